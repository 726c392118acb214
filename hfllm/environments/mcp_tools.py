"""Tools of servers that speak the Model Context Protocol (https://modelcontextprotocol.io), by the `mcp` package.

    tools = MCPTools("servers.json")
    trainer = PPOTrainer(..., tools=tools)

A session is a connection to one server. It is on the event loop of `side_by_side`, so it lasts from call to call. A
server that has ended is started again by the next call.
"""

import asyncio
import atexit
import base64
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakKeyDictionary, WeakSet

from hfllm.environments.episodes import add_methods
from hfllm.environments.side_by_side import NoLoopError, run_together
from hfllm.environments.tools import Content, Tool
from hfllm.errors import HIDDEN, InputError, one_line, redact, refuse_if

if TYPE_CHECKING:
    from mcp import Client, types

# ---- servers ----

# Seconds for a server to begin; `npx` may have to fetch it first.
START_SECONDS = 60.0
# Seconds in which a server that let a call time out answers something else, or is ended and started again.
ALIVE_SECONDS = 2.0
# Errors of anyio and of HTTP clients when a connection is lost.
LOST = (
    "ClosedResourceError",
    "BrokenResourceError",
    "EndOfStream",
    "ConnectError",
    "ReadError",
    "RemoteProtocolError",
)
# Characters of a result.
MOST_READ = 2**18
# Bytes of a program's standard error that are kept.
MOST_ERRORS = 2**20
# Seconds for all sessions to end at the end of the process.
END_SECONDS = 10.0
# A variable of the environment in a file of servers, with the value where it is not set: ${NAME} or ${NAME:-value}.
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
SECRET_NAME = re.compile(r"auth|token|key|secret|passw|credential|cookie", re.IGNORECASE)
LONGEST_NAME = 40
KINDS = ("stdio", "http", "streamable-http", "streamable_http")
# A small program asks the kernel to be ended together with the process that started it, and becomes the server's.
BOUND = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Server:
    """How to reach a server.

    Args:
        name: in messages.
        command: of a program that speaks over its standard input and output, with its arguments.
        env: added to the few variables of the environment that it gets (`HOME`, `PATH` and the like).
        cwd: its folder.
        url: of a server that speaks HTTP ("streamable HTTP"), instead of a command.
        headers: of its requests.
        variables: of the environment, which the others name.
    """

    name: str
    command: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    url: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def secrets(self) -> list[str]:
        """Return what no message may show: values with a name such as `Authorization`, `API_KEY` or `--token`."""
        pairs = [*self.env.items(), *self.headers.items(), *parse_qsl(urlsplit(self.url or "").query)]
        pairs += [*self.variables.items(), *(each for each in pairwise(self.command) if each[0].startswith("-"))]
        pairs += [(name, value) for name, found, value in (each.partition("=") for each in self.command) if found]
        values = [value for name, value in pairs if SECRET_NAME.search(name) and len(name) < LONGEST_NAME]
        return sorted({part for value in values for part in (value, *value.split())}, key=len, reverse=True)

    @asynccontextmanager
    async def connect(self, errors: IO[bytes]) -> "AsyncIterator[Client]":
        """Begin a session and end it.

        Args:
            errors: the file for the program's standard error.
        """
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        if self.url is None:
            command, *arguments = _bound(self.command)
            settings = {"args": arguments, "env": dict(self.env), "cwd": self.cwd}
            program = StdioServerParameters(command=command, **settings, encoding_error_handler="replace")
            async with Client(stdio_client(program, errlog=errors)) as client:
                yield client
            return
        from httpx2 import AsyncClient, Timeout

        # A call has a limit of its own, and a stream may be silent for long.
        settings = {"headers": dict(self.headers), "timeout": Timeout(START_SECONDS, read=None)}
        async with (
            AsyncClient(**settings) as http,
            Client(streamable_http_client(self.url, http_client=http)) as client,
        ):
            yield client


