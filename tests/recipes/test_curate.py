"""`hfllm curate`: from files to shards that pretraining reads, with every drop accounted for."""

import errno
import gc
import gzip
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import curate
import pytest
import yaml

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from hfllm.data.curation.options import FILTERS, CurationOptions
from hfllm.data.loading import RowSource, load_texts
from hfllm.data.packing import Prepared
from hfllm.data.sources import load_source
from hfllm.errors import InputError
from hfllm.stages.curate import CurateArguments, fingerprint, new_attempt, resume_or_clear

ROOT = Path(__file__).parent.parent.parent
WORDS = {
    "adjective": "old quiet broken distant yellow patient narrow careful hungry bright wooden foreign early tired",
    "noun": "river teacher bridge market garden soldier kitchen letter brewer winter harbour doctor village mirror",
    "verb": "crossed found remembered painted carried watched repaired followed described forgot measured sold",
    "adverb": "slowly yesterday twice alone gladly abroad later secretly quickly together again perhaps",
}


ADVERTISEMENT = (
    "You have won the big prize of our weekly draw! Call 09061701461 now to claim your free cash with the code 80086. "
    "Text STOP to 87121 if you do not want to be told of more offers that we have for your mobile. "
    "Urgent: this is the last reminder, and the award expires on Sunday! "
    "Reply to www.example.com or phone the customer service, which costs 150p a minute."
)


def prose(rng):
    """Five lines of English that no other call gives."""

    def pick(kind):
        return rng.choice(WORDS[kind].split())

    def sentence():
        object = f"that {pick('adjective')} {pick('noun')}"
        return (
            f"The {pick('adjective')} {pick('noun')} {pick('verb')} {object} of the {pick('noun')} {pick('adverb')}."
        )

    return "\n".join(" ".join(sentence() for _ in range(3)) for _ in range(5))


def run(*argv):
    return curate.main(*curate.parse([str(word) for word in argv]))


@pytest.fixture
def corpus(tmp_path):
    """A folder of several kinds of files; what is in them that should go."""
    rng, folder = random.Random(0), tmp_path / "in"
    folder.mkdir()
    good = [prose(rng) for _ in range(30)]
    bad = {
        "length": ["token"],
        "language": [
            "Alle Menschen sind frei und gleich an Würde und Rechten geboren und sollen einander helfen. " * 3
        ],
        "gopher_quality": ["This is a good English sentence of the kind that is kept, but it is alone."],
        "gopher_repetition": ["\n".join([good[0].split("\n")[0]] * 5)],
        "c4_quality": [prose(rng) + "\nint main() { }"],
        "spam": [ADVERTISEMENT],
        "toxicity": ["What a grump he was. " + prose(rng)],
        "decontamination": [
            prose(rng) + "\nNatalia sold clips to 48 of her friends in April, and then she sold half as many."
        ],
        "exact_duplicates": [good[1], good[2].upper()],
        "near_duplicates": [good[3] + " And so on."],
    }
    rows = [{"text": text} for text in good[10:]]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (folder / "b.txt").write_text("\n\n\n".join(good[:10]))
    late = [{"text": text} for texts in bad.values() for text in texts] + [{"no": "text"}]
    (folder / "c.jsonl").write_text(
        json.dumps({"text": good[0]}) + "\n" + "".join(json.dumps(row) + "\n" for row in late)
    )
    (tmp_path / "words.txt").write_text("grump\n")
    (tmp_path / "tests.jsonl").write_text(
        json.dumps({"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many."})
    )
    flags = ["--dataset_name", folder, "--toxic_words", tmp_path / "words.txt", "--passage_bytes", 800]
    flags += ["--decontaminate", tmp_path / "tests.jsonl", "--output_dir", tmp_path / "out"]
    return SimpleNamespace(flags=flags, good=good, bad=bad, folder=tmp_path)


