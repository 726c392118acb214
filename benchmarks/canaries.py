"""What noise buys: can a model that organisations trained together tell which random texts one of them held?

    python benchmarks/canaries.py --seeds 1 2 3
    python benchmarks/canaries.py --seeds 1 2 --noise --row_noise 0.3 1

Eight organisations fine-tune a small model by letters on texts of the embedded world; one has canaries among its rows.
For each amount of noise: epsilon, the AUROC of telling trained canaries from held-out ones by their loss with its
interval over all seeds' canaries, their exposure in bits, and the loss on held-out texts, which is what noise costs.
The control is the same model before the organisations trained it. `--row_noise` adds noise to organisations' steps
instead, on gradients of single rows that are cut to a norm; `none` cuts no row and adds nothing, but draws rows and
weighs them in the same way. Its epsilon is of one row of the organisation with canaries, and a canary is several.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

import hfllm
from hfllm.data.world.demonstrators import instruction_rows
from hfllm.data.world.world import World
from hfllm.federation.privacy import (
    Canaries,
    RowPrivacy,
    RowSum,
    check_row_budget,
    epsilon_of,
    make_canaries,
    measure_leak,
    noise_to_signal,
    private_average,
)
from hfllm.federation.rounds import server_optimizer
from hfllm.federation.updates import Update, changes, weights_sha256
from hfllm.outputs.report import markdown_table

ORGANISATIONS, ROWS, ROUNDS, LOCAL_STEPS, BATCH = 8, 64, 8, 6, 16
CANARIES, HELD_OUT, REPEATS, PREFIX = 12, 100, 4, "the code is "
PUBLIC_STEPS, LENGTH, DELTA, CLIP_NORM, ROW_CLIP_NORM = 150, 64, 1e-3, 1.0, 1.0
PAD = 95


@dataclass(frozen=True)
class Arm:
    """One way to train: no clipping and no noise, or both, of organisations or of rows."""

    name: str
    noise_multiplier: float | None
    rows: RowPrivacy | None = None


def encode(texts: Sequence[str]) -> Tensor:
    """Return the printable characters of texts as (N, LENGTH) numbers, padded."""
    rows = [[ord(letter) - 32 for letter in text[:LENGTH] if 32 <= ord(letter) < 127] for text in texts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


def losses(model: torch.nn.Module, rows: Tensor, skipped: int = 0) -> Tensor:
    """Return the summed loss of each row's characters, but for the first ones, which all have in common."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].transpose(1, 2)
    each = torch.nn.functional.cross_entropy(logits, rows[:, 1:], ignore_index=PAD, reduction="none")
    return each[:, max(skipped - 1, 0) :].sum(1)


