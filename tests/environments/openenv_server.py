"""A server of OpenEnv for the tests, of actions or of tools: `python openenv_server.py actions PORT`."""

import sys

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Count(Action):
    """Add to the count."""

    number: int


class Counted(Observation):
    message: str = ""


class Counting(Environment[Count, Counted, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.count = 0
        return Counted(message=f"seed {seed}")

    def step(self, action, timeout_s=None, **kwargs):
        self.count += action.number
        return Counted(message=str(self.count), reward=float(action.number), done=self.count >= 100)

    @property
    def state(self):
        return State(episode_id="one", step_count=0)


class WithTools(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        server, self.count = FastMCP("count"), 0

        @server.tool
        def add(number: int) -> int:
            """Add to the count."""
            self.count += number
            return self.count

        super().__init__(server)

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.count = 0
        return Observation()

    def _step_impl(self, action, timeout_s=None, **kwargs):
        raise ValueError("tools alone")

    @property
    def state(self):
        return State(episode_id="one", step_count=0)


if __name__ == "__main__":
    kinds = {"actions": (Counting, Count, Counted), "tools": (WithTools, CallToolAction, CallToolObservation)}
    app = create_fastapi_app(*kinds[sys.argv[1]], max_concurrent_envs=8)
    uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
