"""Tools of real MCP servers: over standard input and output and over HTTP, with errors, ends and restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run_episodes import asking, call

from hfllm.environments import mcp_tools
from hfllm.environments.episodes import ToolEnvironment, run_episodes
from hfllm.environments.mcp_tools import MCPTools, read_servers
from hfllm.environments.tools import ToolBox, answers_of
from hfllm.errors import HIDDEN, InputError

SERVER = Path(__file__).with_name("mcp_server.py")
NAMES = ["add", "keep", "fail", "wait", "block", "end", "who", "draw"]


def entry(*arguments, **more):
    return {"command": sys.executable, "args": [str(SERVER), *arguments], **more}


def calling(box, name, **arguments):
    message, has_failed = box.call({"function": {"name": name, "arguments": arguments}})
    return message["content"], has_failed


@pytest.fixture(scope="module")
def over_http():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)])
    for _ in range(200):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield {"url": f"http://127.0.0.1:{port}/mcp", "headers": {"Authorization": "Bearer verysecret"}}
    process.kill()


@pytest.fixture
def make():
    made = []

    def make(timeout=20.0, **servers):
        made.append(MCPTools({"mcpServers": servers or {"test": entry()}}))
        return made[-1], ToolBox(made[-1], timeout)

    yield make
    for tools in made:
        tools.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_a_servers_tools_are_called_on_one_session(make, over_http, kind):
    tools, box = make(test=entry() if kind == "stdio" else over_http)
    assert [tool.__name__ for tool in tools] == NAMES
    described = box.schemas[0]["function"]
    assert described["name"] == "add" and described["description"] == "Add two numbers."
    assert described["parameters"]["properties"]["a"]["type"] == "integer"
    assert calling(box, "add", a=2, b=3) == ("5", False)
    word = f"{kind}1"
    assert calling(box, "keep", word=word) == (word, False)
    assert calling(box, "keep", word="more") == (f"{word} more", False)
    assert calling(box, "draw") == ("[image/png]", False)
    (part,), has_failed = calling(ToolBox(tools, reads_images=True), "draw")
    assert part["image"].size == (12, 8) and part["image"].getpixel((5, 5)) == (255, 0, 0) and not has_failed
    content, has_failed = calling(box, "add", a="two", b=3)
    assert has_failed and "valid integer" in content
    content, has_failed = calling(box, "fail", reason="no")
    assert has_failed and "Error executing tool fail" in content
    content, has_failed = calling(box, "fly")
    assert has_failed and "Tool fly not found" in content


@pytest.mark.slow
def test_calls_of_several_episodes_run_side_by_side(make):
    _, box = make()
    calls = [[{"function": {"name": "wait", "arguments": {"seconds": 0.5}}}] for _ in range(64)]
    began = time.monotonic()
    answers = answers_of([(box, 20.0, each) for each in calls])
    assert [each.messages[0]["content"] for each in answers] == ["waited"] * 64
    # One after another they would take 32 seconds.
    assert time.monotonic() - began < 16


@pytest.mark.slow
def test_a_server_that_ends_is_started_again(make):
    _, box = make()
    assert calling(box, "keep", word="one")[0] == "one"
    content, has_failed = calling(box, "end")
    assert has_failed and "the server test failed" in content and "the next call starts it again" in content
    assert calling(box, "keep", word="two") == ("two", False)


@pytest.mark.slow
def test_a_killed_server_fails_one_call(make):
    _, box = make()
    os.kill(int(calling(box, "who")[0].split()[0]), signal.SIGKILL)
    assert calling(box, "add", a=1, b=1)[1]
    assert calling(box, "add", a=1, b=1) == ("2", False)


@pytest.mark.slow
def test_a_call_given_up_costs_its_limit_once(make, monkeypatch):
    monkeypatch.setattr(mcp_tools, "ALIVE_SECONDS", 0.2)
    _, box = make(timeout=0.5)
    assert calling(box, "keep", word="one") == ("one", False)
    assert calling(box, "wait", seconds=60)[1]
    # The server is not blocked, so the session is the same.
    assert calling(box, "keep", word="two") == ("one two", False)
    assert calling(box, "block", seconds=60)[1]
    box.timeout = 20
    assert calling(box, "keep", word="three") == ("three", False)


@pytest.mark.slow
def test_while_others_are_waited_for_a_server_is_not_ended(make, monkeypatch):
    monkeypatch.setattr(mcp_tools, "ALIVE_SECONDS", 0.1)
    _, box = make()
    late = ToolBox([tool for tool in box.tools.values() if tool.__name__ == "wait"], timeout=0.3)
    assert calling(box, "keep", word="one") == ("one", False)
    turns = [(late, 20.0, [{"function": {"name": "wait", "arguments": {"seconds": 60}}}])]
    healthy = ([("block", {"seconds": 1.0})], [("wait", {"seconds": 1.5}), ("keep", {"word": "two"})])
    for calls in healthy:
        named = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
        turns.append((box, 20.0, named))
    answers = answers_of(turns)
    assert [[each["content"] for each in answer.messages] for answer in answers[1:]] == [
        ["blocked"],
        ["waited", "one two"],
    ]


@pytest.mark.slow
def test_a_server_over_http_that_ends_is_reached_again(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start():
        process = subprocess.Popen([sys.executable, str(SERVER), str(port)])
        for _ in range(200):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    return process
            time.sleep(0.1)
        raise AssertionError

    process = start()
    tools = MCPTools({"mcpServers": {"test": {"url": f"http://127.0.0.1:{port}/mcp"}}})
    box = ToolBox(tools, 20.0)
    assert calling(box, "keep", word="one") == ("one", False)
    process.kill()
    process.wait()
    assert calling(box, "keep", word="two")[1]
    process = start()
    content, has_failed = calling(box, "keep", word="three")
    if has_failed:
        content, has_failed = calling(box, "keep", word="three")
    assert (content, has_failed) == ("three", False)
    tools.close()
    process.kill()


@pytest.mark.slow
def test_no_message_shows_a_secret(make, monkeypatch):
    monkeypatch.setenv("OF_TESTS", "verysecret")
    env = {"TEST_TOKEN": "${OF_TESTS}", "SEEN": "${UNSET:-everybody}"}
    tools, box = make(test=entry(env=env, cwd=str(SERVER.parent)))
    content, _ = calling(box, "who")
    assert content.split()[1:] == [HIDDEN, "everybody", str(SERVER.parent)]
    assert "verysecret" not in repr(tools.servers)


@pytest.mark.slow
def test_no_message_shows_a_secret_of_the_arguments(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefsecret123")
    program = "import sys; sys.exit('refused: ' + ' '.join(sys.argv[1:]))"
    for arguments in (["${MY_TOKEN}"], ["--api-key", "abcdefsecret123"], ["--token=abcdefsecret123"]):
        servers = {"mcpServers": {"test": {"command": sys.executable, "args": ["-c", program, *arguments]}}}
        with pytest.raises(InputError, match="refused: ") as error:
            MCPTools(servers)
        assert "abcdefsecret123" not in f"{error.value} {read_servers(servers)!r}"


def test_an_argument_after_a_program_with_such_a_name_is_no_secret():
    entry = {"command": sys.executable, "args": ["-m", "auth-server", "/data/projects", "--token", "abcdefsecret123"]}
    (server,) = read_servers({"mcpServers": {"test": entry}})
    assert server.secrets == ["abcdefsecret123"]


@pytest.mark.slow
def test_a_name_of_several_servers_has_theirs_before_it(make):
    tools, box = make(one=entry(), two=entry())
    assert [tool.__name__ for tool in tools] == [f"{server}_{name}" for server in ("one", "two") for name in NAMES]
    assert box.schemas[-8]["function"]["name"] == "two_add"
    assert calling(box, "two_keep", word="b") == ("b", False)
    assert calling(box, "one_keep", word="a") == ("a", False)


@pytest.mark.slow
def test_each_episode_may_have_a_session_of_its_own(make, tool_tokenizer):
    factory = make()[0].environment_factory()
    environment = ToolEnvironment([], tool_tokenizer, [tool_tokenizer.eos_token_id], factory=factory, timeout=20)
    rows = [{"prompt": [{"role": "user", "content": "Keep."}]} for _ in range(2)]

    def play():
        environment.begin(rows)
        texts = [call("keep", f'{{"word": "{word}"}}') for word in ("a", "b")]
        policy = asking(tool_tokenizer, *texts, "Done.<|end|>")
        episodes = run_episodes([[5]] * len(rows), policy, environment, 400)
        return [[each["content"] for each in episode.messages if each["role"] == "tool"] for episode in episodes]

    # The second rollout has other sessions, with the instances of the first.
    assert play() == play() == [["a", "a b"]] * 2
    environment.states.begin([])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wait", "block"])
def test_a_killed_process_leaves_no_server(name):
    script = f"""
