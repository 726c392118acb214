"""The evaluation of models: its flags, what they refuse, and the stages for the world's models."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from hfllm.data.images.rows import OF_PICTURES, PictureArguments
from hfllm.data.sources import DIGITS, PICTURES
from hfllm.errors import InputError
from hfllm.flags import NAMED, NOT_NEGATIVE, SEED, WORLD_GROUP, Clashes, Fact, Refused, at_least, check_flags, flag
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.identity import function_files
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.stages.rlhf.flags import MCP_SERVERS, TOOLS

# ---- flags ----


SUITES = (
    *("truthfulness", "hhh", "refusals", "calibration", "few_shot", "interpretability", "lm_eval", "robustness"),
    *("pictures", "tools"),
)
# The suites of a run without named ones.
DEFAULT_SUITES = ("truthfulness", "hhh", "refusals", "calibration", "few_shot", "robustness")


def _is_for(*suites: str) -> Fact:
    return Fact(lambda flags: not {*suites} & {*flags.suites}, f"it is for --suites {' or '.join(suites)}")


NO_TASKS = _is_for("lm_eval")
MODELS_NAMED = NAMED.because("the models are named")
# Flags without which a suite has nothing to ask.
TASKS = "--tasks, such as --tasks arc_easy_file --tasks_data FOLDER"
ROWS = "--dataset_name: rows with pictures, or 'pictures' or 'digits'"
TOOL_ROWS = "--dataset_name: a file of rows with prompt and answer"
MODEL = "--model_name_or_path: a vision-language model (hfllm vision makes one)"


@dataclass(frozen=True)
class LmEvalArguments:
    """Tasks of lm-eval."""

    tasks: list[str] | None = flag(
        None, "Tasks for lm_eval: arc_easy_file, gsm8k_file, ... or those of --include_path.", never=NO_TASKS
    )
    include_path: list[str] | None = flag(None, "Folders with YAML tasks of your own.", never=NO_TASKS)
    tasks_data: str | None = flag(
        None, "Folder of the files that tasks name, if not beside their YAML files.", never=NO_TASKS
    )
    num_fewshot: int | None = flag(
        None, "Worked examples of a task; by default what its YAML file says.", takes=at_least(0), never=NO_TASKS
    )
    allow_code_execution: bool = flag(
        False, "Run the code that models write for tasks such as HumanEval, within limits.", never=NO_TASKS
    )
    tasks_from_hub: bool = flag(
        False, "Know lm-eval's own tasks too, and let tasks read data sets of the Hub.", never=NO_TASKS
    )


# Questions of the world, by default.
NUM_WORLD_ITEMS = 240
# YAML files of the stages for the world's models.
CONFIGS = ("pretrain", "sft", "reward", "rlhf")
# Flags without effect on figures.
HOW_IT_ENDS = ("fail_on_regression",)
# Flags of local files.
FILES = ("truthfulqa_file", "preference_files", "xstest_file", "few_shot_files", "facts_file", "robustness_file")
# Kinds of files beside lm-eval's tasks with an effect on their figures.
OF_TASKS = (".yaml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".txt")


@dataclass(frozen=True)
class EvaluateArguments(LmEvalArguments, RemoteCodeArguments, PictureArguments):
    """Which models are judged, by what, and how they are asked."""

    model_name_or_path: list[str] | None = flag(
        None, "One or more models, folders or Hub ids; without any the world's are made and judged."
    )
    suites: list[str] = flag(DEFAULT_SUITES, "What they are judged by.")
    output_dir: str = flag("outputs/evaluate", "Where the report and the samples go.")
    seed: int = flag(42, "Of the world's models.", takes=SEED, group=WORLD_GROUP)
    world_seed: int = flag(0, "Seed of the embedded world's facts.", takes=NOT_NEGATIVE, group=WORLD_GROUP)
    apply_chat_template: bool | None = flag(
        None, "Ask by the chat template, or by plain text; by default where a tokenizer has a template."
    )
    batch_size: int = flag(32, "Prompts, or choices of a question, in one pass.", takes=at_least(1))
    num_items: int | None = flag(
        None, "Items of each file, or of the world; by default all, of the world 240.", takes=at_least(1)
    )
    dtype: str = flag("float32", "The type that models are loaded in.")
    attn_implementation: str | None = flag(None, "eager, sdpa, flash_attention_2, ...")
    load_in_8bit: bool = flag(False, "Load the models in 8 bits, by bitsandbytes.")
    load_in_4bit: bool = flag(False, "Load the models in 4 bits, by bitsandbytes.")
    judge_model_name_or_path: str | None = flag(None, "A model that judges written answers, beside the rules.")
    truthfulqa_file: str | None = flag(
        None,
        "TruthfulQA's CSV or mc_task.json; without it the world's facts are asked.",
        never=_is_for("truthfulness"),
    )
    write_answers: bool = flag(
        False,
        "Let models write answers to TruthfulQA too, and compare them.",
        never=Fact(lambda flags: not flags.truthfulqa_file, "no --truthfulqa_file"),
    )
    preference_files: list[str] | None = flag(
        None, "Pairs for hhh: behaviors with (A) and (B), BIG-bench's HHH, chosen, rejected.", never=_is_for("hhh")
    )
    xstest_file: str | None = flag(None, "XSTest's CSV, for refusals.", never=_is_for("refusals"))
    few_shot_files: list[str] | None = flag(
        None,
        "Multiple choice or exact match, for few_shot and calibration.",
        never=_is_for("few_shot", "calibration"),
    )
    facts_file: str | None = flag(
        None, "Rows of subject, question and answer, for interpretability.", never=_is_for("interpretability")
    )
    num_shots: int = flag(
        0,
        "First rows of each such file that are worked examples.",
        takes=at_least(0),
        never=Fact(lambda flags: not flags.few_shot_files, "no --few_shot_files"),
    )
    robustness_file: str | None = flag(
        None,
        "Prompts for robustness, with a column answer, harmful, or XSTest's label.",
        never=_is_for("robustness"),
    )
    num_attacks: int | None = flag(
        None,
        "Harmful prompts that robustness attacks by gradient: 4 of the world, none of a file.",
        takes=at_least(0),
        never=_is_for("robustness"),
    )
    dataset_name: str | None = flag(
        None,
        "Questions about pictures, for the suite pictures, which is then the default: rows with a column "
        "image or images, or 'pictures' or 'digits', which are drawn here. Or with --tools, for the suite tools: rows "
        "with prompt, answer and tool.",
        never=_is_for("pictures", "tools"),
    )
    tools: list[str] | None = flag(None, TOOLS, never=_is_for("tools"))
    mcp_servers: str | None = flag(None, MCP_SERVERS, never=_is_for("tools"))
    max_new_tokens: int = flag(
        64,
        "Longest written answer to the rows of a file; of tools longest turn, four of which an episode has room for.",
        takes=at_least(1),
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of the world's pretraining.", never=MODELS_NAMED, group=WORLD_GROUP
    )
    sft_config: str | None = flag(None, "YAML flags of its fine-tuning.", never=MODELS_NAMED, group=WORLD_GROUP)
    reward_config: str | None = flag(None, "YAML flags of its reward model.", never=MODELS_NAMED, group=WORLD_GROUP)
    rlhf_config: str | None = flag(None, "YAML flags of its alignment.", never=MODELS_NAMED, group=WORLD_GROUP)
    fail_on_regression: bool = flag(
        False,
        "Exit code 1 where a model is significantly worse than the first one, 2 where nothing is tested.",
        never=Fact(lambda flags: len(flags.model_name_or_path or ()) == 1, "one model has no other to be worse than"),
    )

    refused: ClassVar[Refused] = dict.fromkeys(
        OF_PICTURES,
        (
            _is_for("pictures"),
            Fact(
                lambda flags: flags.dataset_name in (PICTURES, DIGITS),
                "it is for rows of your own, and these are drawn",
            ),
        ),
    )
    clashes: ClassVar[Clashes] = {
        f"--suites lm_eval needs {TASKS}": lambda flags: "lm_eval" in flags.suites and not flags.tasks,
        f"--suites pictures needs {ROWS}": lambda flags: "pictures" in flags.suites and not flags.dataset_name,
        "--suites pictures and tools both read --dataset_name: judge them in two runs": lambda flags: (
            {"pictures", "tools"} <= {*flags.suites}
        ),
        f"--suites tools needs {TOOL_ROWS}": lambda flags: "tools" in flags.suites and not flags.dataset_name,
        "--suites tools needs --tools or --mcp_servers": lambda flags: (
            "tools" in flags.suites and not (flags.tools or flags.mcp_servers)
        ),
        "--suites tools needs --model_name_or_path: a model that calls tools": lambda flags: (
            "tools" in flags.suites and not flags.model_name_or_path
        ),
        f"--suites pictures needs {MODEL}": lambda flags: "pictures" in flags.suites and not flags.model_name_or_path,
        "--tasks_data {tasks_data}: no such folder": lambda flags: (
            flags.tasks_data is not None and not Path(flags.tasks_data).is_dir()
        ),
    }

    def __post_init__(self):
        if self.dataset_name and self.suites == list(DEFAULT_SUITES):
            object.__setattr__(self, "suites", ["tools" if self.tools or self.mcp_servers else "pictures"])

    @property
    def files(self) -> list[str]:
        """The local files with an effect on the figures: of suites, and lm-eval's tasks with code and data."""
        values = [getattr(self, name) or () for name in FILES]
        folders = [*(self.include_path or ()), *([self.tasks_data] if self.tasks_data else ())]
        of_tasks = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in OF_TASKS]
        of_suites = [path for value in values for path in ([value] if isinstance(value, str) else value)]
        return [*of_suites, *sorted(map(str, of_tasks)), *self._tool_files]

    @property
    def _tool_files(self) -> list[str]:
        if "tools" not in self.suites:
            return []
        named = [path for path in (self.dataset_name, self.mcp_servers) if path is not None and Path(path).is_file()]
        return [*named, *(str(path) for _, path in function_files(self.tools or []))]


