"""lm-eval as a suite: the figures that lm-eval itself gives, item by item, from local files alone."""

import gzip
import json

import pytest
import yaml

from hfllm.errors import InputError
from hfllm.evaluation.suites.base import TOO_LONG, Subject

lm_eval = pytest.importorskip("lm_eval")

from hfllm.evaluation.suites.lm_eval import (  # noqa: E402
    LmEval,
    gsm8k_right,
    humaneval,
)

WORDS = ("red", "sky", "fox", "hen", "lake", "honey", "box")
ROWS = [{"question": f"Say {word}.", "choices": ["red", "blue", word], "label": n % 3} for n, word in enumerate(WORDS)]
CHOICE = {
    "task": "colors",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "num_fewshot": 2,
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
WRITTEN = {
    **{name: CHOICE[name] for name in ("dataset_path", "dataset_kwargs", "test_split", "doc_to_text")},
    "task": "said",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for task in (CHOICE, WRITTEN):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return str(tmp_path)


@pytest.fixture
def subject(make_model, tokenizer):
    return Subject("tiny", make_model(), tokenizer, batch_size=2)


def test_a_task_is_compared_by_the_metric_that_it_names_first(folder):
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict-match", "flexible")]
    with open(f"{folder}/filtered.yaml", "w") as stream:
        yaml.safe_dump({**WRITTEN, "task": "filtered", "filter_list": filters}, stream)
    suite = LmEval(["colors", "said", "filtered"], [folder])
    primary = {task: list(suite.primary_of(task)) for task in suite.tasks}
    assert primary == {"colors": ["acc"], "said": ["exact_match"], "filtered": ["exact_match_strict_match"]}
    assert {suite.better[name] for names in primary.values() for name in names} == {1}


@pytest.mark.slow
def test_each_item_is_judged_as_by_lm_eval(folder, subject):
    suite = LmEval(["colors"], [folder])
    records = list(suite.judge(subject, suite.items()))
    assert [record["item"] for record in records] == [f"colors/{n}" for n in range(len(ROWS))]
    # lm-eval draws the worked examples of a question after those of the one before: here each is asked for alone.
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    whole = {**CHOICE, "dataset_kwargs": {"data_files": {"test": f"{folder}/rows.jsonl"}}}
    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, device="cpu", backend="causal")
    manager = TaskManager(include_defaults=False)
    for number in (0, 3, 6):
        expected = lm_eval.simple_evaluate(
            model, tasks=[whole], task_manager=manager, samples={"colors": [number]}, bootstrap_iters=0
        )["samples"]["colors"][0]
        assert records[number]["scores"] == {"acc": expected["acc"], "acc_norm": expected["acc_norm"]}
        assert records[number]["asked"] == expected["arguments"][0][0]


def test_an_item_does_not_depend_on_the_others(folder, make_model, tokenizer):
    def judge(batch_size, places):
        suite = LmEval(["colors", "said"], [folder])
        items = [item for place, item in enumerate(suite.items()) if place in places]
        subject = Subject("tiny", make_model(), tokenizer, batch_size=batch_size)
        return {record["item"]: record for record in suite.judge(subject, items)}

    everything, some = judge(3, range(14)), judge(1, (1, 5, 8, 13))
    assert len(everything) == 14 and {record["group"] for record in everything.values()} == {"colors", "said"}
    assert some == {item: everything[item] for item in some}


def test_what_does_not_fit_is_counted(folder, tmp_path, make_model, tokenizer):
    rows = [*ROWS, {**ROWS[0], "question": "Say red. " * 200}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "colors.yaml").write_text(yaml.safe_dump({**CHOICE, "num_fewshot": 0}))
    suite = LmEval(["colors"], [folder])
    records = {r["item"]: r for r in suite.judge(Subject("tiny", make_model(), tokenizer), suite.items())}
    assert records["colors/7"]["skipped"] == TOO_LONG and not records["colors/7"]["scores"]
    assert records["colors/0"]["scores"]


def test_likelihoods_that_are_no_numbers_are_named(folder, subject):
    import torch

    torch.nn.init.constant_(subject.model.lm_head.weight, float("nan"))
    suite = LmEval(["colors"], [folder], num_items=1)
    with pytest.raises(InputError, match="lm_eval, item colors/0: the likelihood by tiny is nan, not a number"):
        list(suite.judge(subject, suite.items()))


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (["colours"], {}, "unknown task; did you mean 'colors'"),
        (
            ["colors"],
            {"dataset_path": "allenai/ai2_arc", "dataset_kwargs": None},
            "reads 'allenai/ai2_arc' of the Hub",
        ),
        (["colors"], {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "no file 'no.jsonl' beside its YAML"),
        (["colors"], {"unsafe_code": True}, "--tasks colors cannot be used here: it runs code that a model writes"),
        (["colors"], {"output_type": "poetry"}, "--tasks colors: .*poetry"),
        ([], {}, "needs --tasks"),
    ],
)
def test_tasks_that_cannot_be_run_are_named(folder, tmp_path, names, change, said):
    (tmp_path / "colors.yaml").write_text(yaml.safe_dump({**CHOICE, **change}))
    with pytest.raises(InputError, match=said):
        LmEval(names, [folder])


def test_shipped_tasks_read_their_files(tmp_path):
    arc = {
        "instruction": "Please choose the correct answer to the question: What is red?\n\nAnswer1: sky Answer2: "
        "a fox, 2: old Answer3: sea\n\nAnswer format: answer1/answer2/answer3",
        "answer": "answer2",
    }
    (tmp_path / "ARC-Easy_test.json").write_text(json.dumps([arc]))
    (tmp_path / "gsm8k_train.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "it is\n#### 1,002"}) + "\n")
    examples = {"examples": [{"input": f"not {n}", "target": "True"} for n in range(5)]}
    (tmp_path / "bbh_navigate.json").write_text(json.dumps(examples))
    program = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({**program, "canonical_solution": "    return 1"}) + "\n")
    names = ["arc_easy_file", "gsm8k_file", "bbh_navigate_file", "humaneval_file"]
    suite = LmEval(names, data_folder=str(tmp_path), allows_code=True)
    assert {item.key.split("/")[0] for item in suite.items()} == set(names)
    doc = suite.tasks["arc_easy_file"].eval_docs[0]
    assert doc == {"question": "What is red?", "choices": ["sky", "a fox, 2: old", "sea"], "gold": 1}
    assert suite.tasks["gsm8k_file"].eval_docs[0]["gold"] == "1002"
    assert suite.better["pass_at_1"] == 1


@pytest.mark.parametrize(
    ("said", "right"), [("2+2=4\n#### 4", 1), ("so 3, then 4.", 1), ("#### 5 or 4", 0), ("none", 0), ("#### 1,004", 0)]
)
def test_the_number_of_gsm8k(said, right):
    assert gsm8k_right({"gold": "4"}, [said]) == {"exact_match": right}


def test_programs_run_apart():
    doc = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}
    assert humaneval(doc, ["    return 1"]) == {"pass_at_1": 1.0}
    assert humaneval(doc, ["    raise SystemExit"]) == {"pass_at_1": 0.0}
