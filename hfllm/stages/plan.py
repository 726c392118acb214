"""Planning: its flags, what they refuse, and the shape, device and request that they describe."""

import importlib.util
import json
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hfllm.errors import InputError, refuse, refuse_if
from hfllm.flags import NOT_NEGATIVE, Clashes, at_least, flag
from hfllm.scaling.devices import GIB, Device, find_device
from hfllm.scaling.planner import DEGREES, Request
from hfllm.scaling.shapes import LARGEST, NAMED_SHAPES, Shape

# Flags that are fields of a request, under the same names.
SAME = (
    *("num_devices", "global_batch_size", "tokens", "precision", "attention", "mfu", "efficiency"),
    *("overlap_experts", "torch_compile", "sequence_parallel", "fsdp", "fused_loss"),
)


@dataclass(frozen=True)
class PlanArguments:
    """The model, the devices, and the run."""

    preset: str | None = flag(None, "A published model; gpt3-1t unless --config_path is given.")
    config_path: str | None = flag(None, "A config.json, or the folder that holds one.")
    num_devices: int = flag(1024, "Accelerators, of all machines together.")
    device: str = flag(
        "h100",
        "h100, h100-500w (limited to 500 W), h200, gh200, b200, mi300x, h800, a100-80gb, a100-40gb, v100, "
        "rtx4090, or cpu: this machine.",
    )
    device_memory_gb: float | None = flag(None, "The device's memory, in GiB, if it differs.")
    device_peak_tflops: float | None = flag(
        None, "The device's peak in the precision, in TFLOP/s without sparsity, if it differs."
    )
    devices_per_node: int | None = flag(
        None, "Devices per machine, if not the default; for a CPU, processes that share it."
    )
    network_gbps: float | None = flag(
        None,
        "Gigabits per second of the network to other machines, in one direction and for each device, if "
        "it differs: a machine's link divided by the devices that share it.",
    )
    max_length: int | None = flag(
        None, "Tokens per row; by default 2048, or the model's positions if it has fewer.", takes=at_least(1)
    )
    images_per_row: int = flag(1, "Pictures per row, of a model with a vision tower.")
    global_batch_size: int = flag(3072, "Rows per step, over all devices.")
    tokens: float | None = flag(None, "Tokens to train on; by default 20 per parameter.")
    precision: str = flag("bf16", "bf16, fp16, fp8 (the layers' products; not in the recipes) or fp32.")
    attention: str = flag(
        "flash",
        "flash keeps no scores, like SDPA's kernels; flash1 is its slower first generation; eager keeps all of them.",
    )
    loss_chunk_size: int | None = flag(
        None,
        "Tokens per chunk of logits, 0 means a whole micro-batch; by default the 1024 of "
        "hfllm pretrain. DeepSpeed's ZeRO-3 and Megatron-LM do not use chunks.",
        takes=NOT_NEGATIVE,
    )
    mfu: float | None = flag(None, "Measured share of the peak; by default each layout's estimate.")
    efficiency: float | None = flag(
        None, "Share of the peak that matrix products reach, for the estimate; by default the device's."
    )
    usable_memory: float | None = flag(None, "Share of the memory to use; by default 0.97 of a GPU's, 0.9 of a CPU's.")
    tensor_parallel: int | None = flag(None, "Fix this degree instead of searching it.")
    pipeline_parallel: int | None = flag(None, "Likewise: stages.")
    expert_parallel: int | None = flag(None, "Likewise: devices that share the experts.")
    zero_stage: int | None = flag(None, "Likewise: 0, 1, 2 or 3.")
    recompute: str | None = flag(None, "Likewise: none, selective or full.")
    micro_batch_size: int | None = flag(None, "Likewise: rows a device takes at once.")
    interleave: int | None = flag(None, "Likewise: chunks of layers on each stage.")
    context_parallel: int | None = flag(None, "Likewise: devices that share each row; searched from 32,768 tokens on.")
    overlap_experts: bool = flag(False, "The exchange with experts hides behind work, as in DualPipe.")
    torch_compile: bool = flag(
        False, "The layers are compiled, which makes them faster; what they then keep is not planned."
    )
    sequence_parallel: bool = flag(True, "Megatron-LM's tensor parallelism also splits what lies between matrices.")
    fsdp: bool = flag(False, "torch's FSDP2 shards by ZeRO-3, in place of DeepSpeed; in the recipes not by default.")
    fused_loss: bool = flag(
        False,
        "One kernel computes the loss and the gradient of the logits in 16 bits (Liger, FlashAttention, "
        "Transformer Engine); not in the recipes.",
    )
    target_days: float = flag(90.0, "If the plan takes longer, say how many devices would take so long.")
    top: int = flag(10, "Layouts to list.")
    plot: bool = flag(False, "Draw the chosen layout's memory; takes a second.")
    output_dir: str = flag("outputs/plan", "Where the report and the launch files go.")

    clashes: ClassVar[Clashes] = {
        "--target_days {target_days} must be above 0": lambda flags: not flags.target_days > 0,
        "--top {top} must be at least 1": lambda flags: flags.top < 1,
        "--output_dir {output_dir}: a file is there; expected a folder or a new name": lambda flags: (
            Path(flags.output_dir).exists() and not Path(flags.output_dir).is_dir()
        ),
        "--preset {preset} and --config_path {config_path}: give one of them": lambda flags: (
            flags.config_path is not None and flags.preset is not None
        ),
    }

    def request(self, shape: Shape) -> Request:
        """Return the request to plan for a model."""
        options = {name: getattr(self, name) for name in (*DEGREES, *SAME)}
        length = min(2048, shape.max_position_embeddings) if self.max_length is None else self.max_length
        return Request(shape, self._device(), usable=self.usable_memory, max_length=length, **options)

    def _device(self) -> Device:
        """Return the named device, with the given numbers in place of its own.

        Raises:
            InputError: for an unknown name, or a number not positive and finite.
        """
        overrides = {
            "memory": ("device_memory_gb", GIB),
            "peak_16bit": ("device_peak_tflops", 1e12),
            "peak_fp32": ("device_peak_tflops", 1e12),
            "peak_8bit": ("device_peak_tflops", 1e12),
            "per_node": ("devices_per_node", 1),
            "far": ("network_gbps", 1e9 / 8),
        }
        changes = {}
        for name, (each, unit) in overrides.items():
            value = getattr(self, each)
            if value is not None and not 0 < value <= LARGEST:
                raise InputError(f"--{each} {value} must be above 0, and at most {LARGEST:,}")
            if value is not None:
                changes[name] = value * unit
        # Each process has its own device, but the processes of a CPU share the machine.
        processes = max(1, min(self.devices_per_node or 1, self.num_devices))
        return replace(find_device(self.device, processes), **changes)


