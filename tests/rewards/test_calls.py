"""Reward functions by TRL's contract: async, abstaining, with the trainer's state and ways to log."""

import asyncio
import threading
import time

import pytest
from transformers import TrainerState

from hfllm.errors import InputError
from hfllm.rewards.calls import RewardCalls, RewardLog, taken
from hfllm.rewards.functions import checked_by, checked_rewards, exact_match, shuffled

PROMPTS, COMPLETIONS = ["p", "q"], ["a", "bb"]


def results_of(*functions, log=None, timeout=5.0, state=None, **columns):
    given = (log or RewardLog()).arguments(state)
    return RewardCalls(functions, PROMPTS, COMPLETIONS, columns, given, timeout).results()


async def lengths(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(each)) for each in completions]


class Lengths:
    async def __call__(self, prompts, completions, **columns):
        return [len(each) for each in completions]


def test_async_functions_are_awaited_wherever_they_stand():
    def plain(completions, **columns):
        return [0.0, 1.0]

    def around(**columns):
        return lengths(**columns)

    expected = [[1.0, 2.0], [0.0, 1.0], [1.0, 2.0], [1.0, 2.0]]
    assert results_of(lengths, plain, Lengths(), around) == expected
    assert checked_rewards(lengths, PROMPTS, COMPLETIONS) == [1.0, 2.0]


def test_async_functions_run_side_by_side_and_beside_plain_ones():
    """Each waits for the other two: one after another none would end."""
    met = threading.Barrier(3, timeout=5.0)

    async def first(completions, **columns):
        await asyncio.to_thread(met.wait)
        return [1, 1]

    async def second(completions, **columns):
        await asyncio.to_thread(met.wait)
        return [2, 2]

    def plain(completions, **columns):
        met.wait()
        return [3, 3]

    assert results_of(first, plain, second) == [[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]


def test_none_stands_for_what_is_not_judged():
    assert results_of(lambda **columns: [None, 2]) == [[None, 2.0]]
    assert results_of(lambda **columns: [None, None]) == [[None, None]]
    assert results_of(lambda **columns: [None, [1, 2]]) == [[None, [1.0, 2.0]]]
    with pytest.raises(InputError, match=r"returned None for completion 0 .* expected a finite number"):
        checked_rewards(lambda **columns: [None, 2], PROMPTS, COMPLETIONS)
    with pytest.raises(InputError, match="returned 'x' for completion 1"):
        results_of(lambda **columns: [None, "x"])


def test_the_trainers_state_and_logs_go_to_functions_that_take_them():
    log, state, seen = RewardLog(), TrainerState(global_step=7, max_steps=9), []

    def named(completions, log_metric, trainer_state, **columns):
        log_metric("steps", trainer_state.global_step)
        log_metric("steps", 9)
        return [0.0, 0.0]

    async def any_of_them(completions, **columns):
        columns["log_extra"]("lengths", map(len, completions))
        seen.append(sorted(columns))
        return [0.0, 0.0]

    def none_of_them(prompts, completions, answer):
        return [0.0, 0.0]

    results_of(named, any_of_them, none_of_them, log=log, state=state, answer=["x", "y"])
    assert log.metrics == {"steps": [7.0, 9.0]} and log.columns == {"lengths": [1, 2]}
    assert seen == [["answer", "log_extra", "log_metric", "prompts", "trainer_state"]]
    # Columns alone to functions of hfllm, also with yours in them.
    given = RewardLog().arguments(state)
    checker = checked_by(lambda said, answer, **columns: said == answer and not columns)
    assert taken(exact_match, given) == taken(checker, given) == {}
    assert results_of(checker, answer=["a", "b"]) == [[1.0, 0.0]]
    assert sorted(taken(shuffled(named, "control"), given)) == sorted(given)
    # Outside of training a step has not been made, and one is to come.
    assert RewardLog().arguments()["trainer_state"].max_steps == 1


def test_extra_columns_have_a_value_per_completion():
    log = RewardLog()
    results_of(lambda log_extra, **columns: log_extra("x", [1]) or [0, 0], log=log)
    with pytest.raises(InputError, match=r"log_extra\('x'\) has 1 values for 2 completions"):
        log.check(2)


async def hangs(completions, **columns):
    await asyncio.sleep(60)


async def blocks(completions, **columns):
    time.sleep(4.0)


async def fails(completions, **columns):
    raise ZeroDivisionError("here")


async def needs(completions, answer, **columns):
    return [0, 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (hangs, "'hangs' did not return within 0.2 seconds; --reward_timeout"),
        pytest.param(
            blocks,
            "functions 'lengths', 'blocks' did not return within 0.2 seconds; .* gives them more",
            marks=pytest.mark.slow,
        ),
        (fails, r"'fails' failed with ZeroDivisionError\('here'\) in .*test_calls.py, line \d+; columns given: other"),
        (needs, "'needs': the rows have no column 'answer', which it needs; columns given: other"),
    ],
)
def test_async_functions_that_do_not_return_are_named(function, message):
    with pytest.raises(InputError, match=message):
        results_of(lengths, function, timeout=0.2, other=[1, 2])


def test_trls_own_rewards_are_taken_as_they_are():
    import trl.rewards as theirs

    from hfllm.rewards.functions import reward_name

    said = [[{"role": "assistant", "content": f"{'<think>so</think>' * thinks}{text}"}] for thinks, text in SAID]
    ids = [[1] * 4, [1] * 9]
    punishment = theirs.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    functions = [theirs.think_format_reward, punishment]
    columns = {"completion_ids": ids, "solution": ["$4$", "it is blue"]}
    results = RewardCalls(functions, PROMPTS, said, columns, RewardLog().arguments(), 5.0).results()
    assert results[0] == [1.0, 0.0]
    assert results[1] == pytest.approx([0.0, -0.75])
    # The others need a package that reads formulas.
    others = {name for name in theirs.__all__ if name.endswith("reward")} - {*map(reward_name, functions)}
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return
    for name in others:
        results = RewardCalls([getattr(theirs, name)], PROMPTS, said, columns, RewardLog().arguments(), 30.0).results()
        assert results[0][0] == 1.0


SAID = ((1, "$4$"), (0, "$5$"))
