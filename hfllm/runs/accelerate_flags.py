"""The flags of `accelerate launch` that the command `hfllm` hands to it, told from a recipe's without torch."""

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hfllm.errors import InputError
from hfllm.runs.parser import read_yaml
from hfllm.runs.recipes import installed

# Flags that take a value, and flags that stand alone. A test compares both with accelerate's own parser.
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
# Not handed over: what the recipes have flags of their own for, and what does not run our scripts as they are.
NOT_HANDED_OVER = frozenset(
    (
        *("help", "debug", "gradient_accumulation_steps", "gradient_clipping"),
        *("module", "no_python", "vm", "env", "main_training_function", "downcast_bf16"),
        *("use_megatron_lm", "aws_access_key_id", "aws_secret_access_key"),
    )
)


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for `accelerate launch` and those for the recipe, each in their order.

    Raises:
        InputError: for a flag of accelerate's without the value that it takes.
    """
    for_accelerate, for_recipe, following = [], [], iter(words)
    for word in following:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in ALONE and not equals:
            for_accelerate.append(f"--{name}")
        elif name in WITH_VALUE:
            value = value if equals else next(following, None)
            if value is None or value.startswith("--"):
                raise InputError(f"{flag} needs a value")
            for_accelerate += [f"--{name}", value]
        else:
            for_recipe.append(word)
    return for_accelerate, for_recipe


def value_of(name: str, words: Sequence[str]) -> str | None:
    """Return the last value that `words` of accelerate give for the flag `name`, or `None`."""
    values = [value for flag, value in pairwise(words) if flag == f"--{name}"]
    return values[-1] if values else None


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Return accelerate's words with the paths of the configs that came with hfllm, from whatever folder it is run.

    `--config_file zero2` may name one, and the DeepSpeed config that a `--config_file` names may be one.

    Raises:
        InputError: when there is no such config, or when it is one for DeepSpeed and that is not installed.
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
    """The file itself, else the one of that name that came with hfllm in `folder`, else `None`."""
    if path.is_file():
        return path
    shipped = installed(folder) / (path.name if path.suffix == suffix else f"{path.name}{suffix}")
    return shipped if path.parent in (Path(), Path(folder)) and shipped.is_file() else None
