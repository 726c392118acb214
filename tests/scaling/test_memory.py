"""What the planner says a layer keeps, against the tensors that autograd saves; phases and layouts by hand."""

import contextlib
from dataclasses import replace

import pytest
import torch

import hfllm
from hfllm.errors import InputError
from hfllm.models.family import attention_hfllm, layers_hfllm
from hfllm.models.family.attention_masks_hfllm import banded_mask
from hfllm.models.family.delta_rule_hfllm import chunk_length, piece_length
from hfllm.scaling.devices import MIB, find_device
from hfllm.scaling.layouts import Layout
from hfllm.scaling.memory import (
    PRECISIONS,
    autocast_weights,
    device_memory,
    korthikanti_activations,
    layer_activations,
    layer_workspace,
    loss_bytes,
    zero_state_bytes,
)
from hfllm.scaling.shapes import NAMED_SHAPES, Shape, banded_keys, chunk_and_piece
from hfllm.scaling.speed import flops_per_token

BATCH, LENGTH = 2, 64
SIZES = {"vocab_size": 500, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "gpt": {
        **{"norm_type": "layernorm", "mlp_type": "plain", "hidden_act": "gelu_new", "mlp_bias": True},
        **{"position_embedding_type": "learned", "attention_bias": True},
    },
    "palm": {"parallel_block": True, "num_key_value_heads": 1, "norm_type": "layernorm", "norm_bias": False},
    "two norms": {"parallel_block": True, "shared_norm": False},
    "post": {"norm_placement": "post"},
    "qk_norm": {"qk_norm": True, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 64, "num_key_value_heads": 2, "intermediate_size": 208},
    # Keys and values of one size: a CPU's kernel needs copies of others.
    "latent": {"kv_lora_rank": 64, "q_lora_rank": 48, "v_head_dim": 48},
    "latent, one size": {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 32},
    "mixture": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 208},
    "shared experts": {"num_local_experts": 8, "moe_intermediate_size": 64, "n_shared_experts": 2},
}