def test_every_drop_is_counted_and_the_rest_can_be_pretrained_on(corpus, capsys):
    (corpus.folder / "in" / "d.zip").write_bytes(b"PK")
    metrics = run(*corpus.flags)
    printed = capsys.readouterr().out
    assert f"=== curate {corpus.folder / 'in'} -> {corpus.folder / 'out'}" in printed
    assert "1 files of other kinds are not read" in printed
    assert "Drops by reason" in printed and "Examples of what was dropped" not in printed
    assert printed.endswith(f"hfllm pretrain --dataset_name {corpus.folder / 'out' / 'data'}\n")
    out = corpus.folder / "out"
    source = load_source(str(out / "data"))
    assert sorted(row["text"] for row in source.rows) == sorted(corpus.good)
    assert {row["source"] for row in source.rows} == {"a.jsonl.gz", "b.txt"}
    assert len({row["id"] for row in source.rows}) == 30
    expected = {name: len(texts) for name, texts in corpus.bad.items()} | {"read": 1, "perplexity": 0}
    expected["exact_duplicates"] += 1  # the repeat at the head of c.jsonl
    assert {name.removeprefix("dropped_"): n for name, n in metrics.items() if name.startswith("dropped_")} == expected
    assert metrics["documents_read"] == metrics["documents_kept"] + sum(expected.values())
    assert metrics["bytes_kept"] == sum(len(text.encode()) for text in corpus.good)
    report = json.loads((out / "report.json").read_text())
    assert report["metrics"] == metrics and report["stage"] == "curate"
    text = (out / "report.md").read_text()
    (row,) = [line.split("|") for line in text.splitlines() if line.startswith("| b.txt ")]
    words = sum(len(text.split()) for text in corpus.good[:10])
    assert [int(cell) for cell in row[2:6]] == [10, 10, words, sum(len(text) for text in corpus.good[:10])]
    for example in ("c.jsonl:line 2", "is_de", "What a grump", "| b.txt ", "near_duplicate"):
        assert example in text, example
    assert (out / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["data", "funnel.png", "report.json", "report.md"]
    train, held_out = load_texts(RowSource(str(out / "data")), 0, Prepared(corpus.folder / "prepared", {}), "texts")
    assert sorted([*train["text"], *held_out]) == sorted(corpus.good)
    capsys.readouterr()
    assert run(*corpus.flags, "--workers", 2) == metrics
    assert "already done" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a finished run with min_words=10"):
        run(*corpus.flags, "--min_words", 11)
    (corpus.folder / "in" / "e.txt").write_text("more")
    with pytest.raises(InputError, match="holds a finished run with state of the local files"):
        run(*corpus.flags)


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_ends_the_same(corpus, monkeypatch, capsys):
    from hfllm.data.curation import pipeline

    whole = pipeline.run_stages

    def interrupted(stages, *rest):
        whole(stages[:2], *rest)
        raise KeyboardInterrupt

    hours = itertools.count(3600, 3600)
    # What gzip would note in its files.
    monkeypatch.setattr(gzip, "time", SimpleNamespace(time=lambda: next(hours)))
    run(*corpus.flags, "--output_dir", corpus.folder / "whole")
    monkeypatch.setattr(pipeline, "run_stages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*corpus.flags)
    out = corpus.folder / "out"
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    monkeypatch.setattr(pipeline, "run_stages", whole)

    def read_again(*args, **kwargs):
        raise AssertionError("the first stage had ended")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.DocumentReader, "run", read_again)
        run(*corpus.flags)
    assert "resuming the unfinished run" in capsys.readouterr().out
    assert sorted(row["text"] for row in load_source(str(out / "data")).rows) == sorted(corpus.good)
    assert not (out / "unfinished").exists()
    resumed, uninterrupted = (
        {shard.name: shard.read_bytes() for shard in (folder / "data").iterdir()}
        for folder in (out, corpus.folder / "whole")
    )
    assert resumed and resumed == uninterrupted


def attempt(arguments, output_dir):
    """The folder of one more attempt at a run."""
    work = new_attempt(output_dir)
    resume_or_clear(work, arguments)
    return work


def test_the_contents_of_small_files_count_and_not_their_times(corpus, tmp_path, capsys, monkeypatch):
    """Nor the times of folders, which an editor or a viewer of files changes."""
    (script_args,) = curate.parse([str(flag) for flag in corpus.flags])
    (corpus.folder / "in" / "sub").mkdir()
    before = fingerprint(script_args.inputs)
    for path in (corpus.folder / "in" / "b.txt", corpus.folder / "in" / "sub"):
        os.utime(path, (1, 1))
    assert fingerprint(script_args.inputs) == before
    # Of large ones the times count, and none is read.
    with monkeypatch.context() as patch:
        patch.setattr("hfllm.stages.curate.MOST_COMPARED_BYTES", 0)
        patch.setattr(Path, "open", lambda *args: pytest.fail("a large file was read"))
        large = fingerprint(script_args.inputs)
        os.utime(corpus.folder / "in" / "b.txt", (2, 2))
        assert fingerprint(script_args.inputs) != large
    # Nor what lies where the command is given.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("a note")
    assert fingerprint(script_args.inputs) == before
    (attempt({"state": before, "seed": 1}, tmp_path) / "kept").touch()
    assert (attempt({"state": before, "seed": 1}, tmp_path) / "kept").exists()
    assert "resuming the unfinished run" in capsys.readouterr().out
    (corpus.folder / "in" / "b.txt").write_text("another text")
    work = attempt({"state": fingerprint(script_args.inputs), "seed": 1}, tmp_path)
    assert not (work / "kept").exists()
    assert f"starting anew: the unfinished run had state={before!r}, this one has" in capsys.readouterr().out
    # As older versions kept it, without a folder for each attempt.
    shutil.rmtree(work)
    (work.parent / "arguments.json").write_text(json.dumps({"seed": 1}))
    work = attempt({"seed": 1}, tmp_path)
    assert list(work.parent.iterdir()) == [work]
    assert "starting anew: unfinished/arguments.json is that of an older hfllm" in capsys.readouterr().out
    # Cut off by a crash.
    (work / "arguments.json").write_text('{"state')
    work = attempt({"seed": 1}, tmp_path)
    assert json.loads((work / "arguments.json").read_text()) == {"seed": 1}


def test_each_attempt_has_a_folder_of_its_own(tmp_path, capsys):
    """What still runs of an earlier one finds nothing there, though the next goes on with what that has finished."""
    first = attempt({"seed": 1}, tmp_path)
    (first / "finished").touch()
    second = attempt({"seed": 1}, tmp_path)
    assert (second / "finished").exists() and not first.exists()
    # What still ran has made it again; and one was killed before it had its name.
    (first / "left").mkdir(parents=True)
    third = attempt({"seed": 1}, tmp_path)
    assert (third / "finished").exists() and len({first, second, third}) == 3
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == [third.name]
    assert capsys.readouterr().out.count("resuming the unfinished run") == 2


@pytest.mark.parametrize("file", ["arguments.json", "logs/filter/stats/00000.json", "examples/length-00000.json"])
@pytest.mark.parametrize("text", ["", '{"state', "\x00\xff"])
def test_a_file_that_a_crash_cut_off_is_made_again(file, text, tmp_path, capsys):
    work = attempt({"seed": 1}, tmp_path)
    (work / file).parent.mkdir(parents=True, exist_ok=True)
    (work / file).write_text(text, encoding="latin-1")
    (work / "logs" / "filter" / "completions").mkdir(parents=True, exist_ok=True)
    (work / "logs" / "filter" / "completions" / "00000").touch()
    work = attempt({"seed": 1}, tmp_path)
    assert f"starting anew: unfinished/{file} is damaged" in capsys.readouterr().out
    assert [path.name for path in work.rglob("*")] == ["arguments.json"]
    # It is never there in part.
    attempt({"seed": 1}, tmp_path)
    assert "resuming the unfinished run" in capsys.readouterr().out


def test_a_full_disk_is_one_error(corpus, monkeypatch):
    """Steps before the one that fails are closed then, and must not print errors of their own."""
    from hfllm.data.curation import pipeline

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close_without_its_end(stream):
        is_cut = not stream.closed and stream.writable()
        close(stream)
        if is_cut:
            full()

    def fail_at_the_second(self, data, rank=0, world_size=1):
        yield next(data)
        next(data)
        monkeypatch.setattr(gzip.GzipFile, "close", close_without_its_end)
        full()

    unseen, close = [], gzip.GzipFile.close
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", unseen.append)
        patch.setattr(pipeline.DuplicateSignature, "run", fail_at_the_second)
        patch.setattr(pipeline.Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            run(*corpus.flags)
        gc.collect()
    assert not unseen


@pytest.mark.slow
def test_a_task_that_was_killed_in_its_last_moment_runs_again_alone(corpus, monkeypatch, capsys):
    """While datatrove writes the statistics, before it notes that the task has ended."""
    from hfllm.data.curation import pipeline

    def killed(stages, folder, *rest):
        whole(stages[:2], folder, *rest)
        stats = folder / "logs" / stages[1].name / "stats" / "00000.json"
        stats.write_text(stats.read_text()[:20])
        (folder / "logs" / stages[1].name / "completions" / "00000").unlink()
        raise KeyboardInterrupt

    def read_again(*args, **kwargs):
        raise AssertionError("the first stage had ended")

    whole = pipeline.run_stages
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_stages", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*corpus.flags)
    monkeypatch.setattr(pipeline.DocumentReader, "run", read_again)
    assert run(*corpus.flags)["documents_kept"] == 30
    assert "resuming the unfinished run" in capsys.readouterr().out


@pytest.mark.slow
def test_what_still_writes_for_an_earlier_attempt_changes_nothing(corpus, monkeypatch):
    """A process that nothing could end has the files of its task open, and knows where they lie."""
    from hfllm.data.curation import pipeline

    def killed(stages, folder, *rest):
        whole([replace(stages[0], tasks=2)], folder, *rest)
        (folder / "logs" / "filter" / "completions" / "00001").unlink()
        raise KeyboardInterrupt

    def resumed(stages, folder, *rest):
        whole(stages[:1], folder, *rest)
        for file, place in left.items():
            file.write(b"more")
            file.flush()
            with suppress(FileNotFoundError):
                place.write_bytes(b"other")
        whole(stages, folder, *rest)

    flags, whole = [*corpus.flags, "--tasks", 2], pipeline.run_stages
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_stages", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*flags)
    with ExitStack() as files:
        work = corpus.folder / "out" / "unfinished"
        left = {
            files.enter_context(place.open("ab")): place
            for place in work.rglob("00001.*")
            if "logs" not in place.parts
        }
        assert len(left) == 17  # the documents, the bands of their signatures and the sample
        monkeypatch.setattr(pipeline, "run_stages", resumed)
        run(*flags)
    monkeypatch.setattr(pipeline, "run_stages", whole)
    run(*flags, "--output_dir", corpus.folder / "whole")
    ours, uninterrupted = (
        [*map(Path.read_bytes, sorted((corpus.folder / name / "data").iterdir()))] for name in ("out", "whole")
    )
    assert len(ours) == 2 and ours == uninterrupted


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_report_leaves_nothing(corpus, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(curate, "shutil", None)
        with pytest.raises(AttributeError, match="rmtree"):
            run(*corpus.flags)
    out = corpus.folder / "out"
    assert (out / "report.json").is_file() and (out / "unfinished").is_dir()
    metrics = run(*corpus.flags)
    assert "already done" in capsys.readouterr().out and metrics["documents_kept"] == 30
    assert not (out / "unfinished").exists() and (out / "data").is_dir()


@pytest.mark.slow
def test_a_run_that_ended_before_its_report_is_completed(corpus, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hfllm.outputs.report.Report.write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run(*corpus.flags)
    assert run(*corpus.flags)["documents_kept"] == 30
    assert len(load_source(str(corpus.folder / "out" / "data"))) == 30
    assert not (corpus.folder / "out" / "unfinished").exists()


@pytest.mark.slow
def test_an_interrupted_run_on_other_data_begins_anew(corpus, monkeypatch):
    from hfllm.data.curation import pipeline

    whole = pipeline.run_stages
    monkeypatch.setattr(pipeline, "run_stages", lambda stages, *rest: whole(stages[:1], *rest))
    with pytest.raises(FileNotFoundError):
        run(*corpus.flags)
    monkeypatch.setattr(pipeline, "run_stages", whole)
    (corpus.folder / "in" / "a.jsonl.gz").unlink()
    assert run(*corpus.flags)["documents_kept"] == 10


@pytest.mark.slow
def test_parquet_shards_of_the_default_corpus(tmp_path):
    metrics = run("--max_samples", 150, "--output_format", "parquet", "--tasks", 2, "--output_dir", tmp_path / "out")
    assert metrics["documents_read"] == 300
    shards = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert shards == ["00000.parquet", "00001.parquet"]
    rows = load_source(str(tmp_path / "out" / "data")).rows
    assert len(rows) == metrics["documents_kept"] > 150
    assert set(rows[0]) == {"text", "id", "source"}
    assert "PSF" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_workers_at_once_change_nothing(corpus):
    run(*corpus.flags, "--tasks", 3, "--workers", 1)
    run(*corpus.flags, "--tasks", 3, "--workers", 2, "--output_dir", corpus.folder / "two")
    texts = [[row["text"] for row in load_source(str(corpus.folder / name / "data")).rows] for name in ("out", "two")]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_nothing_left_is_one_line_with_the_reasons(tmp_path):
    path = tmp_path / "a.txt"
    for content, message in (("token", "none of 1 documents is left: length/too_short 1"), ("", "read/empty_file 1")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            run("--dataset_name", path, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out" / "data").exists()
        assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "nowhere.jsonl"], "does not exist"),
        (["--filters", "length", "quality"], "--filters 'quality'; accepted: length, language"),
        (["--output_format", "csv"], "--output_format 'csv'; accepted: jsonl, parquet"),
        (["--tasks", "0"], "--tasks must be at least 1, got 0"),
        (["--max_spam_score", "2"], "--max_spam_score must lie in [0, 1], got 2.0"),
        (["--min_word", "3"], "unknown flag 'min_word'; did you mean 'min_words'?"),
        (["--toxic_words", "nowhere.txt", "--filters", "toxicity"], "--toxic_words nowhere.txt"),
        (["--decontaminate", "nowhere.jsonl", "--filters", "decontamination"], "'nowhere.jsonl' does not exist"),
        (["--perplexity_model", "nowhere/at-all"], "--perplexity_model 'nowhere/at-all' could not be loaded"),
        (["--spam_train_file", "nowhere.csv", "--filters", "spam"], "--spam_train_file nowhere.csv"),
    ],
)
def test_bad_flags_end_before_anything_is_read(tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        run(*flags, "--output_dir", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datatrove" else found(name))
    with pytest.raises(InputError, match=r"pip install 'hfllm\[data\]'"):
        run("--output_dir", tmp_path / "out")


def test_settings_of_the_default_corpus_are_for_it_alone(tmp_path):
    (default,) = curate.parse([])
    (named,) = curate.parse(["--dataset_name", "pydoc"])
    (own,) = curate.parse(["--dataset_name=mine.jsonl"])
    (tmp_path / "own.yaml").write_text("dataset_name: mine.jsonl\n")
    (listed,) = curate.parse(["--config", str(tmp_path / "own.yaml")])
    assert default == named
    assert own == listed
    assert "c4_quality" in own.filters and "c4_quality" not in default.filters


def test_settings_that_came_with_hfllm_by_name(tmp_path, monkeypatch):
    file = ROOT / "recipes" / "configs" / "curate" / "books.yaml"
    monkeypatch.chdir(tmp_path)
    (by_name,) = curate.parse(["--dataset_name", "books", "--config", "curate/books"])
    (by_path,) = curate.parse(["--dataset_name", "books", "--config", str(file)])
    assert by_name == by_path
    assert by_name.filters == yaml.safe_load(file.read_text())["filters"]


def test_a_folder_of_files_that_training_does_not_read(tmp_path):
    """A WARC file among them: the fingerprint looks at it, and no list of formats of the other recipes is asked."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.warc").write_bytes(b"")
    (script_args,) = curate.parse(["--dataset_name", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")])
    before = fingerprint(script_args.inputs)
    with pytest.raises(InputError, match="none of 1 documents is left: read/empty_file 1"):
        curate.main(script_args)
    (tmp_path / "in" / "a.warc").write_bytes(b"x")
    assert fingerprint(script_args.inputs) != before


# The guide, its reference and its experiments.
DOCS = "\n".join(
    (ROOT / "docs" / folder / "curation.md").read_text() for folder in ("guides", "reference", "experiments")
)


@pytest.mark.slow
def test_the_page_names_flags_and_metrics_that_exist(tmp_path):
    flags = {flag for flag in re.findall(r"--([a-z_]+)", DOCS) if flag != "config"}
    assert flags <= {item.name for item in fields(CurateArguments)}
    settings = {item.name for item in fields(CurationOptions)} - {"examples", "seed", "max_samples", "output_format"}
    assert settings - {"dataset_train_split"} <= flags | {"tasks", "filters"}
    metrics = run("--max_samples", 120, "--filters", "length", "--output_dir", tmp_path)
    for name in metrics:
        assert f"`{name}`" in DOCS or name.startswith("dropped_"), name
    for name in FILTERS:
        assert f"| `{name}` |" in DOCS


@pytest.mark.slow
def test_the_pages_code_hands_all_stages_to_slurm(corpus, monkeypatch):
    import dill
    from datatrove.executor import SlurmPipelineExecutor

    from hfllm.data.curation.pipeline import QuietExecutor

    code = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL).group(1)
    code = code.replace("/shared/crawl", str(corpus.folder / "in")).replace(
        "/shared/curated", str(corpus.folder / "work")
    )
    code = code.replace("/shared/gsm8k_test.jsonl", str(corpus.folder / "tests.jsonl")).replace("200", "3")
    launched = []
    monkeypatch.setattr(SlurmPipelineExecutor, "run", lambda self: launched.append(self))
    exec(code, {})
    (last,) = launched
    chain = [last]
    while chain[-1].depends:
        chain.append(chain[-1].depends)
    chain.reverse()
    assert [executor.job_name for executor in chain] == [
        f"curate-{name}" for name in ("filter", "bands", "duplicates", "perplexity", "write")
    ]
    # What the nodes do: load the pickled steps and run the tasks; here one after the other.
    for executor in chain:
        steps = dill.loads(dill.dumps(executor.pipeline))
        QuietExecutor(steps, tasks=executor.tasks, workers=1, logging_dir=executor.logging_dir).run()
    kept = [row["text"] for row in load_source(str(corpus.folder / "work" / "data")).rows]
    assert set(corpus.good[10:]) <= set(kept)


@pytest.mark.slow
def test_importing_the_options_needs_no_extra():
    code = (
        "import sys; sys.modules['datatrove'] = None; import hfllm.data.curation.options, hfllm.data.curation.inputs"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_records_of_a_web_archive_that_are_no_pages_are_reported_and_are_no_documents(tmp_path):
    pytest.importorskip("trafilatura", reason="needs the extra 'data'")
    page = f"<html><frameset><noframes><p>{prose(random.Random(0))}</p></noframes></frameset></html>"
    records = []
    for kind, content in (
        ("warcinfo", "x"),
        ("request", "GET / HTTP/1.1\r\n\r\n"),
        ("request", ""),
        ("resource", page),
    ):
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: text/html\r\nContent-Length: {len(content)}\r\n\r\n"
        records.append(f"{head}{content}\r\n\r\n")
    (tmp_path / "a.warc").write_text("".join(records), newline="")
    metrics = run("--dataset_name", tmp_path / "a.warc", "--filters", "length", "--output_dir", tmp_path / "out")
    assert (metrics["documents_read"], metrics["documents_kept"]) == (1, 1)
    report = (tmp_path / "out" / "report.md").read_text()
    for what, number in (("request records, not read", 2), ("warcinfo records, not read", 1), ("found none", 1)):
        assert re.search(rf"{what} +\| {number} ", report), what
