"""The recipe that classifies, tags and finds spans, in miniature: each task to its report, and what it refuses."""

import json

import classify
import pytest
import torch
from killed import SAVES, Killed
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import hfllm
from hfllm.data.labelled import SPANS, TASKS, TEXT, WORDS
from hfllm.errors import InputError
from hfllm.generation.spans import answer_spans
from hfllm.models.loading.adapters import find_adapter

TINY = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--max_length", "64"]
ROWS = {
    TEXT: [{"text": f"the {word} is {kind}", "label": kind} for word in "abcdef" for kind in ("good", "bad")],
    WORDS: [{"words": f"Say {word} now", "tags": ["O", "B-x", "O"]} for word in "abcdefghijkl"],
    SPANS: [
        {
            "context": f"The {word} is red. " * (9 if word == "a" else 1),
            "question": f"What is the {word}?",
            "answers": {"text": ["red"], "answer_start": [9]} if word != "f" else {"text": [], "answer_start": []},
        }
        for word in "abcdefgh"
    ],
}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def run(saved, path, task, *flags):
    words = ["--model_name_or_path", str(saved), "--dataset_name", path, "--task", task, "--doc_stride", "8", *TINY]
    return classify.main(*classify.parse([*words, "--output_dir", str(saved.parent / f"out-{task}"), *flags]))


@pytest.mark.parametrize("task", TASKS)
def test_each_task_to_its_report(saved, tmp_path, task, capsys):
    metrics = run(saved, write(tmp_path / "rows.jsonl", ROWS[task]), task, "--eval_share", "0.3")
    out = tmp_path / f"out-{task}"
    report = json.loads((out / "report.json").read_text())
    assert report["stage"] == "classify" and (out / "held_out.png").is_file()
    main = {TEXT: "accuracy", WORDS: "entity_f1", SPANS: "f1"}[task]
    assert {main, f"majority_{main}", f"bag_of_words_{main}"} <= metrics.keys()
    assert 0 <= metrics[main] <= 1 and metrics["eval_examples"] + metrics["train_rows"] == len(ROWS[task])
    if task == SPANS:
        # Long contexts are read in windows.
        model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        context = "The fox is red. " * 20
        (said,) = answer_spans(model, tokenizer, ["What is red?"], [context], 48, 8, may_be_none=False)
        assert said and said in context
    else:
        found = pipeline(task, str(out))("the a is good")
        assert {each.get("label", each.get("entity")) for each in found} <= {"good", "bad", "O", "B-x"}
    # The same command again reuses what has finished.
    assert run(saved, str(tmp_path / "rows.jsonl"), task, "--eval_share", "0.3") == pytest.approx(metrics)
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "is_causal"),
    [
        (TEXT, False),
        pytest.param(WORDS, True, marks=pytest.mark.slow),
        pytest.param(SPANS, False, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_with_its_labels(make_model, tokenizer, tmp_path, task, is_causal):
    kind = hfllm.HfllmForCausalLM if is_causal else hfllm.HfllmForMaskedLM
    make_model(model_class=kind, is_causal=is_causal).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(tmp_path / "model", write(tmp_path / "rows.jsonl", ROWS[task]), task, "--use_peft", "--eval_share", "0.3")
    out = tmp_path / f"out-{task}"
    assert find_adapter(str(out)).brings_head
    card = (out / "README.md").read_text()
    if task == SPANS:
        assert "AutoPeftModelForQuestionAnswering" in card and not (out / "labels.json").exists()
        return
    labels = {TEXT: ["bad", "good"], WORDS: ["B-x", "O"]}[task]
    assert list(json.loads((out / "labels.json").read_text())["id2label"].values()) == labels
    assert f"id2label={dict(enumerate(labels))}" in card
    # Trained further, it stays an adapter of the same base, with the head that it has.
    more = ["--model_name_or_path", str(out), "--output_dir", str(tmp_path / "more"), "--eval_share", "0.3"]
    run(tmp_path / "model", str(tmp_path / "rows.jsonl"), task, *more)
    assert find_adapter(str(tmp_path / "more")).brings_head


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_from_nothing(tiny, tmp_path, task):
    """Without a model one is pretrained first, on the same world."""
    words = ["--task", task, "--pretrain_config", tiny["pretrain"], "--output_dir", str(tmp_path / "out")]
    sizes = ["--num_examples", "40", "--num_eval_examples", "24", "--max_steps", "2"]
    metrics = classify.main(*classify.parse([*words, *sizes]))
    assert metrics["train_rows"] == 40 and metrics["eval_examples"] == 24
    assert (tmp_path / "out" / "pretrain" / "model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "classify stage" in card and "pretrain" in card


@pytest.mark.parametrize(
    ("task", "rows", "flags", "said"),
    [
        (TEXT, [{"sms": "hi", "label": "ham"}], [], "no column 'text' for text-classification; there are: sms, label"),
        (TEXT, [{"text": f"a {n}", "label": "x"} for n in range(4)], [], "all rows have the label 'x'"),
        (TEXT, [{"text": "a", "label": ["x"]}], [], "label is list; expected one label"),
        (
            TEXT,
            [{"text": "a", "label": 7}],
            ["--class_names", "no", "yes"],
            "label '7' is neither one of --class_names",
        ),
        (WORDS, [{"words": ["a", "b"], "tags": ["O"]}], [], "2 words and 1 tags"),
        (SPANS, [{"context": "a b", "question": "c", "answers": {"text": ["b"]}}], [], "answers need text and answer"),
        (
            SPANS,
            [{"context": "a b", "question": "c", "answers": {"text": ["b"], "answer_start": [0]}}],
            ["--bad_rows", "refuse"],
            "'b' is not at 0 of its context",
        ),
        (TEXT, ROWS[TEXT], ["--column_mapping", "words=text"], "text-classification has no column 'words'"),
        (TEXT, ROWS[TEXT], ["--label_token", "last"], "--label_token cannot be used here"),
    ],
)
def test_bad_rows_and_flags_are_named(saved, tmp_path, task, rows, flags, said):
    with pytest.raises(InputError, match=said.replace("(", "\\(")):
        run(saved, write(tmp_path / "rows.jsonl", rows), task, *flags)


@pytest.mark.slow
def test_the_loss_is_the_same_however_a_step_is_divided(saved, tmp_path):
    """One batch of four rows equals four batches of one, for tags whose rows have different numbers of targets."""
    rows = [{"words": " ".join("abcdefgh"[: 1 + n % 7]), "tags": " ".join("xyxyxyxy"[: 1 + n % 7])} for n in range(20)]
    path, weights = write(tmp_path / "rows.jsonl", rows), []
    for size, steps in ((4, 1), (1, 4)):
        sizes = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]
        out = tmp_path / f"out{size}"
        words = ["--model_name_or_path", str(saved), "--dataset_name", path, "--task", WORDS, *TINY, *sizes]
        words += ["--output_dir", str(out), "--learning_rate", "0.01", "--train_sampling_strategy", "sequential"]
        classify.main(*classify.parse(words))
        from safetensors.torch import load_file

        weights.append(load_file(out / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-5, rtol=1e-4)


# ---- killed, see killed.py ----


def killed_flags(files):
    rows = files.rows(*({"text": f"the {word} is {kind}", "label": kind} for word in "abcdef" for kind in ("x", "y")))
    return [*files.model(), *rows, "--task", "text-classification", "--per_device_train_batch_size", "4", *SAVES]


KILLED = Killed(killed_flags)
