"""Tasks of lm-eval: its prompts, filters and metrics, with our models and our report, from local files too.

    suite = LmEval(["arc_easy_file"], data_folder="data/eval")          # tasks shipped with hfllm, and their files
    suite = LmEval(["my_task"], include_path=["my_tasks"])              # your own YAML tasks

Tasks read local files. lm-eval is an optional library: `pip install 'hfllm[eval]'`.
"""

import difflib
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.environments.python_tool import CodeError, python_within
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.evaluation.suites.base import TOO_LONG, Item, Record, Subject, Suite

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


# ---- the suite ----


SHIPPED = Path(__file__).with_name("lm_eval_tasks")
# Kinds of local files by their names in `datasets`.
FILE_KINDS = ("json", "csv", "parquet", "text", "arrow")
# Of a batch asked at once, to keep finished work.
BATCHES_AT_ONCE = 4
SEED = 1234


@dataclass(frozen=True)
class Doc:
    """A question of a task.

    Args:
        task: the task's name.
        number: its index in the task's rows, from 0.
    """

    task: str
    number: int


class LmEval(Suite[Doc]):
    """Tasks of lm-eval, judged item by item.

    Args:
        tasks: their names, of groups and tags too.
        include_path: folders with YAML tasks, in addition to the tasks shipped with hfllm.
        data_folder: the folder of a task's files, if not next to its YAML file.
        num_fewshot: worked examples before a question; by default the task's number. A task with the number 0 keeps
            it.
        num_items: questions per task, from the first; all by default.
        allows_code: whether tasks may run model-written code, such as HumanEval.
        reads_hub: whether tasks may read data sets of the Hub, and lm-eval's own tasks are known.

    Raises:
        InputError: when lm-eval is not installed, a task is not known, or one may not be run.
    """

    name: ClassVar[str] = "lm_eval"

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: Sequence[str] = (),
        data_folder: str | None = None,
        num_fewshot: int | None = None,
        num_items: int | None = None,
        allows_code: bool = False,
        reads_hub: bool = False,
    ):
        refuse_if(not tasks, "the suite lm_eval needs --tasks")
        for folder in include_path:
            refuse(not Path(folder).is_dir(), f"--include_path {folder}", "no such folder")
        self.num_items, self.allows_code = num_items, allows_code
        manager = _manager([str(SHIPPED), *include_path], data_folder, reads_hub)
        self.tasks = _load(manager, tasks, reads_hub)
        for name, task in self.tasks.items():
            is_unsafe = getattr(task, "UNSAFE_CODE", False) and not allows_code
            refuse(is_unsafe, f"--tasks {name}", "it runs code that a model writes: say --allow_code_execution")
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
        higher = {key: way for task in self.tasks.values() for key, way in (task.higher_is_better() or {}).items()}
        filters = {each.name for task in self.tasks.values() for each in task._filters}
        ways = {**higher, **{_filtered(key, kind): way for key, way in higher.items() for kind in filters}}
        self.better = {name: 1 if way else -1 for name, way in ways.items()}
        self._models: dict[int, HFLM] = {}

    def primary_of(self, group: str) -> Sequence[str]:
        """Return the first metric of a task, by its first filter."""
        task = self.tasks[group]
        metric = next(iter(task.higher_is_better() or ()), None)
        return [] if metric is None else [_filtered(metric, task._filters[0].name) if task._filters else metric]

    def items(self) -> Sequence[Item[Doc]]:
        """Return the questions of all tasks, one group per task."""
        result = []
        for name, task in self.tasks.items():
            count = len(task.eval_docs)
            count = count if self.num_items is None else min(count, self.num_items)
            result += [Item(f"{name}/{number}", name, Doc(name, number)) for number in range(count)]
        return result

    def judge(self, subject: Subject, items: Sequence[Item[Doc]]) -> Iterator[Record]:
        """Yield the values of lm-eval's metrics per item; none for a corpus-wide metric."""
        model, size = self._model_of(subject), subject.batch_size * BATCHES_AT_ONCE
        for name, task in self.tasks.items():
            here = [item for item in items if item.body.task == name]
            docs = task.eval_docs if here else []
            for start in range(0, len(here), size):
                yield from self._judge_some(subject, model, task, docs, here[start : start + size])

    def _model_of(self, subject: Subject) -> "HFLM":
        """Return the model as lm-eval asks it; the same one for the same subject."""
        from lm_eval.models.huggingface import HFLM

        if id(subject) not in self._models:
            self._models = {
                id(subject): HFLM(
                    pretrained=subject.model,
                    tokenizer=subject.tokenizer,
                    backend="causal",
                    batch_size=subject.batch_size,
                    device=str(subject.model.device),
                )
            }
        return self._models[id(subject)]

    def _judge_some(
        self, subject: Subject, model: "HFLM", task: "Task", docs: Sequence[Mapping[str, Any]], items: list[Item[Doc]]
    ) -> Iterator[Record]:
        selected: list[tuple[Item[Doc], Mapping[str, Any], list[Instance]]] = []
        for item in items:
            doc = docs[item.body.number]
            instances = _instances(model, task, doc, item.body.number, subject.uses_chat_template)
            if any(_length(model, each) > model.max_length for each in instances):
                yield self.record(subject, item, asked=str(instances[0].args[0]), skipped=TOO_LONG)
            else:
                selected.append((item, doc, instances))
        if not selected:
            return
        everything = [each for _, _, instances in selected for each in instances]
        _ask(model, everything, subject.label)
        task._instances = everything
        task.apply_filters()
        for item, doc, instances in selected:
            scores = _scores(task, doc, instances)
            reason = "" if scores else "lm-eval has no figure of a single item for this task"
            response = str(instances[0].resps[0]) if task.OUTPUT_TYPE == "generate_until" else ""
            yield self.record(subject, item, scores, str(instances[0].args[0]), response, reason)


