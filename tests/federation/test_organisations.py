"""Who has which rows: shares of families, sizes, and what is refused."""

from collections import Counter

import pytest

from hfllm.data.world.world import FAMILIES, FAMILY_WEIGHTS, World
from hfllm.errors import InputError
from hfllm.federation.organisations import (
    Organisation,
    check_organisations,
    dirichlet_shares,
    family_shares,
    split_evenly,
    world_organisations,
)


def family_of(world, row):
    """The family whose question a row asks, told by its answer's form alone where that is clear."""
    answer = row["completion"][0]["content"]
    return (
        "addition" if answer.startswith("The sum") else "list" if "item is" in answer or "From end" in answer else ""
    )


def test_an_organisation_has_mostly_its_family():
    shares = family_shares(7, 0.9)
    usual = dict(zip(FAMILIES, FAMILY_WEIGHTS, strict=True))
    for number, share in enumerate(shares):
        main = FAMILIES[number % 6]
        assert sum(share.values()) == pytest.approx(1)
        assert share[main] == pytest.approx(0.9 + 0.1 * usual[main] / 20)
    assert family_shares(2, 0.0)[0] == family_shares(2, 0.0)[1]
    world = World(0)
    organisations = world_organisations(world, shares[3:4], 200, 20, seed=1)
    counts = Counter(family_of(world, row) for row in organisations[0].rows)
    assert organisations[0].name == "1-addition" and 0.85 < counts["addition"] / 200 < 0.97


def test_held_out_questions_are_not_learned_and_seeds_differ():
    world, shares = World(0), family_shares(3, 0.5)
    first = world_organisations(world, shares, 60, 12, seed=1)
    assert first == world_organisations(world, shares, 60, 12, seed=1)
    assert first[0].rows != world_organisations(world, shares, 60, 12, seed=2)[0].rows
    # A further organisation changes no other one's rows.
    assert world_organisations(world, [*shares, shares[0]], 60, 12, seed=1)[:3] == first
    for each in first:
        learned = {row["prompt"][0]["content"] for row in each.rows}
        assert len(each.held_out) == 12
        assert not learned & {row["prompt"][0]["content"] for row in each.held_out}


def test_dirichlet_shares_go_from_one_family_to_all():
    apart, alike = dirichlet_shares(40, 0.02, 3), dirichlet_shares(40, 500.0, 3)
    assert all(sum(share.values()) == pytest.approx(1) for share in (*apart, *alike))
    assert sum(max(share.values()) > 0.9 for share in apart) > 25
    for family, weight in zip(FAMILIES, FAMILY_WEIGHTS, strict=True):
        assert all(share[family] == pytest.approx(weight / 20, abs=0.05) for share in alike)
        # Whatever alpha, the mean over organisations is the world's.
        assert sum(share[family] for share in dirichlet_shares(2000, 0.3, 5)) / 2000 == pytest.approx(
            weight / 20, abs=0.03
        )
    assert dirichlet_shares(3, 0.3, 5) == dirichlet_shares(3, 0.3, 5) != dirichlet_shares(3, 0.3, 6)
    with pytest.raises(InputError, match=r"--dirichlet_alpha 0: expected a number above 0"):
        dirichlet_shares(3, 0, 1)


@pytest.mark.parametrize("alpha", [None, 0.3, 50.0])
def test_one_dataset_is_dealt_out_whole(alpha):
    rows = [{"prompt": str(number)} for number in range(101)]
    parts = split_evenly(rows, 4, alpha, 7)
    assert sorted(int(row["prompt"]) for part in parts for row in part) == list(range(101))
    assert parts == split_evenly(rows, 4, alpha, 7)
    sizes = list(map(len, parts))
    assert max(sizes) - min(sizes) <= (1 if alpha is None else 101)


def test_a_very_small_alpha_gives_all_rows_to_one():
    rows = [{"prompt": str(number)} for number in range(11)]
    assert sorted(map(len, split_evenly(rows, 3, 1e-9, 7))) == [0, 0, 11]


def test_organisations_that_cannot_take_part_are_named():
    one, other = Organisation("a", [{}], []), Organisation("b", [], [])
    with pytest.raises(InputError, match=r"1 organisation.*at least 2"):
        check_organisations([one])
    with pytest.raises(InputError, match="'b' has no rows"):
        check_organisations([one, other])
    with pytest.raises(InputError, match="'a' comes twice"):
        check_organisations([one, one])
