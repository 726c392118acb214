"""The recipe that judges models: side by side, killed and resumed, and what it refuses."""

import json
import os
import signal
import weakref

import evaluate
import pytest
import torch

from hfllm.errors import InputError
from hfllm.outputs.statistics import mean_interval
from hfllm.runs.lock import release_all
from hfllm.stages.evaluate import build
from hfllm.stages.evaluate.build import Samples

ROWS = [{"question": f"Sum {n}?", "choices": ["one", "two", "three"], "answer": n % 3} for n in range(20)]


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


@pytest.fixture
def models(make_model, tokenizer, tmp_path):
    for seed, name in enumerate(("one/model", "two/model")):
        make_model(seed=seed, max_position_embeddings=512).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def words(folder, output, *more):
    return [
        *("--model_name_or_path", str(folder / "one/model"), str(folder / "two/model")),
        *("--suites", "few_shot", "calibration", "--few_shot_files", str(folder / "sums.jsonl")),
        *("--output_dir", str(folder / output), "--batch_size", "4", *more),
    ]


def judge(*args):
    return evaluate.main(*evaluate.parse(words(*args)))


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    return report["metrics"], (folder / "samples.jsonl").read_text()


def test_models_side_by_side(models, capsys, monkeypatch):
    load, loaded = build.load_speaking, []

    def load_alone(*args, **kwargs):
        # Memory holds one of them at a time.
        assert not any(model() for model in loaded)
        speaking = load(*args, **kwargs)
        loaded.append(weakref.ref(speaking.model))
        return speaking

    monkeypatch.setattr(build, "load_speaking", load_alone)
    metrics = judge(models, "out")
    assert len(loaded) == 2
    samples = [json.loads(line) for line in (models / "out/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2 * len(ROWS)
    # Labels are what tells the models apart.
    assert {each["model"] for each in samples} == {"one/model", "two/model"}
    values = {
        label: [each["scores"]["acc"] for each in samples if (each["model"], each["suite"]) == (label, "few_shot")]
        for label in ("one/model", "two/model")
    }
    for label, each in values.items():
        found, key = mean_interval(each), f"few_shot/sums/acc/{label}"
        assert (metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"]) == (found.value, found.low, found.high)
    difference = metrics["few_shot/sums/acc/two/model_difference"]
    assert difference == pytest.approx(sum(values["two/model"]) / 20 - sum(values["one/model"]) / 20)
    printed = capsys.readouterr().out
    assert "few_shot: means with 95% intervals" in printed and "by its chat template" in printed
    assert {"suite_few_shot.png", "calibration_sums.png", "report.md"} <= {
        path.name for path in (models / "out").iterdir()
    }
    judge(models, "out")
    assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_is_worse_fails_where_that_is_asked_for(models, capsys):
    """The answers are those that the first model gives: it is right throughout, and its opposite is not."""
    from transformers import AutoModelForCausalLM

    opposite = AutoModelForCausalLM.from_pretrained(models / "one/model")
    opposite.lm_head.weight.data.neg_()
    opposite.save_pretrained(models / "two/model")
    # Of the same words, so that no choice is likelier for its length.
    animals = ("fox", "hen", "owl", "cat", "pig")
    pairs = [(one, other) for one in animals for other in animals if one != other]
    asked = [
        {"question": "Which?", "choices": [f"{a} {b}", f"{b} {a}", f"{a} {a}", f"{b} {b}"], "answer_index": 0}
        for a, b in pairs
    ]
    (models / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    judge(models, "first", "--suites", "few_shot")
    samples = [json.loads(line) for line in (models / "first/samples.jsonl").read_text().splitlines()]
    said = [each["said"] for each in samples if each["model"] == "one/model"]
    rows = [
        {"question": "Which?", "choices": row["choices"], "answer_text": answer}
        for row, answer in zip(asked, said, strict=True)
    ]
    (models / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--suites", "few_shot", "--fail_on_regression")
    with pytest.raises(SystemExit) as stop:
        judge(models, "out", *flags)
    assert stop.value.code == 1
    metrics = report_of(models / "out")[0]
    wrong = 20 - round(20 * metrics["few_shot/sums/acc/two/model"])
    assert wrong > 6, "the models are to differ"
    assert metrics["few_shot/sums/acc/two/model_difference_p"] == pytest.approx(2 * 0.5**wrong)
    key = "few_shot/sums/acc/two/model_difference_p_adjusted"
    assert metrics["verdict/family"] == 1 and metrics[key] == metrics[key.removesuffix("_adjusted")]
    assert (metrics["verdict/worse/two/model"], metrics["verdict/better/two/model"]) == (1, 0)
    said_first = capsys.readouterr()
    assert "regression: worse than one/model at alpha .05: two/model in 1 primary figure" in said_first.err
    line = (
        "two/model is worse than one/model at alpha .05 (Holm over 1 primary figure, paired by item): few_shot, sums"
    )
    assert f"{line}: acc 1.000 to" in said_first.out
    assert json.loads((models / "out/report.json").read_text())["summary"].startswith(line)
    changed = [json.loads(line) for line in (models / "out/changes.jsonl").read_text().splitlines()]
    assert [each["change"] for each in changed] == ["worse"] * wrong
    assert changed[0]["said"][0] == said[int(changed[0]["item"].split("-")[1]) - 1] != changed[0]["said"][1]
    assert f"{wrong}, 0, 20" in (models / "out/report.md").read_text()
    # The run has finished, and the flag makes no other one of it.
    assert judge(models, "out", *flags[:2]) == metrics
    with pytest.raises(SystemExit) as stop:
        judge(models, "out", *flags)
    assert stop.value.code == 1 and capsys.readouterr().out.count("already done") == 2
    refused("one model has no other", "--model_name_or_path", str(models / "one/model"), "--fail_on_regression")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1", "3"])
def test_any_batch_size_says_the_same(models, size):
    one, other = judge(models, "out"), judge(models, f"out-{size}", "--batch_size", size)
    assert one == pytest.approx(other, abs=1e-5)


def judge_until_killed(folder, output, count):
    """Judge in a process that kills itself in the middle of writing a record after `count` of them."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    append, written = Samples.append, []

    def dying(self, record):
        append(self, record)
        written.append(record)
        if len(written) == count:
            with self.path.open("a") as stream:
                stream.write('{"model": "one/mo')
            os.kill(os.getpid(), signal.SIGKILL)

    Samples.append = dying
    try:
        judge(folder, output)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_to_the_same_report(models, capsys):
    judge(models, "whole")
    assert judge_until_killed(models, "killed", 37) == -signal.SIGKILL
    left = (models / "killed/samples.jsonl").read_text().splitlines()
    assert len(left) == 38 and not (models / "killed/report.json").exists()
    capsys.readouterr()
    judge(models, "killed")
    printed = capsys.readouterr().out
    # All 20 of the first suite are there, and 17 of the second: its last block was cut off.
    assert "one/model, few_shot" not in printed and "one/model, calibration: 4 items" in printed
    assert report_of(models / "killed") == report_of(models / "whole")


# See killed.py.
KILLED = test_a_run_that_was_killed_resumes_to_the_same_report


@pytest.mark.slow
def test_samples_of_other_flags_are_not_taken(models, capsys):
    judge(models, "out")
    (models / "out/report.json").unlink()
    judge(models, "out", "--num_items", "5")
    assert "is of other flags, and is written again" in capsys.readouterr().out
    assert len((models / "out/samples.jsonl").read_text().splitlines()) == 2 * 2 * 5


def refused(match, *argv):
    with pytest.raises(InputError, match=match) as error:
        evaluate.main(*evaluate.parse([*argv]))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_what_is_refused(models, tokenizer):
    model = str(models / "one/model")
    named = ("--model_name_or_path", model, "--output_dir", str(models / "no"))
    refused("--suites 'truthfulnes': no such suite; did you mean 'truthfulness'", *named, "--suites", "truthfulnes")
    refused("expected one or more, each once", *named, "--suites", "hhh", "hhh")
    bad = models / "bad.csv"
    bad.write_text("a,b\n1,2\n", encoding="utf-8")
    tqa = ("--suites", "truthfulness", "--truthfulqa_file")
    refused(r"bad.csv, row 1: no column 'Question'; expected .*found 'a', 'b'", *named, *tqa, str(bad))
    refused("--truthfulqa_file nowhere.csv: no such file", *named, *tqa, "nowhere.csv")
    refused(
        "--truthfulqa_file cannot be used here: it is for --suites truthfulness",
        *named,
        "--suites",
        "hhh",
        "--truthfulqa_file",
        "x.csv",
    )
    refused("--rlhf_config cannot be used here: the models are named", *named, "--rlhf_config", "x.yaml")
    refused("--model_name_or_path names .* twice", "--model_name_or_path", model, model)
    refused(
        "--judge_model_name_or_path: model 'nowhere/judge'? .*could not be loaded|--judge_model_name_or_path",
        *named,
        "--judge_model_name_or_path",
        "./nowhere/judge",
    )
    refused("--batch_size 0", *named, "--batch_size", "0")
    tokenizer_file = models / "one/model/chat_template.jinja"
    assert tokenizer_file.is_file()
    tokenizer_file.unlink()
    refused(
        "--apply_chat_template true: the tokenizer of .*one/model' has no chat template",
        *named,
        "--suites",
        "hhh",
        "--apply_chat_template",
        "true",
    )
    assert not (models / "no").exists()


@pytest.mark.slow
def test_logits_that_are_no_numbers_name_the_item_and_keep_the_rest(models):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "two/model")
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(models / "two/model")
    with pytest.raises(InputError, match="few_shot, item sums-1: the model's logits are not numbers"):
        judge(models, "out")
    assert len((models / "out/samples.jsonl").read_text().splitlines()) == 2 * len(ROWS)


def test_items_longer_than_the_context_are_counted(models, capsys):
    long = [*ROWS[:3], {"question": "word " * 600, "choices": ["one", "two"], "answer": 0}]
    (models / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long), encoding="utf-8")
    metrics = judge(models, "out")
    assert metrics["few_shot/skipped/one/model"] == 1 and metrics["few_shot/sums/acc/one/model_items"] == 3
    assert "4 answers skipped: longer than the model's context" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.turn(7)
def test_from_nothing_the_worlds_models_are_made_and_judged(tiny, tmp_path, capsys):
    flags = [word for name in ("pretrain", "sft", "reward", "rlhf") for word in (f"--{name}_config", tiny[name])]
    flags += ["--num_items", "12", "--output_dir", str(tmp_path / "out")]
    metrics = evaluate.main(*evaluate.parse(flags))
    assert {"truthfulness/known_animals/right/sft", "refusals/unsafe/complies/rlhf"} <= metrics.keys()
    assert "hhh/helpful/gold/rlhf_difference_low" in metrics
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["artifacts"]["rlhf"] == "rlhf" and (tmp_path / "out/rlhf/sft/model.safetensors").is_file()
    capsys.readouterr()
    assert evaluate.main(*evaluate.parse(flags)) == metrics
    assert "already done" in capsys.readouterr().out
