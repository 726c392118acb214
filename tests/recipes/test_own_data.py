"""Recipes on data of the user's own: what is learned, what is left out, and what is refused before training."""

import json

import pytest
import reward
import rlhf
import sft
import torch
import trl
from transformers import AutoTokenizer

from hfllm.errors import InputError

MODEL_ROWS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}] * 2}
    for word in ("red", "blue", "one", "two", "three", "four", "five", "six")
]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def flags(saved, tmp_path):
    def make(*rows, **more):
        values = {
            "model_name_or_path": saved,
            "dataset_name": jsonl(tmp_path / "rows.jsonl", *rows),
            "output_dir": tmp_path / "out",
            "max_steps": 1,
            "save_strategy": "no",
            "per_device_train_batch_size": 8,
            **more,
        }
        return [str(word) for name, value in values.items() for word in (f"--{name}", value)]

    return make


@pytest.fixture
def batches(monkeypatch):
    """The first batch of each training."""
    seen, train = [], trl.SFTTrainer.train

    def spy(self, *args, **kwargs):
        seen.append(next(iter(self.get_train_dataloader())))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "train", spy)
    return seen


def learned(tokenizer, labels):
    """The texts that a batch learns, one after the other."""
    text = "".join(tokenizer.decode(token) if token != -100 else "\n" for row in labels for token in [*row, -100])
    return sorted(part for part in text.split("\n") if part)


def run(recipe, words):
    return recipe.main(*recipe.parse(words))


ANSWERS = sorted(f"{row['messages'][1]['content']}<|end|>" for row in MODEL_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "times"),
    [
        ({}, 2),
        ({"loss_on": "last"}, 1),
        ({"assistant_only_loss": "true"}, 2),
        ({"packing": "true", "max_length": 64}, 2),
        ({"padding_free": "true"}, 2),
    ],
)
def test_answers_are_learned(flags, batches, saved, tmp_path, more, times):
    held_out = jsonl(tmp_path / "held_out.jsonl", *MODEL_ROWS[:2])
    metrics = run(sft, flags(*MODEL_ROWS, eval_dataset_name=held_out, **more))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    if "packing" not in more:
        assert learned(tokenizer, batches[0]["labels"]) == sorted(ANSWERS * times)
    else:
        # A packed row is a whole of rows: every answer of its conversations is learned.
        shown = tokenizer.decode([token for row in batches[0]["input_ids"] for token in row])
        assert len(learned(tokenizer, batches[0]["labels"])) == shown.count("<|assistant|>") > 2
    assert metrics["examples"] == 8 and "dropped_rows" not in metrics


@pytest.mark.slow
def test_rows_side_by_side_and_one_after_the_other_give_one_loss(flags, tmp_path):
    held_out = jsonl(tmp_path / "held_out.jsonl", *MODEL_ROWS[:3])
    losses = []
    for number, more in enumerate(({}, {"padding_free": "true"}, {"packing": "true"})):
        metrics = run(
            sft,
            flags(*MODEL_ROWS, eval_dataset_name=held_out, **more, max_length=256, output_dir=tmp_path / str(number)),
        )
        held_out_losses = [
            metrics[f"held_out_loss_{name}"] for name in ("before", "before_se", "after", "change_se", "n")
        ]
        losses.append((metrics["train_loss"], metrics["eval_loss"], *held_out_losses))
    assert torch.allclose(torch.tensor(losses), torch.tensor(losses[:1]), atol=1e-4)


@pytest.mark.slow
def test_every_token_is_learned_if_asked(flags, batches):
    run(sft, flags(*MODEL_ROWS, completion_only_loss="false"))
    labels, mask = batches[0]["labels"], batches[0]["attention_mask"]
    assert torch.equal(labels != -100, mask.bool())