def saved_bytes(layers, precision, attention="sdpa", checkpointing=False, head=False, length=LENGTH, **fields):
    """Bytes of all tensors that a forward pass of a model with so many layers saves, weights left out."""
    torch.manual_seed(0)
    config = hfllm.HfllmConfig(**{**SIZES, "num_hidden_layers": layers, **fields}, attn_implementation=attention)
    model = hfllm.HfllmForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, 500, (BATCH, length))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if "autocast" in precision else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        outputs = (model if head else model.model)(ids, use_cache=False)
        alive.append(outputs)
    return sum(found.values()), Shape.from_config(config.to_dict())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Layers within autocast as on a GPU, for which memory is planned; on a CPU they save less."""
    monkeypatch.setattr(layers_hfllm, "cast_for_autocast", lambda states, *weights: list(weights))
    monkeypatch.setattr(
        attention_hfllm, "attend_in_fp32", lambda attend, module, *given, **named: attend(module, *given, **named)
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_layer_keeps_what_autograd_saves(name, precision, as_on_a_gpu):
    """The difference of three layers and two; 2%, for indices, masks and statistics that are not counted."""
    (three, shape), (two, _) = (saved_bytes(layers, precision, **ARCHITECTURES[name]) for layers in (3, 2))
    kept = BATCH * LENGTH * layer_activations(shape, Layout(), PRECISIONS[precision], LENGTH)
    if precision == "bf16_autocast":
        kept += autocast_weights(shape)
    assert kept == pytest.approx(three - two, rel=0.02)


LINEAR = {
    "square": {"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads"},
    "grouped": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_key_value_heads": 2},
    "wide": {"hidden_size": 192, "linear_num_key_heads": 2, "linear_key_head_dim": 80, "linear_value_head_dim": 40},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_of_linear_attention_keeps_what_autograd_saves(name, precision):
    """The difference of two such layers and one, beside one of full attention; 2%, and so long that it has pieces."""
    kinds, length = ["linear_attention", "linear_attention", "full_attention"], 1200
    (three, shape), (two, other) = (
        saved_bytes(layers, precision, layer_types=kinds[-layers:], length=length, **LINEAR[name]) for layers in (3, 2)
    )
    kept = [
        each.num_hidden_layers
        * (
            BATCH * length * layer_activations(each, Layout(micro_batch=BATCH), PRECISIONS[precision], length)
            + ("autocast" in precision) * autocast_weights(each)
        )
        for each in (shape, other)
    ]
    assert kept[0] - kept[1] == pytest.approx(three - two, rel=0.02)


def test_blocks_and_pieces_are_those_of_the_models():
    for window, length in ((1, 300), (100, 300), (100, 700), (256, 4096), (255, 1000)):
        mask = banded_mask(1, length, length, local_size=window)
        scored = length if mask is None or mask.dim() < 4 or mask.shape[1] == 1 else mask.shape[-1]
        assert banded_keys(window, length) == scored
    for size, rows, length in ((24, 4, 5000), (64, 4, 20), (96, 12, 5000), (128, 64, 5000), (8, 3, 5000)):
        chunk = chunk_length(None, torch.empty(1, length, 1, size))
        assert chunk_and_piece(size, rows, length) == (chunk, piece_length(chunk, rows))


def test_windows_are_scored_in_blocks():
    shape = Shape(64, 3, 4, 100, sliding_window=100, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    for length, attention, keys in ((1000, "flash", 2 * 192 + 1000), (1000, "eager", 3000), (300, "flash", 900)):
        assert flops_per_token(shape, length, attention=attention)["attention"] == 6 * keys * 2 * 64


@pytest.mark.parametrize("kinds", [["linear_attention", "linear_attention", "linear_attention", "full_attention"]])
def test_states_of_a_model_with_linear_attention(kinds):
    config = hfllm.HfllmConfig(**SIZES, num_hidden_layers=4, layer_types=kinds)
    shape, number = Shape.from_config(config.to_dict()), hfllm.HfllmForCausalLM(config).num_parameters()
    memory = device_memory(shape, Layout(), PRECISIONS["fp32"], LENGTH)
    assert memory.weights == memory.gradients == memory.optimizer / 2 == 4 * number
    with pytest.raises(InputError, match="--tensor_parallel 2 splits no layers of linear_attention"):
        Layout(tensor=2).check(shape, 2, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_attention_keeps_its_scores(precision):
    fields = ARCHITECTURES["llama"]
    (three, shape), (two, _) = (saved_bytes(layers, precision, "eager", **fields) for layers in (3, 2))
    kept = BATCH * LENGTH * layer_activations(shape, Layout(), PRECISIONS[precision], LENGTH, "eager")
    assert kept == pytest.approx(three - two, rel=0.02)


def test_checkpointing_keeps_a_layers_input():
    (three, shape), (two, _) = (saved_bytes(layers, "fp32", checkpointing=True) for layers in (3, 2))
    kept = layer_activations(shape, Layout(recompute="full"), PRECISIONS["fp32"], LENGTH)
    assert BATCH * LENGTH * kept == three - two == BATCH * LENGTH * 4 * shape.hidden_size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_the_head_is_read_in_the_precision_of_products(precision, tied):
    """What a larger vocabulary adds: under autocast a 16-bit copy of one table, since embeddings are looked up."""
    sizes = {"head": True, "tie_word_embeddings": tied}
    (large, big), (small, little) = (saved_bytes(2, precision, **sizes, vocab_size=size) for size in (1500, 500))
    layout = Layout(micro_batch=BATCH)
    kept = [device_memory(shape, layout, PRECISIONS[precision], LENGTH).activations for shape in (big, little)]
    assert kept[0] - kept[1] == large - small == 2 * 1000 * SIZES["hidden_size"] * ("autocast" in precision)


def peak_of_training(config, checkpointing, steps=2):
    """Bytes of all allocations at the peak of a step of fp32 AdamW, as torch's profiler counts them."""
    from torch.profiler import ProfilerActivity, profile

    model = hfllm.HfllmForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        top = max(top, current)
    return 12 * model.num_parameters() + top


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("layers", [2, 8])
def test_peak_of_a_step(layers, chunk, checkpointing):
    """Against the allocator; 3%. benchmarks/planner.py does the same with models of 5 to 60 million parameters."""
    sizes = {**SIZES, "vocab_size": 2000, "num_hidden_layers": layers, "loss_chunk_size": chunk}
    config = hfllm.HfllmConfig(**sizes)
    layout = Layout(micro_batch=BATCH, recompute="full" if checkpointing else "none")
    planned = device_memory(Shape.from_config(config.to_dict()), layout, PRECISIONS["fp32"], LENGTH)
    assert planned.peak == pytest.approx(peak_of_training(config, checkpointing), rel=0.03)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_bucket_that_fills_as_activations_go_saves_at_most_itself(zero_stage):
    """DeepSpeed's bucket of gradients, whose memory a CPU gives when it is written to."""
    small = Shape(256, 8, 4, 1000, tie_word_embeddings=True)
    layout = Layout(data=2, zero_stage=zero_stage, micro_batch=BATCH)
    long, short = (
        [device_memory(small, layout, PRECISIONS["fp32"], tokens, reserved=way).peak for way in (True, False)]
        for tokens in (4096, 1)
    )
    bucket = 4 * small.num_parameters() if zero_stage in (1, 2) else 0
    # With many activations the bucket is empty at the peak; with few the peak is when it is full.
    assert long[0] - long[1] == pytest.approx(bucket)
    assert short[0] == short[1]


