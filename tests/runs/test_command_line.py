"""Around a stage: what was given, what decides a result, what is done already, and where to resume."""

import errno
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hfllm.errors import HIDDEN, InputError
from hfllm.runs.command_line import (
    given_values,
    main_process,
    parse_recipe,
    run,
    take_configs,
    world_settings,
)
from hfllm.runs.identity import finished_run, run_arguments
from hfllm.runs.recipes import load_recipe
from hfllm.runs.stage import checkpoint_to_resume

TOKEN = "hf_" + "Abc123" * 6


def test_what_is_given_is_what_files_and_over_them_flags_say(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("warmup_steps: 3\nsizes: [1, 2]\nseed: 1\n")
    other.write_text("seed: 2\nbeta: 0.5\nname: null\n")
    argv = ["--learning-rate", "1e-3", "--use_peft", "--beta=-5", "--count", "-1", "--config", str(one), "--last"]
    argv += [f"--config={other}"]
    flags = {"learning_rate": "1e-3", "use_peft": True, "beta": "-5", "count": "-1", "last": True}
    assert given_values(argv) == {"warmup_steps": 3, "sizes": [1, 2], "seed": 2, "name": None, **flags}
    assert take_configs(argv) == ([*argv[:6], "--last"], [one, other])
    assert given_values([]) == {}


@dataclass
class Arguments:
    model_name_or_path: str | None = None
    seed: int = 1
    epochs: int = 2
    rate: float = 3.0


@pytest.mark.parametrize(
    ("argv", "yaml", "expected"),
    [
        ([], "seed: 10", (10, 20, 300.0)),
        (["--rate", "9"], "seed: 10\nmodel_name_or_path: null", (10, 20, 9.0)),
        (["--model_name_or_path", "mine"], "seed: 10", (10, 2, 3.0)),
        (["--model-name-or-path=mine"], "seed: 10", (10, 2, 3.0)),
        (["--epochs", "9"], "seed: 10\nmodel_name_or_path: mine", (10, 9, 3.0)),
    ],
)
def test_settings_for_the_small_model_do_not_reach_a_model_of_the_users_own(tmp_path, argv, yaml, expected):
    files = [tmp_path / name for name in ("world.yaml", "larger.yaml", "mine.yaml")]
    for file, text in zip(files, ("seed: 100\nepochs: 20\nrate: 30", "rate: 300", yaml), strict=True):
        file.write_text(text)

    def settings(given):
        return files[:2] if world_settings("sft")(given) else []

    (parsed,) = parse_recipe([*argv, "--config", str(files[2])], "", Arguments, settings=settings)
    assert (parsed.seed, parsed.epochs, parsed.rate) == expected
    assert all(path.is_file() for path in world_settings("sft")({}))


# ---- what decides a result ----


@dataclass
class Settings:
    dataset_name: str = "world"
    output_dir: str = "somewhere"
    hub_token: str | None = None
    report_to: str = "none"
    resume_from_checkpoint: str | None = "auto"
    model_init_kwargs: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    folder: Path = Path("a/b")
    computed: int = field(default=3, init=False)


@dataclass
class Others:
    seed: int = 5
    note: str = ""


def test_arguments_that_decide_a_result():
    found = run_arguments(Settings(), Others())
    expected = {"dataset_name": "world", "model_init_kwargs": {}, "betas": [0.9, 0.95], "folder": "a/b"}
    assert found == {**expected, "seed": 5, "note": ""}
    elsewhere = Settings(output_dir="b", hub_token=TOKEN, report_to="all", resume_from_checkpoint=None)
    assert run_arguments(elsewhere, Others()) == found != run_arguments(Settings(), Others(seed=6))


def test_secrets_are_hidden_wherever_they_are(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret of an unusual look")
    nested = {"token": "mine", "password": "", "api_key": None, "revision": "v1", "deeper": [{"use_auth_token": True}]}
    settings = Settings(dataset_name=f"me/{TOKEN}", model_init_kwargs=nested)
    found = run_arguments(settings, Others(note='"a secret of an unusual look" at https://me:pass@hub/x'))
    assert found["dataset_name"] == f"me/{HIDDEN}" and found["note"] == f'"{HIDDEN}" at https://{HIDDEN}@hub/x'
    shown = {
        "token": HIDDEN,
        "password": "",
        "api_key": None,
        "revision": "v1",
        "deeper": [{"use_auth_token": HIDDEN}],
    }
    assert found["model_init_kwargs"] == shown
    written = json.dumps(found)
    assert TOKEN not in written and "unusual" not in written and "mine" not in written and "me:pass" not in written


# ---- where it goes ----


@dataclass
class Output:
    output_dir: str | None = "outputs/try"
    settings: str | None = None


@pytest.mark.parametrize("library", [(), (f"{__name__}.Others",)])
@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("output_dir: null", "--output_dir None: expected the name of a folder"),
        ("output_dir: ''", "--output_dir '': expected the name of a folder"),
        ("output_dir: ' '", "--output_dir ' ': expected the name of a folder"),
        ("output_dir: {a: 1}", "--output_dir {'a': 1}: expected the name of a folder"),
        ('output_dir: "a\\0b"', "no name for a folder: it holds characters that none has"),
        ('output_dir: "\\ud800"', "no name for a folder: it holds characters that none has"),
        (f"output_dir: {'x' * 300}", f"--output_dir '{'x' * 80}'...: no name for a folder: File name too long"),
        (f"output_dir: {'/'.join(['x' * 99] * 42)}", "...: no name for a folder: File name too long"),
    ],
)
def test_an_output_folder_without_a_name_is_refused(yaml, words, library, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(InputError) as error:
        parse_recipe(["--config", str(tmp_path / "a.yaml")], "", Output, library)
    assert words in str(error.value) and len(str(error.value)) < 200


def test_other_output_folders_are_taken(tmp_path):
    for named in ("a", "a b/ü", str(tmp_path / "new" / "er"), "false"):
        assert parse_recipe(["--output_dir", named], "", Output)[0].output_dir == named
    assert parse_recipe([], "", Output)[0].output_dir == "outputs/try"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        parse_recipe(["--output_dir", str(tmp_path / "circle")], "", Output)


def test_an_output_folder_is_taken_where_names_are_short(tmp_path, monkeypatch):
    """An encrypted folder takes names of 143 letters."""
    stat = os.stat

    def of_short_names(path, *args, **options):
        if any(len(part) > 143 for part in Path(path).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", of_short_names)
    assert parse_recipe(["--output_dir", str(tmp_path)], "", Output)[0].output_dir == str(tmp_path)


@pytest.mark.parametrize("text", ['{"a":' * 100_000, f'{{"a": {"9" * 5000}}}'])
def test_json_that_python_cannot_hold_is_named_by_its_flag(text):
    with pytest.raises(InputError, match=r"^--settings \{\"a\":.{54,56}\.\.\.: cannot be read as JSON: ") as error:
        parse_recipe(["--settings", text], "", Output)
    assert len(str(error.value)) < 300
    # What only begins so is a text.
    assert parse_recipe(["--settings", "{a}"], "", Output)[0].settings == "{a}"


# ---- what is done already ----


def report(folder, arguments):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"stage": "sft", "arguments": arguments}))
    return str(folder)