def _bound(command: Sequence[str]) -> list[str]:
    """Return a command that ends with this process, also where this one is killed."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", BOUND, str(os.getpid()), *command]


def read_servers(source: str | Path | Mapping[str, Any], origin: str = "MCPTools") -> list[Server]:
    """Return the servers of a file in the form that other clients read, or of its contents.

        {"mcpServers": {"files": {"command": "npx", "args": ["-y", "@modelcontextprotocol/server-filesystem", "."]},
                        "search": {"url": "https://example.com/mcp", "headers": {"Authorization": "Bearer ${KEY}"}}}}

    `${NAME}` and `${NAME:-value}` in a text are replaced by a variable of the environment. A server with
    `"disabled": true` is left out; other keys are other clients' own.

    Args:
        origin: the flag or argument, in messages.

    Raises:
        InputError: for something else than such a file.
    """
    if not isinstance(source, Mapping):
        origin = f"{origin} {source}"
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{origin}: cannot be read: {one_line(reason)}") from None
    entries = source.get("mcpServers") if isinstance(source, Mapping) else None
    if not isinstance(entries, Mapping) or not entries:
        raise InputError(f'{origin}: expected {{"mcpServers": {{"a name": {{"command": ...}} or {{"url": ...}}}}}}')
    servers = [_server(f"{origin}: server {name!r}", str(name), entry) for name, entry in entries.items()]
    refuse_if(not any(servers), f"{origin}: all servers are disabled")
    return [server for server in servers if server is not None]


def _server(origin: str, name: str, entry: object) -> Server | None:
    """Return a server, `None` for a disabled one."""
    refuse_if(not isinstance(entry, Mapping), f"{origin}: expected an object with command or url, got {entry!r:.80}")
    if entry.get("disabled") is True:
        return None
    kind = entry.get("type")
    if kind is not None and kind not in KINDS:
        raise InputError(f"{origin}: type {kind!r} is not supported; there are stdio and http (streamable HTTP)")
    has = [key for key in ("command", "url") if entry.get(key) is not None]
    refuse_if(len(has) != 1, f"{origin}: expected either command or url, got {', '.join(has) or 'neither'}")
    reader = _Reader(origin)
    if has == ["url"]:
        url = reader.text("url", entry["url"])
        refuse_if(not url.startswith(("http://", "https://")), f"{origin}: url must begin with http:// or https://")
        return Server(name, url=url, headers=reader.texts("headers", entry), variables=reader.variables)
    arguments = entry.get("args", [])
    refuse_if(not isinstance(arguments, list), f"{origin}: args must be a list of texts, got {arguments!r:.80}")
    program, *arguments = [reader.text("command", each) for each in (entry["command"], *arguments)]
    env, cwd = reader.texts("env", entry), entry.get("cwd")
    cwd = None if cwd is None else reader.text("cwd", cwd)
    refuse_if(cwd is not None and not Path(cwd).is_dir(), f"{origin}: cwd {cwd!r} is no folder")
    if os.sep in program:
        # As the program itself would be found: from its folder.
        program = str(Path(cwd or ".").resolve() / program)
    is_there = shutil.which(program, path=env.get("PATH")) is not None
    refuse_if(not is_there, f"{origin}: there is no program {program!r}")
    return Server(name, (program, *arguments), env, cwd, variables=reader.variables)


class _Reader:
    """Reads the texts of a server, with variables of the environment in them.

    Attributes:
        variables: the values of these.
    """

    def __init__(self, origin: str):
        self.origin, self.variables = origin, {}

    def texts(self, key: str, entry: Mapping[str, object]) -> dict[str, str]:
        """Return the texts of an object, an empty one if there is none."""
        values = entry.get(key)
        is_object = isinstance(values, Mapping | None)
        refuse_if(not is_object, f"{self.origin}: {key} must be an object of texts, got {values!r:.40}")
        return {str(name): self.text(f"{key}: {name}", value) for name, value in (values or {}).items()}

    def text(self, key: str, text: object) -> str:
        """Return a text."""
        refuse_if(not isinstance(text, str), f"{self.origin}: {key} must be a text, got {type(text).__name__}")

        def value(found: re.Match[str]) -> str:
            name, otherwise = found.groups()
            value = os.environ.get(name, otherwise)
            refuse_if(value is None, f"{self.origin}: {key}: the environment variable {name} is not set")
            self.variables[name] = value
            return value

        return VARIABLE.sub(value, text)


# ---- sessions ----


class ServerError(Exception):
    """A server failed, or a tool of it; the message is for the policy."""


class _Session:
    """A session with a server on the running loop, begun and ended in one task, as the `mcp` package needs it.

    Attributes:
        is_over: whether the server has ended, or cannot be reached.
        is_suspect: whether a call has been given up.
        calls: how many wait for an answer.
    """

    def __init__(self, server: Server):
        self.server, self.process = server, os.getpid()
        self.is_over = self.is_suspect = False
        self.calls = 0
        self._loop = asyncio.get_running_loop()
        self._client: asyncio.Future[Client] = self._loop.create_future()
        # Who waits for it may have been given up.
        self._client.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._closing = asyncio.Event()
        self._task = self._loop.create_task(self._run())
        _open.add(self)

    async def _run(self) -> None:
        try:
            with tempfile.TemporaryFile() as self._errors:
                try:
                    async with asyncio.timeout(START_SECONDS) as limit, self.server.connect(self._errors) as client:
                        limit.reschedule(None)
                        self._client.set_result(client)
                        await self._closing.wait()
                # What anyio raises may hold several errors.
                except BaseException as error:
                    self._errors.seek(0)
                    self._fail(error, self._errors.read(MOST_ERRORS).decode("utf-8", "replace"))
        # The system has no file for it.
        except OSError as error:
            self._fail(error)
        finally:
            self.is_over = True

    def _fail(self, error: BaseException, words_of_program: str = "") -> None:
        """Let those that wait for the session know why it did not begin, with the program's last words."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        words = f"did not answer within {START_SECONDS:g} seconds" if isinstance(error, TimeoutError) else str(error)
        lines = [line for line in words_of_program.split("\n") if line.strip()]
        words = one_line(": ".join([words or type(error).__name__, *lines[-1:]]))
        if not self._client.done():
            self._client.set_exception(ServerError(_hidden(words, self.server)))

    async def client(self) -> "Client":
        """Return the client, once the session has begun.

        Raises:
            ServerError: where it cannot begin.
        """
        client = await asyncio.shield(self._client)
        # A program that writes much must not fill the disk. The file is closed where the session has ended meanwhile.
        with suppress(ValueError):
            if os.fstat(self._errors.fileno()).st_size > MOST_ERRORS:
                os.ftruncate(self._errors.fileno(), 0)
                os.lseek(self._errors.fileno(), 0, os.SEEK_SET)
        return client

    def end(self) -> None:
        """Let the session end, and the server's program, which may take its time."""
        self.is_over = True
        self._closing.set()
        if not self._client.done():
            self._task.cancel()

    async def close(self) -> None:
        """End the session, and wait until it has ended."""
        self.end()
        await asyncio.wait({self._task}, timeout=END_SECONDS)

    async def answers(self) -> bool:
        """Return whether the server still answers, after a call that it did not answer."""
        with suppress(Exception):
            async with asyncio.timeout(ALIVE_SECONDS):
                await (await self.client()).list_tools(cache_mode="refresh")
            return True
        return False