GPT3 = Shape.from_config(NAMED_SHAPES["gpt3-1t"])
BF16 = PRECISIONS["bf16"]


def test_states_are_sharded_over_replicas():
    whole = device_memory(GPT3, Layout(data=64), BF16, 2048)
    for stage in (1, 2, 3):
        part = device_memory(GPT3, Layout(data=64, zero_stage=stage), BF16, 2048)
        expected = zero_state_bytes(GPT3.num_parameters(), 64, stage)
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(part, name) == pytest.approx(expected[name])
        assert part.activations >= whole.activations


def test_tensor_and_pipeline_parallelism_split_the_weights():
    """All stages together have the model's parameters; the norms and positions are whole on each device."""
    layout = Layout(data=2, tensor=8, pipeline=64, zero_stage=1)
    memory = device_memory(GPT3, layout, BF16, 2048, micro_batches=512)
    layer = GPT3.layer_parameters()
    shard = 2 * ((layer["attention"] + layer["mlp"]) / 8 + layer["norms"])
    tables = 51200 * 25600 / 8 + 2048 * 25600
    assert memory.weights == pytest.approx(2 * (shard + tables))
    assert memory.optimizer == pytest.approx(12 * (shard + tables) / 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_each_end_of_a_pipeline_has_a_table(pipeline, tied):
    """Also of a tied one: its stages cannot share a tensor. With one micro-batch the last stage is the fullest."""
    shape = Shape(128, 4, 8, 50_000, tie_word_embeddings=tied)
    memory = device_memory(shape, Layout(tensor=2, pipeline=pipeline, data=2), BF16, 512)
    layer, tables = shape.layer_parameters(), 1 if tied or pipeline > 1 else 2
    parts = 4 // pipeline * ((layer["attention"] + layer["mlp"]) / 2 + layer["norms"])
    parts += tables * 50_000 * 128 / 2 + 128  # and the norm before the head
    # Half of the logits, and the whole rows that they are made of.
    assert memory.logits == 14 * 50_000 * 512 / 2 + 2 * 128 * 512
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * parts, 2 * parts, 12 * parts)
    # As Megatron-LM's README says: 18 bytes per parameter, or 6 + 12/d with its distributed optimizer.
    for zero_stage, size in ((0, 18), (1, 6 + 12 / 2)):
        layout = Layout(tensor=2, pipeline=pipeline, data=2, zero_stage=zero_stage)
        own = device_memory(shape, layout, PRECISIONS["bf16_megatron"], 512)
        assert own.weights + own.gradients + own.optimizer == pytest.approx(size * parts)


