"""Call functions side by side, each within a limit of time: coroutines on one lasting event loop, others in threads.

    replies = run_together([called(fetch, 10.0, "fetch") for fetch in functions], patience=10.0)

The loop lasts as long as the process, and so do connections that a tool opens on it and keeps: a session of HTTP, a
database, a server of tools.
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent import futures
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# So many functions of one name run at once, as in Python's own pools: those that wait gain by it, and those that
# compute do not slow each other down to their limits of time.
MAX_THREADS = min(32, cores() + 4)
# Seconds in which a loop that is not blocked answers, also on a busy machine.
ANSWERS_WITHIN = 1.0
# Threads of `asyncio.to_thread`, which begin when they are needed: a call must not wait for them.
MAX_WORKERS = 1024


class LateError(Exception):
    """A call was given up at its limit of time."""


class NoLoopError(Exception):
    """The system has no thread or no file for an event loop."""


class LastingLoop:
    """An event loop in a daemon thread.

    Attributes:
        moves: how often a call has begun or ended on it.
        is_given_up: whether a coroutine blocked it when it was last looked at.

    Raises:
        NoLoopError: where it cannot begin.
    """

    def __init__(self):
        self.process, self.moves, self.answer = os.getpid(), 0, threading.Event()
        self.is_given_up = self._is_over = False
        try:
            self.loop = asyncio.new_event_loop()
            self.loop.set_default_executor(workers())
            self.thread = threading.Thread(target=self._run, name="tools-loop", daemon=True)
            self.thread.start()
        except (RuntimeError, OSError) as error:
            raise NoLoopError(str(error)) from error
        _loops[self.loop] = self

    def _run(self) -> None:
        # A task that leaves by `sys.exit` stops the loop, and must not stop it for all.
        while not self._is_over:
            with suppress(BaseException):
                self.loop.run_forever()
        with suppress(Exception):
            self.loop.close()

    def answers(self, seconds: float) -> bool:
        """Return whether the loop takes its turn within so many seconds: a coroutine may block it."""
        self.answer = threading.Event()
        self.loop.call_soon_threadsafe(self.answer.set)
        return self.answer.wait(seconds)

    def end(self) -> None:
        """End the loop and its thread."""
        self._is_over = True
        self.loop.call_soon_threadsafe(self.loop.stop)


# The oldest that is not blocked is in use.
_lasting: list[LastingLoop] = []
_starting = threading.Lock()
_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, LastingLoop] = WeakKeyDictionary()
# Of each loop, by name and number.
_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], asyncio.Semaphore]] = WeakKeyDictionary()


def workers() -> futures.ThreadPoolExecutor:
    """Return a pool for the functions that coroutines run in threads."""
    return futures.ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="tools")


def lasting_loop() -> LastingLoop:
    """Return the process's loop; a forked process starts its own, since threads are not forked.

    A loop that was given up, and answers again, is in use again: connections of tools are on it.
    """
    with _starting:
        _lasting[:] = [each for each in _lasting if each.process == os.getpid()]
        for each in _lasting:
            each.is_given_up = each.is_given_up and not each.answer.is_set()
            if not each.is_given_up:
                return each
        _lasting.append(LastingLoop())
        return _lasting[-1]


def run_together(
    coroutines: Sequence[Coroutine[Any, Any, Result]], patience: float | None = None
) -> list[Result | None]:
    """Return the results of coroutines that run side by side on the lasting loop, in their order.

    Args:
        coroutines: an error of one ends the wait, and is raised here.
        patience: seconds after which a coroutine that blocks the loop, as `time.sleep` does, is given up: what has not
            ended by then is `None`, and later coroutines get another loop. `None`: forever.

    Raises:
        NoLoopError: see `LastingLoop`.
    """
    results: list[Result | None] = [None] * len(coroutines)
    tasks: list[asyncio.Task[None]] = []
    errors: list[BaseException] = []
    is_over = threading.Event()

    async def run(index: int, coroutine: Coroutine[Any, Any, Result]) -> None:
        try:
            results[index] = await coroutine
        except asyncio.CancelledError:
            raise
        # `sys.exit` would end the loop.
        except BaseException as error:
            errors.append(error)
            raise RuntimeError from None

    async def run_all() -> None:
        tasks.append(asyncio.current_task())
        if is_over.is_set():
            return
        await asyncio.gather(*(run(*each) for each in enumerate(coroutines)))

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    lasting = None
    try:
        lasting = lasting_loop()
        # A coroutine that calls this waits on its own loop: what it waits for needs another one.
        is_nested = lasting.thread is threading.current_thread()
        lasting = LastingLoop() if is_nested else lasting
        future = asyncio.run_coroutine_threadsafe(run_all(), lasting.loop)
        moves = lasting.moves
        while not futures.wait([future], timeout=patience).done:
            if not lasting.answers(max(patience, ANSWERS_WITHIN)) and lasting.moves == moves:
                lasting.is_given_up = True
                return list(results)
            moves = lasting.moves
        if errors:
            raise errors[0]
        future.result()
        return results
    finally:
        # What has not ended: at Ctrl-C, at any moment of it, and once a blocked loop goes on.
        is_over.set()
        if lasting is None:
            for coroutine in coroutines:
                coroutine.close()
        else:
            lasting.loop.call_soon_threadsafe(cancel)
            if lasting not in _lasting:
                lasting.end()


def settled(values: Sequence[object]) -> list[object]:
    """Return values, coroutines among them run side by side: each has its result, or its error, in its place."""

    async def result_of(coroutine: Coroutine[Any, Any, object]) -> object:
        try:
            return await coroutine
        except Exception as error:
            return error

    waiting = [index for index, value in enumerate(values) if inspect.iscoroutine(value)]
    results = dict(enumerate(values))
    results |= zip(waiting, run_together([result_of(values[index]) for index in waiting]), strict=True)
    return list(results.values())


# ---- one call ----


class Called(NamedTuple):
    """What a call came to.

    Args:
        result: what the function returned, or the error that it raised.
        seconds: from when it began.
    """

    result: object
    seconds: float


async def called(function: Callable[[], object], timeout: float, name: str, max_threads: int = MAX_THREADS) -> Called:
    """Call a function.

    Args:
        function: without arguments. A coroutine function, or one that returns a coroutine, is awaited here; anything
            else runs in a daemon thread.
        timeout: seconds from when it begins. A coroutine is then cancelled; a thread may still run.
        name: of the thread.
        max_threads: so many functions of one name run at once; the others wait, without a limit of time.

    Raises:
        LateError: at the limit of time.
        RuntimeError: where the system has no further thread.
    """
    timeout, lasting = min(timeout, threading.TIMEOUT_MAX), _loops.get(asyncio.get_running_loop())
    if lasting is not None:
        lasting.moves += 1
    if inspect.iscoroutinefunction(function):
        began, result = time.monotonic(), function()
    else:
        began, result = await _in_thread(function, timeout, name, max_threads)
    if inspect.iscoroutine(result):
        result = await _awaited(result, timeout - (time.monotonic() - began))
    if lasting is not None:
        lasting.moves += 1
    return Called(result, time.monotonic() - began)


async def _in_thread(
    function: Callable[[], object], timeout: float, name: str, max_threads: int
) -> tuple[float, object]:
    """Return when a function began, and its result or error."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def run() -> None:
        result = _result_of(function)
        # The loop may have been closed, and the call given up.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: ended.done() or ended.set_result(result))

    slots = _slots.setdefault(loop, {})
    async with slots.setdefault((name, max_threads), asyncio.Semaphore(max_threads)):
        began = time.monotonic()
        threading.Thread(target=run, name=name, daemon=True).start()
        await asyncio.wait({ended}, timeout=timeout)
    if not ended.done():
        ended.cancel()
        raise LateError
    return began, ended.result()


def _result_of(function: Callable[[], object]) -> object:
    try:
        return function()
    # A tool may also leave by sys.exit.
    except BaseException as error:
        return error


async def _awaited(coroutine: Coroutine[Any, Any, object], timeout: float) -> object:
    """Return a coroutine's result, or its error; a coroutine that goes on although it was cancelled is left behind."""

    async def run() -> object:
        try:
            return await coroutine
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            return RuntimeError("it was cancelled")
        except BaseException as error:
            return error

    task = asyncio.ensure_future(run())
    try:
        await asyncio.wait({task}, timeout=max(timeout, 0))
        if task.done():
            return task.result()
    finally:
        task.cancel()
    # Threads of `asyncio.to_thread` may hang: the next calls get others.
    asyncio.get_running_loop().set_default_executor(workers())
    raise LateError
