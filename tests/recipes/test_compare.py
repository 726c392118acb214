"""The recipe that compares two logs of items: lm-eval's and ours, paired by item, and what it refuses."""

import hashlib
import json
from threading import Thread
from types import SimpleNamespace

import compare
import pytest

from hfllm.errors import InputError
from hfllm.outputs.intervals import holm
from hfllm.outputs.statistics import clustered_interval, paired_p_value
from hfllm.runs.lock import lock, release

DATE = "2026-11-29T11-15-43.454236"


def row(number, scores, kind="none", **more):
    """An item as lm-eval 0.4.13 logs it."""
    doc = {"question": f"Say {number}.", "passage": f"p{number // 4}"}
    return {
        "doc_id": number,
        "doc": doc,
        "target": "0",
        "arguments": {
            f"gen_args_{place}": {"arg_0": doc["question"], "arg_1": f" {text}"}
            for place, text in enumerate(("red", "blue"))
        },
        "resps": [[["-2.5", "False"]], [["-1.5", "True"]]],
        "filtered_resps": [["-2.5", "False"], ["-1.5", "True"]],
        "filter": kind,
        "metrics": list(scores),
        "doc_hash": hashlib.sha256(json.dumps(doc).encode()).hexdigest(),
        "prompt_hash": "x",
        "target_hash": "y",
        **scores,
        **more,
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def accs(path, values, **more):
    return write(path, [row(number, {"acc": float(value)}, **more) for number, value in enumerate(values)])


def run(tmp_path, *words):
    return compare.main(*compare.parse([*map(str, words), "--output_dir", str(tmp_path / "out")]))


def refused(tmp_path, match, *words):
    with pytest.raises(InputError, match=match) as error:
        run(tmp_path, *words)
    assert "\n" not in str(error.value)


GOOD, BAD = [1] * 30, [0] * 12 + [1] * 18


def test_two_logs_give_one_verdict_and_an_exit_code(tmp_path, capsys):
    a, b = accs(tmp_path / "a.jsonl", GOOD), accs(tmp_path / "b.jsonl", BAD)
    metrics = run(tmp_path, a, b)
    key = "a/none/acc/b.jsonl_difference"
    assert metrics[f"{key}_p"] == metrics[f"{key}_p_adjusted"] == pytest.approx(2 * 0.5**12)
    assert metrics[key] == pytest.approx(-0.4) and metrics[f"{key}_high"] < 0
    assert metrics["a/none/acc/a.jsonl"] == 1 and metrics["a/none/acc/b.jsonl_items"] == 30
    printed = capsys.readouterr().out
    said = (
        "b.jsonl is worse than a.jsonl at alpha .05 (Holm over 1 primary figure, paired by item): a: acc 1.000 to 0.6"
    )
    assert said in printed and "12, 0, 30" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["stage"] == "compare" and report["summary"].startswith(said) and report["metrics"] == metrics
    changes = [json.loads(line) for line in (tmp_path / "out/changes.jsonl").read_text().splitlines()]
    assert [each["item"] for each in changes] == [str(number) for number in range(12)]
    assert changes[0]["asked"] == "Say 0." and changes[0]["said"] == ["blue", "blue"], "the likelier choice"
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, a, b, "--fail_on_regression")
    assert stop.value.code == 1 and "regression: worse than a.jsonl" in capsys.readouterr().err
    assert run(tmp_path, b, a, "--fail_on_regression")["verdict/better/a.jsonl"] == 1
    assert run(tmp_path, a, b, "--alpha", "0.0004")["verdict/worse/b.jsonl"] == 0


