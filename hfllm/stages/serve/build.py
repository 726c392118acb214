"""A server of OpenAI's chat completions: one model, one request at a time, the others wait."""

import asyncio
import hmac
import json
import os
import random
import re
import socket
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import set_seed
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hfllm.data.formats import Message
from hfllm.data.thoughts import CLOSE, OPEN
from hfllm.data.tokenizer import end_tokens
from hfllm.environments.tool_turns import ToolTurns
from hfllm.errors import InputError, one_line
from hfllm.generation.streaming import Streamed, StreamedToken, StreamSettings
from hfllm.runs.command_line import say
from hfllm.runs.local import LOOPBACK, LocalOnly, address_of, listen
from hfllm.stages.chat.speaker import Speaker, plain_messages
from hfllm.stages.serve.flags import ServeArguments
from hfllm.stages.serve.requests import ChatRequest, read_request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A conversation with some images.
MAX_BODY = 64 * 2**20
API_KEY = "HFLLM_API_KEY"
# Seconds between two looks at whether a client has gone.
LOOK = 0.2


@dataclass(frozen=True)
class Choice:
    """One answer.

    Args:
        message: with `content`, and `reasoning_content` or `tool_calls` where it has them.
        streamed: its text and tokens.
    """

    message: Message
    streamed: Streamed

    @property
    def finish_reason(self) -> str:
        """Why it ended."""
        if self.message.get("tool_calls"):
            return "tool_calls"
        return "stop" if self.streamed.is_whole else "length"


