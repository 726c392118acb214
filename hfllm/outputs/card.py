"""The model card of a finished run, written from its folder as README.md: use, origin, data, figures.

The card depends only on the folder and has no dates, so publishing the same run twice changes nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfllm.errors import InputError, redact, refuse_if
from hfllm.outputs.files import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    LABELS,
    MERGED_FROM,
    count_parameters,
    is_adapter,
    plot_files,
    read_json,
    sees_pictures,
)
from hfllm.outputs.report import (
    RECEIPT_FILE,
    figures_markdown,
    flag_sections,
    folded,
    markdown_table,
    read_report,
    warnings_markdown,
    write_atomically,
)

# ---- the card ----


WORLD = "world"  # the embedded dataset's name, as in --dataset_name
OUR_QUANTIZATION = "hfllm_int8"  # hfllm.compression.int8
MARKER = "<!-- Written by hfllm and written anew at each push. Remove this line to keep your own text. -->"
SPANS = "question-answering"  # a tag of the Hub; transformers 5 has no pipeline of this name
IMAGE_TEXT = "image-text-to-text"
PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": SPANS,
}
# A separate absolute path of at least two parts; a URL's slashes follow a slash or a letter, or begin two. A folder's
# name may have spaces, as in /home/me/My Data/rows.jsonl; only quotes mark the end of the last part.
_PART = r"[\w.@+~()&-]+"
_ROOT = r"(?:file://|~|(?<![A-Za-z])[A-Za-z]:)?[/\\]"
_ABSOLUTE_PATH = re.compile(rf"(?<![\w./~]){_ROOT}(?:{_PART}(?: {_PART}){{0,4}}[/\\])+({_PART})")
_STANDS_BEFORE, _STANDS_BEHIND = re.compile(r"[\w/]"), re.compile(r"\w")
_INSIDE = re.compile(rf"(?:[/\\]{_PART})*")
_QUOTED_PATH = re.compile(rf"""(?<!\w)([`'"]){_ROOT}(?![/\\])(?:[^\n/\\`'"]+[/\\])+([^\n/\\`'"]+)\1""")


def write_card(folder: str | Path, repo_id: str | None = None) -> None:
    """Write the card as README.md, unless an existing file is the user's own (without our marker line)."""
    path = Path(folder) / CARD
    if not path.is_file() or is_written(path):
        write_atomically(path, model_card(folder, repo_id))


def is_written(card: Path) -> bool:
    """Return whether a card was written by `write_card`, and the user has not made it their own."""
    return MARKER in card.read_text(encoding="utf-8", errors="replace")


def model_card(folder: str | Path, repo_id: str | None = None) -> str:
    """Return the card of the model in `folder`: metadata, use, origin, reward, data, figures, plots and flags.

    Args:
        folder: a saved model, with the report of its run if one of our recipes made it.
        repo_id: its repository for publication; by default the folder's name.

    Raises:
        InputError: when the folder holds no complete model.
    """
    folder = Path(folder)
    report = read_report(folder) or {}
    report = {**report, "parents": entries(report.get("parents"))}
    arguments = report.get("arguments", {})
    name = (repo_id or folder.resolve().name).split("/")[-1]
    base = adapter_base(folder) if is_adapter(folder) else None
    sections = [
        _front_matter(folder, report, base),
        MARKER,
        f"# {plain_line(name)}",
        _introduction(folder, report, base),
        *([f"**Verdict: {sentence}.**"] if (sentence := (report.get("verdict") or {}).get("sentence")) else []),
        *([report["summary"]] if report.get("summary") else []),
        *warnings_markdown(report.get("warnings") or ()),
        _usage(folder, repo_id or name),
        *_origin(report, base),
        *_reward(report),
    ]
    if arguments:
        sections.append(_data(folder, report))
    if report.get("metrics"):
        sections += ["## Metrics", *figures_markdown(report["metrics"])]
    sections += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plot_files(folder)]
    if arguments:
        sections += flag_sections(public_value(arguments), public_value(report.get("given")))
    if report.get("environment"):
        rows = [{"": key, "version or value": value} for key, value in report["environment"].items()]
        sections.append(folded("Environment", "\n".join(markdown_table(rows))))
    return redact(public_value("\n\n".join(sections), local_paths(report, folder))) + "\n"


