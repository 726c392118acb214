"""Tools of several episodes are called side by side, on one event loop that lasts, within their limits of time."""

import asyncio
import multiprocessing
import os
import signal
import socketserver
import threading
import time

import pytest
from test_tool_calls import call_of

from hfllm.environments import side_by_side
from hfllm.environments.side_by_side import MAX_THREADS, lasting_loop, run_together
from hfllm.environments.tools import ToolBox, answers_of
from hfllm.errors import InputError

LONG = float("inf")


def contents(answers):
    return [[message["content"] for message in answer.messages] for answer in answers]


def turns_of(box, *episodes, seconds=LONG):
    """The turns of episodes, each with its calls of the tool `act`."""
    return [(box, seconds, [call_of("act", number=number) for number in numbers]) for numbers in episodes]


class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())


@pytest.fixture
def echo_port():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_an_async_tool_keeps_its_connection(echo_port):
    opened = []

    async def say(word: str) -> str:
        """Say a word.

        Args:
            word: what to say.
        """
        if not opened:
            opened.append(await asyncio.open_connection("127.0.0.1", echo_port))
        ((reader, writer),) = opened
        writer.write(f"{word}\n".encode())
        return (await reader.readline()).strip()

    box = ToolBox([say])
    assert [box.call(call_of("say", word=word)) for word in ("one", "two", "three")] == [
        ({"role": "tool", "name": "say", "content": word}, False) for word in ("ONE", "TWO", "THREE")
    ]
    opened[0][1].close()


def test_coroutines_of_all_episodes_wait_at_once():
    """Each waits until all have begun."""
    begun, all_begun = [], []

    async def act(number: int) -> str:
        """Act.

        Args:
            number: of the episode.
        """
        begun.append(number)
        if not all_begun:
            all_begun.append(asyncio.Event())
        if len(begun) == 128:
            all_begun[0].set()
        await all_begun[0].wait()
        return str(number)

    answers = answers_of(turns_of(ToolBox([act]), *([number] for number in range(128))))
    assert contents(answers) == [[str(number)] for number in range(128)] and begun == list(range(128))


@pytest.mark.parametrize("limit", [None, 3])
def test_functions_run_in_a_bounded_number_of_threads(limit):
    bound = limit or MAX_THREADS
    lock, too_many, running, most = threading.Lock(), threading.Event(), [], []

    def act(number: int) -> str:
        """Act.

        Args:
            number: of the episode.
        """
        with lock:
            running.append(number)
            most.append(len(running))
        if len(running) > bound:
            too_many.set()
        # Long enough for all others to begin.
        too_many.wait(0.05)
        running.remove(number)
        return str(number)

    if limit:
        act.max_threads = limit
    answers = answers_of(turns_of(ToolBox([act]), *([number] for number in range(3 * bound))))
    assert contents(answers) == [[str(number)] for number in range(3 * bound)]
    assert max(most) == bound


@pytest.mark.parametrize("is_async", [True, False])
def test_answers_have_the_order_of_their_episodes_whoever_ends_first(is_async):
    log = []

    def act(number: int) -> int:
        """Act.

        Args:
            number: what to square.
        """
        log.append(number)
        return number**2

    def slowly(number: int) -> int:
        time.sleep(0.02 * (30 - number) / 30)
        return act(number)

    async def later(number: int) -> int:
        await asyncio.sleep(0.02 * (30 - number) / 30)
        return act(number)

    tool = later if is_async else slowly
    tool.__name__, tool.__doc__ = "act", act.__doc__
    episodes = [(number, number + 1) for number in range(0, 30, 2)]
    assert contents(answers_of(turns_of(ToolBox([tool]), *episodes))) == [
        [str(number**2) for number in episode] for episode in episodes
    ]
    # Calls of one episode are made one after another, and the quickest of the episodes ends first.
    assert all(log.index(first) < log.index(second) for first, second in episodes)
    assert log != sorted(log)


