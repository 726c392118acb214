"""What every recipe does around its stage: parse, check, run, report, and turn bad input into one line."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import TrlParser

from hfllm.checkpoints import last_complete_checkpoint
from hfllm.data.sources import WORLD
from hfllm.errors import HIDDEN, InputError, redact
from hfllm.reporting import read_report

# Where a run is, where it reports to and how it is continued do not change its result.
NOT_PART_OF_THE_RUN = frozenset(
    (
        *("output_dir", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm", "log_level"),
        *("log_level_replica", "logging_first_step", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
        *("hub_private_repo", "hub_always_push", "hub_revision", "resume_from_checkpoint", "local_rank"),
        *("deepspeed_plugin", "distributed_state", "ddp_timeout", "save_total_limit"),
    )
)
CREDENTIALS = frozenset(("token", "hub_token", "use_auth_token", "api_key", "password"))


@dataclass
class DataArguments:
    """Where the data comes from."""

    dataset_name: str = field(
        default=WORLD,
        metadata={
            "help": "'world' (embedded), a local file or folder, or a dataset id on the Hub; for text also 'pydoc', "
            "the documentation of this Python."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    max_samples: int | None = field(default=None, metadata={"help": "Use at most this many rows of the dataset."})
    world_seed: int = field(default=0, metadata={"help": "Seed of the embedded world's facts."})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as it stands, and every flag with its default."""

    def format_help(self) -> str:
        # A token in a --config file becomes a default.
        return redact(super().format_help())


class RecipeParser(TrlParser):
    """TrlParser whose complaints are one line and name the nearest valid flag or YAML key."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    @property
    def names(self) -> list[str]:
        """Every flag, without its dashes."""
        return [option[2:] for option in self._option_string_actions if option.startswith("--")] + ["config"]

    def error(self, message: str) -> None:
        raise InputError(message)

    def unknown(self, kind: str, name: str) -> InputError:
        nearest = difflib.get_close_matches(name, self.names, n=1, cutoff=0.0)
        return InputError(f"unknown {kind} {name!r}; did you mean {nearest[0]!r}?")

    def parse(self, argv: Sequence[str], config_files: Sequence[Path], defaults: Mapping[str, Any]) -> tuple:
        """Parse `argv` over the YAML files over `defaults`; later files win.

        Raises:
            InputError: for a flag or key that does not exist, or a value of the wrong type.
        """
        self.set_defaults_with_config(**defaults)
        for path in config_files:
            values = read_yaml(path)
            for key in values:
                if key not in self.names:
                    raise self.unknown(f"key in {path}:", key)
            self.set_defaults_with_config(**{key: self._typed(path, key, value) for key, value in values.items()})
        try:
            *parsed, remaining = self.parse_args_into_dataclasses(args=list(argv), return_remaining_strings=True)
        except argparse.ArgumentError as error:
            raise InputError(str(error)) from None
        if remaining:
            flag = next((word for word in remaining if word.startswith("-")), None)
            if flag is None:
                raise InputError(f"unexpected argument {remaining[0]!r}")
            raise self.unknown("flag", flag.lstrip("-").split("=")[0])
        return tuple(parsed)

    def _typed(self, path: Path, key: str, value: Any) -> Any:
        """A YAML value as the flag `--key` would read it: of its type, and a list where the flag takes several."""
        action = self._option_string_actions.get(f"--{key}")
        if action is None or isinstance(value, dict):
            return value
        if action.nargs in ("+", "*"):
            return value if isinstance(value, list) else [value]
        if value is None or isinstance(value, str) or action.type is None:
            return value
        try:
            return self._get_value(action, str(value))
        except argparse.ArgumentError as error:
            raise InputError(f"{path}: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        InputError: when the file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of flags to values, got {type(values).__name__}")
    return values


def parse_recipe(
    dataclass_types: Sequence[type], argv: Sequence[str], world_config: Path | None, description: str | None = None
) -> tuple:
    """Parse a recipe's arguments.

    Without `--model_name_or_path` the recipe works on the family's small model, and `world_config` (if there is one)
    holds the settings that suit it; with a model of the user's own the defaults are those of transformers and TRL.
    `--config` and flags come on top of either.
    """
    argv, config_files = take_configs(argv)
    own_model = any(word.split("=")[0] == "--model_name_or_path" for word in argv)
    own_model = own_model or any(read_yaml(path).get("model_name_or_path") for path in config_files)
    if world_config and not own_model:
        config_files.insert(0, world_config)
    parser = RecipeParser(dataclass_types, description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", help="A YAML file of flags; flags on the command line win.")
    try:
        return parser.parse(argv, config_files, machine_defaults())[: len(dataclass_types)]
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

    Raises:
        InputError: when there is no such checkpoint.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    if str(wanted).lower() == "true":
        folder = training_args.output_dir
        wanted = last_complete_checkpoint(folder)
        if wanted is None:
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
