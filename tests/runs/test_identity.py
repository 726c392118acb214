"""What tells a run from others: flags that decide what is trained, and contents in place of paths and times."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.outputs.report import CHANGED
from hfllm.runs import identity
from hfllm.runs.identity import difference, model_files, run_identity
from hfllm.runs.stage import stage_arguments


@dataclass
class Flags:
    output_dir: str
    learning_rate: float = 0.1
    logging_steps: int = 1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 2
    dataset_name: str = "world"
    dataset_mixture: list[str] | None = None
    model_name_or_path: str | None = None
    reward_model_name_or_path: list[str] | None = None
    reward_funcs: list[str] | None = None
    tools: list[str] | None = None
    environment_factory: list[str] | None = None
    mcp_servers: str | None = None
    sft_config: str | None = None


@dataclass
class Limited(Flags):
    max_row_bytes: int = MAX_ROW_BYTES


@dataclass
class Rollouts(Flags):
    num_mini_batches: int = 1


def identity_of(flags: Flags, before: "dict[str, tuple[Flags]] | None" = None, stage: str = "sft"):
    found = run_identity(stage, stage_arguments(flags, before=before), (flags,), flags.output_dir)
    # As a checkpoint holds it.
    return json.loads(json.dumps(found))


@pytest.fixture
def named(tmp_path):
    """Files of every kind that flags name, and the flags; in another folder for each call."""

    def make(name, **changes):
        folder = tmp_path / name
        for model in ("model", "reward"):
            (folder / model).mkdir(parents=True)
            (folder / model / "config.json").write_text("{}")
            (folder / model / "model.safetensors").write_bytes(model.encode())
            (folder / model / "README.md").write_text(name)
        (folder / "data").mkdir()
        (folder / "data" / "a.txt").write_text("a text")
        for file in ("score.py", "tools.py", "table.json", "games.py", "servers.json"):
            (folder / file).write_text("def score(): ...")
        (folder / "sft.yaml").write_text("seed: 1")
        for file, text in changes.items():
            (folder / {"data": "data/a.txt", "model": "model/model.safetensors"}.get(file, file)).write_text(text)
        return Flags(
            str(folder / "out"),
            dataset_name=str(folder / "data"),
            model_name_or_path=str(folder / "model"),
            reward_model_name_or_path=[str(folder / "reward"), str(folder / "model")],
            reward_funcs=[f"{folder}/score.py:score"],
            tools=["calculator", f"{folder}/tools.py:double", f"lookup:{folder}/table.json"],
            environment_factory=[f"{folder}/games.py:Game"],
            mcp_servers=f"{folder}/servers.json",
            sft_config=str(folder / "sft.yaml"),
        )

    return make


def test_a_copy_elsewhere_is_the_same_run(named):
    assert difference(identity_of(named("one")), identity_of(named("two"))) is None


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ("data", "dataset_name"),
        ("model", "model_name_or_path"),
        ("score.py", "reward_funcs"),
        ("tools.py", "tools"),
        ("table.json", "tools"),
        ("games.py", "environment_factory"),
        ("servers.json", "mcp_servers"),
        ("sft.yaml", "sft_config"),
    ],
)
def test_other_contents_are_another_run(named, changed, flag):
    before, flags = identity_of(named("one")), named("two", **{changed: "different"})
    assert difference(before, identity_of(flags)).startswith(f"{flag}=")
    same = named("three")
    before = identity_of(same)
    folder = Path(same.output_dir).parent
    (folder / {"data": "data/a.txt", "model": "model/model.safetensors"}.get(changed, changed)).write_text("different")
    assert difference(before, identity_of(same)) == f"other contents of --{flag} {getattr(same, flag)}"


def test_names_that_are_no_files_count_beside_those_that_are(named):
    before, flags = identity_of(named("one")), named("two")
    flags.tools[0] = "python"
    assert difference(before, identity_of(flags)).startswith("tools=['calculator', ")


def test_what_is_logged_may_change_and_the_batch_be_divided(tmp_path, monkeypatch):
    before = identity_of(Flags(str(tmp_path)))
    assert difference(before, identity_of(Flags(str(tmp_path / "moved"), logging_steps=9))) is None
    halves = Flags(str(tmp_path), per_device_train_batch_size=4)
    assert difference(before, identity_of(halves)).startswith("rows per optimizer step (batch x accumulation x pro")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert difference(before, identity_of(halves)) is None
    # A rollout is not divided anew.
    before = identity_of(Rollouts(str(tmp_path)))
    divided = Rollouts(str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert difference(before, identity_of(divided)) == (
        "gradient_accumulation_steps=2, this run has gradient_accumulation_steps=4"
    )
    monkeypatch.delenv("WORLD_SIZE")
    assert difference(before, identity_of(Rollouts(str(tmp_path)))) == "processes=2, this run has processes=1"


def test_the_first_difference_is_named_and_the_stage_before_all(tmp_path):
    before = identity_of(Flags(str(tmp_path)))
    now = identity_of(Flags(str(tmp_path), learning_rate=0.2, dataset_name="pydoc"))
    assert difference(before, now) == "dataset_name='world', this run has dataset_name='pydoc'"
    assert difference(before, identity_of(Flags(str(tmp_path)), stage="reward")).startswith(
        "stage='sft', this run has"
    )
    # A flag of another version, or under its old name.
    before["arguments"] |= {"gone": 1, "lookahead": 4}
    now = {**identity_of(Flags(str(tmp_path)))}
    now["arguments"] |= {"new": 2, "num_draft_tokens": 4}
    assert difference(before, now) is None
    now["arguments"]["num_draft_tokens"] = 5
    assert difference(before, now) == "num_draft_tokens=4, this run has num_draft_tokens=5"


def test_paths_inside_the_output_folder_move_with_it(tmp_path):
    def of(folder, rate=0.1):
        flags = Flags(f"{folder}/sft", model_name_or_path=f"{folder}/pretrain", learning_rate=rate)
        return identity_of(Flags(str(folder)), before={"sft": (flags,)})

    assert difference(of(tmp_path / "one"), of(tmp_path / "two")) is None
    assert difference(of(tmp_path / "one"), of(tmp_path / "two", 0.5)).startswith("sft.learning_rate=0.1, this run")


def test_the_texts_of_a_mixture_count_in_their_order(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)

    def of(*names):
        return identity_of(Flags("out", dataset_mixture=[f"{tmp_path}/{name}" for name in names]))

    before = of("a.txt:0.5", "b.txt:0.5")
    assert difference(before, of("a.txt:0.5", "b.txt:0.6"))
    assert difference(before, of("a.txt:0.5", "c.txt:0.5"))
    (tmp_path / "c.txt").write_text("b")
    assert difference(before, of("a.txt:0.5", "c.txt:0.5")) is None


@pytest.mark.slow
def test_pictures_of_the_rows_that_are_read_count(tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"a picture")
    rows = [{"prompt": "a", "completion": "b", "image": name} for name in ("0.png", "1.png", "")]
    # A row as long as the run reads them hides no picture.
    rows.insert(1, {"prompt": "a" * MAX_ROW_BYTES, "completion": "b"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = Limited("out", dataset_name=str(tmp_path / "rows.jsonl"), max_row_bytes=0)

    def of(most):
        given = {
            **stage_arguments(flags),
            "max_samples": most,
            f"{identity.PICTURES_OF.format('dataset_name')}{CHANGED}": "then",
        }
        return run_identity("sft", given, (flags,), "out")

    first, everything = of(1), of(None)
    (tmp_path / "1.png").write_bytes(b"another")
    assert difference(first, of(1)) is None
    assert difference(everything, of(None)).startswith("other contents of --dataset_name")
    (tmp_path / "0.png").write_bytes(b"another")
    assert difference(first, of(1)).startswith("other contents of --dataset_name")


def test_a_models_report_and_checkpoints_do_not_count(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md", "report.json", "optimizer.pt"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-2").mkdir()
    assert [name for name, _ in model_files(tmp_path)] == ["config.json", "model.safetensors"]
