"""The report of `hfllm plan`: tables of layouts and memory, metrics, and how to launch the chosen layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hfllm.errors import InputError
from hfllm.outputs.report import Bars, write_atomically
from hfllm.scaling.advice import sentences, whole_run_factor
from hfllm.scaling.configs import ACCELERATE_FILE, FLAGS_FILE
from hfllm.scaling.devices import GIB
from hfllm.scaling.layouts import RECIPES
from hfllm.scaling.planner import Plan, Request
from hfllm.scaling.shapes import Shape
from hfllm.scaling.speed import flops_per_token

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
    """Return the parameters of each part of the model, and their share."""
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
    """Return the metrics, named as in docs/planner.md."""
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
    """Return what to know of the chosen layout, as comments, and the command that launches it from `folder`."""
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
