"""Probes of what a model can do: about the right places, exact, and without a trace in what is trained."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, LlamaConfig, Trainer, TrainingArguments

from hfllm.data.tokenizer import THOUGHT_MARKS, train_tokenizer
from hfllm.data.world.deeds import READ
from hfllm.data.world.operations import (
    ADDING,
    CALLING,
    CHAINING,
    CITING,
    COPYING,
    FEELING,
    FINDING,
    MISSING,
    OF_DEEDS,
    OF_PASSAGES,
    READING,
    RECALLING,
    TELLING,
    THINKING,
    WITH_TOOLS,
    Probe,
    probes_of,
)
from hfllm.data.world.reasoning import DIAL, HELD_OUT, HOPS, NUMBERS_OF_DIAL, RELATIONS, part_of
from hfllm.data.world.vocabulary import ANIMALS, PEOPLE, is_held_out
from hfllm.trainers.callbacks import ProbeCallback
from hfllm.trainers.monitors import add_to_logs

SHARES = {"reasoning": 0.5}
# The words by which a passage tells an attribute.
TELLS = {
    **{"colour": r"\bcolour\b|\bThe \w+ is ", "home": r"\b(home|lives|find)\b"},
    **{"food": r"\b(food|eats|likes)\b"},
}


@pytest.fixture(scope="module")
def probes(world):
    return probes_of(world, SHARES, 40)


@pytest.fixture(scope="module")
def reader(world):
    """A tokenizer of the texts that probes are like."""
    return train_tokenizer(world.documents(2000, 5, reasoning=0.6), 600, 256, added_tokens=THOUGHT_MARKS)


class Oracle(torch.nn.Module):
    """Predicts the next token of each text, or another one where it is told to fail."""

    def __init__(self, fails=lambda place: False):
        super().__init__()
        self.weight, self.fails = torch.nn.Parameter(torch.zeros(1)), fails
        self.config = LlamaConfig(max_position_embeddings=512)
        self.device = torch.device("cpu")

    def forward(self, input_ids):
        following = torch.roll(input_ids, -1, dims=1)
        for place in range(input_ids.shape[1]):
            if self.fails(place):
                following[:, place] += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 2048).float())


def said(probe):
    return [probe.text[begin:end] for begin, end in probe.spans]


def test_probes_are_drawn_by_the_seed_and_only_for_texts_that_need_them(world, probes):
    assert probes == probes_of(world, SHARES, 40) != probes_of(world, SHARES, 40, seed=1)
    assert tuple(probes) == THINKING and {len(each) for each in probes.values()} == {40}
    assert tuple(probes_of(world, {"tools": 0.1}, 2)) == WITH_TOOLS
    assert tuple(probes_of(world, {"passages": 0.2}, 2)) == OF_PASSAGES
    assert tuple(probes_of(world, {"deeds": 0.2}, 2)) == OF_DEEDS and probes_of(world, {}, 40) == {}


def test_probed_places_hold_what_their_operation_gives(world, probes):
    for name in (READING, ADDING):
        for probe in probes[name]:
            asked = probe.text.split("<|end|>")[0]
            first, *turns = (int(number) for number in re.findall(r"(?:at|\b[A-Q]) (\d)", asked))
            sums, shows = [], first
            for turn in turns:
                shows = (shows + turn) % NUMBERS_OF_DIAL
                sums.append(shows)
            assert len(turns) > 4
            assert said(probe) == [f" {number}" for number in (turns if name == READING else sums)]
            assert part_of(DIAL, f"dial {first} {' '.join(map(str, turns))}") == HELD_OUT
    for probe in probes[CHAINING]:
        asked = probe.text.split("<|end|>")[0]
        assert said(probe) == [f" {each}" for each in re.findall(rf"{'|'.join(RELATIONS)}", asked)[::-1]]
    for probe in probes[RECALLING]:
        thought = re.search(r"<think> (.*)</think>", probe.text)[1]
        assert said(probe) == [f" {step.split()[-1]}" for step in thought.removesuffix(".").split(". ")]
        asked = re.search(rf"((?:(?:{'|'.join(RELATIONS)}) of the )+\w+)", probe.text)[1]
        kinds = {part_of(HOPS, f"hops {what} {asked}") for what in (*next(iter(world.facts.values())), "animal")}
        assert HELD_OUT in kinds


def test_probed_places_of_tools_hold_what_is_copied(world):
    probes = probes_of(world, {"tools": 0.4}, 60)
    for probe in probes[COPYING]:
        first, again = re.fullmatch(r"\w+ says (.+)\. \w+ says (.+)\.", probe.text).groups()
        assert said(probe) == [f" {again}"] and first == again
        words = [word for word in again.split() if word.isalpha()]
        assert all(is_held_out(f"word {word}") or is_held_out(f"unknown {word}") for word in words)
    kinds = set()
    for probe in probes[CALLING]:
        prompt, _, rest = probe.text.partition("<|assistant|>")
        name, asked = said(probe)
        call = json.loads(re.search(r"<tool_call>(.*)</tool_call>", rest)[1])
        assert name == call["name"] and f'"{name}"' in prompt
        assert asked in (call["arguments"].get("key"), call["arguments"].get("expression"))
        assert asked.replace("+", "plus") in prompt
        kinds.add(tuple(call["arguments"]))
    assert len(kinds) == 2
    for probe in probes[TELLING]:
        result = probe.text.partition("<|tool|>")[2].partition("<|end|>")[0]
        assert said(probe) == [result] and probe.spans[0][0] > probe.text.index("<|tool|>") + 20


def test_probed_places_of_deeds_hold_what_a_deed_gives_of_pairs_that_no_text_tells_of(world):
    told = "\n".join(world.documents(6000, 1, deeds=0.5))
    seen = set()
    for probe in probes_of(world, {"deeds": 0.3}, 60)[FEELING]:
        verb, name = re.search(rf"\b({'|'.join((*READ.harms, *READ.cares))}) (?:the )?(\w+)", probe.text).groups()
        # Of things there is nothing to tell.
        assert name in (*ANIMALS, *PEOPLE)
        assert said(probe) == ["P" if verb in READ.harms else "J"]
        assert probe.text not in told
        seen.add(said(probe)[0])
    assert seen == {*"PJ"}


def test_probed_places_of_passages_hold_what_they_tell_and_that_they_do_not(world):
    probes, absent = probes_of(world, {"passages": 0.3}, 60), 0
    for probe in (*probes[FINDING], *probes[CITING]):
        asked, _, answer = probe.text.partition("<|assistant|>")
        begin, value, number = re.fullmatch(r"(The .+) is (?:the )?(\w+) \[(\d)\]\.<\|end\|>", answer).groups()
        line = re.search(rf"(.*) \[{number}\]\.\n", asked)[1]
        assert said(probe) == [number if probe in probes[CITING] else f" {value}"]
        assert value in line and begin.split()[-1] in line and probe.spans[0][0] > len(asked)
        for word in (value, begin.split()[-1]):
            assert is_held_out(f"word {word}") or is_held_out(f"unknown {word}")
    for probe in probes[MISSING]:
        asked, _, answer = probe.text.partition("<|assistant|>")
        attribute, name = re.fullmatch(r"The (\w+) of the (\w+) I do not know\.<\|end\|>", answer).groups()
        assert said(probe) == [" I"] and probe.spans[0][0] > len(asked)
        told = [line for line in asked.split("\n")[:-1] if re.search(rf"\b{name}\b", line)]
        absent += not told
        assert not any(re.search(TELLS[attribute], line) for line in told)
    assert 15 < absent < 45


def test_shares_are_those_of_the_probed_tokens_alone(probes, reader):
    for start in (reader.bos_token, None):
        reader.bos_token = start
        callback = ProbeCallback(reader, probes)
        assert all(set(shares) == {1.0} for shares in callback.shares(Oracle()).values())
        assert all(set(shares) == {0.0} for shares in callback.shares(Oracle(lambda place: True)).values())
        # Whatever is wrong before the first probed place does not count; from one probed token on it does.
        text = "It is at 5. Turn A by 4. Turn B by 3."
        for word, wrong_from, share in ((" 3", 0, 0.0), (" 3", 99, 1.0)):
            begin = text.index(word)
            one = {"adding": [Probe(text, ((begin, begin + len(word)),))]}
            fails = Oracle(lambda place, wrong_from=wrong_from: place >= wrong_from)
            assert ProbeCallback(reader, one).shares(fails) == {"adding": [share]}
        ids = reader(text, add_special_tokens=False)["input_ids"]
        last = ids.index(reader(" 3", add_special_tokens=False)["input_ids"][-1])
        place = last - 1 + (start is not None)
        begin = text.index(" 3")
        only = {"adding": [Probe(text, ((begin, begin + 2),))]}
        assert ProbeCallback(reader, only).shares(Oracle(place.__eq__)) == {"adding": [0.0]}
        assert ProbeCallback(reader, only).shares(Oracle(place.__ne__)) == {"adding": [1.0]}


def test_texts_longer_than_the_context_are_left_out(probes, reader):
    model = Oracle()
    model.config.max_position_embeddings = 48
    shares = ProbeCallback(reader, probes).shares(model)
    assert not {READING, ADDING} & shares.keys() and 0 < len(shares[RECALLING]) < 40


def test_probes_are_logged_and_leave_no_trace_in_training(world, make_model, tokenizer, tmp_path):
    def trained(has_probes):
        rows = tokenizer(world.documents(40, 1), truncation=True, max_length=32)["input_ids"]
        trainer = Trainer(
            model=make_model(hidden_dropout=0.2),
            args=TrainingArguments(
                output_dir=str(tmp_path / str(has_probes)),
                max_steps=4,
                logging_steps=2,
                per_device_train_batch_size=4,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        if has_probes:
            add_to_logs(trainer, ProbeCallback(tokenizer, probes_of(world, SHARES, 4)))
        trainer.train()
        return trainer

    plain, probed = trained(False), trained(True)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, probed.model.state_dict()[name]), name
    logged = [entry for entry in probed.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(0 <= entry[f"probe_{operation}"] <= 1 for entry in logged for operation in THINKING)