class Server:
    """Answers requests with one model.

    Args:
        speaker: the model.
        name: under which clients know it.
        max_waiting: requests that may wait.
        hosts: accepted names of this machine in requests; `None` accepts all.
        api_key: that clients must send, `None` for none.
        seed: of the answers to requests without one.
    """

    def __init__(
        self,
        speaker: Speaker,
        name: str,
        max_waiting: int = 64,
        hosts: Sequence[str] | None = LOOPBACK,
        api_key: str | None = None,
        seed: int = 0,
    ):
        self.speaker, self.name, self.max_waiting = speaker, name, max_waiting
        self.hosts, self.api_key, self.waiting, self.started = hosts, api_key, 0, int(time.time())
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._turns_of = lru_cache(16)(self._tool_turns)
        self._running: set[_Run] = set()
        self.is_stopping, self._seeds = False, random.Random(seed)

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/chat/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.model)),
            Route("/health", self._guarded(self.health)),
        ]
        errors = {HTTPException: _http_error, InputError: _input_error}
        guard = Middleware(LocalOnly, hosts=self.hosts)
        return Starlette(routes=routes, middleware=[guard], exception_handlers=errors, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that refuses clients without the key, and tells them of errors of this program."""

        async def guarded(request: Request) -> Response:
            sent = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.api_key is not None and not hmac.compare_digest(sent.encode(), self.api_key.encode()):
                raise HTTPException(401, f"the key in the header Authorization is not that of {API_KEY}")
            try:
                return await answer(request)
            except (HTTPException, InputError):
                raise
            except Exception as error:
                traceback.print_exc()
                return _error(500, f"{type(error).__name__}: {one_line(error)}", "server_error")

        return guarded

    async def health(self, request: Request) -> Response:
        """Say that the server is there."""
        return JSONResponse({"status": "ok", "waiting": self.waiting})

    async def models(self, request: Request) -> Response:
        """List the model."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        if request.path_params["name"] != self.name:
            raise HTTPException(404, f"model {request.path_params['name']!r}: served is {self.name!r}")
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "hfllm"}

    def next_seed(self) -> int:
        """Return the seed of the next request without one."""
        return self._seeds.getrandbits(32)

    def stop(self) -> None:
        """End the running answers as far as they came."""
        self.is_stopping = True
        for run in list(self._running):
            run.gone.set()

    async def complete(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await _read_body(request)
        chat = read_request(body, self.speaker.processor is not None)
        if body.get("model") not in (None, self.name):
            raise HTTPException(404, f"model {body['model']!r}: served is {self.name!r}")
        if self.waiting >= self.max_waiting:
            raise HTTPException(503, f"{self.waiting} requests wait already: try again later")
        self.waiting += 1
        is_handed_on = False
        try:
            turns, encoded = await asyncio.to_thread(self._encode, chat)
            run = _Run(self, chat, turns, encoded)
            if chat.is_streamed:
                is_handed_on = True
                return _Stream(run.events(), self._release)
            return JSONResponse(await run.whole(request))
        finally:
            if not is_handed_on:
                self._release()

    def _release(self) -> None:
        self.waiting -= 1

    def _encode(self, chat: ChatRequest) -> tuple[ToolTurns | None, Any]:
        turns = self._turns_of(json.dumps(chat.tools, sort_keys=True)) if chat.tools else None
        messages = chat.messages if turns is None else plain_messages(chat.messages, turns)
        encoded = self.speaker.encoded(messages, chat.tools or None)
        if self.speaker.room(len(encoded[0])) <= 0:
            raise InputError(f"messages: {len(encoded[0])} tokens leave no room for an answer in the model's context")
        return turns, encoded

    def _tool_turns(self, schemas: str) -> ToolTurns:
        speaker = self.speaker
        ends = sorted(end_tokens(speaker.tokenizer, speaker.model))
        return ToolTurns(speaker.processor or speaker.tokenizer, json.loads(schemas), ends)

    @asynccontextmanager
    async def working(self, run: "_Run", work: Callable[[], Any]) -> "AsyncIterator[asyncio.Future[Any]]":
        """Let the model work for a run, which ends when nobody waits for it any more."""
        self._running.add(run)
        try:
            yield asyncio.get_running_loop().run_in_executor(self._worker, work)
        finally:
            run.gone.set()
            self._running.discard(run)


class _Run:
    """One request: its answers, whole or in pieces."""

    def __init__(self, server: Server, chat: ChatRequest, turns: ToolTurns | None, encoded: Any):
        self.server, self.chat, self.turns, self.encoded = server, chat, turns, encoded
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.gone = threading.Event()

    def choices(self, write: Callable[[int, str, Sequence[StreamedToken]], None]) -> Iterator[Choice]:
        """Yield the answers, one after another; called in the model's thread."""
        speaker, chat = self.server.speaker, self.chat
        settings = StreamSettings(speaker.settings | chat.sampling, chat.stop, chat.num_top, self.gone.is_set)
        # Without one another answer each time, also after a request that had one.
        set_seed(self.server.next_seed() if chat.seed is None else chat.seed % 2**32)
        for index in range(chat.choices):
            if self.gone.is_set():
                return
            streamed = speaker.speak(
                self.encoded,
                settings,
                lambda text, tokens, index=index: write(index, text, tokens),
                chat.max_new_tokens,
            )
            yield Choice(self._parsed(streamed), streamed)

    def _parsed(self, streamed: Streamed) -> Message:
        """Return an answer's message, as its pieces in a stream have it."""
        if self.turns is not None and (message := self.turns.parse(streamed.ids)).get("tool_calls"):
            return message
        splitter = _Thoughts(self.server.speaker.opens_thought(self.encoded[0]))
        parts = [*splitter.split(streamed.text), *filter(None, [splitter.rest()])]
        message = {"role": "assistant", "content": ""}
        for name, text in parts:
            message[name] = message.get(name, "") + text
        return message

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return the answers as one object; a client that goes away ends them."""

        def work() -> list[Choice]:
            return list(self.choices(lambda index, text, tokens: None))

        async with self.server.working(self, work) as future:
            while not future.done():
                await asyncio.wait([future], timeout=LOOK)
                if await request.is_disconnected():
                    self.gone.set()
            choices = future.result()
        if self.server.is_stopping:
            raise HTTPException(503, "the server is stopping")
        rows = [
            {
                "index": index,
                "message": self._message(each.message, index),
                "finish_reason": each.finish_reason,
                "logprobs": self._logprobs(each.streamed.tokens),
            }
            for index, each in enumerate(choices)
        ]
        return {**self._head("chat.completion"), "choices": rows, "usage": self._usage(choices)}

    async def events(self) -> AsyncIterator[str]:
        """Yield the answers' pieces as server-sent events; a client that goes away ends them."""
        loop, pieces, choices = asyncio.get_running_loop(), asyncio.Queue(), []
        thoughts = self.server.speaker.opens_thought(self.encoded[0])
        splitters = [_Thoughts(thoughts) for _ in range(self.chat.choices)]
        unsent: list[list[StreamedToken]] = [[] for _ in range(self.chat.choices)]

        def send(piece: object) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def write(index: int, text: str, tokens: Sequence[StreamedToken]) -> None:
            # With tools a text may be a call, which is known at its end.
            if self.turns is None:
                unsent[index] += tokens
                for part in splitters[index].split(text):
                    send_words(index, part)

        def send_words(index: int, part: tuple[str, str]) -> None:
            send(self._piece(index, dict([part]), unsent[index]))
            unsent[index] = []

        def work() -> None:
            try:
                for index, choice in enumerate(self.choices(write)):
                    choices.append(choice)
                    if self.turns is not None:
                        message = self._message(choice.message, index)
                        for at, call in enumerate(message.get("tool_calls") or ()):
                            call["index"] = at
                        send(self._piece(index, message, choice.streamed.tokens))
                    elif rest := splitters[index].rest():
                        send_words(index, rest)
                    send(self._piece(index, {}, (), choice.finish_reason))
            except Exception as error:
                send({"error": {"message": one_line(error), "type": "server_error"}})
            send(None)

        async with self.server.working(self, work):
            for index in range(self.chat.choices):
                yield _event(self._piece(index, {"role": "assistant", "content": ""}, ()))
            while (piece := await pieces.get()) is not None:
                yield _event(piece)
            if self.chat.has_usage:
                head = self._head("chat.completion.chunk")
                yield _event({**head, "choices": [], "usage": self._usage(choices)})
            yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.name}

    def _piece(
        self, index: int, delta: Mapping[str, Any], tokens: Sequence[StreamedToken], reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "finish_reason": reason, "logprobs": self._logprobs(tokens)}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _message(self, message: Message, index: int) -> dict[str, Any]:
        """Return a message as clients read it: calls with ids, their arguments as JSON text."""
        result = {"role": "assistant", "content": message.get("content") or None}
        if message.get("reasoning_content"):
            result["reasoning_content"] = message["reasoning_content"]
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [
                {
                    "id": f"call_{self.id[-12:]}_{index}_{at}",
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": json.dumps(call["function"].get("arguments") or {}, ensure_ascii=False),
                    },
                }
                for at, call in enumerate(calls)
            ]
        return result

    def _logprobs(self, tokens: Sequence[StreamedToken]) -> dict[str, Any] | None:
        """Return the log-probabilities of an answer's tokens, without those of its end."""
        if self.chat.num_top is None:
            return None
        ends = end_tokens(self.server.speaker.tokenizer, self.server.speaker.model)
        rows = [
            {
                **self._token(each.id, each.logprob, each.after),
                "top_logprobs": [self._token(*one, each.after) for one in each.top],
            }
            for each in tokens
            if each.id not in ends
        ]
        return {"content": rows}

    def _token(self, number: int, logprob: float, after: int | None) -> dict[str, Any]:
        text, data = _text_and_bytes(self.server.speaker.tokenizer, number, after)
        # Numbers that JSON has: tokens that cannot follow have a log-probability of minus infinity.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        prompt, answers = len(self.encoded[0]), sum(len(each.streamed.ids) for each in choices)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


