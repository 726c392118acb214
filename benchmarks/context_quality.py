"""Quality of layer mixes and of length extensions, at equal CPU-seconds.

OMP_NUM_THREADS=1 python benchmarks/context_quality.py recall --seeds 2 3 4 --output benchmarks/results/recall.md
OMP_NUM_THREADS=1 python benchmarks/context_quality.py extension --output benchmarks/results/extension.md
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FILLER, KEYS, VALUES = (8, 24), (32, 16), (48, 16)  # first token and number of each kind
VOCABULARY = 72 + 17 * 16
NEEDLE = 1  # the key of a single needle
# Layers by letter: f full, s sliding, l linear attention; sparse attention is full attention that chooses blocks.
MIXES = {"full": "ff", "sliding": "ss", "sliding and full": "sf", "linear and full": "lf", "sparse": "ff"}
TYPES = {"f": "full_attention", "s": "sliding_attention", "l": "linear_attention"}


@dataclass(frozen=True)
class Setting:
    """What all arms share."""

    length: int = 1024
    stages: tuple[tuple[int, float], ...] = ((48, 0.4), (256, 0.2), (1024, 0.4))
    tokens: tuple[int, ...] = (2048, 4096, 4096)
    pairs: int = 8
    hidden_size: int = 64
    heads: int = 2
    window: int = 64
    block: int = 16
    learning_rate: float = 3e-3
    no_rope_full: bool = False
    bias: bool = True
    rotary: float = 0.5
    qk_norm: bool = False
    muon: bool = False
    passes: int = 3
    tie: bool = True
    residual: str = "plain"
    multiplier: float = 8.0


def rows(
    length: int, number: int, pairs: int, generator: "torch.Generator", passes: int = 1
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return tokens (number, length) and the answers, as labels (number, length), -100 elsewhere.

    A row is filler with pairs of a key and a value at random places, among them a needle, whose key is always the
    same token. It ends with all keys in another order, each followed by its value.
    """
    import torch

    if passes == 0:
        ids = FILLER[0] + torch.randint(0, FILLER[1], (number, length), generator=generator)
        at = torch.rand(number, length - pairs - 1, generator=generator).argsort(-1)[:, : pairs + 1]
        keys = 1 + torch.rand(number, KEYS[1], generator=generator).argsort(-1)[:, : pairs + 1]
        keys[:, 0] = 0
        values = torch.randint(0, VALUES[1], (number, pairs + 1), generator=generator)
        ids.scatter_(1, at, 72 + keys * VALUES[1] + values)
        order = torch.rand(number, pairs + 1, generator=generator).argsort(-1)
        labels = torch.full_like(ids, -100)
        asked = keys.gather(1, order)
        ids[:, -pairs - 1 :] = torch.where(asked == 0, NEEDLE, KEYS[0] + asked - 1)
        labels[:, -pairs - 1 :] = VALUES[0] + values.gather(1, order)
        return ids, labels
    asked = 2 * (pairs + 1)
    ids = FILLER[0] + torch.randint(0, FILLER[1], (number, length), generator=generator)
    room = (length - passes * asked) // 2
    at = 2 * torch.rand(number, room, generator=generator).argsort(-1)[:, : pairs + 1]
    keys = KEYS[0] + torch.rand(number, KEYS[1], generator=generator).argsort(-1)[:, : pairs + 1]
    keys[:, 0] = NEEDLE
    values = VALUES[0] + torch.randint(0, VALUES[1], (number, pairs + 1), generator=generator)
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
    labels = torch.full_like(ids, -100)
    for begin in range(length - passes * asked, length, asked):
        order = torch.rand(number, pairs + 1, generator=generator).argsort(-1)
        ids[:, begin : begin + asked : 2] = keys.gather(1, order)
        ids[:, begin + 1 : begin + asked : 2] = labels[:, begin : begin + asked : 2] = values.gather(1, order)
    return ids, labels


def build(name: str, setting: Setting, seed: int) -> "PreTrainedModel":
    import torch

    import hfllm

    torch.manual_seed(seed)
    layers = MIXES[name]
    config = hfllm.HfllmConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting.hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=setting.heads,
        layer_types=[TYPES[letter] for letter in layers],
        no_rope_layers=[int(letter != "f") for letter in layers]
        if setting.no_rope_full and len(set(layers)) > 1
        else None,
        sliding_window=setting.window if "s" in layers else None,
        max_position_embeddings=setting.length,
        attention_bias=setting.bias,
        residual_init=setting.residual,
        embedding_multiplier=setting.multiplier,
        tie_word_embeddings=setting.tie,
        qk_norm=setting.qk_norm,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": setting.rotary},
        initializer_range=setting.hidden_size**-0.5,
        sparse_block_size=setting.block,
        sparse_num_blocks=setting.length // setting.block // 8,
        attn_implementation="sparse" if name == "sparse" else "sdpa",
    )
    return hfllm.HfllmForCausalLM(config)


def loss_of(model: "PreTrainedModel", ids: "torch.Tensor", labels: "torch.Tensor") -> tuple:
    """Return the loss, and whether each answer is right: of needles, and of the other pairs."""
    import torch

    kept = labels != -100
    logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state[kept])
    right, is_needle = (logits.argmax(-1) == labels[kept]).float(), ids[kept] == NEEDLE
    return torch.nn.functional.cross_entropy(logits, labels[kept]), right[is_needle], right[~is_needle]


def fit(
    name: str, setting: Setting, seed: int, seconds: float, verbose: bool = False
) -> tuple["PreTrainedModel", int]:
    """Return a trained model and its steps, needles and pairs taking turns, lengths growing by the curriculum."""
    import torch

    model, generator = build(name, setting, seed), torch.Generator().manual_seed(seed)
    if setting.muon:
        from hfllm.trainers.pretraining.muon import muon_of

        optimizer = muon_of(model, lr=setting.learning_rate, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps, began, stage = 0, time.process_time(), 0
    ends = [sum(share for _, share in setting.stages[: index + 1]) for index in range(len(setting.stages))]
    while (done := (time.process_time() - began) / seconds) < 1:
        stage = next(index for index, end in enumerate(ends) if done <= end + 1e-9 or index == len(ends) - 1)
        length = setting.stages[stage][0]
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * min(1, (steps + 1) / 30) * max(0.05, 1 - done)
        number = setting.tokens[stage] // length
        loss, *right = loss_of(model, *rows(length, number, setting.pairs, generator, setting.passes))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if verbose and steps % 50 == 0:
            print(
                f"  {done:.2f} {length} {steps}",
                f"{loss.item():.3f}",
                *(f"{each.mean():.2f}" for each in right),
                flush=True,
            )
    return model, steps


def accuracy(
    model: "PreTrainedModel", length: int, pairs: int, number: int, seed: int = 99, passes: int = 1
) -> tuple[float, float]:
    import torch

    model.eval()
    generator, right = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for _ in range(number // 8):
            right.append(loss_of(model, *rows(length, 8, pairs, generator, passes))[1:])
    return tuple(round(torch.cat(each).mean().item(), 3) for each in zip(*right))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    setting = Setting(**{k: json.loads(v) for k, v in (each.split("=") for each in args.set)})
    torch.set_num_threads(1)
    for seed in args.seeds:
        for name in args.mixes:
            model, steps = fit(name, setting, seed, args.seconds, args.verbose)
            t = time.process_time()
            out = {n: accuracy(model, n, setting.pairs, 64, passes=min(setting.passes, 1)) for n in (64, 256, 1024)}
            print(seed, name, steps, out, f"eval {time.process_time() - t:.1f}", flush=True)


if __name__ == "__main__":
    main()
