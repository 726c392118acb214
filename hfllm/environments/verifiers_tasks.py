"""Tasks of the `verifiers` package (0.4, https://github.com/PrimeIntellect-ai/verifiers): prompts, tools and rewards.

    tasks = VerifiersTasks("my-taskset")
    trainer = PPOTrainer(
        ..., train_dataset=tasks.rows(), environment_factory=tasks.environment_factory(), reward_funcs=tasks.reward
    )

Episodes are those of `PPOTrainer` in place of the package's harness: a task's tool servers run in this process, and
its rewards read a trace of what was said. Tasks that need a container or a harness of their own are refused.
"""

import itertools
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message
from hfllm.environments.episodes import add_methods
from hfllm.environments.side_by_side import run_together
from hfllm.environments.tools import Content, Tool
from hfllm.errors import InputError, one_line, refuse_if

if TYPE_CHECKING:
    from verifiers.v1.mcp import Toolset
    from verifiers.v1.task import Task
    from verifiers.v1.taskset import Taskset
    from verifiers.v1.trace import Trace

INSTALL = "pip install 'hfllm[verifiers]'"
# The column of a task's number.
NUMBER = "task"


class VerifiersTasks:
    """The tasks of a taskset.

    Args:
        taskset: its id, as of an installed environment package, or a `Taskset`.
        num_tasks: the first tasks; by default all.

    Raises:
        InputError: where the package or the taskset is missing, or a task needs more than prompts, tools and rewards.
    """

    def __init__(self, taskset: "Taskset | str", num_tasks: int | None = None):
        try:
            from verifiers.v1.utils.loaders import load_taskset, taskset_config_type
        except ImportError as error:
            raise InputError(f"VerifiersTasks needs the verifiers package: {INSTALL} ({error})") from None
        if isinstance(taskset, str):
            try:
                taskset = load_taskset(taskset_config_type(taskset)(id=taskset))
            except Exception as error:
                raise InputError(
                    f"VerifiersTasks: the taskset {taskset!r} cannot be loaded: {one_line(error)}"
                ) from None
        is_endless = num_tasks is None and not taskset.bounded
        refuse_if(is_endless, "VerifiersTasks: the taskset has no end: give num_tasks")
        self.taskset, self.tasks = taskset, list(itertools.islice(taskset, num_tasks))
        refuse_if(not self.tasks, "VerifiersTasks: the taskset has no tasks")
        for task in self.tasks:
            needs = "a container" if task.NEEDS_CONTAINER or task.data.image else None
            needs = needs or (None if task.data.prompt else "a prompt of a simulated user")
            refuse_if(needs, f"VerifiersTasks: task {task.data.idx} needs {needs}, which only the package's runs have")

    def rows(self) -> list[dict[str, Any]]:
        """Return the tasks as rows: their prompts, and in `task` their numbers, which choose their environments."""
        return [{"prompt": _prompt_of(task), NUMBER: index} for index, task in enumerate(self.tasks)]

    def environment_factory(self) -> type:
        """Return a class of environments with the tools of the taskset, a trace for each.

        Raises:
            InputError: where it has no tools: its rows need no environment then.
        """
        from verifiers.v1.state import state_cls

        tasks, of_taskset = self.tasks, self.taskset

        class VerifiersEnvironment:
            def __init__(self):
                self._toolsets: list[Toolset] = []
                self._state: Any = None

            async def reset(self, task: int, **columns: object) -> None:
                self._task, self._toolsets = tasks[task], _toolsets_of(of_taskset)
                self._state = state_cls(type(self._task))()
                for toolset in self._toolsets:
                    _share_state(toolset, self)
                    await toolset.setup()
                    await toolset.setup_task(self._task.data)

        described = _described(_toolsets_of(of_taskset))
        refuse_if(not described, "VerifiersTasks: the taskset has no tools: leave environment_factory out")
        methods = {each[2]["function"]["name"]: _method_of(*each) for each in described}
        add_methods(VerifiersEnvironment, methods, "VerifiersTasks")
        return VerifiersEnvironment

    def reward(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        task: Sequence[int],
        environments: Sequence[Any] = (),
        **columns: object,
    ) -> list[float]:
        """Return the weighted rewards of the tasks for what was said, as the package adds them up."""
        states = [environment._state for environment in environments] or [None] * len(completions)
        traces = [
            trace_of(self.tasks[number], prompt, completion, state)
            for number, prompt, completion, state in zip(task, prompts, completions, states, strict=True)
        ]
        run_together([self.tasks[number].score(trace) for number, trace in zip(task, traces, strict=True)])
        return [float(trace.reward) for trace in traces]


