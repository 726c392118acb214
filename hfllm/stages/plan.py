"""Planning: its flags, what they refuse, the shape, device and request that they describe, and the report."""

import importlib.util
import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path, PurePath
from typing import Any, ClassVar

from hfllm.errors import InputError, refuse, refuse_if
from hfllm.flags import NOT_NEGATIVE, Clashes, at_least, flag
from hfllm.outputs.report import Bars, write_atomically
from hfllm.scaling.devices import GIB, Device, find_device
from hfllm.scaling.layouts import DDP, DEEPSPEED, FSDP2, MEGATRON, RECIPES, SINGLE, TENSOR, Layout, stage_layers
from hfllm.scaling.planner import DEGREES, Plan, Request, sentences, whole_run_factor
from hfllm.scaling.shapes import LARGEST, LATENT, MIXTURE, NAMED_SHAPES, Shape
from hfllm.scaling.speed import flops_per_token

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


# ---- the report ----


ENGINES = {
    "single": "accelerate",
    "ddp": "accelerate (DDP)",
    "deepspeed": "accelerate (DeepSpeed)",
    "fsdp2": "accelerate (FSDP2), own script",
    "tensor": "transformers (TP), own script",
    "megatron": "Megatron-LM",
}
OWN = ", own script"


def parameter_rows(shape: Shape) -> list[dict[str, str]]:
    """Return the parameters of the model by part, and their shares."""
    return [
        {"part": part, "parameters": f"{count:,}", "share": f"{count / shape.num_parameters():.1%}"}
        for part, count in shape.parameters().items()
        if count
    ]


def listed(plans: Sequence[Plan], chosen: Plan, top: int) -> list[Plan]:
    """Return the chosen plan, and up to `top` plans with it, fastest first."""
    return [chosen, *(one for one in plans if one is not chosen)][:top]


def layout_row(one: Plan, is_chosen: bool) -> dict[str, object]:
    """Return the row of a layout in the table of layouts."""
    layout = one.layout
    return {
        "": "*" if is_chosen else "",
        "layout": str(layout),
        "interleave": layout.interleave,
        "recompute": layout.recompute,
        "micro-batch": f"{layout.micro_batch} x {one.micro_batches}",
        "GiB": f"{one.memory.peak / GIB:.1f}",
        "bubble": f"{one.bubble:.1%}",
        "waiting": f"{one.speed.communication / one.speed.seconds:.1%}",
        "MFU": f"{one.mfu:.1%}",
        "HFU": f"{one.mfu * one.speed.hfu / one.speed.mfu:.1%}",
        "days": f"{one.days:,.1f}",
        "runs on": ENGINES[layout.engine] + ("" if one.runs_in_recipes or layout.engine not in RECIPES else OWN),
    }


def memory_row(one: Plan) -> dict[str, str]:
    """Return the row of a layout in the table of memory, in GiB."""
    parts = {name: f"{size / GIB:.2f}" for name, size in vars(one.memory).items()}
    return {"layout": str(one.layout), "recompute": one.layout.recompute, **parts}


def memory_bars(chosen: Plan) -> Bars:
    """Return the chosen layout's memory by part."""
    sizes = {name: size / GIB for name, size in vars(chosen.memory).items()}
    notes = {name: f"{size:.3g}" for name, size in sizes.items()}
    return Bars(f"plan: {chosen.layout}", "GiB on each device", sizes, notes)


def metrics(request: Request, plans: Sequence[Plan], chosen: Plan) -> dict[str, float]:
    """Return the metrics, named as in docs/guides/planner.md."""
    shape, flops = request.shape, flops_per_token(request.shape, request.max_length)
    per_token, cache = sum(flops.values()), shape.kv_bytes_per_token()
    return {
        "parameters": shape.num_parameters(),
        "active_parameters": shape.num_parameters(active_only=True),
        **({} if shape.tower is None else {"image_tokens": shape.tower.tokens}),
        "flops_per_token": per_token,
        "training_tokens": request.tokens,
        "training_flops": per_token * request.tokens,
        "kv_bytes_per_token": cache,
        "kv_gib_per_sequence": shape.cache_bytes(request.max_length) / GIB,
        "layouts_that_fit": len(plans),
        "fastest_days": plans[0].days,
        "memory_gib": chosen.memory.peak / GIB,
        "usable_gib": request.usable_bytes / GIB,
        "bubble": chosen.bubble,
        "mfu": chosen.mfu,
        "tokens_per_second": request.tokens / (chosen.days * 86400),
        "days": chosen.days,
        "whole_run_days": chosen.days * whole_run_factor(request),
    }


