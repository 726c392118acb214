"""Answers with thoughts are judged as what they are, and the report counts what it says it counts."""

import random

import pytest

from hfllm.data.world.reasoning import DIAL, HELD_OUT, HOPS, SIZES, UNSEEN_SIZES, draw_problem, part_of
from hfllm.stages.reason.build import (
    answer,
    held_out_problems,
    is_dial,
    is_hops,
    judged,
    plots,
    ppo_metrics,
    summary_of,
    tables,
    tuned_metrics,
    values_of,
)

COUNTS = {HOPS: 12, DIAL: 8}
# Of all sizes of training, and of each other one.
DIALS, UNSEEN = 40, 6


@pytest.fixture(scope="module")
def problems(world):
    return [*held_out_problems(world, COUNTS), *held_out_problems(world, {DIAL: UNSEEN}, sizes=UNSEEN_SIZES)]


def said_by(world, problems, kind):
    """What a model says that thinks, that answers directly and is right, or that thinks wrongly and is right."""
    texts = {
        "thoughts": lambda problem: problem.response(shows_thought=True),
        "direct": lambda problem: problem.response(shows_thought=False),
        "wrong": lambda problem: "I do not know.",
        "slip": lambda problem: f"<think> {problem.steps[0]}</think> {problem.gold.accepted[0]}",
    }
    return [judged(world, problem, texts[kind](problem), len(texts[kind](problem).split())) for problem in problems]


def test_held_out_problems_are_different_and_none_is_learned_from(world, problems):
    assert problems[:64] == held_out_problems(world, COUNTS) != held_out_problems(world, COUNTS, seed=1)
    assert all(part_of(problem.family, problem.key) == HELD_OUT for problem in problems)
    assert len({problem.key for problem in problems}) == len(problems)
    groups = [problem.group for problem in problems]
    for family, sizes in SIZES.items():
        for size in sizes:
            assert groups.count(f"{family}_{size}") == COUNTS[family]
    assert [groups.count(f"{DIAL}_{size}") for size in UNSEEN_SIZES[DIAL]] == [UNSEEN, UNSEEN]
    assert sum(map(is_dial, problems)) == DIALS
    assert sum(map(is_hops, problems)) == 24
    # Of two hops there are no more.
    sizes = [problem.group for problem in held_out_problems(world, {HOPS: 100})]
    assert sizes.count("hops_2") < 80 and sizes.count("hops_3") == 100 and len(set(sizes)) == 2


def test_an_answer_is_judged_apart_from_its_thought(world, problems):
    for problem in problems:
        right, slip, wrong = (said_by(world, [problem], kind)[0] for kind in ("thoughts", "slip", "wrong"))
        assert (right.is_right, right.thinks, right.is_valid) == (True, True, True)
        assert (slip.is_right, slip.thinks, slip.is_valid) == (True, True, False)
        assert slip.steps[0] and not any(slip.steps[1:]) and len(slip.steps) == len(problem.steps)
        assert (wrong.is_right, wrong.thinks, wrong.is_valid, wrong.steps) == (False, False, False, ())
        unended = judged(world, problem, f"<think> {problem.thought} {problem.gold.accepted[0]}", 1)
        assert not unended.is_right and unended.thinks and not unended.is_valid


def test_values_are_shares_of_what_they_are_about(world, problems):
    thoughts, slip, wrong = (said_by(world, problems[:4], kind) for kind in ("thoughts", "slip", "wrong"))
    values = values_of([*thoughts, *slip, *wrong])
    assert values["thought_tokens"] == values["tokens"][:8] and len(values["tokens"]) == 12
    assert sum(values["right"]) == 8 and len(values["right"]) == 12
    assert sum(values["thinks"]) == 8 and values["valid"] == [1.0] * 4 + [0.0] * 4
    assert values["steps"][:4] == [1.0] * 4 and all(0 < share < 1 for share in values["steps"][4:])
    assert values_of(wrong)["valid"] == values_of(wrong)["steps"] == []