def _prompt_of(task: "Task") -> list[Message]:
    data = task.data
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return [*system, *(message.model_dump(exclude_none=True) for message in data.prompt)]


# ---- tools ----


def _toolsets_of(taskset: "Taskset") -> "list[Toolset]":
    kind = type(taskset)
    return [*kind.toolsets(taskset.config), *kind.task_type().toolsets(taskset.config.task)]


def _share_state(toolset: "Toolset", environment: Any) -> None:
    """Let a tool server in this process work on its episode's state, which it has from a server else."""

    async def pull() -> Any:
        return environment._state

    async def push(before: bytes) -> None:
        pass

    toolset._pull_state, toolset._push_state = pull, push


def _described(toolsets: "Sequence[Toolset]") -> list[tuple[int, str, dict[str, Any]]]:
    """Return for each tool the index of its server, its name there, and its schema."""
    (listed,) = run_together([_listed(toolsets)])
    result = []
    for index, (toolset, tools) in enumerate(zip(toolsets, listed, strict=True)):
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for tool in tools:
            function = {"name": f"{prefix}{tool.name}", "description": tool.description or tool.name}
            schema = {"type": "function", "function": {**function, "parameters": tool.input_schema}}
            result.append((index, tool.name, schema))
    return result


async def _listed(toolsets: "Sequence[Toolset]") -> list[list[Any]]:
    return [list(await _server_of(toolset).list_tools()) for toolset in toolsets]


def _server_of(toolset: "Toolset") -> Any:
    from mcp.server.mcpserver import MCPServer

    server = MCPServer(toolset.server_name or type(toolset).__name__)
    toolset.register(server)
    return server


def _method_of(index: int, name: str, schema: dict[str, Any]) -> Tool:
    async def method(self, /, **arguments: object) -> Content:
        from mcp import Client

        from hfllm.environments.mcp_tools import ServerError, content_of, text_of

        async with Client(_server_of(self._toolsets[index])) as client:
            result = await client.call_tool(name, arguments)
        if result.is_error:
            raise ServerError(text_of(result))
        return content_of(result)

    method.__name__, method.__doc__, method.json_schema = schema["function"]["name"], name, schema
    return method


# ---- traces ----


def trace_of(
    task: "Task", prompt: Sequence[Message], completion: Sequence[Message] | str, state: object = None
) -> "Trace":
    """Return an episode as the package's trace, for a task's rewards.

    Args:
        state: of the episode; by default a new one.
    """
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.graph import prepare_turn
    from verifiers.v1.runtimes import SubprocessConfig
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask
    from verifiers.v1.types import AssistantMessage, Response

    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    trace = Trace(
        task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        state=state if state is not None else state_cls(type(task))(),
        agent=AgentInfo(config=AgentConfig(runtime=SubprocessConfig())),
    )
    numbered = _numbered([*prompt, *messages])
    for place, one in enumerate(numbered):
        if place >= len(prompt) and isinstance(one, AssistantMessage):
            settings = {"id": str(place), "created": 0, "model": "policy", "finish_reason": "stop"}
            prepare_turn(trace, numbered[:place]).commit(Response(message=one, **settings))
    trace.is_completed = trace.ok = True
    return trace


def _numbered(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return messages as the package's: calls have numbers, and a result has that of the first call without one."""
    from verifiers.v1 import types

    result, waiting, count = [], deque[str](), 0
    for message in messages:
        role, content = message["role"], message.get("content")
        if role == "tool":
            number = waiting.popleft() if waiting else "call"
            result.append(types.ToolMessage(tool_call_id=number, content=content, name=message.get("name")))
        elif role != "assistant":
            result.append({"system": types.SystemMessage, "user": types.UserMessage}[role](content=content))
        else:
            calls = []
            for call in message.get("tool_calls") or []:
                function, count = call.get("function", call), count + 1
                given = function.get("arguments")
                arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                calls.append(types.ToolCall(id=f"call-{count}", name=function["name"], arguments=arguments))
            waiting = deque(call.id for call in calls)
            said = {"content": content or None, "reasoning_content": message.get("reasoning_content")}
            result.append(types.AssistantMessage(**said, tool_calls=calls or None))
    return result
