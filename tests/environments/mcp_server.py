"""A server of tools for the tests: `python mcp_server.py` over standard input and output, or `... PORT` over HTTP."""

import io
import os
import sys
import time

import anyio
from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("test", log_level="ERROR")
kept: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def keep(word: str) -> str:
    """Keep a word, and say all."""
    kept.append(word)
    return " ".join(kept)


@server.tool()
def fail(reason: str) -> str:
    """Fail."""
    raise ValueError(reason)


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await anyio.sleep(seconds)
    return "waited"


@server.tool()
async def block(seconds: float) -> str:
    """Wait, and let all others wait."""
    time.sleep(seconds)
    return "blocked"


@server.tool()
def end() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def who() -> str:
    """Say the process, and a variable of the environment."""
    return f"{os.getpid()} {os.environ.get('TEST_TOKEN')} {os.environ.get('SEEN')} {os.getcwd()}"


@server.tool()
def draw() -> Image:
    """Draw."""
    from PIL import Image as Picture

    stream = io.BytesIO()
    Picture.new("RGB", (12, 8), "red").save(stream, "PNG")
    return Image(data=stream.getvalue(), format="png")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
