"""Environments of verifiers and OpenEnv in our episodes. Each needs its package: run where it is installed."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run_episodes import asking, call

from hfllm.environments.episodes import ToolEnvironment, run_episodes
from hfllm.environments.open_env import observation_text, openenv_factory
from hfllm.environments.verifiers_tasks import VerifiersTasks
from hfllm.errors import InputError


def play(environment, tokenizer, rows, *texts):
    rows = environment.begin(rows)
    episodes = run_episodes([[5]] * len(rows), asking(tokenizer, *texts), environment, 400)
    return rows, episodes


def test_without_the_packages_the_message_says_how_to_install_them(monkeypatch):
    for name in ("verifiers", "verifiers.v1.utils.loaders", "openenv", "openenv.core.generic_client"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"VerifiersTasks needs .* package: pip install 'hfllm\[verifiers\]'"):
        VerifiersTasks("any")
    with pytest.raises(InputError, match=r"openenv_factory needs the openenv package: pip install 'hfllm\[openenv\]'"):
        openenv_factory("http://localhost:1")


# ---- verifiers ----


@pytest.fixture
def tasks():
    pytest.importorskip("verifiers")
    return VerifiersTasks("counting_tasks")


def test_a_taskset_is_played_and_paid(tasks, tool_tokenizer):
    rows = tasks.rows()
    assert [row["task"] for row in rows] == [0, 1, 2]
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Use the tool."},
        {"role": "user", "content": "Count to 3."},
    ]
    ends = [tool_tokenizer.eos_token_id]
    environment = ToolEnvironment([], tool_tokenizer, ends, factory=tasks.environment_factory(), timeout=30)
    assert [schema["function"]["name"] for schema in environment.schemas] == ["add", "fail"]
    for _ in range(2):
        texts = [call("add", '{"number": 1}'), call("fail", "{}"), call("add", '{"number": 2}'), "It is 3.<|end|>"]
        begun, episodes = play(environment, tool_tokenizer, rows, *texts)
        results = [[each["content"] for each in episode.messages if each["role"] == "tool"] for episode in episodes]
        # The state lasts an episode, and no longer.
        assert all(each[0] == "1" and "fail" in each[1] and each[2] == "3" for each in results)
        rewards = tasks.reward(
            prompts=[row["prompt"] for row in begun],
            completions=[episode.messages for episode in episodes],
            task=[row["task"] for row in begun],
            environments=environment.states.current,
        )
        assert rewards == [3.0, 0.0, 0.0]


@pytest.mark.slow
def test_ppo_learns_from_a_taskset(tasks, make_model, tool_tokenizer, tmp_path):
    from datasets import Dataset

    from hfllm import PPOConfig, PPOTrainer

    args = PPOConfig(str(tmp_path), response_length=24, max_steps=2, per_device_train_batch_size=2, report_to="none")
    trainer = PPOTrainer(
        model=make_model(vocab_size=len(tool_tokenizer), max_position_embeddings=256),
        args=args,
        train_dataset=Dataset.from_list(tasks.rows() * 4),
        processing_class=tool_tokenizer,
        environment_factory=tasks.environment_factory(),
        reward_funcs=tasks.reward,
    )
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("taskset", "message"), [("no_such_tasks", "the taskset 'no_such_tasks' cannot be loaded"), ("json", "cannot be")]
)
def test_what_is_no_taskset_is_refused(taskset, message):
    pytest.importorskip("verifiers")
    with pytest.raises(InputError, match=message):
        VerifiersTasks(taskset)


# ---- OpenEnv ----


@pytest.fixture(scope="module", params=["actions", "tools"])
def server(request):
    pytest.importorskip("openenv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = Path(__file__).with_name("openenv_server.py")
    process = subprocess.Popen([sys.executable, str(file), request.param, str(port)])
    for _ in range(300):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield request.param, f"http://127.0.0.1:{port}"
    process.kill()


def test_a_server_is_played_and_paid(server, tool_tokenizer):
    kind, url = server
    ends = [tool_tokenizer.eos_token_id]
    environment = ToolEnvironment([], tool_tokenizer, ends, factory=openenv_factory(url), timeout=30)
    name = {"actions": "step", "tools": "add"}[kind]
    (schema,) = [each["function"] for each in environment.schemas if each["function"]["name"] == name]
    assert schema["parameters"]["properties"]["number"]["type"] == "integer"
    rows = [{"prompt": [{"role": "user", "content": "Count."}], "seed": seed} for seed in (1, 2)]
    for _ in range(2):
        begun, episodes = play(
            environment, tool_tokenizer, rows, call(name, '{"number": 2}'), call(name, '{"number": 3}'), "Done.<|end|>"
        )
        results = [[each["content"] for each in episode.messages if each["role"] == "tool"] for episode in episodes]
        assert results == [["2", "5"]] * 2
        if kind == "actions":
            assert [row["prompt"][0]["content"] for row in begun] == ["Count.seed 1", "Count.seed 2"]
            (reward,) = environment.states.rewards
            assert reward(environment.states.current) == [5.0, 5.0]


def test_an_error_of_a_tool_is_a_failed_call(server, tool_tokenizer):
    kind, url = server
    ends = [tool_tokenizer.eos_token_id]
    environment = ToolEnvironment([], tool_tokenizer, ends, factory=openenv_factory(url), timeout=30)
    rows = [{"prompt": [{"role": "user", "content": "Count."}]}]
    name = {"actions": "step", "tools": "add"}[kind]
    _, (episode,) = play(environment, tool_tokenizer, rows, call(name, '{"number": "x"}'), "Done.<|end|>")
    reason = {"actions": "VALIDATION_ERROR", "tools": "valid integer"}[kind]
    assert episode.failures == 1 and reason in episode.messages[1]["content"]


def test_what_is_no_server_is_refused():
    pytest.importorskip("openenv")
    with pytest.raises(InputError, match=r"openenv_factory http://127.0.0.1:9: the server does not say"):
        openenv_factory("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({"message": "hi", "reward": 1.0, "done": False}, "hi"),
        ({"a": 1, "b": None, "c": "x"}, '{"a": 1, "c": "x"}'),
        ({"count": 3}, '{"count": 3}'),
        ("plain", "plain"),
        ({}, "{}"),
    ],
)
def test_an_observation_is_read_as_text(observation, text):
    assert observation_text(observation) == text