def test_what_is_left_out_is_counted(flags, capsys, tmp_path):
    long = {"instruction": "word " * 300, "output": "red"}
    cut = {"instruction": "Say much.", "output": "red " * 300}
    held_out = jsonl(tmp_path / "held_out.jsonl", *MODEL_ROWS[:2])
    rows = [long, *MODEL_ROWS, cut, {"instruction": "Say nothing.", "output": ""}]
    metrics = run(sft, flags(*rows, max_length=64, eval_dataset_name=held_out))
    said = capsys.readouterr().out
    name = tmp_path / "rows.jsonl"
    assert f"{name}: 1 of 11 rows dropped: 1 without an answer ({name}, line 11)\n" in said
    expected = f"1 of 10 rows dropped: 1 with no answer within --max_length 64 ({name}, line 1)"
    assert f"training rows: {expected}\n" in said and "training rows: 1 of 10 rows cut to --max_length 64\n" in said
    assert (metrics["examples"], metrics["dropped_rows"]) == (9, 1)


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr("transformers.Trainer.train", train)


def complaint(recipe, words):
    with pytest.raises(InputError) as error:
        run(recipe, words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_sft_says_what_it_cannot_learn(flags, tmp_path, saved):
    long = {"instruction": "word " * 300, "output": "red"}
    held_out = jsonl(tmp_path / "held_out.jsonl", long)
    message = complaint(sft, flags(*MODEL_ROWS, eval_dataset_name=held_out))
    assert message.startswith("held-out rows: nothing to learn is left: 1 of 1 rows dropped: 1 with no answer within")
    message = complaint(sft, flags(*MODEL_ROWS, max_length=4))
    assert message.startswith("training rows: nothing to learn is left: 7 of 7 rows dropped")
    both = {"completion_only_loss": "false", "loss_on": "last"}
    assert "--loss_on cannot be used here" in complaint(sft, flags(*MODEL_ROWS, **both))
    assert "--eos_token '<nowhere>'" in complaint(sft, flags(*MODEL_ROWS, eos_token="<nowhere>"))
    assert "--chat_template_path nowhere" in complaint(sft, flags(*MODEL_ROWS, chat_template_path="nowhere"))
    template = saved / "chat_template.jinja"
    template.write_text(template.read_text().replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    message = complaint(sft, flags(*MODEL_ROWS, assistant_only_loss="true"))
    assert message.startswith("--assistant_only_loss: the chat template has no {% generation %} markers")
    tool = {
        "messages": [*MODEL_ROWS[0]["messages"][:1], {"role": "tool", "content": "sun"}, *MODEL_ROWS[0]["messages"]]
    }
    template.write_text(template.read_text().replace("message['role'] == 'tool'", "false"))
    assert f"{tmp_path}/rows.jsonl, line 1: the chat template cannot write" in complaint(
        sft, flags(tool, tool, *MODEL_ROWS)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_answers_that_are_not_wanted_are_left_out(flags, tmp_path, capsys):
    """As KTO labels them: in jsonl by a truth value, in csv by its name."""
    rows = [{"prompt": f"Say {at}.", "completion": str(at), "label": at % 3 > 0} for at in range(12)]
    with pytest.raises(AssertionError, match="training started"):
        run(sft, flags(*rows))
    expected = "4 of 12 rows dropped: 4 with the label false, answers that are not wanted (first: "
    assert f"{tmp_path}/rows.jsonl: {expected}{tmp_path}/rows.jsonl, line 1)\n" in capsys.readouterr().out
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,label\n" + "".join(f"Say {at}.,{at},{at % 3 > 0}\n" for at in range(12)))
    with pytest.raises(AssertionError, match="training started"):
        run(sft, [*flags(*rows), "--dataset_name", str(table)])
    assert expected in capsys.readouterr().out
    message = complaint(sft, flags(*rows, bad_rows="refuse"))
    assert message.startswith(f"{tmp_path}/rows.jsonl, line 1: label is False")


@pytest.mark.parametrize("is_there", [True, False])
def test_an_adapter_on_the_hub_is_trained_at_its_own_rate(tmp_path, monkeypatch, is_there):
    config = tmp_path / "adapter_config.json"
    config.write_text("{}")
    asked = []

    def find(name, **location):
        asked.append((name, location["revision"]))
        return str(config) if is_there else None

    monkeypatch.setattr("transformers.utils.find_adapter_config_file", find)
    words = ["--model_name_or_path", "me/adapter", "--model_revision", "v2", "--dataset_name", "alpaca.json"]
    assert sft.parse(words)[1].learning_rate == (2e-4 if is_there else 2e-5)
    assert asked == [("me/adapter", "v2")]
    assert sft.parse([*words, "--learning_rate", "1e-3"])[1].learning_rate == 1e-3


@pytest.mark.slow
def test_a_chat_template_of_ones_own(flags, saved, tmp_path, batches):
    template = tmp_path / "mine.jinja"
    template.write_text((saved / "chat_template.jinja").read_text().replace("'<|assistant|>'", "'<|assistant|>So: '"))
    run(sft, flags(*MODEL_ROWS, chat_template_path=template))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template.read_text()
    assert "<|assistant|>So: " in tokenizer.decode(batches[0]["input_ids"][0])


@pytest.mark.slow
def test_a_padding_token_and_a_chat_template_are_set_and_said(flags, saved, tmp_path, capsys, batches):
    (saved / "chat_template.jinja").unlink()
    config = json.loads((saved / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    # A tokenizer that has padded before it was saved tells its padding token there too; this one has no other.
    state = json.loads((saved / "tokenizer.json").read_text().replace("<|pad|>", "<|other|>"))
    (saved / "tokenizer.json").write_text(json.dumps({**state, "padding": None}))
    run(sft, flags(*MODEL_ROWS))
    said = capsys.readouterr().out
    assert said.count(f"the tokenizer of '{saved}' has no padding token: '<|end|>' is set\n") == 1
    assert said.count(f"the tokenizer of '{saved}' has no chat template: a plain one is set") == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == "<|end|>" and "Assistant:" in tokenizer.chat_template
    # The end that is learned is not taken for padding.
    assert [row.tolist().count(tokenizer.eos_token_id) for row in batches[0]["labels"]] == [2] * 7


PAIRS = [{"instruction": f"Say {word}.", "response1": word, "response2": "no", "label": 1} for word in "abcdefgh"]


def test_comparisons_that_are_too_long_are_counted(flags, capsys, tmp_path):
    long = {"instruction": "word " * 300, "response1": "a", "response2": "b", "label": 2}
    held_out = jsonl(tmp_path / "held_out.jsonl", *PAIRS[:3], long)
    metrics = run(reward, flags(*PAIRS, long, long, eval_dataset_name=held_out))
    said = capsys.readouterr().out
    assert (metrics["train_comparisons"], metrics["eval_comparisons"]) == (8, 3)
    assert "training rows: 2 of 10 rows dropped: longer than --max_length 256\n" in said
    assert "held-out rows: 1 of 4 rows dropped: longer than --max_length 256\n" in said


@pytest.mark.slow
def test_a_reward_model_learns_from_calls_of_tools(flags, saved, monkeypatch):
    template = (
        "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    )
    (saved / "chat_template.jinja").write_text(template)

    def pair(name, value):
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": name, "arguments": {name: value}}}],
        }
        return {"prompt": f"Use {name}.", "chosen": [call], "rejected": "I cannot."}

    seen, train = [], trl.RewardTrainer.train

    def spy(self, *args, **kwargs):
        seen.extend([*self.train_dataset["chosen_ids"], *self.eval_dataset["chosen_ids"]])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trl.RewardTrainer, "train", spy)
    run(reward, flags(pair("add", 1), pair("find", "x"), pair("stop", True)))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    shown = sorted(tokenizer.decode(ids).split("<|assistant|>")[1] for ids in seen)
    assert shown == [
        '{"name": "add", "arguments": {"add": 1}}<|end|>',
        '{"name": "find", "arguments": {"find": "x"}}<|end|>',
        '{"name": "stop", "arguments": {"stop": true}}<|end|>',
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_prompts_are_named_by_their_line_and_filtered_on_demand(saved, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def fine(completions, **columns): return [0.0] * len(completions)")
    rows = [{"prompt": f"number {number}"} for number in range(40)]
    rows[16] = {"prompt": "red " * 300}
    name = jsonl(tmp_path / "prompts.jsonl", *rows, {"prompt": " "})
    words = ["--model_name_or_path", saved, "--dataset_name", name, "--reward_funcs", f"{file}:fine"]
    words = [str(word) for word in [*words, "--output_dir", tmp_path / "out", "--apply_chat_template"]]
    message = complaint(rlhf, words)
    assert message.startswith(f"{name}, line 17: the prompt has ") and "leaves room for 203" in message
    with pytest.raises(AssertionError, match="training started"):
        run(rlhf, [*words, "--filter_prompts", "true"])
    said = capsys.readouterr().out
    assert f"too long for --response_length 53 in a context of 256 ({name}, line 17)" in said
    assert f"1 with an empty prompt ({name}, line 41)" in said
    assert "--filter_prompts cannot be used here: it needs --model_name_or_path" in complaint(
        rlhf,
        [
            "--dataset_name",
            name,
            "--reward_funcs",
            f"{file}:fine",
            "--filter_prompts",
            "true",
            "--output_dir",
            words[-2],
        ],
    )


TOOLS_FIRST = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
ADD = {"name": "add", "description": "Add two numbers.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("writes_tools", [True, False])
def test_a_policy_sees_the_tools_of_its_prompts(saved, tmp_path, capsys, monkeypatch, writes_tools):
    from hfllm import PPOTrainer

    template, sampled, sample = saved / "chat_template.jinja", [], PPOTrainer.sample
    without = template.read_text().replace("{%- if tools -%}", "{%- if false -%}")
    template.write_text(TOOLS_FIRST * writes_tools + without)

    def spy(self, rows):
        batch = sample(self, rows)
        sampled.extend(zip(rows, self.processing_class.batch_decode(batch["prompt_ids"]), strict=True))
        return batch

    monkeypatch.setattr(PPOTrainer, "sample", spy)
    file = tmp_path / "mine.py"
    file.write_text("def fine(completions, tools, **columns): return [float(bool(tool)) for tool in tools]")
    rows = [{"prompt": f"number {at}", "tools": json.dumps([ADD]) if at % 2 else None} for at in range(20)]
    words = ["--model_name_or_path", saved, "--dataset_name", jsonl(tmp_path / "prompts.jsonl", *rows)]
    words += ["--reward_funcs", f"{file}:fine", "--output_dir", tmp_path / "out", "--apply_chat_template"]
    with pytest.raises(AssertionError, match="training started"):
        run(rlhf, [*map(str, words), "--response_length", "4", "--use_cpu"])
    assert {bool(row["tools"]) for row, _ in sampled} <= {True, False} and sampled
    assert all(("Add two numbers." in shown) == (writes_tools and bool(row["tools"])) for row, shown in sampled)
    note = "prompts: 10 of 20 rows have tools that the chat template does not write\n"
    assert (note in capsys.readouterr().out) != writes_tools


def test_other_columns_reach_a_reward_function_under_the_users_names(tmp_path):
    from hfllm.stages.rlhf.build import prompt_data

    name = jsonl(tmp_path / "prompts.jsonl", *({"q": f"number {at}", "a": at, "chosen": "x"} for at in range(9)))
    flags = ["--dataset_name", name, "--model_name_or_path", "any", "--column_mapping", "prompt=q", "target=a"]
    train_rows, _ = prompt_data(rlhf.parse(flags)[0], 0, [])
    assert {tuple(row) for row in train_rows} == {("chosen", "prompt", "target")}


def test_columns_of_any_kind_reach_a_reward_function_and_others_than_its_own_arguments(saved, tmp_path):
    # As UltraFeedback has them, some only in some rows, and of more than one type.
    rows = [
        {"instruction": f"Say {at}.", "completions": [{"text": "x"}], "function": at, "meta": at if at % 2 else "no"}
        for at in range(12)
    ]
    rows[5]["hint"] = {"level": 1}
    file = tmp_path / "mine.py"
    file.write_text(
        "def fine(prompts, completions, function, meta, hint, **columns):\n"
        "    assert all(said['role'] == 'assistant' for (said,) in completions)\n"
        "    assert all(kept == (at if at % 2 else 'no') for at, kept in zip(function, meta))\n"
        "    assert all(given == ({'level': 1} if at == 5 else None) for at, given in zip(function, hint))\n"
        "    return [1.0] * len(completions)\n"
    )
    words = ["--model_name_or_path", saved, "--dataset_name", jsonl(tmp_path / "rows.jsonl", *rows)]
    words += ["--reward_funcs", f"{file}:fine", "--response_length", 4, "--num_ppo_epochs", 1, "--max_steps", 1]
    words += ["--per_device_train_batch_size", 8, "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    assert run(rlhf, [*map(str, words), "--use_cpu"])["proxy_reward_after"] == 1
