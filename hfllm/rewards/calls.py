"""Calls of all reward functions on a batch, by the rules of TRL's GRPOTrainer.

Async functions run side by side, and on while the caller computes something else. A function gets the trainer's state
and ways to log, where it takes them. `None` stands for a completion that it does not judge.
"""

import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hfllm.environments.side_by_side import Called, LateError, called, run_together
from hfllm.errors import refuse_if
from hfllm.rewards.functions import (
    LOG_EXTRA,
    LOG_METRIC,
    STATE,
    RewardFunction,
    as_list,
    late_error,
    read_rewards,
    reward_errors,
    reward_name,
    time_limit,
)

if TYPE_CHECKING:
    from transformers import TrainerState

Results = list[float | None] | list[list[float] | None]


@dataclass
class RewardLog:
    """What reward functions log beside their rewards.

    Args:
        metrics: the values of each name.
        columns: a value per completion, for the table of completions.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[object]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Note a number, to be averaged over the batches up to the next line of the log."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        """Note a value for each completion."""
        self.columns[str(column)] = [*values]

    def arguments(self, state: "TrainerState | None" = None) -> dict[str, object]:
        """Return the trainer's arguments to reward functions.

        Args:
            state: of the trainer; by default one that is about to begin.
        """
        from transformers import TrainerState

        return {STATE: state or TrainerState(max_steps=1), LOG_METRIC: self.log_metric, LOG_EXTRA: self.log_extra}

    def check(self, count: int) -> None:
        """Refuse columns of another length than the batch."""
        for name, values in self.columns.items():
            refuse_if(len(values) != count, f"log_extra({name!r}) has {len(values)} values for {count} completions")


class RewardCalls:
    """Calls of reward functions that have begun: plain ones have returned, async ones may still run.

    Args:
        functions: called with `prompts`, `completions` and the columns by name.
        columns: of the dataset, a value per completion.
        given: further arguments, for the functions that take them.
        timeout: seconds for each function; 0 is no limit. A plain one of the user's is interrupted (`time_limit`), an
            async one canceled.

    Raises:
        InputError: for a function that fails, or returns something else than a number, a list of numbers for its
            tokens, or `None` per completion.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        prompts: Sequence,
        completions: Sequence,
        columns: Mapping[str, Sequence[object]],
        given: Mapping[str, object],
        timeout: float,
    ):
        self.functions, self.completions, self.timeout = functions, completions, timeout
        self.columns = columns
        calls = [
            partial(each, prompts=prompts, completions=completions, **{**columns, **taken(each, given)})
            for each in functions
        ]
        self._async = [index for index, each in enumerate(functions) if is_async(each)]
        self._awaited = _Together([self._settled(calls[index], index) for index in self._async], timeout or None)
        self._returned = {
            index: self._return_of(call, index) for index, call in enumerate(calls) if index not in self._async
        }

    def results(self) -> list[Results]:
        """Wait for the async functions; return the rewards of each function, in their order."""
        found = [*zip(self._async, self._awaited.results(), strict=True)]
        # One that blocks the others, as `time.sleep` does, is among them.
        if late := [self.functions[index] for index, settled in found if settled is None]:
            raise late_error(late, self.timeout)
        for index, settled in found:
            function = self.functions[index]
            with reward_errors(function, self.columns):
                if isinstance(settled.result, BaseException):
                    raise settled.result
                self._returned[index] = as_list(settled.result)
        return [
            read_rewards(function, self._returned[index], self.completions, may_abstain=True)
            for index, function in enumerate(self.functions)
        ]

    def _return_of(self, call: Callable[[], object], index: int) -> object:
        function = self.functions[index]
        with time_limit(function, self.timeout), reward_errors(function, self.columns):
            result = call()
            # As from a plain function around an async one.
            return as_list(run_together([result])[0] if inspect.iscoroutine(result) else result)

    async def _settled(self, call: Callable[[], object], index: int) -> Called | None:
        """Return what a function came to, `None` at its time limit."""
        try:
            return await called(call, self.timeout or math.inf, reward_name(self.functions[index]))
        except LateError:
            return None
        # It takes other arguments.
        except TypeError as error:
            return Called(error, 0.0)


class _Together:
    """Coroutines that run side by side in the background.

    Args:
        patience: see `run_together`.
    """

    def __init__(self, coroutines: Sequence[Coroutine[Any, Any, Called | None]], patience: float | None):
        self._coroutines, self._patience = coroutines, patience
        self._results: list[Called | None] = []
        self._error: BaseException | None = None
        # It ends with the process, also where a function does not.
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True) if coroutines else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._results = run_together(self._coroutines, self._patience)
        except BaseException as error:
            self._error = error

    def results(self) -> list[Called | None]:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results


def is_async(function: RewardFunction) -> bool:
    """Return whether a reward function is a coroutine function, or an object that is called like one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def taken(function: RewardFunction, given: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that a function takes: by their names, or all, of a user's function with `**columns`.

    To hfllm's own functions `**columns` are columns alone.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    is_own = (getattr(function, "__module__", None) or "").startswith("hfllm.")
    takes_any = not is_own and any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {name: value for name, value in given.items() if takes_any or name in parameters}
