"""Rows as people have them: other columns, other formats, parts of Hub datasets, and rows that teach nothing."""

import json

import pytest

from hfllm.data import formats
from hfllm.data.formats import Dropped, origin_of
from hfllm.data.loading import (
    DataArguments,
    InstructionArguments,
    RowArguments,
    TextArguments,
    load_rows,
    prompt_key,
    split_rows,
    texts_of,
)
from hfllm.data.sources import HubPart
from hfllm.data.tokenizer import padding_token
from hfllm.errors import InputError
from hfllm.stages.shared import user_rows


def asked(text):
    return [{"role": "user", "content": text}]


def said(text):
    return [{"role": "assistant", "content": text}]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIR = {"instruction": "Q", "input": "", "response1": "good", "response2": "bad", "label": 1}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {**PAIR, "response1": "bad", "response2": "good", "label": "2"},
        {"instruction": "Q", "response1": "good", "response2": "bad", "label": 1},
        {"input": "Q", "output_1": "bad", "output_2": "good", "label": 2},
        {"instruction": "Q", "output_1": "good", "output_2": "bad", "preference": 1},
        {
            "prompt": "Q",
            "chosen": asked("Q") + said("good"),
            "rejected": asked("Q") + said("bad"),
            "score_chosen": 8.0,
        },
        {
            "instruction": "Q",
            "completions": [
                {"response": "so", "overall_score": 5.0, "model": "a"},
                {"response": "good", "overall_score": 8.5},
                {"response": "bad", "overall_score": "2"},
                {"response": "good too", "overall_score": 8.5},
            ],
        },
        {"prompt": "Q", "completions": ["bad", "so", "good"], "scores": [1, 2, 4]},
    ],
)
def test_more_preference_formats_mean_the_same(row):
    expected = {"prompt": asked("Q"), "chosen": said("good"), "rejected": said("bad")}
    assert formats.to_preference("here", row) == expected


def test_an_input_belongs_to_a_labeled_instruction():
    row = formats.to_preference("here", {**PAIR, "input": "passage"})
    assert row["prompt"] == asked("Q\npassage")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({**PAIR, "label": 3}, "x.jsonl, line 3: label is 3; expected 1 or 2"),
        ({**PAIR, "label": 0}, "x.jsonl, line 3: label is 0, a tie"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 1]}, "all 2 completions have the score 1"),
        ({"prompt": "Q", "completions": ["a", "b"]}, "completion 1 has no score"),
        ({"prompt": "Q", "completions": ["a"], "scores": [1]}, "1 completion(s)"),
    ],
)
def test_labels_that_choose_nothing_are_named(row, complaint):
    with pytest.raises(InputError) as error:
        formats.to_preference("x.jsonl, line 3", row)
    assert complaint in str(error.value)


def test_the_system_column_begins_a_conversation():
    conversation = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    row = formats.to_sft("here", {"system": "Be brief.", "conversations": conversation})
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, *asked("Q")]
    assert formats.to_prompt("here", {"conversations": conversation})["prompt"] == asked("Q")


def test_columns_are_renamed_before_they_are_read(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", {"question": "Q", "answer": "A", "prompt": "its number"})
    arguments = InstructionArguments(name, column_mapping=["prompt=question", "response=answer"])
    (row,) = load_rows(arguments.row_source, formats.to_sft)
    assert row == {"prompt": asked("Q"), "completion": said("A")}
    assert row.origin == f"{name}, line 1"
    arguments = DataArguments(name, column_mapping=["prompt=answer", "output=prompt"])
    (row,) = load_rows(arguments.row_source, lambda _, row: row)
    assert row == {"question": "Q", "prompt": "A", "output": "its number"}
    assert list(texts_of(name, renaming={"text": "answer"})) == ["A"]
    with pytest.raises(
        InputError, match=r"a\.jsonl, line 1: --column_mapping prompt=body: no column 'body'; there are"
    ):
        load_rows(InstructionArguments(name, column_mapping=["prompt=body"]).row_source, formats.to_sft)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"column_mapping": ["promt=question"]}, "no format has a column 'promt'"),
        ({"column_mapping": ["prompt"]}, "expected OURS=THEIRS"),
        ({"column_mapping": ["prompt=a", "prompt=b"]}, "a column comes twice"),
        ({"dataset_config": "en"}, "--dataset_config cannot be used here: it is for a dataset on the Hub"),
        ({"dataset_revision": "v2"}, "--dataset_revision cannot be used here"),
        ({"dataset_streaming": True}, "--dataset_streaming cannot be used here"),
        ({"dataset_train_split": "train[:1%]"}, "--dataset_train_split cannot be used here"),
        ({"dataset_test_split": "test"}, "--dataset_test_split cannot be used here"),
        ({"eval_dataset_name": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"dataset_name": "me/rows", "dataset_streaming": True}, "say how many by --max_samples"),
        (
            {
                "dataset_name": "me/rows",
                "dataset_streaming": True,
                "dataset_train_split": "train[:9]",
                "max_samples": 9,
            },
            "a stream has no slices",
        ),
        ({"dataset_name": "world", "eval_dataset_name": "x.jsonl"}, "--eval_dataset_name cannot be used here"),
        ({"dataset_name": "world", "column_mapping": ["prompt=q"]}, "--column_mapping cannot be used here"),
    ],
)
def test_flags_of_the_data_without_effect_are_refused(tmp_path, flags, complaint):
    name = jsonl(tmp_path / "a.jsonl", {"prompt": "Q"})
    with pytest.raises(InputError) as error:
        RowArguments(**{"dataset_name": name, **flags}).check_source()
    assert complaint in str(error.value)