# ---- what is refused ----


def check(script_args: EvaluateArguments) -> None:
    """Refuse flags that would fail later, and flags without effect."""
    suites = script_args.suites
    for name in suites:
        if name not in SUITES:
            nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise InputError(f"--suites {name!r}: no such suite; did you mean {nearest!r}? All: {', '.join(SUITES)}")
    if not suites or len(set(suites)) < len(suites):
        raise InputError(f"--suites {' '.join(suites)}: expected one or more, each once")
    check_flags(script_args)
    if len(script_args.model_name_or_path or ()) != 1:
        refuse_foreign_changes(script_args.output_dir)


# The file of items with differences between models, and the maximum length of its lines.
CHANGES, MOST_READ = "changes.jsonl", 1 << 24


def refuse_foreign_changes(folder: str | Path) -> None:
    """Refuse to overwrite a link, or a file of another kind with the name of `CHANGES`."""
    path = Path(folder, CHANGES)
    if path.is_symlink() or (path.exists() and not _are_changes(path)):
        raise InputError(f"{path} is not hfllm's and would be overwritten: move it or choose another --output_dir")


def _are_changes(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.readline(MOST_READ)
        row = json.loads(first) if first else {"figure": "", "change": ""}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"figure", "change"} <= row.keys()


# ---- the stages before ----


