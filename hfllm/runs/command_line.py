"""The command line of a recipe: read its flags, print its lines, end bad input in a line."""

import argparse
import ctypes
import errno
import importlib.util
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.child_processes import be_launcher, end_children_with_this_process, end_with_launcher
from hfllm.errors import InputError, MachineError, redact
from hfllm.flags import GIVEN, SHIPPED
from hfllm.runs.flags import check_json_flags, check_libraries, check_ranges, check_values
from hfllm.runs.output import explained, hide_unhelpful_bars, hide_unhelpful_output, what_is_saved
from hfllm.runs.parser import (
    DECLARING,
    HelpFormatter,
    PlainParser,
    ShortHelpFormatter,
    add_fields,
    check_words,
    read_yaml,
    training_parser,
)
from hfllm.runs.recipes import installed, is_shipped, settings_file, settings_for_the_world

# Here, since a spawned process imports the recipe again, and does not run it.
end_children_with_this_process()

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ASKS_FOR_HELP = frozenset(("--help", "-h"))
# The text of --help about the libraries' own flags.
ALWAYS = {
    "--config": "A YAML file of flags, or settings that came with hfllm, such as curate/books; flags win over it.",
    "--help_all": "Every flag there is, those of transformers and TRL included.",
}
OF_TRAINING = {
    "--output_dir": "Where the model, its report and plots go.",
    "--model_name_or_path": "A model of your own: a folder or a Hub id.",
    "--learning_rate": "The highest learning rate.",
    "--num_train_epochs": "Passes over the data.",
    "--max_steps": "Optimizer steps, in place of passes.",
    "--per_device_train_batch_size": "Rows that a device takes at once.",
    "--gradient_accumulation_steps": "Such batches to an optimizer step.",
    "--bf16": "Compute in bfloat16.",
    "--use_peft": "Train an adapter (LoRA) in place of all weights; --lora_r, --lora_alpha, --lora_target_modules.",
    "--seed": "Of data and weights: the same seed, the same result.",
    "--resume_from_checkpoint": "A checkpoint folder, or auto: the last one, if there is one.",
    "--trust_remote_code": "Run the code that models bring along, and the kernels that their configs name.",
    "--report_to": "wandb, tensorboard, trackio, ...",
    "--push_to_hub": "Publish the result; --hub_model_id, --hub_private_repo.",
}
# The same for recipes that load a model without training.
OF_MODEL = {
    "--model_name_or_path": OF_TRAINING["--model_name_or_path"],
    "--model_revision": "Its branch, tag or commit.",
    "--dtype": "The type that it is loaded in, such as bfloat16.",
    "--attn_implementation": "eager, sdpa, flash_attention_2, ...",
}
# As long as the longest name of a file in an output folder with its parent folders, 200 letters, in parts accepted by
# every file system.
LONGEST_FILE = os.path.join(*["-" * 19] * 10)
# glibc's options (malloc.h): bytes at the end of the heap before they are given back, bytes asked for at once, and
# the smallest allocation with its own mapping, at most 32 MB.
MALLOC_OPTIONS = {-1: 2**30, -2: 2**26, -3: 2**25}
# The exit code of a process ended by Ctrl-C.
INTERRUPTED = 130


