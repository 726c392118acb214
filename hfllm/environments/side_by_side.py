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
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Result = TypeVar("Result")
# Functions that are no coroutines run in so many threads at once.
MAX_THREADS = 32
# Seconds in which a loop that is not blocked answers, also on a busy machine.
ANSWERS_WITHIN = 1.0


class LateError(Exception):
    """A call was given up at its limit of time."""


class LastingLoop:
    """An event loop in a daemon thread.

    Raises:
        RuntimeError, OSError: where the system has no thread or no file for it.
    """

    def __init__(self):
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="tools-loop", daemon=True).start()

    def answers(self, seconds: float) -> bool:
        """Return whether the loop takes its turn within so many seconds: a coroutine may block it."""
        event = threading.Event()
        self.loop.call_soon_threadsafe(event.set)
        return event.wait(seconds)


_lasting: list[LastingLoop] = []
_starting = threading.Lock()
# Of each loop, by their number.
_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]] = WeakKeyDictionary()


def lasting_loop() -> LastingLoop:
    """Return the process's loop; a forked process starts its own, since threads are not forked."""
    with _starting:
        if not _lasting or _lasting[0].process != os.getpid():
            _lasting[:] = [LastingLoop()]
        return _lasting[0]


def run_together(
    coroutines: Sequence[Coroutine[Any, Any, Result]], patience: float | None = None
) -> list[Result | None]:
    """Return the results of coroutines that run side by side on the lasting loop, in their order.

    Args:
        coroutines: an error of one ends the wait, and is raised here.
        patience: seconds after which a coroutine that blocks the loop, as `time.sleep` does, is given up: what has not
            ended by then is `None`, and later coroutines get a new loop. `None`: forever.

    Raises:
        RuntimeError, OSError: see `LastingLoop`.
    """
    results: list[Result | None] = [None] * len(coroutines)

    async def run(index: int, coroutine: Coroutine[Any, Any, Result]) -> None:
        results[index] = await coroutine

    tasks: list[asyncio.Task[None]] = []

    async def run_all() -> None:
        tasks.append(asyncio.current_task())
        await asyncio.gather(*(run(*each) for each in enumerate(coroutines)))

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    try:
        lasting = lasting_loop()
    except (RuntimeError, OSError):
        for coroutine in coroutines:
            coroutine.close()
        raise
    try:
        future = asyncio.run_coroutine_threadsafe(run_all(), lasting.loop)
        while not futures.wait([future], timeout=patience).done:
            if not lasting.answers(max(patience, ANSWERS_WITHIN)):
                with _starting:
                    _lasting[:] = [each for each in _lasting if each is not lasting]
                return list(results)
        future.result()
        return results
    finally:
        # What has not ended: at Ctrl-C, at any moment of it, and once a blocked loop goes on.
        lasting.loop.call_soon_threadsafe(cancel)


# ---- one call ----


async def called(function: Callable[[], object], timeout: float, name: str, max_threads: int = MAX_THREADS) -> object:
    """Return what a function returns, or the error that it raises, as a value.

    Args:
        function: without arguments. A coroutine function, or one that returns a coroutine, is awaited here; anything
            else runs in a daemon thread.
        timeout: seconds from when it begins. A coroutine is then cancelled; a thread may still run.
        name: of the thread.
        max_threads: so many functions of this limit run at once; the others wait, without a limit of time.

    Raises:
        LateError: at the limit of time.
        RuntimeError: where the system has no further thread.
    """
    timeout = min(timeout, threading.TIMEOUT_MAX)
    began = time.monotonic()
    if inspect.iscoroutinefunction(function):
        result: object = function()
    else:
        result = await _in_thread(function, timeout, name, max_threads)
    if not inspect.iscoroutine(result):
        return result
    return await _awaited(result, timeout - (time.monotonic() - began))


async def _in_thread(function: Callable[[], object], timeout: float, name: str, max_threads: int) -> object:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def run() -> None:
        result = _result_of(function)
        # The loop may have been closed, and the call given up.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: ended.done() or ended.set_result(result))

    async with _slots.setdefault(loop, {}).setdefault(max_threads, asyncio.Semaphore(max_threads)):
        threading.Thread(target=run, name=name, daemon=True).start()
        await asyncio.wait({ended}, timeout=timeout)
    if not ended.done():
        ended.cancel()
        raise LateError
    return ended.result()


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
    asyncio.get_running_loop().set_default_executor(futures.ThreadPoolExecutor(thread_name_prefix="tools"))
    raise LateError
