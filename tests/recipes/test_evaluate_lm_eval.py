"""lm-eval's tasks by the recipe: their figures in its report, and flags that are refused."""

import json

import evaluate
import pytest
import yaml

from hfllm.errors import InputError

pytest.importorskip("lm_eval")

TASK = {
    "task": "colors",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def test_the_report_has_the_tasks_figures(saved, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"Say {word}.", "choices": ["red", word], "label": 0} for word in ("fox", "hen", "lake")]
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "colors.yaml").write_text(yaml.safe_dump(TASK))
    words = [
        "--model_name_or_path",
        str(saved),
        "--suites",
        "lm_eval",
        "--tasks",
        "colors",
        "--include_path",
        str(tasks),
    ]
    metrics = evaluate.main(*evaluate.parse([*words, "--output_dir", str(tmp_path / "out")]))
    assert metrics["lm_eval/colors/acc/model"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {each.get("item") for each in samples} >= {f"colors/{n}" for n in range(3)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suites", "lm_eval"], "--suites lm_eval needs --tasks"),
        (
            ["--tasks", "arc_easy_file", "--suites", "few_shot"],
            "--tasks cannot be used here: it is for",
        ),
        (["--suites", "lm_eval", "--tasks", "arc_easy"], "unknown task; did you mean 'arc_easy_file'"),
        (["--suites", "lm_eval", "--tasks", "arc_easy_file"], "no file 'ARC-Easy_test.json' beside its YAML"),
        (["--suites", "lm_eval", "--tasks", "x", "--tasks_data", "nowhere"], "--tasks_data nowhere: no such folder"),
    ],
)
def test_flags_are_named(saved, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        evaluate.main(*evaluate.parse(["--model_name_or_path", str(saved), "--output_dir", "out", *words]))
