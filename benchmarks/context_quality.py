"""Needles and associative recall by kind of attention, learned at 1,024 tokens in equal CPU-seconds.

    OMP_NUM_THREADS=1 python benchmarks/context_quality.py --output benchmarks/results/context_quality.md
    OMP_NUM_THREADS=1 python benchmarks/context_quality.py --seeds 1 --mixes full --seconds 20 --verbose

A text is filler, in which stand a needle and eight pairs, tokens that hold a key and a value, each four times in a
row, as a sentence has several words on its subject; its end asks for the value of each key. The needle's key is always
the same. Two layers learn it from short texts to long ones, all mixes by the same schedule of CPU-seconds of one
thread: slower ones take fewer steps. A layer with a window of 64 tokens does not reach most of a text, which is the
control that must fail. Sparse attention has blocks of 16 keys and looks at an eighth of them, in short texts at two at
least. Of learning rates 0.0035, 0.005 and 0.01 and scales 16 and 32 of the embeddings, each mix has what did best on
seeds 1, 5 and 7, in part with pairs of single tokens; sparse attention's were chosen with blocks of 32. Shares of
right answers, on texts of other seeds.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.outputs.intervals import share_error

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NUM_KEYS, NUM_VALUES, NUM_FILLER, PAIRS = 16, 16, 24, 8
# Tokens: values to answer with, keys to ask by (the first is the needle's), filler, and pairs of a key and a value.
KEYS, FILLER = NUM_VALUES, NUM_VALUES + NUM_KEYS + 1
HELD = FILLER + NUM_FILLER
VOCABULARY = HELD + (NUM_KEYS + 1) * NUM_VALUES
TYPES = {"f": "full_attention", "s": "sliding_attention", "l": "linear_attention"}
CHECKED = 256  # texts to check by
SPAN = 4  # tokens of a pair
BLOCK = 16  # keys of a block of sparse attention


@dataclass(frozen=True)
class Mix:
    """Two layers by letter: f full, s sliding, l linear attention; sparse attention is full and chooses blocks."""

    layers: str
    learning_rate: float = 0.005
    embedding_multiplier: float = 16.0
    is_sparse: bool = False


MIXES = {
    "full": Mix("ff"),
    "sliding alone": Mix("ss"),
    "sliding, then full": Mix("sf", learning_rate=0.0035),
    "linear, then full": Mix("lf", learning_rate=0.01, embedding_multiplier=32.0),
    "sparse": Mix("ff", is_sparse=True),
}


@dataclass(frozen=True)
class Stage:
    """A part of the training: texts of a length, tokens of a batch, and its share of the time."""

    length: int
    tokens: int
    share: float


STAGES = (Stage(64, 1536, 0.35), Stage(256, 2048, 0.25), Stage(1024, 4096, 0.4))


def rows(length: int, number: int, generator: "torch.Generator") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return texts (number, length), and the values that their last tokens ask for, (number, PAIRS + 1)."""
    import torch

    asked = PAIRS + 1
    ids = FILLER + torch.randint(0, NUM_FILLER, (number, length), generator=generator)
    places = SPAN * torch.rand(number, (length - asked) // SPAN, generator=generator).argsort(-1)[:, :asked]
    keys = 1 + torch.rand(number, NUM_KEYS, generator=generator).argsort(-1)[:, :asked]
    keys[:, 0] = 0
    values = torch.randint(0, NUM_VALUES, (number, asked), generator=generator)
    for word in range(SPAN):
        ids.scatter_(1, places + word, HELD + keys * NUM_VALUES + values)
    order = torch.rand(number, asked, generator=generator).argsort(-1)
    ids[:, -asked:] = KEYS + keys.gather(1, order)
    return ids, values.gather(1, order)


def num_blocks(length: int) -> int:
    """Return the blocks that sparse attention looks at: an eighth, its own and another one at least."""
    return max(2, length // BLOCK // 8)


def build(mix: Mix, seed: int, length: int = STAGES[-1].length) -> "PreTrainedModel":
    """Return a new model of a mix for texts of a length."""
    import torch

    import hfllm

    torch.manual_seed(seed)
    is_mixed = mix.is_sparse or len(set(mix.layers)) > 1
    config = hfllm.HfllmConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=len(mix.layers),
        num_attention_heads=2,
        attention_bias=True,
        layer_types=[TYPES[letter] for letter in mix.layers],
        # Half of a head has no positions, and none of it where the last layer alone sees far.
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        no_rope_layers=[1, 0] if is_mixed else None,
        sliding_window=64 if "s" in mix.layers else None,
        max_position_embeddings=length,
        initializer_range=0.125,
        embedding_multiplier=mix.embedding_multiplier,
        residual_init="gpt2",
        sparse_block_size=BLOCK,
        sparse_num_blocks=num_blocks(length),
        attn_implementation="sparse" if mix.is_sparse else "sdpa",
    )
    return hfllm.HfllmForCausalLM(config)


def answers(model: "PreTrainedModel", ids: "torch.Tensor") -> "torch.Tensor":
    """Return the logits at the last tokens, (B, PAIRS + 1, VOCABULARY)."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=PAIRS + 1).logits


def fit(mix: Mix, seed: int, seconds: float, verbose: bool = False) -> tuple["PreTrainedModel", int]:
    """Return a model trained for so many CPU-seconds, and its steps."""
    import torch

    model, generator = build(mix, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps, began = 0, time.process_time()
    while (done := (time.process_time() - began) / seconds) < 1:
        ends = [sum(stage.share for stage in STAGES[: place + 1]) for place in range(len(STAGES))]
        stage = STAGES[sum(done >= end for end in ends[:-1])]
        for group in optimizer.param_groups:
            group["lr"] = mix.learning_rate * min(1, (steps + 1) / 30) * max(0.05, 1 - done)
        model.config.sparse_num_blocks = num_blocks(stage.length)
        ids, values = rows(stage.length, stage.tokens // stage.length, generator)
        logits = answers(model, ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if verbose and steps % 50 == 0:
            print(f"  {done:.2f} of the time, {stage.length} tokens, step {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval(), steps


def right(model: "PreTrainedModel", length: int, number: int, seed: int) -> tuple[float, float]:
    """Return the share of right answers: of needles, and of the other pairs."""
    import torch

    generator, found = torch.Generator().manual_seed(1000 + seed), []
    with torch.no_grad():
        for _ in range(number // 8):
            ids, values = rows(length, 8, generator)
            is_right = (answers(model, ids).argmax(-1) == values).float()
            found.append((is_right, ids[:, -PAIRS - 1 :] == KEYS))
    is_right, is_needle = (torch.cat(each) for each in zip(*found, strict=True))
    return is_right[is_needle].mean().item(), is_right[~is_needle].mean().item()


def line(name: str, of_seeds: dict[int, tuple[int, float, float]]) -> str:
    """Return the row of a mix: each seed's figures and their means."""
    cells = []
    for place, n in ((1, CHECKED), (2, CHECKED * PAIRS)):
        shares = [each[place] for each in of_seeds.values()]
        cells += [f"{share:.3f} ± {share_error(share, n):.3f}" for share in shares] + [
            f"{statistics.mean(shares):.3f}"
        ]
    return f"| {name} | {' | '.join(cells)} | {' '.join(str(each[0]) for each in of_seeds.values())} |"


def table(found: dict[str, dict[int, tuple[int, float, float]]], seconds: float) -> list[str]:
    """Return the lines of the table."""
    seeds = list(next(iter(found.values())))
    heads = [
        f"{what}, {seed}" for what in ("needle", "recall") for seed in (*(f"seed {each}" for each in seeds), "mean")
    ]
    return [
        f"{STAGES[-1].length} tokens, {seconds:g} CPU-seconds each. n = {CHECKED} needles and {CHECKED * PAIRS} pairs "
        f"for each seed, with binomial errors; guessing is {1 / NUM_VALUES:.3f}.",
        "",
        f"| layers | {' | '.join(heads)} | steps |",
        "| - |" + " - |" * (len(heads) + 1),
        *(line(name, of_seeds) for name, of_seeds in found.items()),
    ]


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[8, 9, 10])
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--seconds", type=float, default=80, help="CPU-seconds of training for each mix and seed.")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[int, tuple[int, float, float]]] = {name: {} for name in args.mixes}
    for seed in args.seeds:
        for name in args.mixes:
            model, steps = fit(MIXES[name], seed, args.seconds, args.verbose)
            found[name][seed] = (steps, *right(model, STAGES[-1].length, CHECKED, seed))
            needle, recall = found[name][seed][1:]
            print(f"seed {seed}, {name}: {steps} steps, needle {needle:.3f}, recall {recall:.3f}", flush=True)
    lines = table(found, args.seconds)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