def test_the_first_stage_holds_the_micro_batches_under_way():
    layout = Layout(tensor=8, pipeline=64)
    few, many = (device_memory(GPT3, layout, BF16, 2048, passes) for passes in (1, 512))
    kept = 2048 * 2 * layer_activations(GPT3, layout, BF16, 2048)
    # And what it has sent on.
    sent = 2048 * 2 * GPT3.hidden_size / 8
    assert many.activations - few.activations == pytest.approx(63 * (kept + sent))
    # 1 + (p-1)/(pv) times as much when interleaved (arXiv:2205.05198, section 4.2.3).
    wide = Layout(tensor=8, pipeline=32, interleave=2)
    one, two = (device_memory(GPT3, replace(wide, interleave=v), BF16, 2048, 512) for v in (1, 2))
    kept = 2048 * 4 * layer_activations(GPT3, wide, BF16, 2048) + 2048 * 2 * GPT3.hidden_size / 8
    assert two.activations - one.activations == pytest.approx(32 * kept * 31 / 64)


def test_experts_are_spread():
    shape = Shape(1024, 4, 8, 1000, num_local_experts=8, intermediate_size=2048)
    spread, whole = (device_memory(shape, Layout(data=8, expert=size), BF16, 512) for size in (8, 1))
    experts = shape.parameters()["experts"]
    assert whole.weights - spread.weights == pytest.approx(2 * experts * 7 / 8)
    # Optimizer states of experts have only the other replicas of the same experts to be sharded over.
    sharded = device_memory(shape, Layout(data=8, expert=4, zero_stage=1), BF16, 512)
    dense = shape.num_parameters() - experts
    assert sharded.optimizer == pytest.approx(12 * (dense / 8 + experts / 4 / 2))


def test_a_single_key_value_head_is_not_split():
    palm = Shape(1024, 4, 8, 1000, num_key_value_heads=1)
    layer = palm.layer_parameters()
    memory = device_memory(palm, Layout(tensor=4), BF16, 512)
    parts = 4 * (layer["attention"] + layer["mlp"] / 4 + layer["norms"]) + 1024 + 1000 * 1024 * 1.25
    assert memory.weights == pytest.approx(2 * parts)


def test_our_block_keeps_less_than_gpt3s():
    ours = 2048 * layer_activations(GPT3, Layout(), BF16, 2048, "flash")
    assert ours < korthikanti_activations(2048, 1, GPT3.hidden_size, GPT3.num_attention_heads, recompute="selective")


def test_chunked_loss_needs_a_chunk_and_the_heads_gradient():
    chunked = Shape(64, 2, 2, 10_000, loss_chunk_size=100)
    assert loss_bytes(chunked, Layout(), PRECISIONS["fp32"], 5000) == (
        12 * 10_000 * 100 + 4 * 10_000 * 64 + 4 * 64 * 5000
    )
    whole = replace(chunked, loss_chunk_size=None)
    assert loss_bytes(whole, Layout(), PRECISIONS["fp32"], 5000) == 12 * 10_000 * 5000
    assert loss_bytes(whole, Layout(), BF16, 5000) == 14 * 10_000 * 5000


def test_uneven_stages_and_their_tables():
    """BLOOM's first stage has five layers and the embeddings, the second six layers, the last five and the head."""
    fields = {"mlp_type": "plain", "position_embedding_type": "none", "tie_word_embeddings": True}
    bloom = Shape(14336, 70, 112, 250880, **fields)
    layout = Layout(8, 4, 12, zero_stage=1, recompute="full", micro_batch=2)
    memory = device_memory(bloom, layout, BF16, 2048, 128)
    layer, table = bloom.layer_parameters(), 250880 * 14336 / 4
    each = (layer["attention"] + layer["mlp"]) / 4 + layer["norms"]
    assert memory.weights == pytest.approx(2 * max(5 * each + table, 6 * each), rel=1e-3)
    # A device holds 11 micro-batches of six layers or 12 of five, whose inputs are split by sequence parallelism.
    with_all = device_memory(replace(bloom, vocab_size=1000), layout, BF16, 2048, 128)
    assert with_all.weights == pytest.approx(2 * 6 * each, rel=1e-3)
    whole = device_memory(bloom, replace(layout, whole_rows=True), BF16, 2048, 128)
    assert whole.activations > 3 * memory.activations


