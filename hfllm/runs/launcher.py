"""The command `hfllm`: every recipe by its name, in this process or by `accelerate launch`, whose flags it takes.

    hfllm list
    hfllm rlhf --seed 1
    hfllm sft --num_processes 4 --config_file zero2 --model_name_or_path NAME

The last is `accelerate launch --num_processes 4 --config_file accelerate_configs/zero2.yaml recipes/sft.py
--model_name_or_path NAME`.
"""

import difflib
import importlib.util
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hfllm.data.child_processes import be_launcher
from hfllm.errors import InputError, refuse_if
from hfllm.runs.command_line import ASKS_FOR_HELP, INTERRUPTED, check_command, run
from hfllm.runs.output import hide_unhelpful_bars, hide_unhelpful_output
from hfllm.runs.parser import read_yaml
from hfllm.runs.pipeline import stage_table
from hfllm.runs.recipes import declared, docstring_of, installed, load_recipe, recipe_file, recipe_names
from hfllm.version import __version__

if TYPE_CHECKING:
    import psutil


# ---- the command ----


# Values with a warning of `accelerate launch` when absent.
ACCELERATE_DEFAULTS = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
# With these accelerate starts processes in a way of their own.
OWN_LAUNCHERS = frozenset(("--multi_gpu", "--cpu", "--use_deepspeed", "--use_fsdp"))
# Seconds in which processes also reached by Ctrl-C should end.
PATIENCE = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `hfllm` with the words of its command line. Returns its exit code, 2 for bad input."""
    command, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if command in (*ASKS_FOR_HELP, "help"):
            print(overview())
        elif command == "--version":
            print(f"hfllm {__version__}")
        elif command == "list":
            print(listing())
        else:
            return run_recipe(command, words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_recipe(name: str, words: Sequence[str]) -> int:
    """Run a recipe in this process, or by `accelerate launch` on request or with several devices.

    Raises:
        InputError: when there is no such recipe, or a flag of accelerate's is wrong.
        SystemExit: with the recipe's own exit code where it is not 0.
    """
    if name not in recipe_names():
        nearest = difflib.get_close_matches(name, [*recipe_names(), "list"], n=1, cutoff=0.0)
        raise InputError(f"unknown recipe {name!r}; did you mean {nearest[0]!r}?")
    is_help = bool({*ASKS_FOR_HELP, "--help_all"} & set(words))
    recipe = load_recipe(name)
    # Any launcher of several processes, such as torchrun, has already set all of accelerate's values.
    if not declared(name).in_one_process and not is_help and "LOCAL_RANK" not in os.environ:
        for_accelerate, words = split_flags(words)
        for_accelerate = with_shipped_configs(for_accelerate)
        # Devices are counted by torch.
        check_command(words, recipe.main.__annotations__["script_args"])
        if for_accelerate or default_accelerate_config().is_file() or has_several_devices():
            return launch(name, for_accelerate, words)
    sys.argv = [str(recipe_file(name)), *words]
    run(recipe.main, recipe.parse)
    return 0


def launch(name: str, for_accelerate: Sequence[str], words: Sequence[str]) -> int:
    """Run a recipe as `accelerate launch` does. Returns the exit code of the first failed process, or 0."""
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    hide_unhelpful_output()
    hide_unhelpful_bars()
    for_accelerate = with_defaults(for_accelerate)
    if value_of("num_processes", for_accelerate) == "1":
        use_all_cores()
    parsed = launch_command_parser().parse_args([*for_accelerate, str(recipe_file(name)), *words])
    be_launcher()
    try:
        with end_after_processes():
            launch_command(parsed)
    except CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except (KeyboardInterrupt, SignalException) as error:
        # The processes have been told too, and say how to resume.
        code = 128 + error.sigval if isinstance(error, SignalException) else INTERRUPTED
    else:
        return 0
    # The processes have printed the error. A negative code is the signal that ended one.
    return code if code >= 0 else 128 - code


@contextmanager
def end_after_processes() -> Iterator[None]:
    """Let the processes started within end first: they end at once when this one does.

    SIGTERM, on which they may save, is passed on to them; Ctrl-C has reached them too, and a second one ends all. With
    several processes, torchrun does the same itself.
    """
    import psutil

    this = psutil.Process()
    # A library may have some of its own.
    others = set(this.children())

    def pass_on(number: int, frame: FrameType | None) -> None:
        processes = set(this.children()) - others
        for process in processes:
            _tell(process, number)
        if not processes:
            sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            _, running = psutil.wait_procs(set(this.children()) - others, PATIENCE)
            # Not Ctrl-C but a signal to this process may have ended it.
            for process in running:
                _tell(process, signal.SIGINT)
            psutil.wait_procs(running)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(process: "psutil.Process", number: int) -> None:
    import psutil

    # Windows sends neither to a process, and Ctrl-C to all of a window.
    if sys.platform != "win32":
        with suppress(psutil.Error):
            process.send_signal(number)


def with_defaults(for_accelerate: Sequence[str]) -> list[str]:
    """Return accelerate's words with defaults for the values it would warn about.

    With several devices or machines, the number of processes is left to accelerate.
    """
    if value_of("config_file", for_accelerate) or default_accelerate_config().is_file():
        return list(for_accelerate)
    defaults = dict(ACCELERATE_DEFAULTS)
    count = value_of("num_processes", for_accelerate) or "1"
    # Its word for several processes of a machine: without it, and without GPUs, it starts one whatever is named.
    are_several = count.isdecimal() and int(count) > 1 and not num_devices()
    are_several = are_several and not OWN_LAUNCHERS & {*for_accelerate}
    for_accelerate = [*(["--multi_gpu"] if are_several else []), *for_accelerate]
    if num_devices() <= 1 and value_of("num_machines", for_accelerate) in (None, "1"):
        defaults["num_processes"] = "1"
    missing = [flag for flag in defaults if value_of(flag, for_accelerate) is None]
    return [*(word for flag in missing for word in (f"--{flag}", defaults[flag])), *for_accelerate]


def use_all_cores() -> None:
    """Give a single process every core, if OMP_NUM_THREADS does not say otherwise: accelerate would give it one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(count or 1))