import sys
from hfllm.environments.mcp_tools import MCPTools
from hfllm.environments.tools import ToolBox
box = ToolBox(MCPTools({{"mcpServers": {{"test": {entry()!r}}}}}), 100)
print(box.call({{"function": {{"name": "who", "arguments": {{}}}}}})[0]["content"].split()[0], flush=True)
box.call({{"function": {{"name": {name!r}, "arguments": {{"seconds": 100}}}}}})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server = int(process.stdout.readline())
    time.sleep(0.5)
    process.kill()
    process.wait()
    for _ in range(100):
        if not is_running(server):
            return
        time.sleep(0.1)
    raise AssertionError(f"{server} still runs")


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- what is refused ----


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ({}, 'expected {"mcpServers"'),
        ({"mcpServers": {}}, 'expected {"mcpServers"'),
        ({"mcpServers": {"a": 3}}, "server 'a': expected an object with command or url, got 3"),
        ({"mcpServers": {"a": {}}}, "server 'a': expected either command or url, got neither"),
        ({"mcpServers": {"a": {"command": "x", "url": "y"}}}, "got command, url"),
        ({"mcpServers": {"a": {"command": "no-such-program"}}}, "there is no program 'no-such-program'"),
        ({"mcpServers": {"a": {"command": sys.executable, "args": "x"}}}, "args must be a list of texts, got 'x'"),
        ({"mcpServers": {"a": {"command": sys.executable, "args": [3]}}}, "command must be a text, got int"),
        ({"mcpServers": {"a": {"command": sys.executable, "env": {"A": 1}}}}, "env: A must be a text, got int"),
        ({"mcpServers": {"a": {"command": sys.executable, "cwd": "/nowhere"}}}, "cwd '/nowhere' is no folder"),
        ({"mcpServers": {"a": {"url": "ftp://a"}}}, "url must begin with http:// or https://"),
        ({"mcpServers": {"a": {"type": "sse", "url": "http://a"}}}, "type 'sse' is not supported"),
        ({"mcpServers": {"a": {"url": "http://a/${NO_SUCH_NAME}"}}}, "variable NO_SUCH_NAME is not set"),
        ({"mcpServers": {"a": {"command": "x", "disabled": True}}}, "all servers are disabled"),
    ],
)
def test_files_that_name_no_servers_are_refused(servers, message, tmp_path):
    with pytest.raises(InputError) as error:
        read_servers(servers)
    assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "servers.json").write_text(json.dumps(servers))
    with pytest.raises(InputError) as error:
        read_servers(tmp_path / "servers.json", "--mcp_servers")
    assert message in str(error.value) and f"--mcp_servers {tmp_path / 'servers.json'}" in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[" * 100_000])
def test_unreadable_files_are_refused(text, tmp_path):
    if text is not None:
        (tmp_path / "servers.json").write_text(text)
    with pytest.raises(InputError, match=r"--mcp_servers .*servers\.json: cannot be read"):
        read_servers(tmp_path / "servers.json", "--mcp_servers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"command": sys.executable, "args": ["-c", "import sys; sys.exit('it is closed')"]}, "it is closed"),
        ({"command": sys.executable, "args": ["-c", "print('hello')"]}, "server 'test' did not begin"),
        ({"url": "http://127.0.0.1:9/mcp"}, "server 'test' did not begin"),
    ],
)
def test_servers_that_do_not_begin_are_refused(server, message):
    with pytest.raises(InputError) as error:
        MCPTools({"mcpServers": {"test": server}})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reset", "get_reward", "_hidden", "__init__"])
