"""Which run a folder or a checkpoint is of: the flags that decide the result, and the files named by them.

A finished run is compared by its flags. A checkpoint's run is compared by contents and not by times or paths: a folder
copied to another machine can be resumed there.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.images.rows import contents_of, existing, named_pictures
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.data.sources import PYDOC, WORLD, source_files
from hfllm.errors import InputError, redact, without_credentials
from hfllm.fingerprint import file_fingerprint
from hfllm.outputs.ownership import DECISIVE
from hfllm.outputs.report import CHANGED, CONTENTS, compared, read_report
from hfllm.runs.parser import present_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Where a run is, where it reports to and how it is continued do not change its result.
NOT_PART_OF_THE_RUN = frozenset(
    (
        *("output_dir", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm", "log_level"),
        *("log_level_replica", "logging_first_step", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
        *("hub_private_repo", "hub_always_push", "hub_revision", "resume_from_checkpoint", "local_rank"),
        *("deepspeed_plugin", "distributed_state", "ddp_timeout", "save_total_limit", "enable_jit_checkpoint"),
        *("trust_remote_code", "max_row_bytes", "reward_timeout"),
    )
)
# Flags that may change between a checkpoint and the run resuming it: logging, saving, evaluation, and speed. All other
# flags must be the same.
MAY_CHANGE = frozenset(
    (
        *("logging_strategy", "logging_steps", "logging_nan_inf_filter", "log_completions"),
        *("include_num_input_tokens_seen", "log_on_each_node", "sample_steps", "peak_flops", "loss_spikes", "debug"),
        *("trackio_bucket_id", "trackio_static_space_id"),
        *("save_strategy", "save_steps", "save_only_model", "save_on_each_node"),
        *("restore_callback_states_from_checkpoint", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("eval_accumulation_steps", "per_device_eval_batch_size", "batch_eval_metrics", "eval_use_gather_object"),
        *("prediction_loss_only", "include_for_metrics", "do_train", "do_eval", "do_predict"),
        *("eval_do_concat_batches", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_multiprocessing_context", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataset_num_proc", "teacher_cache_dir"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "activation_offloading", "torch_compile"),
        *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "skip_memory_metrics"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "ddp_static_graph"),
        *("ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("max_tokens_per_pass", "length_bucket_size", "local_rollout_forward_batch_size"),
    )
)
# The argument about the images named in a dataset's rows, by the dataset's flag.
PICTURES_OF = "pictures of {}"
DATASETS = ("dataset_name", "eval_dataset_name", "ptx_dataset_name")
# Flags that name functions or classes in files.
FUNCTIONS = ("reward_funcs", "tools", "environment_factory")
MODELS = (
    *("model_name_or_path", "config_name_or_path", "tokenizer_name_or_path", "teacher_model_name_or_path"),
    *("reward_model_name_or_path", "value_model"),
)
# The files in a model's folder that decide its answers.
MODEL_FILES = (*DECISIVE, "pytorch_model*.bin", "adapter_model.bin")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


# ---- finished runs ----


def run_arguments(*arguments: "DataclassInstance") -> dict[str, Any]:
    """Return the flags that decide a run's result, as JSON values: they are compared when a folder is used again.

    They go into reports and cards, so secrets in them are hidden.
    """
    merged: dict[str, Any] = {}
    for group in arguments:
        for item in fields(group):
            if item.init and item.name not in NOT_PART_OF_THE_RUN:
                merged[item.name] = getattr(group, item.name)
    return without_credentials(json.loads(redact(json.dumps(merged, default=str, sort_keys=True))))


def finished_run(output_dir: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the report of a finished run with these arguments in `output_dir`, or `None` if none has finished."""
    report = read_report(output_dir)
    if report is None:
        return None
    recorded = {present_name(name): value for name, value in report["arguments"].items()}
    before = {name: value for name, value in recorded.items() if name.rpartition(".")[2] not in NOT_PART_OF_THE_RUN}
    for name in sorted(compared(before, arguments), key=_order_of_naming):
        if before.get(name) != arguments.get(name):
            raise InputError(
                f"--output_dir {output_dir} holds a finished run with {name}={before.get(name)!r}, this one has "
                f"{name}={arguments.get(name)!r}: choose another folder or remove that one"
            )
    return report


def _order_of_naming(name: str) -> tuple[int, str]:
    """Put a run's own flags first, then flags of the stages before it (`sft.seed`), then files with such flags."""
    return (1 if "." in name else 2 if name.endswith("_config") else 0, name)


# ---- checkpoints ----


