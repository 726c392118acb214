"""Environments of OpenEnv servers (https://github.com/meta-pytorch/OpenEnv), by the client of the `openenv` package.

    trainer = PPOTrainer(..., environment_factory=openenv_factory("http://localhost:8000"))

An action is a call of the tool `step`, whose arguments are the server's action; of a server with tools these are the
episode's. The reward is the sum of what the server pays for its steps.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

from hfllm.environments.episodes import add_methods
from hfllm.environments.side_by_side import run_together
from hfllm.environments.tools import Tool
from hfllm.errors import InputError, one_line, redact, refuse_if

if TYPE_CHECKING:
    from openenv.core.client_types import StepResult

INSTALL = "pip install 'hfllm[openenv]'"
SECONDS = 60.0
# What an observation has beside what the policy reads.
NOT_READ = ("reward", "done", "metadata")
# Fields of an action that a server fills in itself.
NOT_GIVEN = ("metadata",)


def openenv_factory(url: str, reset_columns: tuple[str, ...] = ("seed",)) -> type:
    """Return a class of environments, each with a session of its own on the server.

    Args:
        url: of the server, such as `http://localhost:8000`.
        reset_columns: columns of a row that the server's reset gets, where the row has them.

    Raises:
        InputError: where the package is missing or the server does not answer.
    """
    try:
        from openenv.core.generic_client import GenericEnvClient
        from openenv.core.mcp_client import MCPToolClient
    except ImportError as error:
        raise InputError(f"openenv_factory needs the openenv package: {INSTALL} ({error})") from None
    origin = f"openenv_factory {redact(url)}"
    schemas = _tools_of(origin, url, MCPToolClient)
    client = MCPToolClient if schemas else GenericEnvClient
    methods = {schema["function"]["name"]: _calling(schema) for schema in schemas} or {"step": _stepping(origin, url)}

    class OpenEnvironment(_Session):
        def __init__(self):
            super().__init__(lambda: client(base_url=url), reset_columns)

    add_methods(OpenEnvironment, methods, origin)
    return OpenEnvironment


class _Session:
    """An episode's session on a server."""

    def __init__(self, connect: Any, reset_columns: tuple[str, ...]):
        self._connect, self._reset_columns, self._client = connect, reset_columns, None
        self._reward, self._is_done = 0.0, False

    async def reset(self, **row: object) -> str:
        """Begin an episode, and return the server's first observation."""
        if self._client is not None:
            await self._client.close()
        self._client, self._reward, self._is_done = self._connect(), 0.0, False
        await self._client.connect()
        given = {name: row[name] for name in self._reset_columns if row.get(name) is not None}
        return self._read(await self._client.reset(**given))

    def get_reward(self) -> float:
        """Return the sum of the rewards of the episode's steps."""
        return self._reward

    def _read(self, result: "StepResult[Any]") -> str:
        self._reward += float(result.reward or 0.0)
        self._is_done = bool(result.done)
        return observation_text(result.observation)

    def _check(self) -> None:
        if self._is_done:
            raise RuntimeError("the episode is over")


def observation_text(observation: object) -> str:
    """Return what the policy reads of an observation: its only text, or else all of it as JSON."""
    values = observation.model_dump(mode="json") if hasattr(observation, "model_dump") else observation
    if not isinstance(values, Mapping):
        return str(values)
    read = {name: value for name, value in values.items() if name not in NOT_READ and value is not None}
    (only,) = read.values() if len(read) == 1 else (None,)
    return only if isinstance(only, str) else json.dumps(read, ensure_ascii=False, default=str)


def tool_text(observation: object) -> str:
    """Return the result of a tool: its texts, or what it is.

    Raises:
        ToolFailed: where the tool failed.
    """
    values = observation.model_dump(mode="json") if hasattr(observation, "model_dump") else observation
    if not isinstance(values, Mapping) or "tool_name" not in values:
        return observation_text(observation)
    error, result = values.get("error"), values.get("result")
    if error:
        raise ToolFailed(error.get("message") if isinstance(error, Mapping) else str(error))
    if not isinstance(result, Mapping):
        return str(result)
    texts = [part["text"] for part in result.get("content") or () if isinstance(part, Mapping) and "text" in part]
    return "\n".join(texts) or json.dumps(result.get("data"), ensure_ascii=False, default=str)


class ToolFailed(Exception):
    """A tool of a server failed; the message is for the policy."""


def _tools_of(origin: str, url: str, client: Any) -> list[dict[str, Any]]:
    """Return the schemas of a server's tools; none of a server whose environment takes other actions."""

    async def listed() -> list[Any] | Exception:
        connected = client(base_url=url)
        try:
            await connected.connect()
            await connected.reset()
            return await connected.list_tools()
        except Exception as error:
            return error
        finally:
            await connected.close()

    (tools,) = run_together([listed()])
    if isinstance(tools, Exception):
        # It may be no server at all: what it says of its actions tells.
        _schema_of(origin, url)
        return []
    named = [(tool.name, tool.description or tool.name, tool.input_schema) for tool in tools]
    return [
        {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}
        for name, text, parameters in named
    ]


def _calling(schema: dict[str, Any]) -> Tool:
    name = schema["function"]["name"]

    async def method(self, /, **arguments: object) -> str:
        from openenv.core.env_server.mcp_types import CallToolAction

        self._check()
        self._read(result := await self._client.step(CallToolAction(tool_name=name, arguments=dict(arguments))))
        return tool_text(result.observation)

    method.__name__, method.__doc__, method.json_schema = name, schema["function"]["description"], schema
    return method


def _stepping(origin: str, url: str) -> Tool:
    schema = _schema_of(origin, url)

    async def step(self, /, **action: object) -> str:
        self._check()
        return self._read(await self._client.step(dict(action)))

    properties = {name: each for name, each in schema.get("properties", {}).items() if name not in NOT_GIVEN}
    parameters = {**schema, "properties": properties}
    description = schema.get("description") or "Act in the environment."
    step.json_schema = {
        "type": "function",
        "function": {"name": "step", "description": description, "parameters": parameters},
    }
    return step


def _schema_of(origin: str, url: str) -> dict[str, Any]:
    """Return the JSON schema of a server's actions."""
    refuse_if(not url.startswith(("http://", "https://")), f"{origin}: expected http:// or https://")
    try:
        with urlopen(f"{url.rstrip('/')}/schema", timeout=SECONDS) as response:
            schema = json.load(response)["action"]
    except (URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{origin}: the server does not say what its actions are: {one_line(error)}") from None
    return schema