def test_tools_with_the_names_of_an_environments_own_are_refused(make, name):
    tools, _ = make()
    tools._described = [(name, *tools._described[0][1:])]
    with pytest.raises(InputError, match=f"a tool is named '{name}', which an environment has itself"):
        tools.environment_factory()


def test_a_program_is_found_from_the_folder_of_the_server(tmp_path):
    (tmp_path / "server.sh").write_text("#!/bin/sh")
    (tmp_path / "server.sh").chmod(0o755)
    entry = {"command": "./server.sh", "cwd": str(tmp_path)}
    (server,) = read_servers({"mcpServers": {"test": entry}})
    assert server.command == (str(tmp_path / "server.sh"),)
    with pytest.raises(InputError, match=r"there is no program '.*server\.sh'"):
        read_servers({"mcpServers": {"test": {"command": "./server.sh"}}})


@pytest.mark.slow
def test_without_a_free_file_a_session_says_so(monkeypatch):
    def full():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(mcp_tools.tempfile, "TemporaryFile", full)
    with pytest.raises(InputError, match=r"did not begin: .*Too many open files"):
        MCPTools({"mcpServers": {"test": entry()}})


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(InputError, match=r"--mcp_servers needs the mcp package: pip install hfllm\[mcp\]"):
        MCPTools({"mcpServers": {}}, "--mcp_servers")