def run_identity(
    stage: str, arguments: Mapping[str, Any], parsed: "Sequence[DataclassInstance]", output_dir: str
) -> dict[str, Any]:
    """Return the identity of a run, as JSON values.

    Args:
        stage: its stage's name.
        arguments: all inputs of its result.
        parsed: its flags.
    """
    selected = {
        flag: _without_folder(value, output_dir)
        for flag, value in arguments.items()
        if flag.rpartition(".")[2] not in MAY_CHANGE and not flag.endswith((CHANGED, CONTENTS))
    }
    files = {flag: paths for flag, paths in _named_files(arguments).items() if flag in selected and paths}
    contents = {
        flag: {"value": selected.pop(flag), "content": file_fingerprint(paths)} for flag, paths in files.items()
    }
    for flag, digest in _pictures(arguments, parsed).items():
        if flag in contents:
            contents[flag]["pictures"] = digest
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not set(BATCH) <= selected.keys() or any(hasattr(group, "num_mini_batches") for group in parsed):
        # A rollout is divided among processes and micro-batches, and each checkpoint holds one.
        selected["processes"] = processes
    else:
        rows = selected.pop(BATCH[0]) * selected.pop(BATCH[1]) * processes
        selected["rows per optimizer step (batch x accumulation x processes)"] = rows
    return {"stage": stage, "arguments": selected, "files": contents}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first difference of a checkpoint's run from this one, `None` if they are the same.

    Flags present in only one of them come from another version of hfllm or of a library, and are not compared.
    """
    if before.get("stage") != now["stage"]:
        return f"stage={before.get('stage')!r}, this run has stage={now['stage']!r}"
    was = {present_name(flag): value for flag, value in before.get("arguments", {}).items()}
    old, new = before.get("files", {}), now["files"]
    for flag in sorted({*was, *now["arguments"], *old, *new}):
        in_both = flag in old and flag in new
        if in_both and _same_contents(old[flag], new[flag]):
            continue
        one = old[flag]["value"] if flag in old else was.get(flag)
        other = new[flag]["value"] if flag in new else now["arguments"].get(flag)
        if in_both and one == other:
            return f"other contents of --{flag} {other}"
        is_known = (flag in was or flag in old) and (flag in now["arguments"] or flag in new)
        if is_known and one != other:
            return f"{flag}={one!r}, this run has {flag}={other!r}"
    return None


def _same_contents(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    # Earlier versions wrote the images behind the content, by their times, and times are not compared.
    same_pictures = "pictures" not in before or before["pictures"] == now.get("pictures")
    return before["content"].partition(", ")[0] == now["content"] and same_pictures


def model_files(folder: str | Path) -> list[tuple[str, Path]]:
    """Return the files of a model's folder that decide its answers, with their names; for a file, only itself."""
    folder = Path(folder)
    if folder.is_file():
        return [("", folder)]
    return [(path.name, path) for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()]


def _named_files(arguments: Mapping[str, Any]) -> dict[str, list[tuple[str, Path]]]:
    """Return the local files named by flags, by flag."""
    result = {flag: data_files(arguments.get(flag)) for flag in DATASETS}
    mixture = [entry.rpartition(":") for entry in arguments.get("dataset_mixture") or []]
    result["dataset_mixture"] = [
        (f"{index}:{weight}:{name}", path)
        for index, (dataset, _, weight) in enumerate(mixture)
        for name, path in data_files(dataset)
    ]
    if any(not data_files(dataset) for dataset, _, _ in mixture):
        # A dataset of the Hub has no contents here, so the names count.
        del result["dataset_mixture"]
    for flag in MODELS:
        names = arguments.get(flag) or []
        names = [names] if isinstance(names, str) else names
        files = [model_files(name) if Path(name).exists() else [] for name in names]
        if all(files):
            result[flag] = [(f"{index}/{name}", path) for index, each in enumerate(files) for name, path in each]
    for flag in FUNCTIONS:
        if files := function_files(arguments.get(flag) or []):
            result[flag] = files
    for flag, value in arguments.items():
        is_settings = flag.endswith(("_config", "_path")) or flag in ("deepspeed", "mcp_servers")
        if is_settings and flag not in result and isinstance(value, str) and Path(value).is_file():
            result[flag] = [("", Path(value))]
    return result


def function_files(names: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the local files among names such as `path/to/file.py:function`, `lookup:table.json` or `calculator`."""
    paths: list[tuple[str, Path | None]] = []
    for whole in names:
        file, _, name = whole.rpartition(":")
        path = next((Path(part) for part in (file, name) if Path(part).is_file()), None)
        paths.append((name if path is None or path != Path(name) else path.name, path))
    # The names that are no files count too.
    others = [whole for whole, (_, path) in zip(names, paths, strict=True) if path is None]
    beside = f" beside {' '.join(others)}" if others else ""
    return [(f"{index}:{name}{beside}", path) for index, (name, path) in enumerate(paths) if path is not None]


def _pictures(arguments: Mapping[str, Any], parsed: "Sequence[DataclassInstance]") -> dict[str, str]:
    """Return a hash of the images named in the rows of each dataset, only for rows in use."""
    result = {}
    # It decides which rows are readable, and nothing about learning from them.
    limit = next((group.max_row_bytes for group in parsed if hasattr(group, "max_row_bytes")), MAX_ROW_BYTES)
    for flag in DATASETS:
        if f"{PICTURES_OF.format(flag)}{CHANGED}" in arguments:
            most = arguments.get("max_samples") if flag == DATASETS[0] else None
            files = named_pictures(arguments[flag], arguments.get("column_mapping"), most, limit)
            result[flag] = contents_of(existing(files))
    return result


def data_files(name: str | None) -> list[tuple[str, Path]]:
    """Return the local files of a dataset with their names in it; none of one on the Hub or of the world."""
    if not name or name in (WORLD, PYDOC) or not Path(name).exists():
        return []
    try:
        files = source_files(name) or []
    except InputError:
        return []
    return [(str(file.relative_to(name)) if Path(name).is_dir() else "", file) for file in files]


def _without_folder(value: object, output_dir: str) -> object:
    """Return a flag's value with paths inside the output folder relative to it: the folder may be moved."""
    if isinstance(value, list):
        return [_without_folder(item, output_dir) for item in value]
    inside = isinstance(value, str) and value.startswith(f"{output_dir}/")
    return f"(output_dir)/{value[len(output_dir) + 1 :]}" if inside else value