def model_shape(
    preset: str | None, config_path: str | None, images_per_row: int, loss_chunk_size: int | None
) -> tuple[str, Shape, Mapping[str, Any]]:
    """Return the name, shape and fields of a config.json of a model: a file's, or else a preset's.

    Args:
        preset: a published model; gpt3-1t by default.
        config_path: a config.json, or the folder that holds one.
        images_per_row: pictures per row, of a model with a vision tower.
        loss_chunk_size: tokens per chunk of logits; by default the shape's.

    Raises:
        InputError: when one cannot be read.
    """
    if config_path is None:
        name = preset or "gpt3-1t"
        fields = NAMED_SHAPES[name] if name in NAMED_SHAPES else preset_fields(name)
        source = f"--preset {name}"
    else:
        file = Path(config_path) / "config.json" if Path(config_path).is_dir() else Path(config_path)
        name, source, fields = str(config_path), f"--config_path {file}", read_json(file)
    shape = Shape.from_config(fields, source)
    refuse(images_per_row != 1 and shape.tower is None, "--images_per_row", "the model has no vision tower")
    refuse_if(images_per_row < 0, f"--images_per_row {images_per_row} must be at least 0")
    shape = replace(shape, images_per_row=images_per_row)
    return name, shape if loss_chunk_size is None else replace(shape, loss_chunk_size=loss_chunk_size), fields


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
    refuse_if(not isinstance(values, dict), f"--config_path {file}: expected an object, got {type(values).__name__}")
    return values


def preset_fields(name: str) -> Mapping[str, Any]:
    """Return the fields of a preset of the family.

    Raises:
        InputError: for an unknown name, with the nearest known ones.
    """
    # Run as a separate file: importing it from hfllm.models would import transformers.
    folder = importlib.util.find_spec("hfllm.models").submodule_search_locations[0]
    presets = runpy.run_path(f"{folder}/family/presets.py")
    try:
        return presets["preset"](name)
    except ValueError as error:
        raise InputError(f"--preset: {error}; beside these there are {', '.join(NAMED_SHAPES)}") from None