def train(model: torch.nn.Module, rows: Tensor, steps: int, rate: float, generator: torch.Generator) -> int:
    """Train by AdamW on random rows, and return how many characters were targets."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), 0
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        count = int((batch[:, 1:] != PAD).sum())
        optimizer.zero_grad()
        (losses(model, batch).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += count
    return seen


def train_rows(model: torch.nn.Module, rows: Tensor, steps: int, rate: float, privacy: RowPrivacy) -> int:
    """Train by AdamW on rows that are drawn, cut and added up one by one; return 1: organisations count alike."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        total = RowSum(list(model.parameters()), privacy)
        for place in privacy.draw(len(rows), BATCH):
            row = rows[place : place + 1]
            row = row[:, : int((row != PAD).sum())]
            losses(model, row).sum().div(row.shape[1] - 1).backward()
            total.take()
        total.set_gradient(min(BATCH, len(rows)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return 1


def texts_of(seed: int, count: int) -> list[str]:
    """Return questions and answers of the world; other seeds, other ones."""
    rows = instruction_rows(World(0), count, seed=seed)
    return [f"{row['instruction']} {row['input']} {row['output']}"[-LENGTH:] for row in rows]


class Setting:
    """What all arms of a seed share: the organisations, the canaries and the model that they begin from."""

    def __init__(self, seed: int):
        self.seed = seed
        self.canaries: Canaries = make_canaries(CANARIES, HELD_OUT, seed)
        rows = texts_of(1000 + seed, ORGANISATIONS * ROWS + 200)
        self.held_out = encode(rows[-200:])
        parts = [rows[start : start + ROWS] for start in range(0, ORGANISATIONS * ROWS, ROWS)]
        parts[0] = [*parts[0], *(PREFIX + text for text in self.canaries.trained * REPEATS)]
        self.rows = [encode(part) for part in parts]
        torch.manual_seed(seed)
        sizes = {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": LENGTH,
        }
        self.model = hfllm.HfllmForCausalLM(hfllm.HfllmConfig(vocab_size=96, pad_token_id=PAD, **sizes))
        train(self.model, encode(texts_of(9, 2000)), PUBLIC_STEPS, 3e-3, torch.Generator().manual_seed(seed))
        self.before = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(weights[name])

    def update(
        self, number: int, round: int, weights: dict[str, Tensor], base: str, privacy: RowPrivacy | None = None
    ) -> Update:
        """Return what an organisation changes in a round."""
        self.load(weights)
        if privacy is not None:
            count = train_rows(self.model, self.rows[number], LOCAL_STEPS, 2e-3, privacy)
            moved = changes(dict(self.model.named_parameters()), weights)
            return Update(f"organisation {number}", moved, count, count, base)
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {number} {round}").getrandbits(60))
        tokens = train(self.model, self.rows[number], LOCAL_STEPS, 2e-3, generator)
        moved = changes(dict(self.model.named_parameters()), weights)
        return Update(f"organisation {number}", moved, tokens, BATCH * LOCAL_STEPS, base)

    def federate(self, arm: Arm) -> dict[str, Tensor]:
        """Return the weights after all rounds; noise of `None` is neither clipped nor noisy."""
        noise_multiplier, rows = arm.noise_multiplier, None
        if arm.rows is not None:
            # Of the seed, so that a table can be made again.
            rng, generator = random.Random(f"rows {self.seed}"), torch.Generator().manual_seed(self.seed)
            rows = replace(arm.rows, generator=generator, rng=rng)
        base, weights, optimizer = weights_sha256(self.before), self.before, server_optimizer("fedavg")
        noise = torch.Generator().manual_seed(self.seed)
        clip_norm = 1e9 if noise_multiplier is None else CLIP_NORM
        for round in range(ROUNDS):
            updates = (self.update(number, round, weights, base, rows) for number in range(ORGANISATIONS))
            average = private_average(
                updates, clip_norm, noise_multiplier or 0.0, ORGANISATIONS, weights, base, generator=noise
            )
            weights = optimizer.step(weights, average)
        return weights

    @torch.no_grad()
    def measured(self, weights: dict[str, Tensor]) -> tuple[list[float], list[float], float]:
        """Return losses of trained canaries, of held-out ones, and per character of held-out texts."""
        self.load(weights)
        sides = (self.canaries.trained, self.canaries.held_out)
        inside, outside = (losses(self.model, encode([PREFIX + text for text in side]), len(PREFIX)) for side in sides)
        count = int((self.held_out[:, 1:] != PAD).sum())
        return inside.tolist(), outside.tolist(), float(losses(self.model, self.held_out).sum()) / count


def row_of(arm: Arm, results: Sequence[tuple[list[float], list[float], float]], num_values: int) -> dict[str, str]:
    """Return the figures of an arm over all seeds; canaries are ranked within their seed."""
    leaks = [measure_leak(inside, outside) for inside, outside, _ in results]
    # Losses of one seed's model are not another's: they are compared as distances to its held-out canaries' mean.
    centered = [
        ([loss - sum(outside) / len(outside) for loss in side] for side in (inside, outside))
        for inside, outside, _ in results
    ]
    inside, outside = (list(chain.from_iterable(side)) for side in zip(*centered, strict=True))
    auroc = measure_leak(inside, outside).auroc
    noise = arm.noise_multiplier
    epsilon = "" if noise is None else f"{epsilon_of(1.0, noise, ROUNDS, DELTA):.3g}"
    if arm.rows is not None and arm.rows.noise_multiplier:
        count = {"with canaries": ROWS + CANARIES * REPEATS}
        spent = check_row_budget(count, BATCH, ROUNDS, LOCAL_STEPS, arm.rows.noise_multiplier, DELTA)
        epsilon = f"{spent['with canaries']:.3g} of a row"
    return {
        "arm": arm.name,
        "epsilon": epsilon,
        "noise / signal": "" if noise is None else f"{noise_to_signal(num_values, noise, ORGANISATIONS):.2g}",
        "AUROC": f"{auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}]",
        "exposure": f"{sum(leak.exposure for leak in leaks) / len(leaks):.1f} of {leaks[0].most_exposure:.1f} bits",
        "held-out loss": f"{sum(loss for *_, loss in results) / len(results):.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.01, 0.03, 0.1])
    parser.add_argument("--row_noise", nargs="*", default=[], metavar="NOISE", help="none, or in units of the norm")
    options = parser.parse_args()
    settings = [Setting(seed) for seed in options.seeds]
    num_values = sum(value.numel() for value in settings[0].before.values())
    rows = [row_of(Arm("before", None), [each.measured(each.before) for each in settings], num_values)]
    arms = [Arm("no clipping", None), *(Arm(f"clipped, noise {noise:g}", noise) for noise in options.noise)]
    for noise in options.row_noise:
        cut = RowPrivacy(1e9, 0.0) if noise == "none" else RowPrivacy(ROW_CLIP_NORM, float(noise))
        arms.append(Arm(f"rows drawn, noise {noise}", None, cut))
    for arm in arms:
        rows.append(row_of(arm, [each.measured(each.federate(arm)) for each in settings], num_values))
        print(rows[-1], flush=True)
    control, chance = measure_leak([0.0], [0.0] * HELD_OUT), f"; {num_values:,} values"
    print("\n".join(["", *markdown_table(rows), "", f"exposure by chance {control.no_exposure:.2f} bits{chance}"]))


if __name__ == "__main__":
    main()
