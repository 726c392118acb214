"""The command `hfllm`: what it runs and how, with accelerate's flags told from the recipe's."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import default_config_file

from hfllm.data.child_processes import LAUNCHER
from hfllm.errors import InputError
from hfllm.runs import launcher
from hfllm.runs.launcher import ALONE, NOT_HANDED_OVER, WITH_VALUE, split_flags, with_shipped_configs
from hfllm.runs.recipes import declared, installed, load_recipe, recipe_file, recipe_names

ROOT = Path(__file__).parent.parent.parent


# ---- help ----


def test_help_of_every_recipe_imports_no_torch():
    code = """
import sys
from hfllm.runs.launcher import main
from hfllm.runs.recipes import recipe_names
assert main(["--help"]) == main(["list"]) == main(["--version"]) == main([]) == 0
for name in recipe_names():
    print(f"## {name}")
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    heavy = {"torch", "transformers", "trl", "datasets", "accelerate"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    overview, *helps = run.stdout.split("## ")
    assert len(helps) == len(recipe_names())
    for name, text in zip(recipe_names(), helps, strict=True):
        assert re.search(rf"^    {name} +[A-Z]", overview, re.MULTILINE)
        assert f"hfllm {name}" in text and "--config" in text


def test_docstrings_say_how_to_launch():
    for name in recipe_names():
        launched = f"accelerate launch recipes/{name}.py" in recipe_file(name).read_text()
        assert launched or declared(name).in_one_process, name


@pytest.mark.parametrize(("name", "meant"), [("rhlf", "rlhf"), ("pretraining", "pretrain"), ("lst", "list")])
def test_a_misspelt_recipe(name, meant, capsys):
    assert launcher.main([name, "--seed", "1"]) == 2
    assert capsys.readouterr().err == f"error: unknown recipe {name!r}; did you mean {meant!r}?\n"


# ---- whose flag it is ----


def accelerate_options():
    """Every flag of accelerate's own parser, with whether it takes a value; short ones are left out."""
    for action in accelerate_launch.launch_command_parser()._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                yield option[2:].replace("-", "_"), action.nargs != 0


def test_the_flags_are_those_of_accelerate():
    options = dict(accelerate_options())
    left_out = {name for name in options if name.startswith(("megatron_lm_", "tpu", "no_tpu"))} | NOT_HANDED_OVER
    with_value, alone = ({name for name in options if options[name] == takes} - left_out for takes in (True, False))
    assert with_value <= WITH_VALUE and alone == ALONE
    # accelerate 1.16 has it no more.
    assert WITH_VALUE - with_value <= {"fp8_opt_level"}


def test_no_recipe_has_a_flag_that_is_handed_to_accelerate(capsys):
    for name in (name for name in recipe_names() if not declared(name).in_one_process):
        with pytest.raises(SystemExit):
            load_recipe(name).parse(["--help_all"])
        own = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
        assert "seed" in own or "model_name_or_path" in own
        assert not own & (WITH_VALUE | ALONE), name


def test_flags_are_split():
    words = [
        "--num-processes",
        "2",
        "--seed=3",
        "--config_file=zero2",
        "--use_fsdp",
        "--learning_rate",
        "-1",
        "--bf16",
    ]
    words += ["--gradient_accumulation_steps", "4", "--debug", "underflow_overflow"]
    for_accelerate, for_recipe = split_flags(words)
    assert for_accelerate == ["--num_processes", "2", "--config_file", "zero2", "--use_fsdp"]
    assert for_recipe == [
        *("--seed=3", "--learning_rate", "-1", "--bf16", "--gradient_accumulation_steps", "4"),
        *("--debug", "underflow_overflow"),
    ]
    for words in (["--num_processes"], ["--config_file", "--seed", "1"]):
        with pytest.raises(InputError, match="needs a value"):
            split_flags(words)


def accelerates_view(words):
    """accelerate's arguments once it has read its config, and what it has warned of."""
    warned = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    accelerate_launch.logger.addHandler(handler)
    try:
        args = accelerate_launch.launch_command_parser().parse_args([*words, "script.py"])
        return accelerate_launch._validate_launch_command(args)[0], warned
    finally:
        accelerate_launch.logger.removeHandler(handler)


@pytest.mark.parametrize("name", ["zero3", "zero3.yaml", "accelerate_configs/zero3.yaml"])
def test_shipped_configs_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: object())
    words = with_shipped_configs(["--num_processes", "2", "--config_file", name, "--machine_rank", "0"])
    args, _ = accelerates_view(words)
    assert Path(args.config_file).samefile(ROOT / "accelerate_configs" / "zero3.yaml")
    assert Path(args.deepspeed_config_file).samefile(ROOT / "ds_configs" / "zero3.json")
    assert args.use_deepspeed and args.num_processes == 2 and args.zero3_init_flag in (True, "true")


