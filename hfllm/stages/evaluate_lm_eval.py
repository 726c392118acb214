"""The flags of lm-eval's tasks, what they refuse, and the suite."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from hfllm.evaluation.suites.lm_eval import LmEval

SUITE = "lm_eval"


@dataclass(frozen=True)
class LmEvalArguments:
    """Tasks of lm-eval."""

    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks for lm_eval: arc_easy_file, gsm8k_file, ... or those of --include_path."},
    )
    include_path: list[str] | None = field(default=None, metadata={"help": "Folders with YAML tasks of your own."})
    tasks_data: str | None = field(
        default=None, metadata={"help": "Folder of the files that tasks name, if not beside their YAML files."}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Worked examples of a task; by default what its YAML file says."}
    )
    allow_code_execution: bool = field(
        default=False, metadata={"help": "Run the code that models write for tasks such as HumanEval, within limits."}
    )
    tasks_from_hub: bool = field(
        default=False, metadata={"help": "Know lm-eval's own tasks too, and let tasks read data sets of the Hub."}
    )


def check(script_args: LmEvalArguments, suites: list[str]) -> None:
    """Refuse flags of tasks without the suite, and the suite without tasks.

    Raises:
        InputError: naming the flag.
    """
    for item in fields(LmEvalArguments):
        is_given = getattr(script_args, item.name) != item.default
        refuse(is_given and SUITE not in suites, f"--{item.name}", f"it is for --suites {SUITE}")
    if SUITE in suites and not script_args.tasks:
        raise InputError(f"--suites {SUITE} needs --tasks, such as --tasks arc_easy_file --tasks_data FOLDER")
    if script_args.num_fewshot is not None and script_args.num_fewshot < 0:
        raise InputError(f"--num_fewshot {script_args.num_fewshot}: expected at least 0")
    if script_args.tasks_data is not None and not Path(script_args.tasks_data).is_dir():
        raise InputError(f"--tasks_data {script_args.tasks_data}: no such folder")


def suite_of(script_args: LmEvalArguments, num_items: int | None) -> "LmEval":
    """Return the suite that the flags describe."""
    from hfllm.evaluation.suites.lm_eval import LmEval

    return LmEval(
        script_args.tasks or (),
        script_args.include_path or (),
        script_args.tasks_data,
        script_args.num_fewshot,
        num_items,
        script_args.allow_code_execution,
        script_args.tasks_from_hub,
    )


def files_of(script_args: LmEvalArguments) -> list[str]:
    """Return the files that the figures depend on: YAML tasks, the code beside them, and data."""
    folders = [*(script_args.include_path or ()), *([script_args.tasks_data] if script_args.tasks_data else ())]
    kinds = (".yaml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".txt")
    return sorted(str(path) for folder in folders for path in Path(folder).rglob("*") if path.suffix in kinds)