def next_steps(chosen: Plan, plans: Sequence[Plan], request: Request, folder: str, target_days: float) -> list[str]:
    """Return the notes on the chosen layout, as comments, and the command to launch it from `folder`."""
    comments = [f"# {line}" for line in sentences(chosen, plans, request, target_days)]
    machines = -(-request.num_devices // request.device.per_node)
    among = " --machine_rank N --main_process_ip FIRST_MACHINE --main_process_port 29500" if machines > 1 else ""
    launch = f"--config_file {Path(folder) / ACCELERATE_FILE}{among}"
    if not chosen.runs_in_recipes:
        engine = ENGINES[chosen.layout.engine]
        return [*comments, f"accelerate launch {launch} YOUR_SCRIPT  # {engine}: the recipes do not run this layout"]
    return [*comments, f"hfllm pretrain {launch} --config {Path(folder) / FLAGS_FILE}"]


def write_files(folder: str, files: Mapping[str, str]) -> None:
    """Write files by name into `folder`, each file atomically.

    Raises:
        InputError: when the folder cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be made: {error.strerror}") from None
    for name, text in files.items():
        write_atomically(Path(folder) / name, text)


# ---- configs ----
# Files for launching a layout: accelerate's and DeepSpeed's configurations, and the flags for a recipe.
#
#     for name, text in launch_files(plan, request, folder).items(): ...
#
# The files in accelerate_configs/ and ds_configs/ are of the same kinds, for any model.


ACCELERATE_FILE = "accelerate.yaml"
DEEPSPEED_FILE = "ds_config.json"
FLAGS_FILE = "flags.yaml"
MODEL_FILE = "architecture.json"
_TYPES = {SINGLE: "NO", DDP: "MULTI_GPU", TENSOR: "MULTI_GPU", DEEPSPEED: "DEEPSPEED", FSDP2: "FSDP"}


def deepspeed_config(
    zero_stage: int, offload: str | None = None, nvme_path: str = "/local_nvme", overlap: bool = False
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a ZeRO stage; `auto` is filled in from the recipe's flags.

    Args:
        offload: where weights and optimizer states go, `"cpu"` or `"nvme"` (ZeRO-Infinity, arXiv:2104.07857).
        nvme_path: a folder on a local drive of every node.
        overlap: communicate during the backward pass, for the memory of a second bucket; no gain on a CPU.
    """
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": overlap}
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
    if zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload is not None:
        index = {"device": offload} | ({"nvme_path": nvme_path} if offload == "nvme" else {})
        zero |= {"offload_optimizer": dict(index), "offload_param": dict(index)}
    if offload == "nvme":
        zero["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True}
        config["aio"] = {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}
    return config


def accelerate_config(layout: Layout, request: Request, folder: str = "") -> dict[str, Any]:
    """Return accelerate's configuration of a layout; `folder` holds DeepSpeed's."""
    machines = -(-request.num_devices // request.device.per_node)
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _TYPES.get(layout.engine, "MEGATRON_LM"),
        "machine_rank": 0,
        "num_machines": machines,
        "num_processes": request.num_devices,
        # Several processes on a CPU are launched as if on GPUs; the flag --use_cpu keeps them there.
        "use_cpu": request.device.name == "cpu" and layout.engine == SINGLE,
    }
    if layout.engine == DEEPSPEED:
        # accelerate takes the precision, like everything else, from DeepSpeed's file.
        file = str(PurePath(folder) / DEEPSPEED_FILE)
        config["deepspeed_config"] = {"deepspeed_config_file": file, "zero3_init_flag": layout.zero_stage == 3}
        if machines > 1:
            config["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
        return config
    config["mixed_precision"] = "no" if request.precision == "fp32" else request.precision
    if layout.engine == FSDP2:
        config["fsdp_config"] = fsdp2_config(layout.recompute == "full")
        sizes = {"dp_replicate_size": 1, "dp_shard_size": layout.data, "tp_size": layout.tensor, "cp_size": 1}
        config["parallelism_config"] = {f"parallelism_config_{name}": size for name, size in sizes.items()}
    if layout.engine == MEGATRON:
        config["megatron_lm_config"] = _megatron_config(layout, request)
    return config


def fsdp2_config(activation_checkpointing: bool = False) -> dict[str, Any]:
    """Return FSDP2's configuration for a transformer, whose weights are gathered layer by layer."""
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": activation_checkpointing,
    }


def _megatron_config(layout: Layout, request: Request) -> dict[str, Any]:
    config = {
        "megatron_lm_tp_degree": layout.tensor,
        "megatron_lm_pp_degree": layout.pipeline,
        "megatron_lm_num_micro_batches": layout.micro_batches(request.global_batch_size),
        "megatron_lm_sequence_parallelism": layout.sequence_parallel,
        "megatron_lm_use_distributed_optimizer": layout.zero_stage == 1,
        "megatron_lm_expert_model_parallel_size": layout.expert,
        "megatron_lm_context_parallel_size": layout.context,
        "megatron_lm_gradient_clipping": 1.0,
    }
    if layout.recompute != "none":
        config["megatron_lm_recompute_granularity"] = layout.recompute
    if layout.recompute == "full":
        config |= {"megatron_lm_recompute_method": "uniform", "megatron_lm_recompute_num_layers": 1}
    return config


def recipe_flags(plan: Plan, request: Request, folder: str = "") -> dict[str, Any]:
    """Return the flags of `hfllm pretrain` for a plan; `folder` holds the architecture."""
    layout = plan.layout
    flags = {
        "config_name_or_path": str(PurePath(folder) / MODEL_FILE),
        "packing": True,
        "max_length": request.max_length,
        "total_tokens": str(int(request.tokens)),
        "per_device_train_batch_size": layout.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
        # FSDP2 does it itself.
        "activation_checkpointing": layout.recompute == "full" and layout.engine != FSDP2,
        "attn_implementation": "eager" if request.attention == "eager" else "sdpa",
        "loss_chunk_size": request.loss_chunk_size(layout),
        "bf16": request.precision == "bf16",
        "fp16": request.precision == "fp16",
    }
    flags |= {"torch_compile": True} if request.torch_compile else {}
    return flags | ({"use_cpu": True} if request.device.name == "cpu" else {})


def architecture(request: Request, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a config.json of the planned model: the fields of `model`, by default the equivalent shape's."""
    fields = {"model_type": "hfllm", **(_family_fields(request.shape) if model is None else model)}
    # A flag of the run, not to be kept in a saved model.
    fields.pop("loss_chunk_size", None)
    return fields


def _family_fields(shape: Shape) -> dict[str, Any]:
    """Return the fields of a shape, without unused fields of other families."""
    unused = {item.name for item in dataclass_fields(Shape) if getattr(shape, item.name) == item.default}
    left_out = ((LATENT | MIXTURE) & unused) | {"tower", "images_per_row"}
    fields = {name: value for name, value in asdict(shape).items() if name not in left_out}
    # The router with groups, in the one type with groups, DeepSeek-V3.
    router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"} if shape.n_group > 1 else {}
    return fields | router


def launch_files(
    plan: Plan, request: Request, folder: str = "", model: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return the files, by name, for launching a plan from `folder`.

    Args:
        model: fields of a config.json with more detail than the model's shape.
    """
    text = _yaml(accelerate_config(plan.layout, request, folder))
    text = "".join(f"# {line}\n" for line in _pipeline_notes(plan.layout, request)) + text
    files = {ACCELERATE_FILE: text}
    if plan.layout.engine == DEEPSPEED:
        config = deepspeed_config(plan.layout.zero_stage, overlap=request.device.name != "cpu")
        if request.precision == "fp16":
            config["fp16"] = {"enabled": "auto"}
        files[DEEPSPEED_FILE] = json.dumps(config, indent=2) + "\n"
    if plan.runs_in_recipes:
        note = "# For hfllm pretrain --config. Data, learning rate and schedule are yours to add.\n"
    else:
        note = f"# hfllm pretrain does not run this layout ({plan.layout.engine}); what a script would set:\n"
    flags = note + _yaml(recipe_flags(plan, request, folder))
    return files | {FLAGS_FILE: flags, MODEL_FILE: json.dumps(architecture(request, model), indent=2) + "\n"}


def _pipeline_notes(layout: Layout, request: Request) -> list[str]:
    """Return Megatron-LM's additional settings for its pipeline, besides accelerate's keys."""
    layers, notes = request.shape.num_hidden_layers, []
    if layout.interleave > 1:
        chunk = -(-layers // (layout.pipeline * layout.interleave))
        notes.append(f"accelerate has no key for MegatronLMPlugin(num_layers_per_virtual_pipeline_stage={chunk})")
    layer_counts = stage_layers(layers, layout.pipeline, layout.interleave)
    if len(set(layer_counts)) > 1:
        notes.append(
            f"accelerate has no key for stages with different numbers of layers: {', '.join(map(str, layer_counts))}"
        )
    return notes


def _yaml(values: Mapping[str, Any], indent: str = "") -> str:
    """Return YAML of nested mappings of plain values, each written as JSON, which is valid YAML."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}\n")
    return "".join(lines)
