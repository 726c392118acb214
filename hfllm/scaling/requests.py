"""The flags of `hfllm plan`, and the shape, the device and the request that they describe."""

import importlib.util
import json
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfllm.errors import InputError, refuse
from hfllm.scaling.devices import GIB, Device, find_device
from hfllm.scaling.planner import Request
from hfllm.scaling.shapes import LARGEST, NAMED_SHAPES, Shape


@dataclass(frozen=True)
class PlanArguments:
    """The model, the devices, and the run."""

    preset: str | None = field(
        default=None, metadata={"help": "A published model; gpt3-1t unless --config_path is given."}
    )
    config_path: str | None = field(default=None, metadata={"help": "A config.json, or the folder that holds one."})
    num_devices: int = field(default=1024, metadata={"help": "Accelerators, of all machines together."})
    device: str = field(
        default="h100",
        metadata={
            "help": "h100, h100-500w (limited to 500 W), h200, gh200, b200, mi300x, h800, a100-80gb, a100-40gb, v100, "
            "rtx4090, or cpu: this machine."
        },
    )
    device_memory_gb: float | None = field(
        default=None, metadata={"help": "The device's memory, in GiB, if it differs."}
    )
    device_peak_tflops: float | None = field(
        default=None,
        metadata={"help": "The device's peak in the precision, in TFLOP/s without sparsity, if it differs."},
    )
    devices_per_node: int | None = field(
        default=None, metadata={"help": "Devices per machine, if not the default; for a CPU, processes that share it."}
    )
    network_gbps: float | None = field(
        default=None,
        metadata={
            "help": "Gigabits per second of the network to other machines, in one direction and for each device, if "
            "it differs: a machine's link divided by the devices that share it."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per row; by default 2048, or the model's positions if it has fewer."}
    )
    images_per_row: int = field(default=1, metadata={"help": "Pictures per row, of a model with a vision tower."})
    global_batch_size: int = field(default=3072, metadata={"help": "Rows per step, over all devices."})
    tokens: float | None = field(default=None, metadata={"help": "Tokens to train on; by default 20 per parameter."})
    precision: str = field(
        default="bf16", metadata={"help": "bf16, fp16, fp8 (the layers' products; not in the recipes) or fp32."}
    )
    attention: str = field(
        default="flash",
        metadata={
            "help": "flash keeps no scores, like SDPA's kernels; flash1 is its slower first generation; eager keeps "
            "all of them."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per chunk of logits, 0 means a whole micro-batch; by default the 1024 of "
            "hfllm pretrain. DeepSpeed's ZeRO-3 and Megatron-LM do not use chunks."
        },
    )
    mfu: float | None = field(
        default=None, metadata={"help": "Measured share of the peak; by default each layout's estimate."}
    )
    efficiency: float | None = field(
        default=None,
        metadata={"help": "Share of the peak that matrix products reach, for the estimate; by default the device's."},
    )
    usable_memory: float | None = field(
        default=None, metadata={"help": "Share of the memory to use; by default 0.97 of a GPU's, 0.9 of a CPU's."}
    )
    tensor_parallel: int | None = field(default=None, metadata={"help": "Fix this degree instead of searching it."})
    pipeline_parallel: int | None = field(default=None, metadata={"help": "Likewise: stages."})
    expert_parallel: int | None = field(default=None, metadata={"help": "Likewise: devices that share the experts."})
    zero_stage: int | None = field(default=None, metadata={"help": "Likewise: 0, 1, 2 or 3."})
    recompute: str | None = field(default=None, metadata={"help": "Likewise: none, selective or full."})
    micro_batch_size: int | None = field(default=None, metadata={"help": "Likewise: rows a device takes at once."})
    interleave: int | None = field(default=None, metadata={"help": "Likewise: chunks of layers on each stage."})
    context_parallel: int | None = field(
        default=None, metadata={"help": "Likewise: devices that share each row; searched from 32,768 tokens on."}
    )
    overlap_experts: bool = field(
        default=False, metadata={"help": "The exchange with experts hides behind work, as in DualPipe."}
    )
    torch_compile: bool = field(
        default=False,
        metadata={"help": "The layers are compiled, which makes them faster; what they then keep is not planned."},
    )
    sequence_parallel: bool = field(
        default=True,
        metadata={"help": "Megatron-LM's tensor parallelism also splits what lies between matrices."},
    )
    fsdp: bool = field(
        default=False,
        metadata={"help": "torch's FSDP2 shards by ZeRO-3, in place of DeepSpeed; in the recipes not by default."},
    )
    fused_loss: bool = field(
        default=False,
        metadata={
            "help": "One kernel computes the loss and the gradient of the logits in 16 bits (Liger, FlashAttention, "
            "Transformer Engine); not in the recipes."
        },
    )
    target_days: float = field(
        default=90.0, metadata={"help": "If the plan takes longer, say how many devices would take so long."}
    )
    top: int = field(default=10, metadata={"help": "Layouts to list."})
    plot: bool = field(default=False, metadata={"help": "Draw the chosen layout's memory; takes a second."})
    output_dir: str = field(default="outputs/plan", metadata={"help": "Where the report and the launch files go."})


def check(script_args: PlanArguments) -> None:
    """Refuse an empty list, and an output folder that is a file.

    Raises:
        InputError: naming the flag.
    """
    folder = Path(script_args.output_dir)
    if not script_args.target_days > 0:
        raise InputError(f"--target_days {script_args.target_days} must be above 0")
    if script_args.top < 1:
        raise InputError(f"--top {script_args.top} must be at least 1")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: a file is there; expected a folder or a new name")


def model_shape(script_args: PlanArguments) -> tuple[str, Shape, Mapping[str, Any]]:
    """Return the model's name, shape and fields of a config.json, from `--config_path` or `--preset`.

    Raises:
        InputError: when both are given, or one cannot be read.
    """
    path, name = script_args.config_path, script_args.preset
    if path is not None and name is not None:
        raise InputError(f"--preset {name} and --config_path {path}: give one of them")
    if path is None:
        name = name or "gpt3-1t"
        fields = NAMED_SHAPES[name] if name in NAMED_SHAPES else preset_fields(name)
        source = f"--preset {name}"
    else:
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        name, source, fields = str(path), f"--config_path {file}", read_json(file)
    shape, chunk = Shape.from_config(fields, source), script_args.loss_chunk_size
    if chunk is not None and chunk < 0:
        raise InputError(f"--loss_chunk_size {chunk} must be at least 0, which means all at once")
    count = script_args.images_per_row
    refuse(count != 1 and shape.tower is None, "--images_per_row", "the model has no vision tower")
    if count < 0:
        raise InputError(f"--images_per_row {count} must be at least 0")
    shape = replace(shape, images_per_row=count)
    return name, shape if chunk is None else replace(shape, loss_chunk_size=chunk), fields


def read_json(file: Path) -> dict[str, Any]:
    """Return a config.json's mapping.

    Raises:
        InputError: when the file is missing or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"--config_path {file}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config_path {file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config_path {file}: expected an object, got {type(values).__name__}")
    return values


def preset_fields(name: str) -> Mapping[str, Any]:
    """Return the fields of a preset of the family.

    Raises:
        InputError: for an unknown name, with the nearest known ones.
    """
    # Run as a separate file: importing it from hfllm.models would import transformers.
    folder = importlib.util.find_spec("hfllm.models").submodule_search_locations[0]
    presets = runpy.run_path(f"{folder}/presets.py")
    try:
        return presets["preset"](name)
    except ValueError as error:
        raise InputError(f"--preset: {error}; beside these there are {', '.join(NAMED_SHAPES)}") from None


def make_request(script_args: PlanArguments, shape: Shape) -> Request:
    """Return what to plan.

    Raises:
        InputError: naming the error.
    """
    held = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "context_parallel", "zero_stage", "recompute")
    held += ("micro_batch_size", "interleave")
    same = ("num_devices", "global_batch_size", "tokens", "precision", "attention", "mfu", "efficiency")
    same += ("overlap_experts", "torch_compile", "sequence_parallel", "fsdp", "fused_loss")
    options = {flag: getattr(script_args, flag) for flag in (*held, *same)}
    length = script_args.max_length
    options["max_length"] = min(2048, shape.max_position_embeddings) if length is None else length
    return Request(shape, make_device(script_args), usable=script_args.usable_memory, **options)


def make_device(script_args: PlanArguments) -> Device:
    """Return the named device, with the given numbers in place of its own.

    Raises:
        InputError: for an unknown name, or a number that is not positive and finite.
    """
    given = {
        "memory": ("device_memory_gb", GIB),
        "peak_16bit": ("device_peak_tflops", 1e12),
        "peak_fp32": ("device_peak_tflops", 1e12),
        "peak_8bit": ("device_peak_tflops", 1e12),
        "per_node": ("devices_per_node", 1),
        "far": ("network_gbps", 1e9 / 8),
    }
    changes = {}
    for name, (flag, unit) in given.items():
        value = getattr(script_args, flag)
        if value is not None and not 0 < value <= LARGEST:
            raise InputError(f"--{flag} {value} must be above 0, and at most {LARGEST:,}")
        if value is not None:
            changes[name] = value * unit
    # Each process has its own device, but the processes of a CPU share the machine.
    processes = max(1, min(script_args.devices_per_node or 1, script_args.num_devices))
    return replace(find_device(script_args.device, processes), **changes)