def test_the_report_tells_the_arms_apart(world, problems):
    dials = [problem for problem in problems if is_dial(problem)]
    tuned = {name: said_by(world, problems, kind) for name, kind in (("thoughts", "thoughts"), ("direct", "wrong"))}
    half = [*said_by(world, dials[:20], "thoughts"), *said_by(world, dials[20:], "wrong")]
    sampled = {"mixed": half, "rl": said_by(world, dials, "thoughts"), "shuffled": half}
    metrics = {**tuned_metrics(tuned), **ppo_metrics(sampled)}
    for group, count in (("hops", 24), ("dial", DIALS), ("dial_4", UNSEEN), ("dial_12", UNSEEN)):
        assert (metrics[f"thoughts_{group}_right"], metrics[f"direct_{group}_right"]) == (1, 0)
        assert metrics[f"thoughts_{group}_right_n"] == count and metrics[f"thoughts_{group}_valid"] == 1
        assert f"direct_{group}_valid" not in metrics
    for name in ("right", "thinks"):
        assert (metrics[f"{name}_before"], metrics[f"{name}_after"], metrics[f"{name}_change"]) == (0.5, 1, 0.5)
        assert metrics[f"shuffled_{name}_change"] == 0 and metrics[f"{name}_n"] == DIALS
        # The same questions before and after: the error is that of their differences.
        assert metrics[f"{name}_change_se"] == pytest.approx((0.25 / (DIALS - 1)) ** 0.5)
    assert metrics["tokens_change"] > 0 == metrics["shuffled_tokens_change"]
    assert metrics["rl_valid"] == metrics["mixed_steps"] == 1 and metrics["mixed_valid_n"] == 20
    # Lengths of thoughts are of the answers that have one.
    assert metrics["rl_thought_tokens"] > 10 and metrics["mixed_thought_tokens_n"] == 20
    summary = summary_of(metrics)
    assert "direct answers 0 [0.00, 0.14], with thoughts 1 [0.86, 1.00]" in summary
    assert "PPO on right answers: right 0.50 to 1.00, thinking 0.50 to 1.00" in summary
    found = tables(tuned, sampled)
    rows = {row["question"]: row for row in found["Right answers, greedy"]}
    assert list(rows) == ["2 hops", "3 hops", *(f"{size} turns" for size in (4, 5, 6, 7, 8, 9, 12))]
    assert rows["6 turns"]["n"] == "8" and rows["12 turns"]["n"] == "6"
    rows = {row["figure"]: row for row in found["PPO on dials, sampled answers"]}
    assert rows["answers with a thought"]["before PPO"] == "0.500 ± 0.080 (n 40)"
    history = [{"step": 8, "episode": 128, "reward": 0.5, "response_length": 20.0}, {"step": 8, "train_loss": 1.0}]
    drawn = plots(tuned, {"rl": history, "shuffled": history})
    assert drawn["steps"].lines == {"with thoughts": (list(range(10)), [1.0] * 10), "direct answers": ([], [])}
    assert drawn["ppo_lengths"].lines["PPO on right answers"] == ([128], [20.0])
    assert drawn["ppo_rewards"].lines["PPO, rewards by chance"] == ([128], [0.5])


def test_a_report_without_controls_leaves_them_out(world, problems):
    dials = [problem for problem in problems if is_dial(problem)]
    tuned = {"thoughts": said_by(world, problems, "thoughts")}
    metrics = {**tuned_metrics(tuned), **ppo_metrics({"mixed": said_by(world, dials, "wrong")})}
    assert not any(name.startswith(("direct", "shuffled", "right")) for name in metrics)
    assert "direct" not in summary_of(metrics) and "PPO" not in summary_of(metrics)


def test_a_model_answers_every_problem_greedily_and_by_samples(world, make_model, tokenizer):
    rng = random.Random(0)
    problems = [draw_problem(world.facts, world.relations, rng, family, HELD_OUT) for family in (HOPS, DIAL)]
    model = make_model()
    greedy, sampled = (answer(model, tokenizer, world, problems, 12, do_sample=each, seed=3) for each in (False, True))
    assert [each.problem for each in greedy] == problems == [each.problem for each in sampled]
    assert greedy == answer(model, tokenizer, world, problems, 12)
    for each in (*greedy, *sampled):
        assert each.num_tokens == len(tokenizer(each.response, add_special_tokens=False)["input_ids"])
        assert not each.is_right