def test_configs_of_the_users_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: object())
    values = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds_configs/zero2.json"}}
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    Path("zero1").write_text(yaml.safe_dump({**values, "deepspeed_config": {"zero_stage": 1}}))
    Path("ds_configs").mkdir()
    Path("ds_configs/zero2.json").write_text(json.dumps({}))
    for words in (["--config_file", "mine.yaml"], ["--config_file", "zero1"], ["--num_machines", "2"]):
        assert with_shipped_configs(words) == words
    words = ["--config_file", "zero2", "--deepspeed_config_file", "other.json"]
    assert with_shipped_configs(words)[2:] == words[2:]


def test_configs_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--config_file zero4: no such file, and none .*: cpu, ddp, .*zero2"):
        with_shipped_configs(["--config_file", "zero4"])
    with pytest.raises(InputError, match="no such file"):
        with_shipped_configs(["--config_file", "elsewhere/zero2.yaml"])
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"zero2 needs DeepSpeed: pip install 'hfllm\[deepspeed\]'"):
        with_shipped_configs(["--config_file", "zero2"])
    assert with_shipped_configs(["--config_file", "ddp"])[1].endswith("ddp.yaml")


# ---- how it is run ----


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many devices and no settings of accelerate; `ran` and `launched` tell what was done."""
    note = SimpleNamespace(devices=0, ran=[], launched=[])
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # Both are changed by the launcher itself.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(launcher, "num_devices", lambda: note.devices)
    monkeypatch.setattr(launcher, "run", lambda main, parse: note.ran.append((main.__module__, sys.argv[1:])))
    monkeypatch.setattr(accelerate_launch, "launch_command", note.launched.append)
    return note


@pytest.mark.parametrize(
    ("devices", "words", "is_launched"),
    [
        (0, ["sft", "--seed", "1"], False),
        (1, ["sft", "--seed", "1"], False),
        (8, ["sft", "--seed", "1"], True),
        (0, ["sft", "--num_processes", "1", "--seed", "1"], True),
        (8, ["push", "--seed", "1"], False),
        (8, ["sft", "--help", "--seed", "1"], False),
        (8, ["sft", "--help_all", "--seed", "1"], False),
    ],
)
def test_several_devices_or_flags_of_accelerate_launch_it(machine, devices, words, is_launched):
    machine.devices = devices
    assert launcher.main(words) == 0
    assert (len(machine.launched), len(machine.ran)) == ((1, 0) if is_launched else (0, 1))
    if is_launched:
        (args,) = machine.launched
        assert Path(args.training_script).samefile(ROOT / "recipes" / "sft.py")
        assert args.training_script_args == ["--seed", "1"]
    else:
        assert machine.ran == [(f"hfllm.recipes.{words[0]}", words[1:])]


def test_what_others_have_launched_is_run_as_it_is(machine, monkeypatch):
    machine.devices = 8
    os.environ["LOCAL_RANK"] = "3"
    assert launcher.main(["sft", "--seed", "1"]) == 0
    assert machine.ran == [("hfllm.recipes.sft", ["--seed", "1"])]
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_users_settings_of_accelerate_are_used(machine, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("num_processes: 4")
    assert launcher.main(["sft"]) == 0
    (args,) = machine.launched
    assert args.num_processes is None and args.mixed_precision is None


def test_where_accelerate_looks_for_them(monkeypatch):
    # accelerate reads the environment when it is imported.
    assert str(launcher.default_accelerate_config()) == default_config_file
    for name, value, expected in (
        ("HF_HOME", "/a", "/a/accelerate/default_config.yaml"),
        ("XDG_CACHE_HOME", "/b", "/b/huggingface/accelerate/default_config.yaml"),
    ):
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.setenv(name, value)
        assert launcher.default_accelerate_config() == Path(expected)


def test_a_single_process_has_all_cores(machine):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    launcher.main(["sft"])
    assert os.environ.pop("OMP_NUM_THREADS") == str(cores)
    launcher.main(["sft", "--num_processes", "1"])
    assert os.environ.pop("OMP_NUM_THREADS") == str(cores)
    # accelerate divides them, or gives each process one.
    launcher.main(["sft", "--num_processes", "2"])
    assert "OMP_NUM_THREADS" not in os.environ
    machine.devices = 8
    launcher.main(["sft"])
    assert "OMP_NUM_THREADS" not in os.environ
    os.environ["OMP_NUM_THREADS"] = "3"
    for words in (["sft"], ["sft", "--num_processes", "1"]):
        launcher.main(words)
        assert os.environ["OMP_NUM_THREADS"] == "3"


def test_accelerate_has_nothing_to_warn_of(machine):
    given = ["--mixed_precision", "bf16"]
    assert "--num_processes" in "".join(accelerates_view(given)[1])
    words = launcher.with_defaults(given)
    args, warned = accelerates_view(words)
    assert not warned
    assert (args.num_processes, args.num_machines, args.mixed_precision, args.dynamo_backend) == (1, 1, "bf16", "no")
    assert launcher.with_defaults(["--config_file", "x.yaml"]) == ["--config_file", "x.yaml"]


def test_how_many_processes_is_left_to_accelerate_where_there_is_a_choice(machine):
    assert "--num_processes" in launcher.with_defaults(["--use_fsdp"])
    assert "--num_processes" not in launcher.with_defaults(["--num_machines", "2", "--machine_rank", "0"])
    machine.devices = 8
    assert "--num_processes" not in launcher.with_defaults(["--use_fsdp"])


def test_what_is_launched_knows_what_it_ends_with(machine):
    """Also a single process, which `accelerate launch` starts by itself."""
    launcher.main(["sft", "--num_processes", "1"])
    assert os.environ.pop(LAUNCHER) == f"{os.getpid()}@{socket.gethostname()}"
    launcher.main(["sft"])
    assert LAUNCHER not in os.environ


def failed(error):
    def launch_command(args):
        raise error

    return launch_command


def test_exit_codes_pass_through(machine, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    words = ["sft", "--num_processes", "2"]
    for code, expected in ((2, 2), (1, 1), (143, 143), (-9, 137)):
        monkeypatch.setattr(accelerate_launch, "launch_command", failed(CalledProcessError(code, "sft")))
        assert launcher.main(words) == expected
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="none")
        monkeypatch.setattr(accelerate_launch, "launch_command", failed(ChildFailedError("sft", {0: failure})))
        assert launcher.main(words) == expected
    monkeypatch.setattr(launcher, "run", lambda main, parse: sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        launcher.main(["sft"])
    monkeypatch.setattr(accelerate_launch, "launch_command", failed(KeyboardInterrupt()))
    assert launcher.main(words) == 130


# What a launched process does: it tells its launcher, and what it is told itself takes it a second.
SAVES = """
import os, signal, sys, time
number, is_told = int(sys.argv[1]), sys.argv[3] == "yes"
def save(*_):
    time.sleep(1)
    open(sys.argv[2], "a").write("saved")
    sys.exit(128 + number)