def test_a_finished_run_with_the_same_arguments_is_found(tmp_path):
    assert finished_run(str(tmp_path), {}) is None
    arguments = run_arguments(Settings(model_init_kwargs={"revision": "v1"}), Others(note="naïve"))
    folder = report(tmp_path / "out", arguments)
    assert finished_run(folder, arguments) == {"stage": "sft", "arguments": arguments}
    assert finished_run(folder, run_arguments(Settings(model_init_kwargs={"revision": "v1"}), Others(note="naïve")))


@pytest.mark.parametrize(
    ("before", "now", "name", "was", "is_now"),
    [
        ({"b": 1, "a": 2}, {"b": 2, "a": 2}, "b", 1, 2),
        ({"c": 1, "b": 1, "a": 1}, {"a": 1, "b": 5, "c": 6}, "b", 1, 5),
        ({"a": 1}, {"a": 1, "new": "x"}, "new", None, "x"),
        ({"a": 1, "old": [1]}, {"a": 1}, "old", [1], None),
        ({"a": 1, "old": 3}, {"a": 1, "new": 4}, "new", None, 4),
        ({"a": {"x": 1}}, {"a": {"x": 2}}, "a", {"x": 1}, {"x": 2}),
        ({"a": "1"}, {"a": 1}, "a", "1", 1),
    ],
)
def test_a_finished_run_with_others_is_refused_by_the_first_that_differs(tmp_path, before, now, name, was, is_now):
    folder = report(tmp_path, before)
    with pytest.raises(InputError) as error:
        finished_run(folder, now)
    expected = f"--output_dir {folder} holds a finished run with {name}={was!r}, this one has {name}={is_now!r}: "
    assert str(error.value).startswith(expected)


# ---- where to resume ----


