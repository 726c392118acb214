"""`hfllm rlhf --tools`: the run, and what is refused before anything is trained."""

import json
import sys
from pathlib import Path

import pytest
import rlhf
import torch
from tool_tokenizer import make

import hfllm
from hfllm.data.tokenizer import plain_chat_template
from hfllm.errors import InputError
from hfllm.stages.rlhf.build import checked_tools

SERVER = Path(__file__).parents[1] / "environments" / "mcp_server.py"
TOOLS = '''
def double(number: int) -> int:
    """Double a number.

    Args:
        number: what to double.
    """
    return 2 * number


def undescribed(number: int) -> int:
    return number


class Desk:
    def reset(self, prompt, **columns):
        self.asked = prompt[-1]["content"]
        return " Now."

    def double(self, number: int) -> int:
        """Double a number.

        Args:
            number: what to double.
        """
        return 2 * number


class Game(Desk):
    def get_reward(self):
        return float(len(self.asked))


def own(prompts, completions, completion_ids, action_mask, tools, **columns):
    assert all(each[0]["function"]["name"] == "double" for each in tools)
    return [float(sum(mask) <= len(ids)) for mask, ids in zip(action_mask, completion_ids, strict=True)]


def seen(prompts, environments, **columns):
    asked = [environment.asked + " Now." for environment in environments]
    return [float(one == prompt[-1]["content"]) for one, prompt in zip(asked, prompts)]


class Shop:
    def reset(self, prompt, **columns):
        assert "environment" not in columns

    def buy(self, thing: str) -> str:
        """Buy something.

        Args:
            thing: what to buy.
        """
        return thing


def named(prompts, completions, tools, **columns):
    return [float("add" in [tool["function"]["name"] for tool in each]) for each in tools]


def of_row(prompts, completions, environment, environments, tools, **columns):
    names = {"Game": "double", "Shop": "buy"}
    for name, one, each in zip(environment, environments, tools, strict=True):
        assert type(one).__name__ == name and [tool["function"]["name"] for tool in each] == [names[name]]
    return [1.0] * len(prompts)


def score(prompts, completions, **columns):
    return [float(sum(len(message.get("content") or "") for message in each)) for each in completions]
'''


@pytest.fixture
def flags(tmp_path):
    tokenizer = make()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    hfllm.HfllmForCausalLM(hfllm.HfllmConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"prompt": [{"role": "user", "content": f"Say {number} times 2."}]} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tools.py").write_text(TOOLS)

    def given(tool="double", **more):
        values = {
            "model_name_or_path": tmp_path / "m",
            "dataset_name": tmp_path / "rows.jsonl",
            "output_dir": tmp_path / "out",
            "reward_funcs": f"{tmp_path / 'tools.py'}:score",
            "tools": tool and f"{tmp_path / 'tools.py'}:{tool}",
            "response_length": 24,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "save_strategy": "no",
            **more,
        }
        return [str(word) for name, value in values.items() if value for word in (f"--{name}", value)]

    return given


@pytest.mark.slow
def test_a_run_with_tools_reports_their_calls(flags, tmp_path):
    rlhf.main(*rlhf.parse(flags(max_tool_calling_iterations=2)))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["response_template"]["start_anchor"] == "<|assistant|>"


@pytest.mark.slow
def test_rewards_may_need_what_episodes_alone_have(flags, tmp_path):
    rlhf.main(*rlhf.parse(flags(reward_funcs=f"{tmp_path / 'tools.py'}:own")))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]["proxy_reward_before"] == 1.0


@pytest.mark.slow
def test_a_run_in_environments_needs_no_other_reward(flags, tmp_path):
    flags = flags(tool=None, reward_funcs=None, environment_factory=f"{tmp_path / 'tools.py'}:Game")
    rlhf.main(*rlhf.parse([*flags, "--logging_steps", "1"]))
    state = json.loads((tmp_path / "out" / "report.json").read_text())
    assert state["metrics"]["proxy_reward_before"] >= 10