def adapter_base(folder: Path) -> str | None:
    """Return the Hub id of an adapter's base model; `None` for a local folder."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    return None if merged_base(folder) or _was_local(folder, base) else hub_id({"base": base}, "base")


def check_base(folder: Path) -> None:
    """Refuse to publish an adapter with a base model inaccessible to others.

    Raises:
        InputError: when its base is a local folder.
    """
    if is_adapter(folder) and adapter_base(folder) is None:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
        raise InputError(
            f"{folder} holds a PEFT adapter of {base!r}, which is not on the Hub: merge it into its base (hfllm merge "
            f"--model_name_or_path {folder}) or train it on a model of the Hub"
        )


def hub_id(arguments: Mapping[str, Any], flag: str) -> str | None:
    """Return a flag's value if it is a repository of the Hub, not a local path or the embedded world, else `None`."""
    value = arguments.get(flag)
    # The run recorded whether it was a path, since a relative path looks like a Hub id.
    if not isinstance(value, str) or value == WORLD or f"{flag} changed at" in arguments or not is_hub_id(value):
        return None
    if Path(value).exists():
        return None
    return value if not value.endswith((".json", ".jsonl", ".txt", ".parquet")) else None


def public_value(value: object, paths: Sequence[str] = ()) -> object:
    """Return a report's value for publication: absolute local paths are reduced to their names.

    Args:
        value: also of nested values, with the keys of mappings, every text.
        paths: the known ones, such as `local_paths`: a text may name them with any letters around.
    """
    if isinstance(value, Mapping):
        return {public_value(key, paths): public_value(item, paths) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(item, paths) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and not _is_web_address(value) and _is_absolute(value):
        return Path(value).name or value
    for path in paths:
        value = _without_path(value, path)
    value = _QUOTED_PATH.sub(r"\1\2\1", value)
    return _ABSOLUTE_PATH.sub(r"\1", value)


def _without_path(text: str, path: str) -> str:
    """Return a text with a path, and paths in it, as the last name; /home/me/database is not in /home/me/data.

    Without a pattern made of the path: a long path's pattern, with its many folders, takes minutes to compile.
    """
    parts, done, begin = [], 0, text.find(path)
    while begin >= 0:
        end = begin + len(path)
        if not _STANDS_BEFORE.match(text[begin - 1 : begin]) and not _STANDS_BEHIND.match(text, end):
            end = _INSIDE.match(text, end).end()
            parts += [text[done:begin], Path(text[begin:end]).name]
            done = end
        begin = text.find(path, max(done, begin + 1))
    return "".join(parts) + text[done:]


def local_paths(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the absolute paths in a report and its folder, and their parents with a space, longest first.

    Nothing in a text marks the end of a path with spaces; the flags of the run show it.
    """
    named: set[str] = {str(folder.absolute()), str(folder.resolve())}
    for text in _texts({name: report.get(name) for name in ("arguments", "given", "parents", "artifacts")}):
        # A flag may hold more than a path: FILE.py:function, NAME:WEIGHT, OURS=THEIRS, and a note behind it in a key.
        candidates = (text, text.rpartition(":")[0], text.partition("=")[2], text.removesuffix(" changed at"))
        named |= {part for part in candidates if "\n" not in part and _is_absolute(part)}
    above = {str(parent) for path in named for parent in Path(path).parents if " " in parent.name}
    # A path of one part has nothing to hide, and its name may occur in any text.
    return sorted((path for path in named | above if len(Path(path).parts) > 2), key=len, reverse=True)


def _is_absolute(text: str) -> bool:
    try:
        return Path(text).expanduser().is_absolute()
    except (RuntimeError, ValueError):  # the home of nobody, and a zero byte
        return False


def _is_web_address(text: str) -> bool:
    return "://" in text


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def public_report(folder: Path, name: str) -> bytes:
    """Return report.json or report.md for publication, see `public_value`."""
    text = (folder / name).read_text(encoding="utf-8", errors="replace")
    report = read_report(folder)
    paths = local_paths(report or {}, folder)
    if name.endswith(".json"):
        refuse_if(report is None, f"{folder / name} is damaged, or not hfllm's: move it, or run the stage again")
        text = json.dumps(public_value(report, paths), indent=2) + "\n"
    else:
        text = public_value(text, paths)
    return redact(text).encode()


def _was_local(folder: Path, base: str) -> bool:
    """Return whether the run's report records `base` as a local path: a relative one looks like a Hub id."""
    report, flag = read_report(folder) or {}, "model_name_or_path"
    arguments, parents = report.get("arguments", {}), report.get("parents") or []
    is_named = arguments.get(flag) == base and f"{flag} changed at" in arguments
    # For an adapter trained further the base is an ancestor.
    return is_named or any(entry["model"] == base and "hub_id" not in entry for entry in parents)


def _front_matter(folder: Path, report: Mapping[str, Any], base: str | None) -> str:
    import yaml

    arguments = report.get("arguments", {})
    adapter = is_adapter(folder)
    metadata: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if pipeline := _pipeline(folder):
        metadata["pipeline_tag"] = pipeline
    metadata["tags"] = ["hfllm", *([report["stage"]] if report.get("stage") else [])]
    named = hub_id(arguments, "model_name_or_path") or _first_on_hub(report)
    if base := base if adapter else first_base(folder) or named:
        metadata["base_model"] = base
    if dataset := hub_id(arguments, "dataset_name"):
        metadata["datasets"] = [dataset]
    return "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---"


def _first_on_hub(report: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the first stage's starting model, if it is one of the Hub."""
    return hub_id(origin(report.get("parents") or []) or {}, "hub_id")


def _pipeline(folder: Path) -> str | None:
    task = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
    task["QUESTION_ANS"] = SPANS
    if is_adapter(folder):
        result = task.get(read_json(folder / ADAPTER_CONFIG).get("task_type") or "")
    else:
        architecture = _architecture(folder)
        result = next((tag for ending, tag in PIPELINES.items() if architecture.endswith(ending)), None)
    return IMAGE_TEXT if sees_pictures(folder) and result in (None, "text-generation") else result


def _architecture(folder: Path) -> str:
    return next(iter(read_json(folder / CONFIG).get("architectures") or []), "")


def _introduction(folder: Path, report: Mapping[str, Any], base: str | None) -> str:
    kind = (
        f"A PEFT adapter of {base or _local_base(folder)}" if is_adapter(folder) else code_span(_architecture(folder))
    )
    # Packed numbers and their scales do not give the number of parameters.
    method = _quantization(folder)
    text = f"{kind}, quantized ({method})" if method else f"{kind} with {count_parameters(folder):,} parameters"
    if merged_from(folder):
        text += f": {_merged(folder)}"
    if report.get("stage"):
        text += f", made by the {report['stage']} stage of hfllm {report.get('hfllm_version', '')}".rstrip()
        text += f" in {report.get('wall_seconds') or 0:.0f} seconds"
    return f"{text}."


def _local_base(folder: Path) -> str:
    merged = merged_base(folder)
    return "a local model" if merged is None else _merged(merged)


def _merged(folder: Path) -> str:
    """Return the description of a merged model, in words."""
    adapters = [code_span(public_value(name)) for name in merged_adapters(folder)]
    many = f"adapter{'s' if len(adapters) > 1 else ''} {', then '.join(adapters)}"
    return f"{first_base(folder) or 'a local model'} ({many} merged into it)"


def _usage(folder: Path, name: str) -> str:
    pipeline = _pipeline(folder)
    if sees_pictures(folder):
        auto_class = "AutoModelForImageTextToText" if pipeline == IMAGE_TEXT else "AutoModelForSequenceClassification"
        labels = _label_arguments(folder, pipeline) if is_adapter(folder) else ""
        lines = [
            f"from transformers import {auto_class}, AutoProcessor",
            "",
            f"model = {auto_class}.from_pretrained({quoted(name)}{labels})",
            f"processor = AutoProcessor.from_pretrained({quoted(name)})",
        ]
    elif is_adapter(folder):
        kind = {"text-classification": "SequenceClassification", "token-classification": "TokenClassification"}
        kind[SPANS] = "QuestionAnswering"
        model_class = f"AutoPeftModelFor{kind.get(pipeline or '', 'CausalLM')}"
        # Neither the base nor the adapter records the number of scores of its head.
        labels = _label_arguments(folder, pipeline)
        lines = [
            f"from peft import {model_class}",
            "",
            f"model = {model_class}.from_pretrained({quoted(name)}{labels})",
        ]
    elif pipeline in (None, SPANS):
        auto_class = "AutoModel" if pipeline is None else "AutoModelForQuestionAnswering"
        lines = [f"from transformers import {auto_class}", "", f"model = {auto_class}.from_pretrained({quoted(name)})"]
    else:
        lines = ["from transformers import pipeline", "", f'model = pipeline("{pipeline}", {quoted(name)})']
        chat = any((folder / file).is_file() for file in ("chat_template.jinja", "chat_template.json"))
        prompt = '[{"role": "user", "content": "..."}]' if chat and pipeline == "text-generation" else '"..."'
        lines.append(f"print(model({prompt}))")
    method = _quantization(folder)
    is_ours = read_json(folder / CONFIG).get("model_type") in ("hfllm", "hfllm_vision") or method == OUR_QUANTIZATION
    lines = [*(["import hfllm"] if is_ours else []), *lines]
    text = "\n".join(["## Use", "", "```python", *lines, "```"])
    if method == OUR_QUANTIZATION:
        text += "\n\nThe weights are in a format of hfllm, for CPUs: hfllm must be installed."
    elif is_ours and read_json(folder / CONFIG).get("auto_map"):
        text += (
            "\n\nWithout hfllm installed, leave out `import hfllm` and pass `trust_remote_code=True`: the code beside "
            "the weights is used."
        )
    if method == "bitsandbytes":
        text += "\n\nThe weights are quantized: loading them needs `pip install bitsandbytes`."
    return text


def _label_arguments(folder: Path, pipeline: str | None) -> str:
    """Return the arguments of `from_pretrained` for the head of an adapter, which names no labels itself."""
    if pipeline not in ("text-classification", "token-classification"):
        return ""
    names = read_json(folder / LABELS).get("id2label") or {}
    return f", id2label={dict(enumerate(names.values()))!r}" if names else ", num_labels=1"


def _quantization(folder: Path) -> str | None:
    """Return the quantization of the weights, or `None`; an adapter's are not quantized."""
    return (read_json(folder / CONFIG).get("quantization_config") or {}).get("quant_method")


def _origin(report: Mapping[str, Any], base: str | None) -> list[str]:
    """Return the section about the base model and the stages before this one, in order; none if unknown.

    Args:
        base: the Hub id of an adapter's base.
    """
    parents = report.get("parents") or []
    if not parents:
        return []
    first, begins = origin(parents), []
    if first and first.get("stage"):
        begins = [f"The base model was made by the {first['stage']} stage, from new weights ({_shown(first)})."]
    elif first and base and first.get("hub_id") not in (None, base):
        # An adapter of the Hub was trained further; its own origin is unknown here.
        begins = [f"The base model is {_linked({'hub_id': base})}; training started from {_linked(first)}."]
    elif first:
        begins = [f"The base model is {_linked(first)}."]
    rows = [
        {"stage": entry.get("stage") or "", "model": _shown(entry), "as": _role(entry), "from": _rows(entry)}
        for entry in parents
    ]
    own = {"stage": report.get("stage", ""), "model": "this one", "as": "", "from": _rows(learned_from(report))}
    return ["## Origin", *begins, "\n".join(markdown_table([*rows, own]))]


def _shown(entry: Mapping[str, Any]) -> str:
    return code_span(public_value(entry["model"]))


def _linked(entry: Mapping[str, Any]) -> str:
    result = entry.get("hub_id")
    return f"[{result}](https://huggingface.co/{result})" if is_hub_id(result) else f"{_shown(entry)}, a local model"


def _role(entry: Mapping[str, Any]) -> str:
    return {"model": "start"}.get(entry["role"], entry["role"])


def _rows(entry: Mapping[str, Any]) -> str:
    """Return the training data of an entry of the lineage, such as `9,600 demonstrations of world`."""
    data, count = entry.get("data"), entry.get("rows")
    name = "" if not data else "the embedded world" if data == WORLD else code_span(public_value(data))
    if count is None:
        return name
    return f"{count:,} {entry.get('kind', 'rows')}" + (f" of {name}" if name else "")


def _listed(value: object) -> list[object]:
    """Return a flag's values: a single value may have lost its list on the way through other programs."""
    return value if isinstance(value, list) else [value] if value else []


def _reward(report: Mapping[str, Any]) -> list[str]:
    """Return the section about the reward used to train a policy; none without a reward."""
    arguments = report.get("arguments", {})
    functions = [f"the function {code_span(public_value(name))}" for name in _listed(arguments.get("reward_funcs"))]
    models = [
        f"the reward model {_shown(entry)}"
        + (f", trained by the {entry['stage']} stage on {_rows(entry)}" if entry.get("stage") and _rows(entry) else "")
        for entry in report.get("parents") or []
        if entry["role"] == "reward model"
    ]
    parts = [*functions, *models]
    if not parts:
        return []
    text = f"Trained on {'; '.join(parts)}."
    if len(models) > 1:
        text += (
            f" The scores of several reward models are combined by {code_span(arguments.get('reward_aggregation'))}."
        )
    if weights := _listed(arguments.get("reward_weights")):
        text += f" Weights, in this order: {', '.join(map(str, weights))}."
    return ["## Reward", text]


def _data(folder: Path, report: Mapping[str, Any]) -> str:
    arguments = report["arguments"]
    name = arguments.get("dataset_name")
    if name == WORLD:
        text = (
            "hfllm's embedded instruction world: plain English about a closed universe, generated from seed "
            f"{arguments.get('world_seed', 0)}, with no text from elsewhere."
        )
    elif result := hub_id(arguments, "dataset_name"):
        parts = {"configuration": "dataset_config", "split": "dataset_train_split", "revision": "dataset_revision"}
        details = [f"{part} {code_span(arguments[flag])}" for part, flag in parts.items() if arguments.get(flag)]
        text = f"{', '.join([f'[{result}](https://huggingface.co/datasets/{result})', *details])}."
    else:
        text = f"{code_span(public_value(name))}, a local dataset." if name else "Not recorded."
    if arguments.get("max_samples"):
        text += f" The first {arguments['max_samples']} rows of it."
    learned = learned_from(report)
    if "rows" in learned:
        text += f" Trained on {learned['rows']:,} {learned['kind']}."
    return "\n\n".join(["## Data", text, *_receipt(folder, name)])


def _receipt(folder: Path, name: object) -> list[str]:
    """Return what the run read of its dataset and what not, in a sentence each, if it has written it."""
    try:
        receipts = json.loads((folder / RECEIPT_FILE).read_text(encoding="utf-8"))
        (own,) = [each for each in receipts["datasets"] if each["dataset"] == name][:1]
        columns, ignored = own["columns"], own["ignored"]
        dropped = {reason: each["rows"] for reason, each in own["dropped"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    lines = [f"{own['rows']:,} rows were read, and of them {', '.join(map(code_span, columns)) or 'no column'}."]
    if dropped:
        reasons = ", ".join(f"{count:,} {plain_line(reason)}" for reason, count in dropped.items())
        lines.append(f"Left out: {reasons}.")
    if ignored:
        lines.append(f"Not read: {', '.join(map(code_span, ignored))}.")
    return [" ".join(lines)]


def check_publishable(peft: bool, model_name: str | None, revision: str = "main") -> None:
    """Refuse to train an adapter for publication if others could not load its base model.

    Raises:
        InputError: when `peft` is true and the base is made by an earlier stage, is a local folder, or an adapter to
            be merged into a local base first; or when an adapter of a local base is named, to be trained further.
    """
    if not peft and model_name is not None and Path(model_name, ADAPTER_CONFIG).is_file():
        check_base(Path(model_name))
    if peft and (model_name is None or hub_id({"base": model_name}, "base") is None):
        raise InputError(
            "--push_to_hub with --use_peft publishes only the adapter, so its base must be a model of the Hub: name "
            f"one by --model_name_or_path (now {model_name!r}), or train without --use_peft"
        )
    if peft and _is_adapter_of_hub(model_name, revision):
        raise InputError(
            f"--push_to_hub with --use_peft: {model_name!r} is an adapter, which is merged into a local base first: "
            "leave --use_peft out to train it further, or publish the result by hfllm merge and hfllm push"
        )


def _is_adapter_of_hub(name: str, revision: str) -> bool:
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name, revision=revision) is not None
    except OSError:
        # Loading the model will report it.
        return False


def chat_lines(folder: str, prompt: str | Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of Python to load the model in `folder` and print its answer to `prompt`."""
    answer = "[0]['generated_text']" + ("" if isinstance(prompt, str) else "[-1]['content']")
    return [
        "import hfllm",
        "from transformers import pipeline",
        f"assistant = pipeline('text-generation', {folder!r})",
        f"print(assistant({prompt!r}, max_new_tokens=64){answer})",
    ]


# ---- parents ----
# The origin of a model: the stages before it and the starting model of the first of them.


# The metrics with the number of a stage's training rows, and the kind of the rows.
ROWS = {
    "documents": "texts",
    "examples": "demonstrations",
    "train_comparisons": "comparisons",
    "train_prompts": "prompts",
    "train_rows": "rows",
}
# The role of the starting model of training; other roles include `reward model` and `teacher`.
START = "model"
BEFORE = "start of the "


def lineage(models: Mapping[str, str | Sequence[str] | None]) -> list[dict[str, Any]]:
    """Return the input models of a stage and their ancestors, in the order of their creation, without repeats.

    Args:
        models: names or folders, by role: `model` is the starting model of training.

    Returns:
        An entry per model: its `role` and `model` (folder or Hub id); `hub_id` of one of the Hub; for a stage's model
        `stage`, `data`, `rows` and `kind` of rows, as far as recorded in its report.
    """
    result: dict[tuple[str, str], dict[str, Any]] = {}
    for role, named in models.items():
        for name in [named] if isinstance(named, str) else named or []:
            for entry in _with_parents(role, name):
                result.setdefault((entry["model"], entry.get("stage", "")), entry)
    return list(result.values())


def _with_parents(role: str, name: str, children: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return a model's entry after the entries of the models before it.

    Args:
        children: the models after it, none of them also before it.
    """
    if not Path(name).is_dir():
        return [{"role": role, "model": name, "hub_id": name}]
    report, ancestor = read_report(name), role if role == START else f"{BEFORE}{role.removeprefix(BEFORE)}"
    own = {"role": role, "model": name}
    if report is None:
        base = read_json(Path(name) / ADAPTER_CONFIG).get("base_model_name_or_path")
        parents = None
    else:
        base, parents = report.get("arguments", {}).get("model_name_or_path"), entries(report.get("parents"))
        own |= {"stage": report.get("stage"), **learned_from(report)}
    if parents is None:
        # Another tool's model, or one with a report from before the lineage was written.
        is_known = isinstance(base, str) and base and base not in (name, *children)
        parents = _with_parents(START, base, (name, *children)) if is_known else []
    return [*({**entry, "role": ancestor if entry["role"] == START else entry["role"]} for entry in parents), own]


def learned_from(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name of the data of a run and the number of rows, as far as its report has them."""
    metrics, data = report.get("metrics") or {}, report.get("arguments", {}).get("dataset_name")
    counts = {name: metrics[name] for name in ROWS if isinstance(metrics.get(name), int | float)}
    rows = next(({"rows": count, "kind": ROWS[name]} for name, count in counts.items()), {})
    return {**({"data": data} if data else {}), **rows}


def entries(parents: object) -> list[dict[str, Any]] | None:
    """Return the lineage in a report, without invalid entries: models come from elsewhere too."""
    if not isinstance(parents, list):
        return None
    kinds = {"role": str, "model": str, "stage": str, "hub_id": str, "data": str, "kind": str, "rows": int | float}
    return [
        {name: value for name, value in entry.items() if name not in kinds or isinstance(value, kinds[name])}
        for entry in parents
        if isinstance(entry, dict) and isinstance(entry.get("role"), str) and isinstance(entry.get("model"), str)
    ]


def origin(parents: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the first model of the line of starting models: a base model, or the output of a first stage."""
    return next((entry for entry in parents if entry["role"] == START), None)


# ---- python lines ----
# Lines of Python in reports about a saved model.


def loading_lines(folder: str, task: str | None = None) -> list[str]:
    """Return the lines of Python to load the model in `folder` and its tokenizer, or a vision-language processor.

    Args:
        task: as PEFT names it, such as SEQ_CLS; by default the task of a language model.
    """
    kinds = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
    kinds["QUESTION_ANS"] = "QuestionAnswering"
    words, reader = "CausalLM", ("tokenizer", "AutoTokenizer")
    if sees_pictures(Path(folder)):
        words, reader = "ImageTextToText", ("processor", "AutoProcessor")
    auto_class = f"AutoModelFor{kinds.get(task or '', words)}"
    # transformers supports bitsandbytes without hfllm; our own scheme and family need hfllm imported.
    return [
        "import hfllm",
        f"from transformers import {auto_class}, {reader[1]}",
        f"model = {auto_class}.from_pretrained({folder!r})",
        f"{reader[0]} = {reader[1]}.from_pretrained({folder!r})",
    ]


def speculative_lines(model: str, draft: str) -> list[str]:
    """Return the lines of Python for speculative decoding of a model.

    Args:
        model: its folder or Hub id.
        draft: the expression for the draft, such as `Int8Draft()`.
    """
    return [
        "import hfllm",
        f"from hfllm.generation.speculative import {draft.partition('(')[0]}, speculative_generate",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({model!r})",
        f"model = AutoModelForCausalLM.from_pretrained({model!r})",
        f"draft = {draft}",
        "output = speculative_generate(model, draft, **tokenizer('...', return_tensors='pt'), max_new_tokens=64)",
    ]


def picture_lines(folder: str, is_adapter: bool = False) -> list[str]:
    """Return the lines of Python to load the vision-language model in `folder` and ask it about an image.

    Args:
        is_adapter: whether the model is an adapter, to be loaded on its base.
    """
    if is_adapter:
        return [
            "import hfllm",
            "from transformers import AutoModelForImageTextToText",
            f"model = AutoModelForImageTextToText.from_pretrained({folder!r})",
        ]
    return [
        "import hfllm",
        "from transformers import pipeline",
        f"look = pipeline('image-text-to-text', {folder!r})",
        "question = [{'type': 'image', 'url': 'picture.png'}, {'type': 'text', 'text': 'What color is the square?'}]",
        "print(look(text=[{'role': 'user', 'content': question}], max_new_tokens=8, return_full_text=False))",
    ]


# ---- names ----
# Names of users' models, data and folders in Markdown: they stay unchanged, whatever their characters.


# The maximum length of names on the Hub.
_HUB_ID = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?")


def is_hub_id(value: object) -> bool:
    """Return whether a name is valid for a repository of the Hub."""
    return isinstance(value, str) and _HUB_ID.fullmatch(value) is not None


def code_span(value: object) -> str:
    """Return a name as a code span without escaping from it; a pipe is for `markdown_table` to escape."""
    text = _printable(value)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or not text.strip() else ""
    return f"{fence}{space}{text or ' '}{space}{fence}"


def plain_line(value: object) -> str:
    """Return a name as the text of a heading, without tags interpreted by a page."""
    return _printable(value).strip().replace("<", "&lt;")


def quoted(value: object) -> str:
    """Return a name as a string of Python in a block of code, unable to end the block."""
    return json.dumps(_printable(value), ensure_ascii=False).replace("```", "'''")


def _printable(value: object) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


# ---- labels ----
# The names of a head's labels, next to the weights: the config of a whole model has them, an adapter's does not.


def write_labels(folder: str | Path, labels: Sequence[str]) -> None:
    """Write the labels in order, as `id2label` of a config would have them."""
    text = json.dumps({"id2label": dict(enumerate(labels))}, indent=2, ensure_ascii=False)
    write_atomically(Path(folder) / LABELS, text + "\n")


# ---- merged ----
# The sources of a merged model, from the record in its folder.


def merged_from(folder: Path) -> dict[str, Any]:
    """Return the record of a merged model: its `adapter` and `base_model_name_or_path`; empty for any other model."""
    return read_json(folder / MERGED_FROM)


def first_base(folder: Path) -> str | None:
    """Return the base on the Hub of the first of the merged adapters, `None` for a local one."""
    record = merged_from(folder)
    if not record or record.get("base_is_local") is False:
        return record.get("base_model_name_or_path")
    return first_base(Path(record["base_model_name_or_path"]))


def merged_adapters(folder: Path) -> list[str]:
    """Return the names of the adapters merged one after the other, the first one first."""
    record = merged_from(folder)
    if not record:
        return []
    return [*merged_adapters(Path(record["base_model_name_or_path"])), record["adapter"]]


def merged_base(folder: Path) -> Path | None:
    """Return the local merged base model of an adapter; `None` for any other adapter."""
    base = Path(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    # The run's folder may have moved, with the base in it.
    indices = (base, folder / base.name) if base.name else ()
    return next((index for index in indices if (index / MERGED_FROM).is_file()), None)
