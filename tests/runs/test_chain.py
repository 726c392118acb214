"""One table says what each stage needs; what is missing runs in order, and only that."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfllm.errors import InputError
from hfllm.runs import pipeline
from hfllm.runs.lock import LOCK_FILE, release
from hfllm.runs.pipeline import Chain, chain_before, run_stage, stage_table
from hfllm.runs.recipes import recipe_names, settings_file


@dataclass(frozen=True)
class Flags:
    output_dir: str
    words: tuple[str, ...] = ()


@pytest.fixture
def recipes(monkeypatch):
    """Recipes that note when they run, in place of the real ones: `ran` is the list of their output folders."""
    ran = []

    def load(name):
        def parse(argv):
            return (Flags(argv[len(argv) - 1 - argv[::-1].index("--output_dir") + 1], (name, *argv)),)

        def main(flags):
            ran.append(Path(flags.output_dir).name)
            folder = Path(flags.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            values = {name: value for name, value in vars(flags).items() if name != "output_dir"}
            (folder / "report.json").write_text(json.dumps({"stage": "", "arguments": json.loads(json.dumps(values))}))
            return {"metric": float(len(ran))}

        return SimpleNamespace(parse=parse, main=main)

    monkeypatch.setattr(pipeline, "load_recipe", load)
    return ran


def flag_of(flags: Flags, name: str) -> str | None:
    words = list(flags.words)
    return words[words.index(name) + 1] if name in words else None


def test_the_table_is_whole():
    for name, entry in stage_table().items():
        assert entry.name in recipe_names(), name
        assert not entry.settings or settings_file(entry.settings).is_file(), name
        assert set(entry.needs.values()) <= stage_table().keys(), name


def test_each_stage_begins_from_what_the_one_before_makes(recipes):
    before = chain_before("rlhf", "out", seed=3, world_seed=7)
    assert list(before.runs) == ["pretrain", "sft", "reward"]
    (sft,), (reward,) = before.runs["sft"], before.runs["reward"]
    assert flag_of(sft, "--model_name_or_path") == "out/pretrain"
    assert flag_of(reward, "--model_name_or_path") == "out/sft"
    for (flags,) in before.runs.values():
        assert (flag_of(flags, "--seed"), flag_of(flags, "--world_seed")) == ("3", "7")
        assert flag_of(flags, "--config").endswith("world.yaml")
    assert before.model("sft") == "out/sft" and before.models("reward") == ["out/reward"]


def test_what_is_named_is_not_made(recipes):
    before = chain_before("rlhf", "out", 3, given_models={"sft": "my/model"})
    assert list(before.runs) == ["reward"]
    (reward,) = before.runs["reward"]
    assert flag_of(reward, "--model_name_or_path") == "my/model"
    # The world's settings are for the small models made here.
    assert flag_of(reward, "--config") is None
    assert before.model("sft") is None
    assert not chain_before("rlhf", "out", 3, given_models={"sft": "my/model"}, skip=["reward"]).runs


def test_a_config_of_the_users_takes_the_place_of_the_worlds(recipes):
    before = chain_before("reward", "out", 3, configs={"sft": "mine.yaml"})
    assert list(before.runs) == ["pretrain", "sft"]
    assert flag_of(before.runs["sft"][0], "--config") == "mine.yaml"


def test_copies_differ_in_their_flags_alone(recipes):
    before = chain_before("rlhf", "out", 3, copies={"reward": [["--seed", "4"], ["--seed", "5"]]})
    assert before.models("reward") == ["out/reward", "out/reward_2", "out/reward_3"]
    first, second = before.runs["reward"][0].words, before.runs["reward_2"][0].words
    assert second[: len(first) - 2] == first[:-2] and second[-2:] == ("--seed", "4")


def test_a_stage_that_runs_its_own_is_one_job(recipes):
    before = chain_before("distill", "out", 3, configs={"sft": "mine.yaml"})
    assert list(before.runs) == ["rlhf"]
    (rlhf,) = before.runs["rlhf"]
    assert flag_of(rlhf, "--sft_config") == "mine.yaml" and flag_of(rlhf, "--model_name_or_path") is None
    nested = Chain("rlhf", chain_before("rlhf", "out/rlhf", 3).runs)
    assert list(Chain("distill", before.runs, {"rlhf": nested}).parsed) == ["pretrain", "sft", "reward", "rlhf"]


def test_what_builds_on_a_changed_stage_is_removed_before_it_runs(recipes, tmp_path):
    def run(seed):
        recipes.clear()
        chain_before("rlhf", str(tmp_path), seed).run()
        return list(recipes)

    # The recipe in each folder sees for itself whether it is done: here it notes that it was asked.
    assert run(3) == ["pretrain", "sft", "reward"]
    weights = [tmp_path / name / "weights.bin" for name in ("pretrain", "sft", "reward")]
    for path in weights:
        path.write_bytes(b"1")
    written = [path.stat().st_mtime_ns for path in weights]
    assert run(3) == ["pretrain", "sft", "reward"]
    assert [path.stat().st_mtime_ns for path in weights] == written
    assert run(4) == ["pretrain", "sft", "reward"]
    assert not any(path.exists() for path in weights)


def test_configs_may_lie_over_the_settings_for_the_world(recipes):
    before = chain_before("reward", "out", 3, configs={"sft": "mine.yaml"}, over_world=True)
    words = before.runs["sft"][0].words
    files = [words[place + 1] for place, word in enumerate(words) if word == "--config"]
    assert [Path(file).name for file in files] == ["world.yaml", "mine.yaml"]


def test_a_stage_inside_a_removed_one_stays(recipes, tmp_path):
    inner = tmp_path / "rlhf" / "sft"
    inner.mkdir(parents=True)
    for folder in (tmp_path / "rlhf", inner):
        (folder / "report.json").write_text('{"stage": "", "arguments": {"other": 1}}')
    (tmp_path / "rlhf" / "checkpoint-1").mkdir()
    run_stage("rlhf", (Flags(str(tmp_path / "rlhf"), ("x",)),))
    assert (inner / "report.json").is_file()
    assert not (tmp_path / "rlhf" / "checkpoint-1").exists()


def test_all_processes_are_told_why_a_folder_cannot_be_emptied(recipes, tmp_path, monkeypatch):
    told, processes = [], SimpleNamespace(num_processes=1, wait_for_everyone=lambda: None)

    def fails(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "weights")

    (tmp_path / "report.json").write_text('{"stage": "", "arguments": {"other": 1}}')
    monkeypatch.setattr(pipeline, "refuse_changed_files", fails)
    monkeypatch.setattr("accelerate.PartialState", lambda: processes)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values: told.append(values) or values)
    flags = (Flags(str(tmp_path), ("x",)),)
    with pytest.raises(OSError):
        run_stage("sft", flags)
    processes.num_processes = 2
    with pytest.raises(InputError, match="the disk cannot be read or written: weights"):
        run_stage("sft", flags)
    assert len(told) == 1
    assert (tmp_path / "report.json").exists() and not recipes


def test_a_folder_that_another_run_holds_is_not_emptied(recipes, tmp_path):
    folders = [tmp_path / name for name in ("sft", "reward")]
    for folder in folders:
        folder.mkdir()
        (folder / "report.json").write_text('{"stage": "", "arguments": {"other": 1}}')
        (folder / "weights.bin").write_bytes(b"1")
    code = (
        "import sys, time; from hfllm.runs.lock import lock; lock(sys.argv[1]); print('holds', flush=True); "
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folders[1])], stdout=subprocess.PIPE, text=True)
    flags = (Flags(str(folders[0]), ("x",)),)
    try:
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(InputError, match=rf"another run is writing there \(process {other.pid} "):
            run_stage("sft", flags, {str(folders[1]): "reward"})
        assert all((folder / "weights.bin").is_file() for folder in folders) and not recipes
    finally:
        other.kill()
        other.wait()
    run_stage("sft", flags, {str(folders[1]): "reward"})
    assert recipes and not any((folder / "weights.bin").exists() for folder in folders)
    # The first is held for its stage, so that no other run begins there in between.
    assert (folders[0] / LOCK_FILE).is_file() and not (folders[1] / LOCK_FILE).exists()
    release(folders[0])


def test_what_a_later_stage_has_begun_is_known_as_its_own(recipes, tmp_path):
    later = tmp_path / "reward"
    later.mkdir()
    # Of a run that was killed before report.json.
    (later / "report.md").write_text("# reward\n")
    run_stage("sft", (Flags(str(tmp_path / "sft"), ("x",)),), {str(later): "reward"})
    (later / "report.md").write_text("# mine\n")
    with pytest.raises(InputError, match=r"report\.md is not hfllm's"):
        run_stage("sft", (Flags(str(tmp_path / "sft"), ("y",)),), {str(later): "reward"})
