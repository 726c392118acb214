"""`hfllm sft` on calls of tools and on thoughts: what is learned, and what becomes of the tokenizer."""

import json
import random

import pytest
import sft
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfllm.errors import InputError

WORDS = ("red", "blue", "green", "one", "two", "three", "four", "five")


def glaive(number):
    """A row in the form of glaive's conversations: calls and what they returned as turns, tools as JSON text."""
    rng = random.Random(number)
    arguments = {"words": rng.sample(WORDS, 2), "size": {"x": rng.random(), "y": None, "z": [True, None]}}
    name = f"paint_{number % 3}"
    schema = {"type": "object", "properties": {"words": {"type": "array", "description": "the words"}}}
    turns = [
        ("human", f"Hello, number {number}."),
        ("gpt", "Hello! What shall I do?"),
        ("human", 'Paint "two" words, <b>please</b>.'),
        ("function_call", json.dumps({"name": name, "arguments": arguments})),
        ("observation", json.dumps({"status": f"painted {number}"})),
        ("gpt", "They are painted."),
    ]
    return {
        "conversations": [{"from": who, "value": value} for who, value in turns],
        "tools": json.dumps([{"name": name, "description": "Paints words", "parameters": schema}]),
    }


def thinking(number):
    word = WORDS[number % 8]
    answer = {"role": "assistant", "content": f"It is {word}.", "reasoning_content": f"look at {word}"}
    return {"messages": [{"role": "user", "content": f"Say {word}, number {number}."}, answer]}


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    """A saved model with room for schemas of tools."""
    make_model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def flags(saved, tmp_path):
    def make(rows, **more):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            **{"model_name_or_path": saved, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"},
            **{"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, **more},
        }
        words = []
        for name, value in values.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

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


def learned(tokenizer, batch):
    """The texts that a batch learns, row by row."""
    found = []
    for labels in batch["labels"].tolist():
        text = "".join("\0" if token == -100 else tokenizer.decode(token) for token in labels)
        found.append([part for part in text.split("\0") if part])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"assistant_only_loss": "true"}])
def test_calls_are_learned_and_read_back(flags, batches, tmp_path, capsys, more):
    rows = [glaive(number) for number in range(12)]
    sft.main(*sft.parse(flags(rows, max_length=1024, **more)))
    assert "11 of 11 calls of tools are read back exactly" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = {row["conversations"][3]["value"] for row in rows}
    for hello, call, painted in learned(tokenizer, batches[0]):
        assert (hello, painted) == ("Hello! What shall I do?<|end|>", "They are painted.<|end|>")
        (read,) = tokenizer.parse_response(call, prefix="")["tool_calls"]
        assert json.dumps(read["function"]) in expected


@pytest.mark.slow
def test_thoughts_are_learned_by_tokens_of_their_own(flags, batches, saved, tmp_path, capsys):
    rows = [thinking(number) for number in range(12)]
    sft.main(*sft.parse(flags(rows, added_tokens=["<think>", "</think>", "<|end|>"])))
    printed = capsys.readouterr().out
    assert "new tokens: <think> </think>\n" in printed and "11 of 11 thoughts are read back exactly" in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer("<think>red</think>")["input_ids"]
    assert ids[0] == len(tokenizer) - 2 and ids[-1] == len(tokenizer) - 1 == model.config.vocab_size - 1
    for (text,) in learned(tokenizer, batches[0]):
        word = text.partition(" is ")[2].removesuffix(".<|end|>")
        assert text == f"<think>look at {word}</think>It is {word}.<|end|>"
    assert any(ids[0] in row for row in batches[0]["labels"].tolist())
    old = AutoModelForCausalLM.from_pretrained(saved).get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight[ids[0]], old[tokenizer("think")["input_ids"]].mean(0))


@pytest.mark.slow
def test_a_built_in_template_is_set_with_how_it_is_read(flags, tmp_path, capsys):
    rows = [glaive(number) for number in range(6)]
    with pytest.raises(InputError, match=r"--chat_template_path chatml: .* needs the token '<\|im_start\|>'"):
        sft.main(*sft.parse(flags(rows, chat_template_path="chatml")))
    more = {"added_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>", "max_length": 1024}
    sft.main(*sft.parse(flags(rows, chat_template_path="chatml", **more)))
    assert "5 of 5 calls of tools are read back exactly" in capsys.readouterr().out
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<|im_start|>" in saved_tokenizer.chat_template and saved_tokenizer.response_template
    ids = saved_tokenizer("<|im_start|>a<|im_end|>")["input_ids"]
    assert len(ids) == 3 and saved_tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_an_adapter_gets_no_new_tokens(flags):
    words = flags([thinking(number) for number in range(6)], use_peft="true", added_tokens=["<think>"])
    with pytest.raises(InputError, match="--added_tokens cannot be used here: an adapter has no rows for new tokens"):
        sft.main(*sft.parse(words))
