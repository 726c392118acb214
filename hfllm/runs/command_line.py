"""What every recipe does around its stage: parse, check, run, report, and turn bad input into one line."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hfllm.errors import HIDDEN, InputError, redact
from hfllm.outputs.checkpoints import last_complete_checkpoint
from hfllm.outputs.report import read_report
from hfllm.runs.parser import HelpFormatter, PlainParser, read_yaml, training_parser

# Where a run is, where it reports to and how it is continued do not change its result.
NOT_PART_OF_THE_RUN = frozenset(
    (
        *("output_dir", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm", "log_level"),
        *("log_level_replica", "logging_first_step", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
        *("hub_private_repo", "hub_always_push", "hub_revision", "resume_from_checkpoint", "local_rank"),
        *("deepspeed_plugin", "distributed_state", "ddp_timeout", "save_total_limit", "enable_jit_checkpoint"),
    )
)
CREDENTIALS = frozenset(("token", "hub_token", "use_auth_token", "api_key", "password"))


def parse_recipe(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    world_config: Path | Sequence[Path] | None,
    description: str | None = None,
) -> tuple:
    """Parse a recipe's arguments.

    Without `--model_name_or_path` the recipe works on the family's small model, and `world_config` (a file, several of
    which later ones win, or none) holds the settings that suit it; with a model of the user's own the defaults are
    those of transformers and TRL.
    `--config` and flags come on top of either.
    """
    argv, config_files = take_configs(argv)
    own_model = any(word.split("=")[0] == "--model_name_or_path" for word in argv)
    own_model = own_model or any(read_yaml(path).get("model_name_or_path") for path in config_files)
    if world_config and not own_model:
        config_files[:0] = [world_config] if isinstance(world_config, Path) else world_config
    return _parse(training_parser(), dataclass_types, argv, config_files, machine_defaults(), description)


def parse_plain(dataclass_types: Sequence[type], argv: Sequence[str], description: str | None = None) -> tuple:
    """Parse the arguments of a recipe that needs no torch, and do not import it either."""
    argv, config_files = take_configs(argv)
    return _parse(PlainParser, dataclass_types, argv, config_files, {}, description)


def _parse(
    kind: type,
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    config_files: Sequence[Path],
    defaults: Mapping[str, Any],
    description: str | None,
) -> tuple:
    parser = kind(dataclass_types, description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", help="A YAML file of flags; flags on the command line win.")
    try:
        return parser.parse(argv, config_files, defaults)[: len(dataclass_types)]
    except (TypeError, ValueError) as error:
        raise InputError(str(error).splitlines()[0] if not isinstance(error, InputError) else str(error)) from None


def take_configs(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Split `--config FILE` (which may be repeated; later files win) from the other flags."""
    rest, files, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            files.append(Path(next(words, "")))
        elif word.startswith("--config="):
            files.append(Path(word.partition("=")[2]))
        else:
            rest.append(word)
    return rest, files


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of the flags that the user gives, on the command line or in a `--config` file."""
    argv, config_files = take_configs(argv)
    words = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    return words.union(*(read_yaml(path) for path in config_files))


def machine_defaults() -> dict[str, Any]:
    """Progress bars on a terminal only; without an accelerator no mixed precision, recomputation or pinned memory."""
    import torch

    defaults = {"disable_tqdm": not sys.stderr.isatty()}
    if torch.accelerator.is_available():
        return defaults
    return {
        **defaults,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def run_arguments(*arguments: Any) -> dict[str, Any]:
    """The flags that decide a run's result, as JSON values: what is compared when a folder is used again.

    They go into reports and cards, so secrets in them are hidden.
    """
    merged: dict[str, Any] = {}
    for group in arguments:
        for item in fields(group):
            if item.init and item.name not in NOT_PART_OF_THE_RUN:
                merged[item.name] = getattr(group, item.name)
    return json.loads(redact(json.dumps(merged, default=str, sort_keys=True)), object_hook=_without_credentials)


def _without_credentials(values: dict[str, Any]) -> dict[str, Any]:
    """A dictionary as it may be shown: flags such as --model_init_kwargs may carry a token for a Hub of one's own."""
    return {name: HIDDEN if name in CREDENTIALS and value else value for name, value in values.items()}


def finished_run(output_dir: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a run with these arguments that has finished in `output_dir`, or `None` if none has.

    Raises:
        InputError: when a run with other arguments has finished there, naming the first that differs.
    """
    report = read_report(output_dir)
    if report is None:
        return None
    before = report["arguments"]
    for name in sorted({*before, *arguments}):
        if before.get(name) != arguments.get(name):
            raise InputError(
                f"--output_dir {output_dir} holds a finished run with {name}={before.get(name)!r}, this one has "
                f"{name}={arguments.get(name)!r}: choose another folder or remove that one"
            )
    return report


def checkpoint_to_resume(training_args: Any) -> str | bool | None:
    """What `--resume_from_checkpoint` asks for: a checkpoint folder, the last one of the output folder, or none.

    `true` is the last complete checkpoint. `auto` is that too, or the beginning where there is none yet: one command
    for the first launch and for every restart.

    Raises:
        InputError: when there is no such checkpoint.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    if str(wanted).lower() in ("true", "auto"):
        folder = training_args.output_dir
        is_needed = str(wanted).lower() == "true"
        wanted = last_complete_checkpoint(folder)
        if wanted is None:
            if not is_needed:
                return None
            raise InputError(f"--resume_from_checkpoint true: no complete checkpoint in {folder}")
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {wanted}: not a checkpoint folder (no trainer_state.json)")
    return str(wanted)


def main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def run(main: Callable[..., Any], parse: Callable[[Sequence[str]], tuple]) -> None:
    """Run a recipe from the command line; bad input ends it with one line and exit code 2."""
    try:
        main(*parse(sys.argv[1:]))
    except InputError as error:
        if main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