def wanted(folder, value):
    return checkpoint_to_resume(value, str(folder))


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints 9 and 10 of a run, the latter cut off, and one elsewhere."""
    for name in ("out/checkpoint-8", "out/checkpoint-9", "out/checkpoint-10", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        if not name.endswith("10"):
            (tmp_path / name / "trainer_state.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("value", [None, False, "false", "False", "none", ""])
def test_nothing_is_resumed_unless_asked(checkpoints, value):
    assert wanted(checkpoints / "out", value) is None


@pytest.mark.parametrize("value", [True, "true", "True", "auto", "Auto"])
def test_the_last_complete_checkpoint_is_resumed(checkpoints, value):
    with pytest.warns(UserWarning, match="checkpoint-10 is not complete"):
        assert wanted(checkpoints / "out", value) == str(checkpoints / "out" / "checkpoint-9")
    if str(value).lower() == "auto":
        assert wanted(checkpoints / "new", value) is None
    else:
        with pytest.raises(InputError, match=r"--resume_from_checkpoint true: no complete checkpoint in .*new"):
            wanted(checkpoints / "new", value)


def test_a_named_checkpoint_is_resumed_wherever_it_is(checkpoints):
    assert wanted(checkpoints / "out", str(checkpoints / "elsewhere")) == str(checkpoints / "elsewhere")
    assert wanted(checkpoints / "out", checkpoints / "elsewhere") == str(checkpoints / "elsewhere")
    with pytest.raises(InputError, match=r"checkpoint-10: not a checkpoint folder \(no trainer_state.json\)"):
        wanted(checkpoints / "out", str(checkpoints / "out" / "checkpoint-10"))


# ---- the end ----


# A single process; the main process; another on its machine; the first of a second machine; without a local rank.
@pytest.mark.parametrize(
    ("rank", "local_rank", "says"),
    [(None, None, True), ("0", "0", True), ("1", "1", False), ("8", "0", True), ("9", "1", False), ("1", None, False)],
)
def test_bad_input_is_one_line_of_each_machine(monkeypatch, capsys, rank, local_rank, says):
    def main(argv):
        raise InputError(f"--name {argv[0]}: {TOKEN} is not accepted")

    monkeypatch.setattr(sys, "argv", ["recipe.py", "x"])
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert main_process() == (rank in (None, "0"))
    with pytest.raises(SystemExit) as ended:
        run(main, lambda argv: (argv,))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (f"error: --name x: {HIDDEN} is not accepted\n" if says else "")


def test_a_defect_is_not_taken_for_bad_input(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0, lambda argv: ())


def test_the_output_folder_of_a_file_wins_over_the_default(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: there\n")
    parse = load_recipe("sft").parse
    assert parse([])[1].output_dir == "outputs/sft"
    assert parse(["--config", str(config)])[1].output_dir == "there"
    assert parse(["--config", str(config), "--output_dir", "here"])[1].output_dir == "here"


def test_a_flag_that_is_off_is_not_given():
    given = given_values(["--fsdp", "false", "--deepspeed=", "--use_peft", "--name", "x"])
    assert given == {"fsdp": False, "deepspeed": False, "use_peft": True, "name": "x"}


def test_a_finished_run_under_old_names_of_flags_is_the_same(tmp_path):
    arguments = {"chat_prompts": False, "sft.train_alone": True, "seed": 1}
    (tmp_path / "report.json").write_text(json.dumps({"stage": "rlhf", "arguments": arguments}))
    present = {"apply_chat_template": False, "sft.train_baseline": True, "seed": 1}
    assert finished_run(str(tmp_path), present)["arguments"] == arguments
    with pytest.raises(InputError, match="apply_chat_template=False, this one has apply_chat_template=True"):
        finished_run(str(tmp_path), {**present, "apply_chat_template": True})


def test_an_old_flag_is_told_its_new_name():
    for word in ("--chat_prompts", "--no_chat_prompts"):
        with pytest.raises(InputError, match="its name is 'apply_chat_template' now"):
            load_recipe("rlhf").parse([word])


def test_an_adapter_is_fine_tuned_at_a_rate_of_its_own(tmp_path):
    def rate(*flags):
        return load_recipe("sft").parse(["--output_dir", str(tmp_path / "out"), *flags])[1].learning_rate

    whole, adapter = str(tmp_path), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert rate() == 2e-3  # the embedded world's model
    assert rate("--model_name_or_path", whole) == 2e-5
    assert rate("--model_name_or_path", whole, "--use_peft") == 2e-4
    assert rate("--model_name_or_path", str(adapter)) == 2e-4
    assert rate("--model_name_or_path", str(adapter), "--learning_rate", "1e-5") == 1e-5


# ---- how it ends ----


@pytest.mark.slow
def test_a_run_does_not_end_as_a_success_before_it_is_done(monkeypatch, capsys):
    def ended(main, parse=lambda argv: ()):
        monkeypatch.setattr(sys, "argv", ["try"])
        try:
            run(main, parse)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    def fork():
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    end = os._exit
    for main, call in ((lambda: sys.exit(), "sys.exit(0)"), (lambda: os._exit(0), "os._exit(0)")):
        code, said = ended(main)
        assert code == 2
        assert re.fullmatch(rf"error: {__file__}, line \d+: {re.escape(call)} would end the run .*\n", said)
    assert ended(lambda: sys.exit(7)) == (7, "")
    assert ended(fork) == (0, "")
    # --help ends so.
    assert ended(lambda: None, lambda argv: sys.exit(0)) == (0, "")
    assert os._exit is end