def has_several_devices() -> bool:
    """Return whether one process would leave accelerators idle; if not, this process gets every core from now on."""
    threads = os.environ.get("OMP_NUM_THREADS")
    # Before torch is imported, which reads it once.
    use_all_cores()
    if num_devices() <= 1:
        return False
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    return True


def num_devices() -> int:
    """Return the number of this machine's accelerators. It imports torch."""
    import torch

    return torch.accelerator.device_count()


def default_accelerate_config() -> Path:
    """Return the path of the file written by `accelerate config`."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser() / "accelerate" / "default_config.yaml"


def overview() -> str:
    """Return the output of `hfllm --help`."""
    return f"""hfllm {__version__}: one language-model family, from raw text to an aligned, published model

    hfllm RECIPE [flags]      run a recipe; hfllm RECIPE --help shows its flags
    hfllm list                the recipes, and the settings that came with them
    hfllm --version

{recipes_table()}

Flags of accelerate launch, such as --num_processes 4 or --config_file zero2, are handed to it: hfllm sft
--num_processes 4 is accelerate launch --num_processes 4 recipes/sft.py."""


def listing() -> str:
    """Return the output of `hfllm list`."""
    configs = installed("recipes") / "configs"
    settings = sorted(str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml"))
    engines = sorted(path.stem for path in installed("accelerate_configs").glob("*.yaml"))
    width = max(map(len, models_made())) + 1
    model_lines = "\n".join(f"    {name:<{width}}{words}" for name, words in models_made().items())
    return f"""{recipes_table()}

Where no model is named, on the embedded world:
{model_lines}