def test_context_parallelism_splits_activations_and_shards_states():
    long = Shape(1024, 4, 8, 1000)
    whole, split = (device_memory(long, Layout(8 // c, context=c, zero_stage=1), BF16, 65536) for c in (1, 8))
    own = device_memory(long, Layout(8, zero_stage=1, tensor=2), BF16, 65536 // 8)
    assert split.optimizer == pytest.approx(whole.optimizer)
    # Eight shares of what is kept, and one layer's at work.
    # Tensor parallelism also reads whole rows.
    assert split.activations < whole.activations / 6.5 and 2 * (own.logits - 2 * 1024 * 8192) == split.logits


def test_fp8_keeps_copies_of_the_weights():
    layout = Layout(tensor=2, pipeline=4)
    plain, half = (device_memory(GPT3, layout, PRECISIONS[f"{name}_megatron"], 2048) for name in ("bf16", "fp8"))
    assert half.weights == 2 * plain.weights and half.gradients == plain.gradients


def test_a_gpu_takes_more_than_its_tensors():
    """The context, NCCL's buffers for each group, and 15% of what is reserved; a CPU takes 16 MiB more."""
    layout = Layout(data=8, zero_stage=2)
    roomy = replace(find_device("h100"), memory=1e15)
    tensors, gpu, cpu = (
        device_memory(GPT3, layout, BF16, 2048, device=one) for one in (None, roomy, find_device("cpu"))
    )
    assert gpu.peak == pytest.approx(tensors.peak / 0.85 + (1573 + 688) * MIB)
    assert gpu.fragments == pytest.approx(0.15 * tensors.peak / 0.85) and tensors.fragments == cpu.fragments == 0
    assert gpu.buffers == tensors.buffers + (1573 + 688) * MIB and cpu.peak == tensors.peak + 16 * MIB
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert getattr(gpu, part) == getattr(tensors, part)


def test_fragments_are_what_a_full_device_has_room_for():
    """The allocator gives free blocks back before it fails, as far as the smallest share that was published."""
    layout, beside = Layout(data=8, zero_stage=2), (1573 + 688) * MIB
    tensors = device_memory(GPT3, layout, BF16, 2048).peak
    for reserved, share in ((1.25, 0.15), (1.1, 1 - 1 / 1.1), (1.01, 0.04)):
        device = replace(find_device("h100"), memory=tensors * reserved + beside, usable=1.0)
        memory = device_memory(GPT3, layout, BF16, 2048, device=device)
        assert memory.fragments == pytest.approx(share / (1 - share) * tensors, rel=1e-6)
        assert (memory.peak > device.memory * (1 + 1e-9)) == (reserved == 1.01)


def test_a_fused_loss_has_logits_and_their_gradient_in_16_bits():
    for layout, split in ((Layout(), 1), (Layout(2, tensor=4, zero_stage=1), 4)):
        usual, fused = (
            device_memory(GPT3, replace(layout, fused_loss=is_fused), BF16, 2048).logits for is_fused in (False, True)
        )
        rows = 2 * GPT3.hidden_size if split > 1 else 0
        assert fused == 2048 * (2 * 2 * GPT3.vocab_size / split + rows)
        assert usual - fused == 2048 * 10 * GPT3.vocab_size / split


def test_fsdp_gathers_layers_and_tables_and_keeps_no_bucket():
    """And shards over devices that share rows too."""
    deepspeed, fsdp = (Layout(8, zero_stage=3, fsdp=flag) for flag in (False, True))
    assert (deepspeed.engine, fsdp.engine, Layout(4, context=2, zero_stage=3, fsdp=True).engine) == (
        "deepspeed",
        "fsdp2",
        "fsdp2",
    )
    one, two = (device_memory(GPT3, layout, BF16, 2048) for layout in (deepspeed, fsdp))
    assert (one.weights, one.gradients, one.optimizer, one.activations) == (
        two.weights,
        two.gradients,
        two.optimizer,
        two.activations,
    )
    layer = sum(GPT3.layer_parameters().values())
    tables = GPT3.vocab_size * GPT3.hidden_size * (1 if GPT3.tie_word_embeddings else 2)
    assert two.buffers == 12 * layer + 4 * tables


def test_products_in_fp8_keep_their_inputs_in_8_bits():
    """A byte less for each number that a product reads; attention keeps its own output besides."""
    layout = Layout(2, tensor=1, pipeline=2, zero_stage=1)
    usual, eight = (
        layer_activations(GPT3, layout, PRECISIONS[name], 2048) for name in ("bf16_megatron", "fp8_megatron")
    )
    hidden = GPT3.hidden_size
    assert usual - eight == 2 * hidden + GPT3.intermediate_size - GPT3.output_size


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (Layout(), 0),
        (Layout(8), 1),
        (Layout(8, zero_stage=3), 1),
        # All devices and those of a matrix; those of a shard too.
        (Layout(tensor=8), 2),
        (Layout(4, tensor=2, zero_stage=3), 3),
        # All, replicas, matrix, pipeline, the tables at its ends, and the replica.
        (Layout(8, 4, 12, zero_stage=1), 6),
        (Layout(1, 8, 8, context=8, zero_stage=1), 7),
        (Layout(64, pipeline=2, expert=8, zero_stage=1), 6),
    ],
)
def test_groups_that_communicate(layout, groups):
    assert layout.groups == groups


def test_megatron_deepspeed_reduces_half_a_billion_gradients_at_once():
    layout, names = Layout(8, 4, 12, zero_stage=1), ("bf16_megatron", "bf16_megatron_deepspeed")
    shape = replace(GPT3, num_hidden_layers=70, layer_types=None)
    plain, own = (device_memory(shape, layout, PRECISIONS[name], 2048) for name in names)
    assert (plain.buffers, own.buffers) == (0, 4 * 500_000_000)
    # A smaller stage has fewer.
    small = Shape(128, 24, 8, 1000)
    own = device_memory(small, layout, PRECISIONS[names[1]], 512)
    assert 0 < own.buffers < 4 * small.num_parameters()


def test_torchtitan_splits_rows_and_logits_under_fsdp2():
    """And its loss makes four tensors of the size of the logits in fp32, where others make three."""
    shape, layout = Shape(1024, 4, 8, 50_000), Layout(4, tensor=8, zero_stage=3, recompute="full")
    whole, split = (device_memory(shape, replace(layout, split_rows=way), BF16, 2048) for way in (False, True))
    assert (whole.logits, split.logits) == (14 * 50_000 * 2048, (18 * 50_000 / 8 + 2 * 1024) * 2048)
    assert split.activations < whole.activations
    # The gathered layer, the next one with its buffer, a gradient and its buffer.
    layer = sum(shape.layer_parameters().values()) / 8
    assert whole.buffers == split.buffers == layer * (3 * 2 + 2 + 4)


def test_split_rows_are_gathered_for_each_product():
    shape, whole = Shape(1024, 4, 8, 1000), Layout(1, 8, 2, recompute="full", whole_rows=True)
    more = [layer_workspace(shape, one, BF16, 2048) for one in (replace(whole, whole_rows=False), whole)]
    assert more[0] - more[1] == 2 * 2 * 1024


def test_names_are_checked():
    with pytest.raises(InputError, match="attention='linear' is not one of flash, flash1, eager"):
        device_memory(GPT3, Layout(), BF16, 2048, attention="linear")
    with pytest.raises(InputError, match="recompute='some' is not one of none, selective, full"):
        korthikanti_activations(2048, 1, 64, 2, recompute="some")
