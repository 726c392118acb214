"""What `context.py` compares: models of each kind of layers with the same weights, and what one step of them takes."""

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCABULARY = 512
SHARE = 8  # sparse attention looks at one block of so many
TYPES = {"f": "full_attention", "s": "sliding_attention", "l": "linear_attention"}
# Of four layers; `native` are the weights of `lllf` in transformers' own OLMo Hybrid, without fla's kernels.
KINDS = {
    **{"full": "ffff", "masked": "ssss", "banded": "ssss", "sssf": "sssf", "sparse": "ffff", "lllf": "lllf"},
    "native": "lllf",
}
# So that a model of linear and full layers is an OLMo Hybrid.
FORM = {
    **{"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads", "position_embedding_type": "none"},
    "tie_word_embeddings": False,
}


def build(kind: str, length: int, window: int, hidden: int, layers: str | None = None) -> "PreTrainedModel":
    """Return a model with the attention of a kind, for texts of a length; its layers may be others, by letters."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    import hfllm
    from hfllm.models.loading.saved import saved_model

    # Our own SDPA is banded where it has a window.
    AttentionInterface.register("masked", sdpa_attention_forward)
    AttentionMaskInterface.register("masked", sdpa_mask)
    layers = layers or KINDS[kind]
    block = max(16, min(256, length // 32))
    torch.manual_seed(0)
    config = hfllm.HfllmConfig(
        **FORM,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        max_position_embeddings=2 * length,
        layer_types=[TYPES[letter] for letter in layers],
        loss_chunk_size=1024,
        sliding_window=window if "s" in layers else None,
        sparse_block_size=block,
        sparse_num_blocks=max(1, length // (SHARE * block)),
        attn_implementation=kind if kind in ("masked", "sparse") else "sdpa",
    )
    model = hfllm.HfllmForCausalLM(config)
    if kind != "native":
        return model
    with tempfile.TemporaryDirectory() as folder:
        hfllm.to_native(model, folder)
        return saved_model(AutoModelForCausalLM, folder, dtype=torch.float32, attn_implementation="sdpa").train()


def training_step(model: "PreTrainedModel", ids: "torch.Tensor") -> Callable[[], None]:
    """Return a forward and a backward pass."""

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def decoding(model: "PreTrainedModel", ids: "torch.Tensor", tokens: int) -> tuple[Callable[[], None], int]:
    """Return a run that adds tokens one by one to the cache of a text, and the bytes of that cache."""
    import torch

    from hfllm.generation.caches import cache_bytes

    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).cache

    @torch.no_grad()
    def run() -> None:
        for index in range(tokens):
            model(input_ids=ids[:, index : index + 1], cache=cache, use_cache=True)

    # After the first new tokens a window holds no memory of the text before it.
    run()
    return run, cache_bytes(cache)


def rules(length: int, key_size: int, value_size: int) -> dict[str, Callable[[], None]]:
    """Return forward and backward passes of the gated delta rule alone, with four heads: ours and transformers'."""
    import torch
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import torch_chunk_gated_delta_rule

    from hfllm.models.family.delta_rule_hfllm import gated_delta_rule

    torch.manual_seed(0)
    query, key = torch.randn(2, 1, length, 4, key_size)
    value, outer = torch.randn(2, 1, length, 4, value_size)
    g, beta = -torch.rand(1, length, 4), torch.rand(1, length, 4)
    inputs = [each.requires_grad_() for each in (query, key, value, g, beta)]

    def run(rule: Callable[..., tuple["torch.Tensor", object]]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(rule(*inputs, use_qk_l2norm_in_kernel=True)[0], inputs, outer)

    return {"hfllm": run(gated_delta_rule), "transformers": run(torch_chunk_gated_delta_rule)}


def saved_bytes(model: "PreTrainedModel", ids: "torch.Tensor") -> int:
    """Return the bytes of all tensors that the trunk's forward pass keeps for the backward pass, without weights."""
    import torch

    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: "torch.Tensor") -> "torch.Tensor":
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(model.model(ids, use_cache=False))
    return sum(found.values())


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the most bytes that a step has allocated at once, as torch's profiler counts them."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    current = top = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        top = max(top, current)
    return top


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU-seconds of each run in each round; the order changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in list(runs) if index % 2 else list(runs)[::-1]:
            began = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - began)
    return seconds


def median_ratio(peer: Sequence[float], mine: Sequence[float]) -> float:
    """Return how many times as fast a run is as a peer: the median over the rounds."""
    ratios = sorted(theirs / ours for theirs, ours in zip(peer, mine, strict=True))
    return (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