def test_folders_are_compared_task_by_task_and_filter_by_filter(tmp_path):
    values = {"A": (GOOD, BAD, GOOD), "B": (BAD, BAD, [0] * 6 + [1] * 24)}
    for name, (first, strict, flexible) in values.items():
        accs(tmp_path / name / f"samples_mmlu_law_{DATE}.jsonl", first)
        accs(tmp_path / name / "model" / f"samples_mmlu_art_{DATE}.jsonl", strict)
        rows = [row(n, {"exact_match": float(each)}, "strict-match") for n, each in enumerate(strict)]
        rows += [row(n, {"exact_match": float(each)}, "flexible-extract") for n, each in enumerate(flexible)]
        write(tmp_path / name / f"samples_gsm8k_{DATE}.jsonl", rows)
    metrics = run(tmp_path, tmp_path / "A", tmp_path / "B")
    keys = [
        "gsm8k/strict-match/exact_match",
        "gsm8k/flexible-extract/exact_match",
        "mmlu_art/none/acc",
        "mmlu_law/none/acc",
    ]
    p_values = [metrics[f"{key}/B_difference_p"] for key in keys]
    assert p_values == pytest.approx([1, 2 * 0.5**6, 1, 2 * 0.5**12]) and metrics["verdict/family"] == 4
    assert [metrics[f"{key}/B_difference_p_adjusted"] for key in keys] == pytest.approx(holm(p_values))
    # .03 is noise among four.
    assert metrics["verdict/worse/B"] == 1
    pooled = run(tmp_path, tmp_path / "A", tmp_path / "B", "--pool", "mmlu", "--metrics", "acc")
    assert pooled["mmlu/none/acc/A_items"] == 60 and pooled["verdict/family"] == 1
    assert pooled["mmlu/none/acc/B"] == pytest.approx((18 + 18) / 60)


def test_figures_that_are_no_shares_and_those_of_which_less_is_better(tmp_path):
    first = [0.1 + 0.01 * number**1.5 for number in range(20)]
    second = [each * 1.3 for each in first]
    for name, values in (("A", first), ("B", second)):
        rows = [
            row(n, {"bits_per_byte": each, "score": each, "word_perplexity": [1.0, 2]})
            for n, each in enumerate(values)
        ]
        write(tmp_path / name / f"samples_text_{DATE}.jsonl", rows)
    metrics = run(tmp_path, tmp_path / "A", tmp_path / "B")
    assert (metrics["verdict/worse/B"], metrics["verdict/better/B"], metrics["verdict/family"]) == (1, 1, 2)
    assert metrics["text/none/score/B_difference_p"] == paired_p_value(first, second) < 1e-4
    # As lm-eval's results say it, whatever the name.
    (tmp_path / "A" / f"results_{DATE}.json").write_text(json.dumps({"higher_is_better": {"text": {"score": False}}}))
    compare_stage().cache_clear()
    assert run(tmp_path, tmp_path / "A", tmp_path / "B")["verdict/worse/B"] == 2


def test_only_results_of_the_logs_own_run_say_which_way_is_better(tmp_path):
    def results(path, is_more_better):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"higher_is_better": {"text": {"score": is_more_better}}}))

    def is_worse(*logs):
        compare_stage().cache_clear()
        return run(tmp_path, *logs)["verdict/worse/B"] == 1

    for name, values in (("A", range(20)), ("B", range(1, 21))):
        rows = [row(n, {"score": each}) for n, each in enumerate(values)]
        write(tmp_path / name / f"samples_text_{DATE}.jsonl", rows)
        write(tmp_path / name / "log.jsonl", rows)
    dated, plain = ([tmp_path / name / log for name in "AB"] for log in (f"samples_text_{DATE}.jsonl", "log.jsonl"))
    folders = [tmp_path / name for name in "AB"]
    # Another run's, in a folder below, above, and beside.
    for place in ("A/other", ".", "B/other/deep"):
        results(tmp_path / place / f"results_{DATE}.json", False)
    results(tmp_path / "A" / "results_2026-11-30T11-15-43.1.json", False)
    assert not is_worse(*dated) and not is_worse(*folders)
    results(tmp_path / "A" / f"results_{DATE}.json", False)
    assert is_worse(*dated) and is_worse(*folders)
    # A log without a date has all results beside it.
    (tmp_path / "A" / f"results_{DATE}.json").unlink()
    compare_stage().cache_clear()
    assert run(tmp_path, *plain)["verdict/worse/B/log.jsonl"] == 1
    (tmp_path / "A" / "results_2026-11-30T11-15-43.1.json").unlink()
    compare_stage().cache_clear()
    assert run(tmp_path, *plain)["verdict/worse/B/log.jsonl"] == 0