def test_a_coroutine_that_blocks_the_loop_costs_its_limit_and_the_next_get_another_loop(monkeypatch):
    monkeypatch.setattr(side_by_side, "ANSWERS_WITHIN", 0.1)
    free = threading.Event()

    async def act(number: int) -> str:
        """Act.

        Args:
            number: 0 blocks.
        """
        return str(number) if number else free.wait(30)

    box, blocked = ToolBox([act], timeout=0.1), lasting_loop()
    (late,) = answers_of(turns_of(box, [0]))
    assert "act did not answer: a coroutine blocked the event loop" in late.messages[0]["content"]
    assert late.failures == 1 and box.is_late
    assert ToolBox([act]).call(call_of("act", number=2)) == ({"role": "tool", "name": "act", "content": "2"}, False)
    assert lasting_loop() is not blocked
    # It answers again: connections are on it.
    free.set()
    assert blocked.answer.wait(10) and lasting_loop() is blocked


def test_a_coroutine_that_does_not_let_itself_be_cancelled_is_left_behind():
    ends = []

    async def act(number: int) -> str:
        """Act.

        Args:
            number: how often it goes on.
        """
        for _ in range(number):
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                ends.append("on")
        return "done"

    box = ToolBox([act], timeout=0.05)
    message, has_failed = box.call(call_of("act", number=1))
    assert message["content"] == "{'error': 'act did not answer within 0.05 seconds'}" and has_failed and box.is_late
    assert box.call(call_of("act", number=0))[0]["content"] == "done" and ends == ["on"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), ValueError("no")])
def test_whatever_a_coroutine_raises_the_loop_goes_on(error):
    async def act(number: int) -> str:
        """Act.

        Args:
            number: 0 raises.
        """
        if number == 0:
            raise error
        return str(number)

    before, box = lasting_loop(), ToolBox([act])
    failed, done = answers_of(turns_of(box, [0], [1]))
    assert failed.failures == 1 and "error" in failed.messages[0]["content"]
    assert done.messages[0]["content"] == "1" and lasting_loop() is before and before.answers(10)


def test_an_error_as_a_result_is_no_failure():
    async def later():
        """Later."""
        return ValueError("fine")

    def now():
        """Now."""
        return ValueError("fine")

    box = ToolBox([later, now])
    assert [box.call(call_of(name))[1] for name in ("later", "now")] == [False, False]


def test_the_calls_of_an_episode_share_its_seconds():
    free = threading.Event()

    def act(number: int) -> str:
        """Act.

        Args:
            number: 0 waits.
        """
        return str(number) if number else free.wait(30)

    box = ToolBox([act], timeout=30)
    (answer,) = answers_of(turns_of(box, [1, 0, 2], seconds=0.2))
    assert [message["content"].partition("within")[0] for message in answer.messages] == [
        "1",
        "{'error': \"act did not answer ",
        "{'error': \"act was not called: the episode's seconds for tools are over\"}",
    ]
    assert answer.failures == 2 and answer.seconds >= 0.2
    free.set()


def test_short_blocks_of_many_do_not_add_up_to_one():
    async def act(number: int) -> str:
        """Act.

        Args:
            number: any.
        """
        time.sleep(0.02)
        return str(number)

    answers = answers_of(turns_of(ToolBox([act], timeout=0.1), *([number] for number in range(30))))
    assert contents(answers) == [[str(number)] for number in range(30)]


def test_what_was_answered_before_a_block_stays(monkeypatch):
    monkeypatch.setattr(side_by_side, "ANSWERS_WITHIN", 0.1)
    free = threading.Event()

    async def act(number: int) -> str:
        """Act.

        Args:
            number: 0 blocks.
        """
        await asyncio.sleep(0)
        return str(number) if number else free.wait(30)

    (answer,) = answers_of(turns_of(ToolBox([act], timeout=0.1), [1, 0, 2]))
    free.set()
    first, *others = [message["content"] for message in answer.messages]
    assert first == "1" and len(others) == 2 and all("blocked the event loop" in each for each in others)
    assert answer.failures == 2