def parse_recipe(
    argv: Sequence[str],
    description: str,
    own: "type[DataclassInstance]",
    library: Sequence[str] = (),
    output_dir: str | None = None,
    settings: Callable[[Mapping[str, Any]], Sequence[Path]] | None = None,
    shown: "Sequence[type[DataclassInstance]]" = (),
) -> tuple:
    """Parse a recipe's flags: over `--config` files, over default settings, over the defaults of the classes.

    `--help` prints the recipe's own flags, without importing torch, and `--help_all` the libraries' flags too; both
    end the process.

    Args:
        argv: the words of the command line.
        description: the recipe's docstring.
        own: the dataclass of the recipe's own flags.
        library: the dataclasses whose flags the recipe also takes, by dotted name, such as `trl.SFTConfig`: they
            are imported when there is something to parse.
        output_dir: the default of `--output_dir`, where `library` has the flag.
        settings: function from the user's flags to the YAML files of default settings; later ones win.
        shown: dataclasses with flags of `library` also listed by `--help`.

    Returns:
        An instance of `own` and of each class of `library`.
    """
    if ASKS_FOR_HELP & set(argv):
        try:
            print(short_help(description, own, library, shown, settings), flush=True)
        except BrokenPipeError:
            # A reader such as head has gone before the end; Python would write the rest when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    provided, chosen = given_values(argv), given_values(argv, with_shipped=False)
    argv, config_files = take_configs(argv)
    if library and "--help_all" not in argv and all(name.split(".")[0] in DECLARING for name in library):
        check_command(argv, own)
    files = [*(settings(provided) if settings else ()), *config_files]
    kinds = [own, *map(_imported, library)]
    parser_class, defaults = (training_parser(), machine_defaults(provided)) if library else (PlainParser, {})
    defaults |= {} if output_dir is None else {"output_dir": output_dir}
    parser = parser_class(kinds, description=description, formatter_class=HelpFormatter)
    parser.add_argument("--config", help="A YAML file of flags; flags on the command line win.")
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    check_json_flags(provided)
    try:
        parsed = parser.parse(argv, files, defaults)[: len(kinds)]
    # The last two come from flags asking for a library, or for a file.
    except (TypeError, ValueError, ImportError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(next(iter(str(error).strip().splitlines()), type(error).__name__)) from None
    shipped = {name for path in files if is_shipped(path) for name in read_yaml(path)} - chosen.keys()
    for group in parsed:
        # Only names: values may be secrets, and a trainer saves its arguments.
        object.__setattr__(group, GIVEN, tuple(provided))
        object.__setattr__(group, SHIPPED, tuple(sorted(shipped)))
    check_output_dir(provided, parsed)
    check_ranges(*parsed)
    if library:
        check_libraries(*parsed)
    return parsed


def check_command(argv: Sequence[str], own: "type[DataclassInstance]") -> None:
    """Refuse an impossible command line in a moment, before torch and the libraries are imported: see `check_words`.

    Args:
        own: the dataclass of the recipe's own flags.
    """
    words, _ = take_configs(argv)
    values = vars(check_words(words, own))
    check_values(own, {name: values[name] for name in given_values(words) if name in values})


def check_output_dir(values: Mapping[str, Any], parsed: "Sequence[DataclassInstance]") -> None:
    """Refuse an output folder without a name, or with a name rejected by every file system."""
    folder = next((group.output_dir for group in parsed if hasattr(group, "output_dir")), None)
    if folder is None and "output_dir" not in values:
        return
    # A library may put a name of its own in place of none.
    is_none = "output_dir" in values and values["output_dir"] is None
    if is_none or not isinstance(folder, str) or not folder.strip():
        value = None if is_none else folder
        raise InputError(f"--output_dir {value!r:.80}: expected the name of a folder")
    try:
        # With room for the files in it.
        os.stat(os.path.join(folder, LONGEST_FILE))
    except ValueError:
        raise InputError(
            f"--output_dir {folder!r:.80}: no name for a folder: it holds characters that none has"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = os.strerror(error.errno)
            raise InputError(f"--output_dir {folder[:80]!r}...: no name for a folder: {reason}") from None


def _imported(dotted: str) -> type:
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def short_help(
    description: str,
    own: "type[DataclassInstance]",
    library: Sequence[str],
    shown: "Sequence[type[DataclassInstance]]" = (),
    settings: Callable[[Mapping[str, Any]], Sequence[Path]] | None = None,
) -> str:
    """Return the help of a recipe's own flags in groups, and of the libraries' most used flags.

    Defaults are those that a run will use: of the embedded world, and where they differ of your own model and data.
    """
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=description, formatter_class=ShortHelpFormatter, add_help=False
    )
    for kind in (own, *shown):
        add_fields(parser, kind, short=True)
    group = parser.add_argument_group("Common flags")
    trains = any(not name.endswith(".ModelConfig") for name in library)
    for flag, text in {**ALWAYS, **(OF_TRAINING if trains else OF_MODEL if library else {})}.items():
        # Some recipes have a default of their own for one of them.
        if flag not in parser._option_string_actions:
            group.add_argument(flag, metavar="", default=None, help=text)
    world, *others = _settings_by_case(settings).items() if settings else [("", {})]
    own_flags = {action.dest for action in parser._actions}
    for action in parser._actions:
        before = action.default
        action.default = world[1].get(action.dest, before)
        for case, values in others:
            value = values.get(action.dest, before)
            if value != action.default and action.help != argparse.SUPPRESS:
                # Without a value the library has its own, which only `--help_all` knows.
                other = "the library's" if value is None else value
                suffix = f" (default: {action.default}; {case}: {other})"
                action.help, action.default = action.help + suffix.replace("%", "%%"), None
                break
    lines = [_settings_line(case, values, own_flags) for case, values in (world, *others)]
    return parser.format_help() + "".join(["\nSettings of the libraries' flags:\n", *lines] if any(lines) else [])


def _settings_by_case(settings: Callable[[Mapping[str, Any]], Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """Return the values of a recipe's YAML files of settings, by flag: on the world, an own model, an adapter."""
    # A folder that is no adapter: no name is looked up.
    own = {"model_name_or_path": str(installed("recipes")), "dataset_name": "ROWS"}
    cases = {"the embedded world": {}, "your own model and data": own, "an adapter": {**own, "use_peft": True}}
    result: dict[str, dict[str, Any]] = {}
    for case, given in cases.items():
        values = {name: value for path in settings(given) for name, value in read_yaml(path).items()}
        if values not in result.values():
            result[case] = values
    return result


def _settings_line(case: str, values: Mapping[str, Any], without: Collection[str]) -> str:
    named = ", ".join(f"{name} {value}" for name, value in values.items() if name not in without)
    if not named:
        return ""
    return textwrap.fill(f"{case}: {named}", 116, initial_indent="  ", subsequent_indent="    ") + "\n"


def world_settings(name: str) -> Callable[[Mapping[str, Any]], list[Path]]:
    """Return the selector of a recipe's default settings: the embedded world's model, unless a model is named."""
    return lambda provided: [] if provided.get("model_name_or_path") else settings_for_the_world(name, provided)


def take_configs(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Split `--config FILE` (repeatable; later files win) from the other flags."""
    rest, files, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            files.append(config_file(next(words, "")))
        elif word.startswith("--config="):
            files.append(config_file(word.partition("=")[2]))
        else:
            rest.append(word)
    return rest, files


def config_file(name: str) -> Path:
    """Return the file named by `--config`: one of the user's, or one shipped with hfllm, such as curate/books."""
    shipped = settings_file(name if name.endswith(".yaml") else f"{name}.yaml")
    return shipped if name and not Path(name).is_file() and shipped.is_file() else Path(name)


def given_values(argv: Sequence[str], with_shipped: bool = True) -> dict[str, Any]:
    """Return the user's values, by flag: the words of the command line, over the values of `--config` files.

    Args:
        with_shipped: whether files that hfllm ships count too.
    """
    words, files = take_configs(argv)
    files = [path for path in files if with_shipped or not is_shipped(path)]
    values: dict[str, Any] = {}
    for path in files:
        values |= read_yaml(path)
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            following = words[index + 1] if index + 1 < len(words) else "--"
            if "=" not in word:
                value = True if following.startswith("--") else following
            # As a flag without a value is on, an off or empty flag is not given.
            values[name.replace("-", "_")] = False if str(value).lower() in ("", "false") else value
    return values


def machine_defaults(values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Progress bars on a terminal only; without an accelerator no mixed precision, recomputation or pinned memory.

    An accelerator with bf16 multiplication uses it in every training recipe, with TF32 for operations in fp32.

    Args:
        values: the user's values, by flag; `fp16` and `use_cpu` exclude bf16.
    """
    import torch
    from transformers.utils import is_torch_tf32_available

    from hfllm.models.devices import has_native_bf16

    values = values or {}
    defaults = {"disable_tqdm": not sys.stderr.isatty()}
    if torch.accelerator.is_available() and not values.get("use_cpu"):
        bf16 = has_native_bf16() and not values.get("fp16")
        is_wanted = bf16 and values.get("bf16", True)
        return {**defaults, "bf16": bf16, **({"tf32": True} if is_wanted and is_torch_tf32_available() else {})}
    return {
        **defaults,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def keep_freed_memory() -> None:
    """Let glibc keep memory that PyTorch frees on a CPU; it is taken again within a step.

    By default every larger tensor is a new mapping: the kernel clears its pages at the first touch, and takes them
    back when it is freed. A user's own `MALLOC_...` settings, and other C libraries, stay as they are.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if sys.platform != "linux" or own:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in MALLOC_OPTIONS.items():
            set_option(option, value)


def main_process() -> bool:
    """Whether this process does the printing and writing."""
    return int(os.environ.get("RANK", "0")) == 0


def first_of_machine() -> bool:
    """Whether this process prints refusals: the first of its machine, whose user sees no other's."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0


def say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if main_process():
        print(line, flush=True)


@cache
def say_once(line: str) -> None:
    """Print a line at the first call with it."""
    say(line)


def _left_behind(parsed: "Sequence[DataclassInstance]") -> str:
    """Return a description of the files left by a failed run, as the end of a line."""
    folder = next((each.output_dir for each in parsed if getattr(each, "output_dir", None)), None)
    if folder is None:
        return ""
    can_resume = any(hasattr(each, "resume_from_checkpoint") for each in parsed)
    try:
        return f"; {what_is_saved(folder, can_resume)}"
    except (MemoryError, ImportError, OSError, RuntimeError):
        # It reads files and imports a library, possibly also without room for them.
        return ""


@contextmanager
def _no_silent_end() -> Iterator[None]:
    """Context manager to keep a run from ending as a success before it is done.

    Code called by a run, such as a reward function or a tool, may leave by `sys.exit(0)` or `os._exit(0)`, a sign of
    success to any program waiting for this process.
    """
    end, process = os._exit, os.getpid()

    def refuse_to_end(status: int) -> None:
        # Forked children end so.
        if status or os.getpid() != process:
            end(status)
        frame = sys._getframe(1)
        raise InputError(_about_end("os._exit(0)", frame.f_code.co_filename, frame.f_lineno))

    os._exit = refuse_to_end
    try:
        yield
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
        last = traceback.extract_tb(stop.__traceback__)[-1]
        raise InputError(_about_end("sys.exit(0)", last.filename, last.lineno)) from None
    finally:
        os._exit = end


def _about_end(call: str, file: str, line: int | None) -> str:
    return f"{file}, line {line}: {call} would end the run before it is done; raise an error, or return"


def run(main: Callable[..., object], parse: Callable[[Sequence[str]], tuple]) -> None:
    """Run a recipe from the command line: bad input, full memory and full disks end it in one line, with exit code 2.

    Each machine's first process prints the line of bad input, and every process the line of its own memory or disk.
    Ctrl-C ends it with 130. Any other error keeps its traceback. The run ends with its launching process, and the
    processes started by the run end with the run.
    """
    end_with_launcher()
    be_launcher()
    keep_freed_memory()
    if not ASKS_FOR_HELP & set(sys.argv):
        hide_unhelpful_output()
    parsed: tuple = ()
    try:
        parsed = parse(sys.argv[1:])
        hide_unhelpful_bars()
        if importlib.util.find_spec("multiprocess"):
            end_children_with_this_process("multiprocess")
        with _no_silent_end():
            main(*parsed)
    except InputError as error:
        if first_of_machine() or isinstance(error, MachineError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if main_process():
            print(f"\ninterrupted: {stop}" if str(stop) else "\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    # A panic of a library in Rust is no `Exception`.
    except BaseException as error:
        # Only shortages of the machine: an error of this program keeps its traceback.
        line = explained(error, *parsed)
        if line is None:
            raise
        print(f"error: {redact(line)}{_left_behind(parsed)}", file=sys.stderr)
        sys.exit(2)
