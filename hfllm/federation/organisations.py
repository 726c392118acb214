"""Organisations of a federation, their own rows, by family, by Dirichlet shares or dealt out, and held-out ones."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise

from hfllm.data.formats import Row
from hfllm.data.loading import prompt_key, split_rows
from hfllm.data.world.demonstrators import demonstrate
from hfllm.data.world.world import FAMILIES, FAMILY_WEIGHTS, World
from hfllm.errors import InputError, refuse_if
from hfllm.flags import POSITIVE, check_number

# Held-out rows of an organisation, at most; without separate held-out rows, this share of its own rows.
MOST_HELD_OUT, HELD_OUT_SHARE = 64, 0.1


@dataclass(frozen=True)
class Organisation:
    """A participant with rows of its own, unseen by the others.

    Args:
        name: its name in reports.
        rows: its training rows.
        held_out: rows of the same kind, for measuring its loss.
    """

    name: str
    rows: Sequence[Row]
    held_out: Sequence[Row]


def check_organisations(organisations: Sequence[Organisation]) -> None:
    """Refuse organisations unable to take part.

    Raises:
        InputError: for fewer than two, two of one name, or one without rows.
    """
    refuse_if(len(organisations) < 2, f"{len(organisations)} organisation(s): a federation needs at least 2")
    names = [each.name for each in organisations]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"organisation {doubled!r} comes twice: each needs a name of its own")
    for each in organisations:
        if not each.rows:
            raise InputError(f"organisation {each.name!r} has no rows to learn from: leave it out, or give it some")


# ---- the embedded world ----


def family_shares(count: int, main_share: float) -> list[dict[str, float]]:
    """Return for every organisation its shares of the families: `main_share` of one, the rest as the world draws them.

    Organisation number i has mostly family number i; with more organisations than families they begin again.
    """
    usual = _normalized(dict(zip(FAMILIES, FAMILY_WEIGHTS, strict=True)))
    return [
        {
            family: main_share * (family == FAMILIES[number % len(FAMILIES)]) + (1 - main_share) * usual[family]
            for family in FAMILIES
        }
        for number in range(count)
    ]


def dirichlet_shares(count: int, alpha: float, seed: int) -> list[dict[str, float]]:
    """Return for every organisation its shares of the families, drawn from Dirichlet(alpha * the world's shares * 6).

    As in Hsu et al. 2019 (arXiv:1909.06335), section 3: alpha near 0 gives every one a single family, a large one
    gives all of them the world's shares.

    Raises:
        InputError: for an alpha not above 0.
    """
    check_number("dirichlet_alpha", alpha, POSITIVE)
    usual = _normalized(dict(zip(FAMILIES, FAMILY_WEIGHTS, strict=True)))
    rng = random.Random(f"dirichlet-{seed}")
    result = []
    for _ in range(count):
        drawn = {family: rng.gammavariate(alpha * len(FAMILIES) * usual[family], 1.0) for family in FAMILIES}
        # With a very small alpha all of them may be 0 in floating point.
        result.append(_normalized(drawn) if sum(drawn.values()) > 0 else {**dict.fromkeys(FAMILIES, 0.0), "fact": 1.0})
    return result


def world_organisations(
    world: World, shares: Sequence[Mapping[str, float]], num_rows: int, num_held_out: int, seed: int
) -> list[Organisation]:
    """Return organisations of the embedded world, with `num_rows` questions per organisation and their good answers.

    Args:
        world: whose facts they know.
        shares: for every organisation its shares of the families.
        num_rows: rows per organisation.
        num_held_out: further rows per organisation, with questions outside of its training.
        seed: of all questions.
    """
    result = []
    for number, share in enumerate(shares, 1):
        rng = random.Random(f"organisation-{world.seed}-{seed}-{number}")
        rows = [_world_row(world, share, rng) for _ in range(num_rows)]
        train_questions, held_out = {row["prompt"][0]["content"] for row in rows}, []
        # Some families have few questions: more draws than this would find no new one.
        for _ in range(20 * num_held_out):
            row = _world_row(world, share, rng)
            if row["prompt"][0]["content"] not in train_questions and len(held_out) < num_held_out:
                held_out.append(row)
        main = max(share, key=share.__getitem__)
        result.append(Organisation(f"{number}-{main}", rows, held_out))
    return result


def _world_row(world: World, share: Mapping[str, float], rng: random.Random) -> Row:
    task = world.draw_task(rng, rng.choices(list(share), list(share.values()))[0])
    answer = demonstrate(task, "good", rng)
    return {
        "prompt": [{"role": "user", "content": task.question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


# ---- rows of the user ----


def split_evenly(rows: Sequence[Row], count: int, alpha: float | None, seed: int) -> list[list[Row]]:
    """Return one dataset's rows dealt out to organisations: in equal parts, or in sizes drawn from Dirichlet(alpha).

    Raises:
        InputError: for an alpha not above 0.
    """
    check_number("dirichlet_alpha", alpha, POSITIVE)
    rng = random.Random(f"dealt-{seed}")
    shuffled = list(rows)
    rng.shuffle(shuffled)
    weights = [1.0 if alpha is None else rng.gammavariate(alpha, 1.0) for _ in range(count)]
    if sum(weights) == 0:
        # A very small alpha, in floating point: one of them has all.
        weights[0] = 1.0
    total, ends, so_far = sum(weights), [0], 0.0
    for weight in weights:
        so_far += weight
        ends.append(round(so_far / total * len(shuffled)))
    return [shuffled[first:last] for first, last in pairwise(ends)]


def hold_out(name: str, rows: Sequence[Row], seed: int, is_private: bool) -> Organisation:
    """Return an organisation with a held-out part of its rows, unless it has too few of them.

    Args:
        seed: of the choice.
        is_private: whether single rows are protected: then only a row's own prompt decides on its side, since with a
            shuffle of all rows one row would move the others.
    """
    if len(set(map(prompt_key, rows))) < 2:
        return Organisation(name, list(rows), [])
    if not is_private:
        return Organisation(name, *split_rows(list(rows), seed, HELD_OUT_SHARE, MOST_HELD_OUT))
    shares = [_share_of(f"{seed} {prompt_key(row)}") for row in rows]
    train = [row for row, share in zip(rows, shares, strict=True) if share >= HELD_OUT_SHARE]
    held_out = [row for row, share in zip(rows, shares, strict=True) if share < HELD_OUT_SHARE]
    return Organisation(name, train, held_out[:MOST_HELD_OUT])


def _share_of(text: str) -> float:
    """Return a number from 0 to 1 from a text's hash."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def without_shared_prompts(organisations: Sequence[Organisation]) -> list[Organisation]:
    """Return organisations, held-out rows without prompts of anyone's training rows: the model learns from all."""
    prompts = {prompt_key(row) for each in organisations for row in each.rows}
    return [
        replace(each, held_out=[row for row in each.held_out if prompt_key(row) not in prompts])
        for each in organisations
    ]


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