def test_threads_of_coroutines_do_not_wait_for_each_other():
    together = threading.Barrier(40)

    async def act(number: int) -> str:
        """Act.

        Args:
            number: any.
        """
        await asyncio.to_thread(together.wait, 30)
        return str(number)

    answers = answers_of(turns_of(ToolBox([act], timeout=30), *([number] for number in range(40))))
    assert not any(answer.failures for answer in answers)


def test_a_tool_may_call_tools():
    def inner(number: int) -> str:
        """Act.

        Args:
            number: any.
        """
        return str(number)

    inner.__name__ = "act"
    box = ToolBox([inner])

    def outside() -> str:
        """Call another."""
        return box.call(call_of("act", number=1))[0]["content"]

    async def outside_too() -> str:
        """Call another."""
        return box.call(call_of("act", number=2))[0]["content"]

    outside.max_threads = inner.max_threads = 1
    found = [ToolBox([tool], timeout=20).call(call_of(tool.__name__)) for tool in (outside, outside_too)]
    assert [(message["content"], has_failed) for message, has_failed in found] == [("1", False), ("2", False)]


@pytest.mark.parametrize("number", [0, -1, None, True, "2"])
def test_a_bound_of_threads_is_a_number(number):
    def act() -> str:
        """Act."""

    act.max_threads = number
    with pytest.raises(InputError, match=r"'act' has max_threads .*; expected a number from 1 on"):
        ToolBox([act])


def test_leaving_outside_of_tools_is_raised_and_the_loop_goes_on():
    async def leave():
        raise SystemExit(3)

    async def leave_later():
        background = asyncio.ensure_future(leave())
        await asyncio.sleep(0.01)
        return 1 + isinstance(background, int)

    before = lasting_loop()
    with pytest.raises(SystemExit):
        run_together([leave()])
    assert run_together([leave_later()]) == [1]
    assert lasting_loop() is before and before.answers(10)


@pytest.mark.parametrize("is_text", [True, False])
def test_json_that_is_nested_deeply_fails_alone(is_text):
    depth = 600
    arguments = '{"number": ' + "[" * depth + "]" * depth + "}" if is_text else {"number": None}
    if not is_text:
        for _ in range(depth):
            arguments["number"] = [arguments["number"]]

    def act(number: int) -> str:
        """Act.

        Args:
            number: any.
        """
        return "done"

    box = ToolBox([act])
    deep, plain = answers_of(
        [(box, LONG, [{"function": {"name": "act", "arguments": arguments}}]), *turns_of(box, [1])]
    )
    assert plain.messages[0]["content"] == "done" and not plain.failures
    assert deep.failures == 0 or "recursion" in deep.messages[0]["content"].lower()


def test_waiting_for_a_thread_costs_an_episode_nothing():
    def act(number: int) -> str:
        """Act.

        Args:
            number: any.
        """
        time.sleep(0.05)
        return str(number)

    act.max_threads = 1
    answers = answers_of(turns_of(ToolBox([act]), *([number] for number in range(20)), seconds=0.5))
    assert contents(answers) == [[str(number)] for number in range(20)]


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_cancels_what_is_waiting():
    cancelled = threading.Event()

    async def act(number: int) -> str:
        """Act.

        Args:
            number: any.
        """
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(1e6)
        finally:
            cancelled.set()

    box = ToolBox([act], timeout=100)
    with pytest.raises(KeyboardInterrupt):
        box.call(call_of("act", number=1))
    # A method of an environment may still run.
    assert cancelled.wait(10) and box.is_late


def forked_call(sender):
    async def later() -> str:
        """Answer later."""
        await asyncio.sleep(0)
        return "of the child"

    sender.send(ToolBox([later]).call(call_of("later"))[0]["content"])


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_has_its_own_loop():
    lasting_loop()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=forked_call, args=(sender,))
    child.start()
    assert receiver.poll(30) and receiver.recv() == "of the child"
    child.join()


def test_errors_outside_of_tools_are_raised():
    async def fail():
        raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        run_together([fail()])


def test_results_have_the_order_of_their_coroutines():
    async def later(number):
        await asyncio.sleep(0.02 / number)
        return number

    assert run_together([later(number) for number in range(1, 6)]) == [1, 2, 3, 4, 5]