def compare_stage():
    from hfllm.stages import compare as stage

    return stage._higher_is_better


def test_items_of_a_passage_are_not_independent(tmp_path):
    a, b = accs(tmp_path / "a.jsonl", [1] * 32), accs(tmp_path / "b.jsonl", [0] * 12 + [1] * 20)
    metrics = run(tmp_path, a, b, "--cluster_by", "passage")
    key, clusters = "a/none/acc/b.jsonl_difference", [number // 4 for number in range(32)]
    # Three passages changed, of eight.
    assert metrics[f"{key}_p"] == pytest.approx(2 * 0.5**3) and metrics["verdict/worse/b.jsonl"] == 0
    expected = clustered_interval([1.0] * 32, [0.0] * 12 + [1.0] * 20, clusters)
    assert (metrics[f"{key}_low"], metrics[f"{key}_high"]) == (expected.low, expected.high)
    refused(
        tmp_path,
        r"--cluster_by page: .*a.jsonl, line 1 has no such column; found 'doc_id'|found doc_id",
        a,
        b,
        "--cluster_by",
        "page",
    )


def own(path, values, model="m", suite="few_shot", group="sums", **more):
    rows = [
        {
            **{"model": model, "suite": suite, "item": f"{group}-{n}", "group": group},
            **{"scores": {"acc": float(each), "acc_norm": 0.0}, "asked": f"Sum {n}?", "said": "x", "skipped": ""},
            **more,
        }
        for n, each in enumerate(values)
    ]
    return write(path, [*rows, {**rows[0], "item": "long", "scores": {}, "skipped": "too long"}])


def test_our_own_samples_by_their_primary_figures(tmp_path):
    a, b = own(tmp_path / "A/samples.jsonl", GOOD), own(tmp_path / "B/samples.jsonl", BAD)
    for words in ((a, b), (a.parent, b.parent)):
        metrics = run(tmp_path, *words)
        assert metrics["verdict/family"] == 1 and metrics["verdict/worse/B"] == 1
        assert metrics["few_shot/sums/acc/B_difference_p"] == pytest.approx(2 * 0.5**12)
    assert run(tmp_path, a, b, "--metrics", "acc", "acc_norm")["verdict/family"] == 2
    safe = [
        own(tmp_path / name, GOOD, suite="refusals", scores={"over_refusal": score})
        for name, score in (("c", 0.0), ("d", 1.0))
    ]
    assert run(tmp_path, *(each.rename(each.with_suffix(".jsonl")) for each in safe))["verdict/worse/d.jsonl"] == 1
    with (tmp_path / "B/samples.jsonl").open("a") as stream:
        stream.write(json.dumps({**json.loads(a.read_text().splitlines()[0]), "model": "n", "item": "y"}) + "\n")
    refused(tmp_path, "line 32: the log has several models, which hfllm evaluate has compared", a, b)


def test_our_samples_have_the_family_of_the_evaluation_that_wrote_them(tmp_path):
    """Suites of one name have other primary figures on the world, and lm-eval's tasks those that they name first."""
    from hfllm.evaluation.suites import robustness, world_suites
    from hfllm.evaluation.suites.base import Item
    from hfllm.stages.evaluate.report import report

    class Tasks(world_suites.WorldSuite):
        name, better, primary = "lm_eval", {"acc": 1, "misses": -1}, ("misses",)

        def items(self):
            return []

        def scores(self, subject, item, answer):
            return {}

    attacked = robustness.Robustness(dataset_name="x")
    groups = [
        (world_suites.WorldTruthfulness(None), world_suites.KNOWN, ("right", "wrong", "mc2")),
        (world_suites.WorldFewShot(None), "0 shots", ("right", "acc", "exact_match")),
        (world_suites.WorldRefusals(None), "unsafe", ("refuses", "complies")),
        (world_suites.WorldRefusals(None), "safe", ("over_refusal",)),
        (attacked, robustness.RANDOM, ("accuracy",)),
        (attacked, "typos", ("accuracy",)),
        (Tasks(None), "sums", ("acc", "misses")),
    ]
    records = [
        suite.record(SimpleNamespace(label=label), Item(f"{group}-{n}", group, None), dict.fromkeys(metrics, score))
        for label, scores in (("A", GOOD), ("B", BAD))
        for suite, group, metrics in groups
        for n, score in enumerate(scores)
    ]
    suites = {suite.name: suite for suite, _, _ in groups}.values()
    expected = report(list(suites), ["A", "B"], records)
    for label in "AB":
        write(tmp_path / label / "samples.jsonl", [each for each in records if each["model"] == label])
    found = run(tmp_path, tmp_path / "A", tmp_path / "B")
    verdict = {
        name: value
        for name, value in expected.metrics.items()
        if name.startswith("verdict/") or "difference_p" in name
    }
    assert verdict == {name: found[name] for name in found if name.startswith("verdict/") or "difference_p" in name}
    assert verdict["verdict/family"] == 6 and verdict["lm_eval/sums/misses/B_difference_p"] < 1e-3
    assert (verdict["verdict/worse/B"], verdict["verdict/better/B"]) == (3, 3)
    # What is not primary has its direction from the suite.
    assert run(tmp_path, tmp_path / "A", tmp_path / "B", "--metrics", "wrong")["verdict/better/B"] == 1
    odd = write(tmp_path / "C" / "samples.jsonl", [{**records[0], "primary": ["right"]}])
    refused(tmp_path, r"line 1: primary is \['right'\], expected metrics with 1 or -1", tmp_path / "A", odd)


def test_too_few_items_are_no_green_light(tmp_path, capsys):
    a, b = accs(tmp_path / "a.jsonl", [1] * 5), accs(tmp_path / "b.jsonl", [0] * 5)
    said = "nothing of b.jsonl could be tested against a.jsonl: its 1 primary figure has fewer than 6 items"
    refused(tmp_path, f"--fail_on_regression: {said}", a, b, "--fail_on_regression")
    assert run(tmp_path, a, b)["verdict/tested/b.jsonl"] == 0
    assert "1 figure of too few items left out: a: acc (b.jsonl, 5)" in capsys.readouterr().out
    refused(tmp_path, "fewer than 11 items that both have", a, b, "--fail_on_regression", "--alpha", ".001")


def test_missing_items_are_refused_or_said(tmp_path, capsys):
    a, b = accs(tmp_path / "a.jsonl", GOOD), accs(tmp_path / "b.jsonl", BAD[:20])
    refused(tmp_path, r"--logs: b.jsonl lacks 10 of 30 items of a acc \(20, 21, 22\); --allow_missing", a, b)
    metrics = run(tmp_path, a, b, "--allow_missing")
    assert metrics["a/none/acc/a.jsonl_items"] == 20
    assert "10 items that only one of them has left out" in capsys.readouterr().out
    for name, tasks in (("A", ("x", "y")), ("B", ("x",))):
        for task in tasks:
            accs(tmp_path / name / f"samples_{task}_{DATE}.jsonl", GOOD)
    refused(tmp_path, "--logs: B lacks 30 of 30 items of y acc", tmp_path / "A", tmp_path / "B")
    assert run(tmp_path, tmp_path / "A", tmp_path / "B", "--allow_missing")["verdict/family"] == 1


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = accs(tmp_path / "a.jsonl", GOOD), accs(tmp_path / "b.jsonl", BAD)
    refused(tmp_path, "expected two logs, got 1: hfllm compare A.jsonl B.jsonl", a)
    refused(tmp_path, "--logs .*nowhere: no such file or folder", a, tmp_path / "nowhere")
    refused(tmp_path, "--logs .*a.jsonl cannot be used here: it is the first one again", a, a)
    refused(tmp_path, "--alpha 5.0: expected a number between 0 and 1", a, b, "--alpha", "5")
    refused(tmp_path, "--logs: no item with the metrics f1 in both", a, b, "--metrics", "f1")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "the folder holds no samples_TASK_DATE.jsonl and no samples.jsonl", a, tmp_path / "empty")
    twice = write(tmp_path / "twice.jsonl", [row(0, {"acc": 1.0}), row(0, {"acc": 0.0})])
    refused(tmp_path, r"twice.jsonl, line 2: item 0 of twice none again, after .*twice.jsonl, line 1", a, twice)
    other = accs(tmp_path / "other.jsonl", BAD, doc_hash="of other data")
    refused(tmp_path, r"other.jsonl, line 1: item 0 of a is another one than in .*a.jsonl, line 1", a, other)
    nan = write(tmp_path / "nan.jsonl", [row(0, {"acc": float("nan")})])
    refused(tmp_path, "nan.jsonl, line 1: acc is nan, expected a number", a, nan)
    alien = write(tmp_path / "alien.jsonl", [{"prompt": "x"}])
    refused(tmp_path, "alien.jsonl, line 1: no doc_id; expected lm-eval's log of items", a, alien)
    tasks = [accs(tmp_path / f"samples_{task}_{DATE}.jsonl", GOOD) for task in ("x", "y")]
    refused(tmp_path, "lacks 30 of 30 items of", *tasks)
    later = accs(tmp_path / "two" / "samples_x_2026-11-30T11-15-43.1.jsonl", GOOD)
    accs(later.parent / f"samples_x_{DATE}.jsonl", GOOD)
    refused(tmp_path, "two logs of x: .* and .*; name one of them", later.parent, a)