@pytest.mark.slow
def test_rewards_get_the_environments(flags, tmp_path):
    file = tmp_path / "tools.py"
    rlhf.main(*rlhf.parse(flags(tool=None, environment_factory=f"{file}:Desk", reward_funcs=f"{file}:seen")))
    metrics = json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]
    assert metrics["proxy_reward_before"] == metrics["proxy_reward_after"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("sessions", ["shared", "episode"])
def test_rlhf_takes_servers_of_tools(flags, tmp_path, sessions):
    server = {"command": sys.executable, "args": [str(SERVER)], "env": {"TEST_TOKEN": "verysecret"}}
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"test": server}}))
    more = {"mcp_servers": tmp_path / "servers.json", "mcp_sessions": sessions, "max_steps": 1}
    file = f"{tmp_path / 'tools.py'}:named"
    rlhf.main(*rlhf.parse(flags(tool=None, reward_funcs=file, response_length=16, **more)))
    report = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(report)["metrics"]["proxy_reward_after"] == 1.0
    assert not any("verysecret" in each.read_text(errors="ignore") for each in (tmp_path / "out").rglob("*.*"))


@pytest.mark.slow
def test_a_row_names_its_environment(flags, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"Say {n}."}], "environment": "Game" if n % 2 else "Shop"}
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = flags(tool=None, reward_funcs=f"{tmp_path / 'tools.py'}:of_row", environment_factory="")
    words = ["--environment_factory", *(f"{tmp_path / 'tools.py'}:{name}" for name in ("Game", "Shop"))]
    rlhf.main(*rlhf.parse([*flags, *words]))
    metrics = json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]
    assert metrics["proxy_reward_before"] > 1


def test_tools_that_come_with_the_package_have_short_names(flags, tmp_path):
    tools = ["calculator", "python", f"{tmp_path / 'tools.py'}:double"]
    script_args, _, model_args = rlhf.parse([*flags(tool=None), "--tools", *tools])
    policy_tools = checked_tools(script_args, model_args.model_name_or_path)
    assert [tool.__name__ for tool in policy_tools.functions] == ["calculator", "python", "double"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool": "fly"}, "no function 'fly' in"),
        ({"tool": "undescribed"}, "tools: 'undescribed' has no schema"),
        ({"tools": "lookup:deep.json"}, "--tools lookup:.*deep.json: cannot be read: .*recursion"),
        ({"tools": "nowhere.py:f"}, "--tools nowhere.py:f: no file 'nowhere.py'"),
        (
            {"tools": "lookup_in"},
            "--tools lookup_in: expected calculator, python, lookup:table.json, or path/to/file.py:function",
        ),
        ({"tool": None, "max_tool_calling_iterations": 2}, "--max_tool_calling_iterations 2 cannot be used here"),
        ({"tool": None, "tool_timeout": 2.5}, "--tool_timeout 2.5 cannot be used here"),
        ({"tool": None, "max_tool_result_length": 9}, "--max_tool_result_length 9 cannot be used here"),
        ({"response_length": 120}, "leaves room for 8"),
        ({"tool": None, "environment_factory": "Nowhere"}, "--environment_factory Nowhere: no file"),
        ({"tool": None, "environment_factory": "score"}, "environment_factory: it failed with TypeError"),
        ({"tool": None, "environment_factory": "Desk", "reward_funcs": None}, ":Desk needs a reward: its get_reward"),
        ({"model_name_or_path": None}, "--tools cannot be used here: it needs --model_name_or_path"),
    ],
)
def test_what_cannot_work_is_refused_first(flags, tmp_path, changes, message):
    if changes.get("environment_factory") in ("Desk", "score"):
        changes = {**changes, "environment_factory": f"{tmp_path / 'tools.py'}:{changes['environment_factory']}"}
    if changes.get("tools") == "lookup:deep.json":
        (tmp_path / "deep.json").write_text("[" * 100_000)
        changes = {"tools": f"lookup:{tmp_path / 'deep.json'}"}
    with pytest.raises(InputError, match=message):
        rlhf.main(*rlhf.parse(flags(**changes)))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_whose_template_has_no_tools_is_refused(flags, saved):
    (saved / "chat_template.jinja").write_text(plain_chat_template())
    with pytest.raises(InputError, match="chat template cannot write an assistant's tool_calls"):
        rlhf.main(*rlhf.parse(flags(model_name_or_path=saved)))