_open: WeakSet[_Session] = WeakSet()


@atexit.register
def _end_all() -> None:
    """End the sessions at the end of the process: a program may wish to write something."""
    loops: dict[asyncio.AbstractEventLoop, list[_Session]] = {}
    for session in list(_open):
        if session.process == os.getpid() and not session.is_over and session._loop.is_running():
            loops.setdefault(session._loop, []).append(session)
    for loop, sessions in loops.items():
        with suppress(Exception):
            done = asyncio.run_coroutine_threadsafe(_together([each.close() for each in sessions]), loop)
            done.result(END_SECONDS)


async def _together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*coroutines)


class _Connection:
    """A server's session, begun when it is needed, and again when it is over; one for each event loop."""

    def __init__(self, server: Server):
        self.server = server
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, _Session] = WeakKeyDictionary()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """Call a tool, and return its result, see `content_of`.

        Raises:
            ServerError: where the tool or the server failed.
        """
        session = await self._living()
        client = await session.client()
        session.calls += 1
        try:
            result = await client.call_tool(name, dict(arguments))
        except asyncio.CancelledError:
            session.is_suspect = True
            raise
        except Exception as error:
            raise ServerError(self._reason(error, session)) from None
        finally:
            session.calls -= 1
        session.is_suspect = False
        # More than this no policy reads, and it takes its time.
        if result.is_error:
            raise ServerError(_hidden(text_of(result)[:MOST_READ], self.server))
        return content_of(result, lambda text: _hidden(text[:MOST_READ], self.server))

    async def _living(self) -> _Session:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        # A program busy with a call that was given up would let all later ones wait for it. While others are waited
        # for, they show whether it is.
        is_doubtful = session is not None and session.is_suspect and not session.calls
        if is_doubtful and not await session.answers():
            session.end()
        session = self._sessions.get(loop)
        if session is None or session.is_over:
            session = self._sessions[loop] = _Session(self.server)
        return session

    def _reason(self, error: Exception, session: _Session) -> str:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        # Other errors are the server's answer, such as a name that it does not know, or what is wrong with its answer.
        is_closed = isinstance(error, MCPError) and error.code == CONNECTION_CLOSED
        is_alive = not (is_closed or isinstance(error, OSError) or type(error).__name__ in LOST)
        if not is_alive:
            session.end()
        words = f"the server {self.server.name} failed: {one_line(error) or type(error).__name__}"
        return _hidden(words if is_alive else f"{words}; the next call starts it again", self.server)

    async def close(self) -> None:
        """End the session of this loop."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()


def text_of(result: "types.CallToolResult") -> str:
    """Return what a tool returned as text: its texts, one below the other, and what it has else by its kind."""
    parts = [_text_of(block) for block in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def content_of(result: "types.CallToolResult", shown: Callable[[str], str] = str) -> Content:
    """Return what a tool returned, as `text_of` does, or where it has images as a list of parts.

    Args:
        shown: changes texts.
    """
    if not any(map(_is_image, result.content)):
        return shown(text_of(result))
    return [
        {"type": "image", "image": base64.b64decode(block.data), "mime_type": block.mime_type}
        if _is_image(block)
        else {"type": "text", "text": shown(_text_of(block))}
        for block in result.content
    ]


def _is_image(block: object) -> bool:
    return getattr(block, "type", None) == "image"


def _text_of(block: object) -> str:
    text = getattr(block, "text", None)
    if text is None:
        text = getattr(getattr(block, "resource", None), "text", None)
    kind = getattr(block, "mime_type", None) or getattr(block, "uri", None) or getattr(block, "type", "result")
    return text if isinstance(text, str) else f"[{kind}]"


def _hidden(text: str, server: Server) -> str:
    """Return a text without the secrets of a server: of its environment and its headers."""
    for secret in server.secrets:
        # Anything shorter is no secret, see `redact`.
        if len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
    return redact(text)


# ---- tools ----


class MCPTools(Sequence[Tool]):
    """The tools of MCP servers, as a list of functions for `tools=` of `PPOTrainer` and `ToolRunner`.

        tools = MCPTools("servers.json")
        tools = MCPTools({"mcpServers": {"sums": {"command": "python", "args": ["sums.py"]}}})

    All episodes share a session with each server. For servers with a state, such as a browser, `environment_factory`
    has a session for each episode:

        trainer = PPOTrainer(..., environment_factory=tools.environment_factory())

    A name that several servers have becomes `server_name`. Names, descriptions and schemas are the servers' own: read
    them before you train on a server of somebody else, which may say anything to your model. Servers run with your
    rights.

    Args:
        servers: see `read_servers`.
        origin: the flag or argument, in messages.

    Raises:
        InputError: for servers that cannot be read or reached, or have no tools, and where `mcp` is not installed.
    """

    def __init__(self, servers: str | Path | Mapping[str, Any], origin: str = "MCPTools"):
        _import_mcp(origin)
        self._origin = origin
        self.servers = read_servers(servers, origin)
        self._connections = [_Connection(server) for server in self.servers]
        listed = [self._listed(connection, origin) for connection in self._connections]
        try:
            found = run_together(listed)
        except NoLoopError as error:
            raise InputError(f"{origin}: {error}") from None
        for server, tools in zip(self.servers, found, strict=True):
            twice = {tool.name for tool in tools if [each.name for each in tools].count(tool.name) > 1}
            refuse_if(twice, f"{origin}: server {server.name!r} has two tools named {', '.join(sorted(twice))}")
        names = [tool.name for tools in found for tool in tools]
        self._described: list[tuple[str, str, dict[str, Any], int]] = []
        for index, tools in enumerate(found):
            for tool in tools:
                prefix = f"{self.servers[index].name}_" if names.count(tool.name) > 1 else ""
                self._described.append((f"{prefix}{tool.name}", tool.name, _schema(tool, prefix), index))
        self._tools = [self._function(self._connections, *each) for each in self._described]

    def __getitem__(self, index):
        return self._tools[index]

    def __len__(self) -> int:
        return len(self._tools)

    def close(self) -> None:
        """End the sessions; the next call begins another one."""
        run_together([connection.close() for connection in self._connections])

    def environment_factory(self) -> Callable[[], Any]:
        """Return a class of environments, whose instances have sessions of their own, others after each `reset`."""
        described, servers, function = self._described, self.servers, self._function

        class MCPEnvironment:
            def __init__(self):
                self._connections = [_Connection(server) for server in servers]

            async def reset(self, **row: object) -> None:
                await asyncio.gather(*(connection.close() for connection in self._connections))

        add_methods(MCPEnvironment, {each[0]: function(None, *each) for each in described}, self._origin)
        return MCPEnvironment

    @staticmethod
    def _function(
        connections: Sequence[_Connection] | None, shown: str, name: str, schema: dict[str, Any], index: int
    ) -> Tool:
        """Return a tool as a function, or as a method of an `MCPEnvironment`."""
        if connections is None:

            async def tool(self, /, **arguments: object) -> Content:
                return await self._connections[index].call(name, arguments)
        else:

            async def tool(**arguments: object) -> Content:
                return await connections[index].call(name, arguments)

        tool.__name__ = tool.__qualname__ = shown
        tool.__doc__ = schema["function"]["description"]
        tool.json_schema = schema
        return tool

    @staticmethod
    async def _listed(connection: _Connection, origin: str) -> "list[types.Tool]":
        """Return the tools of a server as it describes them."""
        origin, tools, cursor = f"{origin}: server {connection.server.name!r}", [], None
        try:
            client = await (await connection._living()).client()
            async with asyncio.timeout(START_SECONDS):
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if not cursor:
                        break
        except Exception as error:
            words = _hidden(one_line(error) or type(error).__name__, connection.server)
            raise InputError(f"{origin} did not begin: {words}") from None
        refuse_if(not tools, f"{origin} has no tools")
        return tools


def _schema(tool: "types.Tool", prefix: str) -> dict[str, Any]:
    function = {"name": f"{prefix}{tool.name}", "description": tool.description or tool.name}
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _import_mcp(origin: str) -> None:
    try:
        import mcp  # noqa: F401

        # What a program prints besides messages is no news in each line.
        logging.getLogger("mcp.client.stdio").setLevel(logging.CRITICAL)
    except ImportError as error:
        raise InputError(f"{origin} needs the mcp package: pip install hfllm[mcp] ({error})") from None