def test_older_logs_without_filters_metrics_and_hashes(tmp_path):
    rows = []
    for number, each in enumerate(GOOD):
        old = row(number, {"acc": each}, arguments=[["Say.", " red"], ["Say.", " blue"]])
        rows.append({name: value for name, value in old.items() if name not in ("filter", "metrics", "doc_hash")})
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{**each, "acc": score} for each, score in zip(rows, BAD, strict=True)])
    assert run(tmp_path, a, b)["verdict/worse/b.jsonl"] == 1
    c = write(tmp_path / "c.jsonl", [{**each, "doc": {"question": "another"}} for each in rows])
    refused(tmp_path, "item 0 of a is another one", a, c)


def test_files_that_are_not_ours_stay(tmp_path):
    a, b = accs(tmp_path / "a.jsonl", GOOD), accs(tmp_path / "b.jsonl", BAD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text("{}")
    refused(tmp_path, "is not hfllm's and would be overwritten", a, b)
    (tmp_path / "out/report.json").unlink()
    (tmp_path / "mine.jsonl").write_text('{"change": 1}\n')
    changes = tmp_path / "out/changes.jsonl"
    changes.symlink_to(tmp_path / "mine.jsonl")
    refused(tmp_path, "changes.jsonl is not hfllm's and would be overwritten", a, b)
    changes.unlink()
    changes.write_text("mine")
    refused(tmp_path, "changes.jsonl is not hfllm's and would be overwritten", a, b)
    changes.unlink()
    lock(tmp_path / "out")
    said = []

    def at_once():
        try:
            run(tmp_path, a, b)
        except InputError as error:
            said.append(str(error))

    other = Thread(target=at_once)
    other.start()
    other.join()
    release(tmp_path / "out")
    assert "thread MainThread of this process" in said[0] and not changes.exists()
    # Its own are written again.
    assert run(tmp_path, a, b) == run(tmp_path, a, b)