# ---- tasks ----


def _manager(folders: list[str], data_folder: str | None, reads_hub: bool) -> "TaskManager":
    """Return lm-eval's list of tasks; its loaded tasks read local files, or are refused."""
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._factory import TaskFactory
    except ImportError:
        raise InputError("the suite lm_eval needs lm-eval: pip install 'hfllm[eval]'") from None

    class LocalFactory(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            config = super()._load_full_config(entry, overrides)
            base = Path(entry.yaml_path).parent if entry.yaml_path else Path()
            return local_config(entry.name, config, base, data_folder, reads_hub)

    manager = TaskManager(include_path=folders, include_defaults=reads_hub)
    manager._factory = LocalFactory(meta=None)
    return manager


def local_config(
    name: str, config: Mapping[str, Any], base: Path, data_folder: str | None, reads_hub: bool
) -> dict[str, Any]:
    """Return a task's config with whole paths of its files.

    Args:
        name: the task's.
        config: as its YAML file has it.
        base: the folder of this file.
        data_folder: where its files may be too.
        reads_hub: whether it may read a data set of the Hub.

    Raises:
        InputError: when a file is not there, or the data are on the Hub and may not be read.
    """
    kwargs, path = dict(config.get("dataset_kwargs") or {}), config.get("dataset_path")
    files = kwargs.get("data_files")
    if path in FILE_KINDS and files is not None:
        folders = [base, Path(data_folder) if data_folder else Path(), Path()]
        kwargs["data_files"] = _whole(name, files, folders)
        return {**config, "dataset_kwargs": kwargs}
    is_local = config.get("custom_dataset") is not None or path is None or Path(str(path)).is_dir()
    if not is_local and not reads_hub:
        raise InputError(
            f"--tasks {name}: it reads {path!r} of the Hub; only local files are read, unless --tasks_from_hub says so"
        )
    return dict(config)


def _whole(name: str, files: Any, folders: Sequence[Path]) -> Any:
    """Return the path or paths of a task's files, each in the first folder containing it."""
    if isinstance(files, Mapping):
        return {split: _whole(name, each, folders) for split, each in files.items()}
    if isinstance(files, list | tuple):
        return [_whole(name, each, folders) for each in files]
    for folder in folders:
        if (folder / str(files)).is_file():
            return str((folder / str(files)).resolve())
    raise InputError(f"--tasks {name}: no file {str(files)!r} beside its YAML file or in --tasks_data (a folder)")


def _load(manager: "TaskManager", names: Sequence[str], reads_hub: bool) -> "dict[str, Task]":
    """Return tasks by name, ready to be asked."""
    available, tasks = manager.all_tasks, {}
    for name in names:
        if name not in available:
            near = difflib.get_close_matches(name, available, n=1, cutoff=0.0)
            more = "" if reads_hub else "; lm-eval's own tasks are on the Hub: --tasks_from_hub"
            hint = f"did you mean {near[0]!r}?" if near else "there are none"
            raise InputError(f"--tasks {name}: unknown task; {hint} (--include_path names folders with tasks{more})")
    try:
        loaded = manager.load(list(names))
    except InputError:
        raise
    except Exception as error:
        # A YAML file of the user's may fail in many ways, and so may the library reading its data.
        raise InputError(f"--tasks {' '.join(names)}: {type(error).__name__}: {_one_line(error)}") from error
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        tasks[name] = task
    return tasks


# ---- questions ----


def _instances(
    model: "HFLM", task: "Task", doc: Mapping[str, Any], number: int, uses_chat_template: bool
) -> "list[Instance]":
    """Return the requests of an item. Its worked examples are drawn again, regardless of earlier requests."""
    task.set_fewshot_seed(SEED)
    template = model.apply_chat_template if uses_chat_template else None
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        apply_chat_template=uses_chat_template,
        fewshot_as_multiturn=uses_chat_template,
        chat_template=template,
        gen_prefix=task.doc_to_prefix(doc),
    )
    result = task.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(task.config.task, number, task.config.repeats),
        apply_chat_template=uses_chat_template,
        chat_template=template,
    )
    return result if isinstance(result, list) else [result]