def test_texts_may_be_streamed_without_an_end():
    TextArguments("me/texts", dataset_streaming=True).check_source()
    with pytest.raises(InputError, match="--dataset_config cannot be used here: a mixture"):
        TextArguments(dataset_mixture=["me/texts:1"], dataset_config="en").check_source()


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """`me/rows`, with two configurations and two splits, read by the real `load_dataset` from a folder."""
    import datasets

    folder, load, asked_for = tmp_path / "hub", datasets.load_dataset, []
    for config in ("en", "de"):
        for split, count in (("train", 40), ("test", 5)):
            (folder / config).mkdir(parents=True, exist_ok=True)
            rows = ({"prompt": f"{config} {split} {number}", "completion": "A"} for number in range(count))
            jsonl(folder / config / f"{split}.jsonl", *rows)
    files = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in ("train", "test"))
        for config in ("en", "de")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")

    def load_dataset(name, config=None, *, revision=None, **options):
        asked_for.append((name, config, revision))
        return load(str(folder), config, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked_for


def test_a_part_of_a_hub_dataset(on_the_hub):
    flags = {"dataset_config": "de", "dataset_revision": "v2", "dataset_train_split": "train[:10%]"}
    arguments = InstructionArguments("me/rows", **flags)
    arguments.check_source()
    assert [row["prompt"][0]["content"] for row in load_rows(arguments.row_source, formats.to_sft)] == [
        f"de train {number}" for number in range(4)
    ]
    assert on_the_hub == [("me/rows", "de", "v2")]
    streamed = InstructionArguments("me/rows", dataset_config="en", dataset_streaming=True, max_samples=3)
    streamed.check_source()
    assert load_rows(streamed.row_source, formats.to_sft)[-1]["prompt"] == asked("en train 2")
    with pytest.raises(InputError, match=r"'me/rows' is neither a local file or folder nor could it be loaded.*fr"):
        load_rows(InstructionArguments("me/rows", dataset_config="fr").row_source, formats.to_sft)
    assert len([*texts_of("me/rows", HubPart(config="en"), renaming={"text": "prompt"})]) == 40


def test_held_out_rows_of_ones_own(on_the_hub, tmp_path, capsys):
    arguments = InstructionArguments("me/rows", dataset_config="en", dataset_test_split="test")
    train_rows, eval_rows = user_rows(arguments.row_sources, formats.to_sft, seed=0)
    assert (len(train_rows), [row["prompt"][0]["content"] for row in eval_rows][:2]) == (
        40,
        ["en test 0", "en test 1"],
    )
    assert capsys.readouterr().out.count("me/rows: columns read: completion, prompt; ignored: none") >= 2
    own = jsonl(
        tmp_path / "own.jsonl", {"prompt": "en train 3", "completion": "A"}, {"prompt": "new", "completion": "B"}
    )
    arguments = InstructionArguments("me/rows", dataset_config="en", eval_dataset_name=own, max_samples=1)
    train_rows, eval_rows = user_rows(arguments.row_sources, formats.to_sft, seed=0, most=300)
    assert (len(train_rows), len(eval_rows)) == (1, 2)
    arguments = InstructionArguments("me/rows", dataset_config="en", eval_dataset_name=own)
    user_rows(arguments.row_sources, formats.to_sft, seed=0)
    *_, line = capsys.readouterr().out.splitlines()
    assert line == f"{own}: 1 of 2 held-out rows have the prompt of a training row"


BAD = [
    ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "with equal answers"),
    ({"prompt": "Q", "chosen": " ", "rejected": "A"}, "without an answer"),
    ({"prompt": asked("Q") + asked("P"), "chosen": "A", "rejected": "B"}, "with doubled turns"),
    ({**PAIR, "label": 0}, "with a tie"),
]
GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def test_pairs_that_teach_nothing_are_dropped_and_counted(tmp_path, capsys):
    rows = [GOOD, BAD[0][0], *(row for row, _ in BAD), {**GOOD, "prompt": "P"}]
    name = jsonl(tmp_path / "pairs.jsonl", *rows)
    train_rows, eval_rows = user_rows(RowArguments(name).row_sources, formats.to_preference, seed=0)
    assert len(train_rows) == len(eval_rows) == 1
    assert capsys.readouterr().out == (
        f"{name}: 7 rows in 1 file (pairs.jsonl)\n"
        f"{name}: 5 of 7 rows dropped: 2 with equal answers (first: {name}, line 2), 1 without an answer "
        f"({name}, line 4), 1 with doubled turns ({name}, line 5), 1 with a tie ({name}, line 6)\n"
        f"{name}: columns read: chosen, prompt, rejected; ignored: none\n"
    )