class _Thoughts:
    """Splits streamed text into thoughts and the answer after them, as `thinking_message` does for a whole text."""

    def __init__(self, is_open: bool):
        self.is_thinking, self.held, self.has_begun, self.is_after = is_open, "", is_open, False

    def split(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield the names of fields with the next words for them."""
        self.held += text
        if not self.has_begun:
            if OPEN.startswith(self.held.lstrip()):
                return
            self.has_begun, self.is_thinking = True, self.held.lstrip().startswith(OPEN)
            if self.is_thinking:
                self.held = self.held.lstrip().removeprefix(OPEN)
        if self.is_thinking and CLOSE in self.held:
            thought, _, self.held = self.held.partition(CLOSE)
            self.is_thinking, self.is_after = False, True
            if thought:
                yield "reasoning_content", thought
        if self.is_after:
            # Chat templates write line breaks between a thought and its answer.
            self.held = self.held.lstrip("\n")
            self.is_after = not self.held
        # The mark of a thought's end may come in pieces.
        kept = 0
        if self.is_thinking:
            sizes = range(min(len(CLOSE) - 1, len(self.held)), 0, -1)
            kept = next((size for size in sizes if CLOSE.startswith(self.held[-size:])), 0)
        words, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        if words:
            yield ("reasoning_content" if self.is_thinking else "content"), words

    def rest(self) -> tuple[str, str] | None:
        """Return what was held back, at the end."""
        return (("reasoning_content" if self.is_thinking else "content"), self.held) if self.held else None


def _text_and_bytes(tokenizer: "PreTrainedTokenizerBase", number: int, after: int | None) -> tuple[str, bytes]:
    """Return what a token adds to the text before it; the bytes of a part of a letter are its own."""
    before = "" if after is None else tokenizer.decode([after])
    whole = tokenizer.decode([number] if after is None else [after, number])
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode([number])
    if "\ufffd" not in text:
        return text, text.encode("utf-8", "replace")
    spelled = tokenizer.convert_ids_to_tokens(number)
    if re.fullmatch("<0x[0-9A-F]{2}>", spelled):
        return text, bytes([int(spelled[3:5], 16)])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    is_bytes = all(each in letters for each in spelled)
    return text, bytes(letters[each] for each in spelled) if is_bytes else text.encode("utf-8", "replace")


class _Stream(StreamingResponse):
    """A streamed answer that gives its place back when it ends, also where it never began."""

    def __init__(self, events: AsyncIterator[str], release: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self.release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


class _Uvicorn(uvicorn.Server):
    """Ends the running answers at once when it is told to end."""

    stop: Callable[[], None] = staticmethod(lambda: None)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stop()
        super().handle_exit(sig, frame)


def _event(piece: object) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"


async def _read_body(request: Request) -> Any:
    """Return a request's JSON. A page of another site can send text without asking, but not this type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected the header Content-Type: application/json")
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY >> 20} MiB")
    except ClientDisconnect:
        raise HTTPException(400, "the client has gone") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON: {one_line(error)}") from None


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, str(error.detail), "invalid_request_error", error.headers)


async def _input_error(request: Request, error: InputError) -> Response:
    return _error(400, str(error), "invalid_request_error")


def opened(args: ServeArguments) -> socket.socket:
    """Return the socket to serve on, before a model is loaded for it.

    Raises:
        InputError: when the port cannot be listened on, or other machines could come in without a key.
    """
    if args.host not in LOOPBACK and not os.environ.get(API_KEY):
        raise InputError(f"--host {args.host} lets other machines in: set {API_KEY} to a key that clients must send")
    return listen(args.host, args.port)


def serve(args: ServeArguments, speaker: Speaker, listening: socket.socket) -> None:
    """Serve a model until Ctrl-C."""
    name, key = args.served_model_name or args.model_name_or_path, os.environ.get(API_KEY) or None
    server = Server(speaker, name, args.max_waiting, LOOPBACK if args.host in LOOPBACK else None, key, args.seed)
    say(f"serving {name} at {address_of(listening)}/v1 (Ctrl-C ends)")
    config = uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=1)
    running = _Uvicorn(config)
    running.stop = server.stop
    running.run([listening])