def _length(model: "HFLM", instance: "Instance") -> int:
    """Return the number of tokens of a request, including the tokens to generate."""
    if instance.request_type == "generate_until":
        most = instance.args[1].get("max_gen_toks", model.max_gen_toks)
        return len(model.tok_encode(instance.args[0])) + most
    if instance.request_type == "loglikelihood_rolling":
        # It is read in windows.
        return 0
    # The last token of a continuation is not read.
    return len(model.tok_encode("".join(instance.args[:2]))) - 1


def _ask(model: "HFLM", instances: "list[Instance]", label: str) -> None:
    """Put the model's output into the requests."""
    for kind in dict.fromkeys(each.request_type for each in instances):
        requests = [each for each in instances if each.request_type == kind for _ in range(each.repeats or 1)]
        answers = getattr(model, kind)(requests, disable_tqdm=True)
        for request, answer in zip(requests, answers, strict=True):
            number = answer[0] if kind == "loglikelihood" else answer
            if kind != "generate_until" and not math.isfinite(number):
                item = f"{request.task_name}/{request.doc_id}"
                raise InputError(f"lm_eval, item {item}: the likelihood by {label} is {number}, not a number")
            request.resps.append(answer)


def _scores(task: "Task", doc: Mapping[str, Any], instances: "list[Instance]") -> dict[str, float]:
    """Return the figures of an item by metric, with the name of the filter where a task has several."""
    scores = {}
    ordered = sorted(instances, key=lambda each: each.idx)
    for kind in ordered[0].filtered_resps:
        result = task.process_results(doc, [each.filtered_resps[kind] for each in ordered])
        for metric, value in result.items():
            if isinstance(value, bool | int | float) or hasattr(value, "item"):
                scores[_filtered(metric, kind)] = float(value)
    return scores


def _filtered(metric: str, kind: str) -> str:
    """Return the name of a metric with its filter."""
    return metric if kind == "none" else f"{metric}_{kind.replace('-', '_')}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---- rows of local files ----
#
# Functions named in the shipped YAML tasks of lm-eval: they read rows of local files, and judge answers.


# Time limit of a HumanEval program, in seconds.
SECONDS = 10.0


def arc(rows: "Dataset") -> "Dataset":
    """Return ARC's questions with `question`, `choices` and `gold`, from rows instructing to choose an answer."""
    return rows.map(_arc, remove_columns=rows.column_names)


def _arc(row: Mapping[str, Any]) -> dict[str, Any]:
    question, _, rest = row["instruction"].partition("question: ")[2].partition("\n\n")
    listed = rest.partition("\n\nAnswer format")[0]
    choices = [each.strip() for each in re.split(r"\s*Answer\d+: ", listed) if each.strip()]
    return {"question": question.strip(), "choices": choices, "gold": int(row["answer"].removeprefix("answer")) - 1}


def gsm8k(rows: "Dataset") -> "Dataset":
    """Return GSM8K's questions with `gold`, the number after `####`, without commas."""
    return rows.map(lambda row: {"gold": row["answer"].split("####")[-1].strip().replace(",", "")})


def humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the function completed by a model passes its tests, in a process of its own."""
    # A program ending before its tests has passed none: the output after them cannot be guessed.
    passed = secrets.token_hex(8)
    program = f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\nprint({passed!r})\n"
    try:
        printed = python_within(SECONDS)(program)
    except CodeError:
        return {"pass_at_1": 0.0}
    return {"pass_at_1": float(printed.rstrip().endswith(passed))}


def gsm8k_right(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the number after `####`, or else the last one, in a model's output is the right one."""
    marked = re.findall(r"####\s*(-?[\d,.]+)", results[0])
    numbers = marked[:1] or re.findall(r"-?\d[\d,]*(?:\.\d+)?", results[0])[-1:]
    answer = numbers[0].replace(",", "").rstrip(".") if numbers else ""
    return {"exact_match": float(answer == doc["gold"])}