@pytest.mark.parametrize(("bad", "kind"), BAD)
def test_or_refused_by_a_flag(tmp_path, bad, kind):
    name = jsonl(tmp_path / "pairs.jsonl", GOOD, bad)
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 2: "):
        user_rows(RowArguments(name, bad_rows="refuse").row_sources, formats.to_preference, seed=0)
    with pytest.raises(InputError, match=f"no row is left: 1 of 1 rows dropped: 1 {kind}"):
        user_rows(RowArguments(jsonl(tmp_path / "bad.jsonl", bad)).row_sources, formats.to_preference, seed=0)


def test_conversations_that_teach_nothing(tmp_path):
    rows = [
        {"messages": asked("Q") + said("A") + asked("P")},
        {"messages": asked("Q") + said(" ") + asked("P") + said("B")},
        {"messages": asked("Q") + said("A") + said("B")},
        {"messages": said("Hello!")},
        {"messages": asked("Q") + said("A") + asked("P") + said("B")},
    ]
    dropped = Dropped()
    kept = load_rows(InstructionArguments(jsonl(tmp_path / "a.jsonl", *rows)).row_source, formats.to_sft, dropped)
    assert [origin_of(row, "") for row in kept] == [f"{tmp_path}/a.jsonl, line 5"]
    assert dropped.reasons == {"without an answer": 2, "with doubled turns": 1, "without a question": 1}
    assert (dropped.total, dropped.count) == (5, 4)


def test_conversations_with_one_question_stay_on_one_side():
    rows = [
        formats.to_sft("", {"messages": asked(f"Q{at % 9}") + said(f"A{at}") + asked("P") + said("B")})
        for at in range(90)
    ]
    train_rows, eval_rows = split_rows(rows, seed=0, share=0.2)
    assert not {*map(prompt_key, train_rows)} & {*map(prompt_key, eval_rows)}
    # All with the same greeting, or the same first question: what follows tells them apart.
    for first in (said("Hello!"), asked("Hi") + said("Hello!")):
        rows = [formats.to_sft("", {"messages": [*first, *asked(f"Q{at}"), *said("A")]}) for at in range(40)]
        train_rows, eval_rows = split_rows(rows, seed=0, share=0.1)
        assert (len(train_rows), len(eval_rows)) == (36, 4)


class Vocabulary:
    """A tokenizer without a padding token."""

    def __init__(self, *tokens, unk=None, bos=None, eos="</s>"):
        self.tokens, self.unk_token, self.bos_token, self.eos_token = tokens, unk, bos, eos

    def get_vocab(self):
        return dict.fromkeys(self.tokens, 0)


@pytest.mark.parametrize(
    ("published", "chosen"),
    [
        (Vocabulary("<|endoftext|>", unk="<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>"), "<|endoftext|>"),
        (Vocabulary("<unk>", "<s>", "</s>", unk="<unk>", bos="<s>"), "<unk>"),
        (Vocabulary("<|finetune_right_pad_id|>", "<|eot_id|>", eos="<|eot_id|>"), "<|finetune_right_pad_id|>"),
        (Vocabulary("<unk>", "<pad>", "</s>", unk="<unk>"), "<pad>"),
    ],
    ids=["GPT-2", "Llama 2", "Llama 3.1", "with <pad>"],
)
def test_the_token_that_pads_where_none_is_named(published, chosen):
    assert padding_token(published) == chosen
