"""What a job says of itself: its stages, which of them runs, and how long each takes where that was timed."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfllm.runs import pipeline, schedule
from hfllm.runs.pipeline import Chain, chain_before, stage_table, usual_minutes
from hfllm.runs.recipes import load_recipe, settings_file
from hfllm.runs.schedule import Job, Planned, current_job, described


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    monkeypatch.setattr(schedule, "_job", None)


def test_a_job_in_words():
    known = [Planned("pretrain", "a", 1.5), Planned("sft", "b", 0.5), Planned("rlhf", "c", 2.5)]
    assert described(Job(tuple(known))) == (
        "3 stages: pretrain (about 1.5 min), sft (0.5 min), rlhf (2.5 min); in all about 4.5 min on two cores"
    )
    assert described(Job((Planned("sft", "b"), *known[1:2]))) == "2 stages: sft, sft (about 0.5 min)"
    assert Job(tuple(known), place=0).minutes_after == 3
    assert Job(tuple(known), place=2).minutes_after == 0
    assert Job((known[0], Planned("sft", "b"), known[2])).minutes_after is None


# ---- how long a stage takes ----


@pytest.mark.parametrize("name", [name for name, entry in stage_table().items() if entry.minutes is not None])
def test_the_settings_of_the_world_take_the_time_of_the_table(name):
    entry = stage_table()[name]
    flags = ["--config", str(settings_file(entry.settings)), "--seed", "7", "--output_dir", "elsewhere"]
    for flag in entry.needs:
        flags += [f"--{flag}", "a/model"]
    parse = load_recipe(entry.name).parse
    assert usual_minutes(name, parse(flags)) == entry.minutes
    assert usual_minutes(f"{name}_2", parse(flags)) == entry.minutes
    for other in (["--max_steps", "3"], ["--per_device_train_batch_size", "2"], ["--use_peft", "true"]):
        assert usual_minutes(name, parse([*flags, *other])) is None


def test_nobody_knows_how_long_other_stages_take(monkeypatch):
    parse = load_recipe("sft").parse
    assert usual_minutes("sft", parse([])) == stage_table()["sft"].minutes
    assert usual_minutes("sft", parse(["--model_name_or_path", "mine"])) is None
    assert usual_minutes("sft", parse(["--dataset_name", "mine.jsonl"])) is None
    assert usual_minutes("sft", ()) is None
    assert usual_minutes("convert", parse([])) is None
    assert usual_minutes("unheard_of", parse([])) is None
    parsed = parse([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert usual_minutes("sft", parsed) is None


# ---- what a chain plans ----


@dataclass(frozen=True)
class Flags:
    output_dir: str
    words: tuple[str, ...] = ()


@pytest.fixture
def jobs(monkeypatch):
    """Recipes that enter the job as stages do and finish at once; the list of what the job was when each ran."""
    seen = []

    def load(name):
        def parse(argv):
            return (Flags(argv[argv.index("--output_dir") + 1], (name, *argv)),)

        def main(flags):
            schedule.enter(Planned(name, flags.output_dir))
            seen.append(([stage.name for stage in current_job().stages], current_job().place))
            folder = Path(flags.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(json.dumps({"stage": "", "arguments": {"words": list(flags.words)}}))
            return {}

        return SimpleNamespace(parse=parse, main=main)

    monkeypatch.setattr(pipeline, "load_recipe", load)
    return seen


def test_the_stages_are_said_once_and_counted(jobs, tmp_path, capsys):
    before = chain_before("rlhf", str(tmp_path), seed=3)
    schedule.enter(Planned("rlhf", str(tmp_path)))
    before.run()
    assert capsys.readouterr().out == "rlhf: 4 stages: pretrain, sft, reward, rlhf\n"
    names = ["pretrain", "sft", "reward", "rlhf"]
    assert jobs == [(names, 0), (names, 1), (names, 2)]
    assert current_job().place == 3


def test_finished_stages_are_not_counted(jobs, tmp_path, capsys):
    before = chain_before("rlhf", str(tmp_path), seed=3)
    before.run()
    (tmp_path / "sft" / "report.json").unlink()
    assert list(before.missing()) == ["sft", "reward"]
    # Said again by a run that begins anew, but not where nothing is to be made.
    for expected in ("rlhf: 3 stages: sft, reward, rlhf\n", ""):
        capsys.readouterr()
        schedule.enter(Planned("rlhf", str(tmp_path)))
        before.run()
        assert capsys.readouterr().out == expected
        assert not before.missing()


def test_a_nested_chain_is_part_of_the_job(jobs, tmp_path, capsys):
    inner = chain_before("rlhf", str(tmp_path / "rlhf"), seed=3)
    outer = Chain("distill", {"rlhf": (Flags(str(tmp_path / "rlhf")),)}, {"rlhf": inner})
    names = ["pretrain", "sft", "reward", "rlhf", "distill"]
    assert list(outer.missing()) == names[:-1]
    schedule.enter(Planned("distill", str(tmp_path)))
    outer.announce()
    schedule.enter(Planned("rlhf", str(tmp_path / "rlhf")))
    assert current_job().place == 3
    inner.run()
    assert jobs == [(names, 0), (names, 1), (names, 2)]
    assert current_job().place == 3
    assert capsys.readouterr().out == "distill: 5 stages: pretrain, sft, reward, rlhf, distill\n"


def test_a_failed_job_does_not_spoil_the_next(jobs, tmp_path, capsys):
    schedule.enter(Planned("rlhf", str(tmp_path)))
    chain_before("rlhf", str(tmp_path), seed=3).announce()
    schedule.enter(Planned("sft", str(tmp_path / "sft")))
    # It fails there; another job begins in the same process, and then the same one again.
    schedule.enter(Planned("sft", "other"))
    assert [stage.name for stage in current_job().stages] == ["sft"]
    chain_before("rlhf", str(tmp_path), seed=3).announce()
    assert len(current_job().stages) == 1
    schedule.enter(Planned("rlhf", str(tmp_path)))
    capsys.readouterr()
    chain_before("rlhf", str(tmp_path), seed=3).announce()
    assert capsys.readouterr().out.startswith("rlhf: 4 stages")


def test_only_the_main_process_says_so(jobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    schedule.enter(Planned("rlhf", str(tmp_path)))
    chain_before("rlhf", str(tmp_path), seed=3).announce()
    assert capsys.readouterr().out == ""
    assert len(current_job().stages) == 4