signal.signal(number, save)
os.kill(os.getppid(), number)
if is_told:
    os.kill(os.getpid(), number)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "is_told"), [(signal.SIGTERM, "no"), (signal.SIGINT, "yes"), (signal.SIGINT, "no")], ids=str
)
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_a_launched_process_ends_first(machine, tmp_path, monkeypatch, number, is_told):
    """Ctrl-C tells both, SIGTERM only the launcher."""
    words = [sys.executable, "-c", SAVES, str(int(number)), str(tmp_path / "note"), is_told]

    def launch_command(args):
        process = subprocess.Popen(words)
        if code := process.wait():
            raise CalledProcessError(code, words)

    def ends(*_):
        raise AssertionError("the launcher has ended first")

    monkeypatch.setattr(accelerate_launch, "launch_command", launch_command)
    monkeypatch.setattr(launcher, "PATIENCE", 3 if is_told == "yes" else 0)
    before = signal.signal(signal.SIGTERM, ends)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert launcher.main(["sft", "--num_processes", "1"]) == 128 + number
        assert signal.getsignal(signal.SIGTERM) is ends
        # It is not the launcher's.
        assert other.poll() is None
    finally:
        signal.signal(signal.SIGTERM, before)
        other.kill()
        other.wait()
    assert (tmp_path / "note").read_text() == "saved"


def test_a_signal_ends_what_has_launched_nothing_yet(machine, monkeypatch):
    monkeypatch.setattr(accelerate_launch, "launch_command", lambda args: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(SystemExit, match="143"):
            launcher.main(["sft", "--num_processes", "1"])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_list_names_what_came_with_it(capsys):
    assert launcher.main(["list"]) == 0
    shown = capsys.readouterr().out
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert re.search(rf"\b{path.stem}\b", shown)
    for path in (ROOT / "recipes" / "configs").rglob("*.yaml"):
        assert f"{path.parent.name}/{path.stem}" in shown
    assert str(installed("recipes")) in shown


@pytest.mark.parametrize(
    "words, devices, is_added",
    [
        (["--num_processes", "2"], 0, True),
        (["--num_processes", "1"], 0, False),
        ([], 0, False),
        (["--num_processes", "2"], 2, False),
        (["--num_processes", "2", "--multi_gpu"], 0, False),
        (["--num_processes", "2", "--use_fsdp"], 0, False),
        (["--num_processes", "two"], 0, False),
    ],
)
def test_several_processes_start_without_gpus_too(monkeypatch, words, devices, is_added):
    monkeypatch.setattr(launcher, "num_devices", lambda: devices)
    monkeypatch.setattr(launcher, "default_accelerate_config", lambda: Path("nowhere"))
    given = launcher.with_defaults(words)
    assert given[-len(words) :] == words if words else True
    assert given.count("--multi_gpu") == ("--multi_gpu" in words or is_added)
    parsed = (
        accelerate_launch.launch_command_parser().parse_known_args([*given, "script.py"])[0]
        if "two" not in words
        else None
    )
    assert parsed is None or parsed.multi_gpu == ("--multi_gpu" in words or is_added)
