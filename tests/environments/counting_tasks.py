"""A taskset of the verifiers package, as an installed one is: a tool with a state, and rewards of what was said."""

import verifiers.v1 as vf
from verifiers.v1.mcp import Toolset, ToolsetConfig


class CountState(vf.State):
    count: int = 0


class CountData(vf.TaskData):
    target: int


class CountTools(Toolset[ToolsetConfig, CountState]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, number: int) -> int:
        """Add to the count."""
        self.state.count += number
        return self.state.count

    @vf.tool
    async def fail(self) -> str:
        """Fail."""
        raise ValueError("never")


class CountTask(vf.Task[CountData, CountState]):
    @classmethod
    def toolsets(cls, config):
        return [CountTools(ToolsetConfig())]

    @vf.reward(weight=2.0)
    async def reached(self, trace) -> float:
        return float(trace.state.count == self.data.target)

    @vf.reward
    async def says(self, trace) -> float:
        return float(str(self.data.target) in trace.last_reply and len(trace.tool_messages) > 0)


class CountTaskset(vf.Taskset[CountTask, vf.TasksetConfig]):
    def load(self):
        for target in (3, 5, 8):
            data = CountData(prompt=f"Count to {target}.", system_prompt="Use the tool.", target=target)
            yield CountTask(data, self.config.task)


__all__ = ["CountTaskset"]