For --config: {", ".join(settings)}
For --config_file: {", ".join(engines)}
Recipes are in {installed("recipes")}"""


# The order of a model's life, in which `hfllm list` names the stages; those that are not here come last.
IN_ORDER = (
    *("pretrain", "sft", "reward", "rlhf", "draft", "distill", "quantize", "speculative", "constitution"),
    *("expert_iteration", "reason", "tools", "ground", "federated", "classify", "vision", "extend", "evaluate"),
    "convert",
)


def models_made() -> dict[str, str]:
    """Return the output and inputs of every stage, as words by its name."""
    table, made = stage_table(), {}
    for name in sorted(table, key=lambda name: IN_ORDER.index(name) if name in IN_ORDER else len(IN_ORDER)):
        inputs = " and ".join(table[name].needs.values())
        made[name] = f"{table[name].makes}, from what {inputs} made" if inputs else table[name].makes
    return made


def recipes_table() -> str:
    """Return the recipes with the first sentences of their docstrings."""
    rows, width = [], max(map(len, recipe_names())) + 1
    for name in recipe_names():
        # Its first sentence, without the text in brackets.
        what = re.split(r" \(|\. |\.?\n", docstring_of(name), maxsplit=1)[0]
        first, others = f"    {name:<{width}}", " " * (4 + width)
        rows.append(textwrap.fill(what, 100, initial_indent=first, subsequent_indent=others))
    return "\n".join(rows)


# ---- accelerate flags ----
# The flags of `accelerate launch` passed to it by the command `hfllm`, distinguished from a recipe's without torch.


# Flags with a value, and flags without one. A test compares both with accelerate's own parser.
WITH_VALUE = frozenset(
    (
        *("config_file", "num_processes", "num_machines", "num_cpu_threads_per_process", "mixed_precision"),
        *("dynamo_backend", "dynamo_mode", "gpu_ids", "machine_rank", "main_process_ip", "main_process_port", "tee"),
        *("log_dir", "role", "rdzv_backend", "rdzv_conf", "max_restarts", "monitor_interval", "mpirun_hostfile"),
        *("deepspeed_config_file", "deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter"),
        *("deepspeed_multinode_launcher", "deepspeed_moe_layer_cls_names", "zero_stage", "zero3_init_flag"),
        *("zero3_save_16bit_model", "offload_optimizer_device", "offload_optimizer_nvme_path"),
        *("offload_param_device", "offload_param_nvme_path"),
        *("fsdp_version", "fsdp_offload_params", "fsdp_min_num_params", "fsdp_sharding_strategy"),
        *("fsdp_reshard_after_forward", "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap"),
        *("fsdp_backward_prefetch", "fsdp_state_dict_type", "fsdp_forward_prefetch", "fsdp_use_orig_params"),
        *("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states", "fsdp_activation_checkpointing"),
        *("fsdp_activation_checkpointing_offload",),
        *("fp8_backend", "fp8_margin", "fp8_interval", "fp8_format", "fp8_amax_history_len", "fp8_amax_compute_algo"),
        *("fp8_override_linear_precision", "fp8_opt_level", "fp8_enable_fsdp_float8_all_gather", "fp8_pad_inner_dim"),
        *("parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size", "parallelism_config_tp_size"),
        *("parallelism_config_cp_size", "parallelism_config_cp_backend", "parallelism_config_cp_comm_strategy"),
        *("parallelism_config_sp_size", "parallelism_config_sp_backend", "parallelism_config_sp_seq_length"),
        *("parallelism_config_sp_seq_length_is_variable", "parallelism_config_sp_attn_implementation"),
    )
)
ALONE = frozenset(
    (
        *("quiet", "cpu", "multi_gpu", "use_deepspeed", "use_fsdp", "use_parallelism_config", "same_network"),
        *("enable_cpu_affinity", "dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation"),
        *("fp8_use_autocast_during_eval",),
    )
)
# Not passed on: options with flags in the recipes, and options that do not run our scripts unchanged.
NOT_HANDED_OVER = frozenset(
    (
        *("help", "debug", "gradient_accumulation_steps", "gradient_clipping"),
        *("module", "no_python", "vm", "env", "main_training_function", "downcast_bf16"),
        *("use_megatron_lm", "aws_access_key_id", "aws_secret_access_key"),
    )
)


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for `accelerate launch` and the words for the recipe, both in their order."""
    for_accelerate, for_recipe, following = [], [], iter(words)
    for word in following:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in ALONE and not equals:
            for_accelerate.append(f"--{name}")
        elif name in WITH_VALUE:
            value = value if equals else next(following, None)
            refuse_if(value is None or value.startswith("--"), f"{flag} needs a value")
            for_accelerate += [f"--{name}", value]
        else:
            for_recipe.append(word)
    return for_accelerate, for_recipe


def value_of(name: str, words: Sequence[str]) -> str | None:
    """Return the last value of the flag `name` in accelerate's `words`, or `None`."""
    values = [value for flag, value in pairwise(words) if flag == f"--{name}"]
    return values[-1] if values else None


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Return accelerate's words with the paths of the configs shipped with hfllm, from whatever folder it is run.

    `--config_file zero2` may name one, and the DeepSpeed config named in a `--config_file` may be one.
    """
    named = value_of("config_file", words)
    if named is None:
        return list(words)
    file = _existing(Path(named), "accelerate_configs", ".yaml")
    if file is None:
        names = ", ".join(path.stem for path in sorted(installed("accelerate_configs").glob("*.yaml")))
        raise InputError(f"--config_file {named}: no such file, and none that came with hfllm: {names}")
    changed = [str(file) if flag == "--config_file" else word for flag, word in pairwise(["", *words])]
    values = read_yaml(file) if file.suffix != ".json" else {}
    if values.get("distributed_type") == "DEEPSPEED":
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(f"--config_file {named} needs DeepSpeed: pip install 'hfllm[deepspeed]'")
        settings = (values.get("deepspeed_config") or {}).get("deepspeed_config_file")
        is_missing = settings and not Path(settings).is_file() and value_of("deepspeed_config_file", words) is None
        if is_missing and (shipped := _existing(Path(settings), "ds_configs", ".json")):
            changed += ["--deepspeed_config_file", str(shipped)]
    return changed


def _existing(path: Path, folder: str, suffix: str) -> Path | None:
    """The file itself, else the file of the same name shipped with hfllm in `folder`, else `None`."""
    if path.is_file():
        return path
    shipped = installed(folder) / (path.name if path.suffix == suffix else f"{path.name}{suffix}")
    return shipped if path.parent in (Path(), Path(folder)) and shipped.is_file() else None