def stages_before(
    output_dir: str, seed: int, world_seed: int, models: Sequence[str], configs: Mapping[str, str | None]
) -> Chain:
    """Return the main job for making the world's models, if none is named.

    Args:
        models: the named ones.
        configs: YAML files of the stages' flags, by stage of `CONFIGS`.
    """
    from hfllm.stages.rlhf import flags as rlhf_flags

    named = {"rlhf": models[0] if models else None}
    before = chain_before("evaluate", output_dir, seed, world_seed, given_models=named, configs=configs)
    nested = {name: rlhf_flags.stages_before(*parsed) for name, parsed in before.runs.items()}
    return replace(before, nested=nested)


def models_of(names: Sequence[str], before: Chain) -> dict[str, str]:
    """Return the models by their labels: the named ones, or the world's before and after alignment."""
    if names:
        return dict(zip(labels_of(names), names, strict=True))
    return {"sft": before.nested["rlhf"].model("sft"), "rlhf": before.model("rlhf")}


def labels_of(names: Sequence[str], flag: str = "--model_name_or_path") -> list[str]:
    """Return a short label of each model: the shortest unique end of its name.

    Args:
        names: of models, or of other files or folders.
        flag: with the names, for errors.
    """
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise InputError(f"{flag} names {twice} twice")
    parts = [[part for part in name.split("/") if part not in ("", ".")] or [name] for name in names]
    for size in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-size:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(names)
