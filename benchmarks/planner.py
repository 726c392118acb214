"""The planner's peak memory against the measured memory of training, in separate processes.

    OMP_NUM_THREADS=1 python benchmarks/planner.py --output benchmarks/results/planner.md
    OMP_NUM_THREADS=1 python benchmarks/planner.py --sizes 5M --processes 2 --zero_stages 0 1 2 3
    python benchmarks/planner.py --published        # time and memory of 307 published runs, in a second

Each case is the stock `Trainer` with fp32 AdamW on a CPU, on one process or several (DDP, or DeepSpeed's ZeRO stages).
The measure is the growth of a process's resident memory from before its model is made to its peak in the steps
after the first, with libraries and kernels loaded by an earlier run of a small model. glibc must return freed blocks,
since fragments are not part of the plan.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# name: (hidden_size, layers, heads); parameters with a vocabulary of 8192 and separate head.
SIZES = {"5M": (192, 6, 6), "20M": (384, 8, 6), "60M": (640, 10, 10)}
VOCABULARY, ROWS, LENGTH, STEPS = 8192, 4, 256, 3
MIB = 2**20


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def make_config(size: str, chunk: int | None) -> Any:
    import hfllm

    hidden, layers, heads = SIZES[size]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return hfllm.HfllmConfig(vocab_size=VOCABULARY, **sizes, loss_chunk_size=chunk)


def train(model: Any, case: dict[str, Any], steps: int, folder: str) -> Any:
    """Train for `steps` steps; reset the peak of memory after the first. Return the arguments."""
    import torch
    from transformers import Trainer, TrainerCallback

    class FromTheSecondStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                Path("/proc/self/clear_refs").write_text("5")

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCABULARY, (64, LENGTH))]
    args = training_arguments(case, steps, folder)
    Trainer(model, args, train_dataset=rows, callbacks=[FromTheSecondStep()]).train()
    return args


def training_arguments(case: dict[str, Any], steps: int, folder: str) -> Any:
    from transformers import TrainingArguments

    zero_stage = case["zero_stage"]
    return TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        activation_checkpointing=case["checkpointing"],
        deepspeed=str(ROOT / "ds_configs" / f"zero{zero_stage}.json") if zero_stage else None,
    )


def measure(case: dict[str, Any]) -> None:
    """Train in this process and print the growth of its memory, the largest of all processes."""
    import torch

    import hfllm

    torch.manual_seed(0)
    small = hfllm.HfllmConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        if case["zero_stage"]:
            import deepspeed

            # Its kernels for shared memory take a minute to compile, and change nothing here.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        # DeepSpeed has one engine per process, so the small model trains without it.
        train(hfllm.HfllmForCausalLM(small), {**case, "zero_stage": 0}, 1, folder)
        gc.collect()
        before = resident("VmRSS")
        if case["zero_stage"]:
            training_arguments(case, STEPS, folder)  # the model has to be made under ZeRO-3 already
        args = train(hfllm.HfllmForCausalLM(make_config(case["size"], case["chunk"])), case, STEPS, folder)
        grown = torch.tensor(float(resident("VmHWM") - before))
    if args.world_size > 1:
        torch.distributed.all_reduce(grown, torch.distributed.ReduceOp.MAX)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print("GROWN", grown.item())


def run(case: dict[str, Any]) -> float:
    """Return the bytes of a case."""
    launcher = [sys.executable]
    if case["processes"] > 1 or case["zero_stage"]:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case['processes']}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [*launcher, __file__, "--case", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"{case}: {result.stderr[-3000:]}")
    return float(next(line for line in result.stdout.splitlines() if line.startswith("GROWN")).split()[1])


def planned(case: dict[str, Any]) -> Any:
    """Return the planner's answer for a case."""
    from hfllm.scaling.devices import find_device
    from hfllm.scaling.layouts import Layout
    from hfllm.scaling.memory import PRECISIONS, device_memory
    from hfllm.scaling.shapes import Shape

    recompute = "full" if case["checkpointing"] else "none"
    layout = Layout(case["processes"], zero_stage=case["zero_stage"], recompute=recompute, micro_batch=ROWS)
    hidden, layers, heads = SIZES[case["size"]]
    shape = Shape(hidden, layers, heads, VOCABULARY, loss_chunk_size=case["chunk"])
    return device_memory(shape, layout, PRECISIONS["fp32"], LENGTH, reserved=False, device=find_device("cpu"))


def published_lines() -> list[str]:
    """Return the tables of published runs."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from published_runs import report

    return report().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--zero_stages", nargs="+", type=int, default=[0], help="0 is DDP, or one process alone")
    parser.add_argument("--chunks", nargs="+", type=int, default=[0, 128], help="loss_chunk_size; 0 is all at once")
    parser.add_argument("--published", action="store_true", help="compare with published runs, and measure nothing")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        measure(args.case)
        return
    if args.published:
        lines = published_lines()
        print("\n".join(lines))
        if args.output:
            args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    lines = [
        "| model | processes | ZeRO | loss chunk | checkpointing | measured, MiB | planned, MiB | ratio |",
        "| - | - | - | - | - | - | - | - |",
    ]
    print("\n".join(lines), flush=True)
    for size in args.sizes:
        for zero_stage in args.zero_stages:
            for chunk in args.chunks:
                for checkpointing in (False, True):
                    case = {"size": size, "processes": args.processes, "zero_stage": zero_stage}
                    case |= {"chunk": chunk or None, "checkpointing": checkpointing}
                    taken, plan = run(case), planned(case).peak
                    cells = (size, args.processes, zero_stage, chunk or "-", "yes" if checkpointing else "no")
                    cells += (f"{taken / MIB:.0f}", f"{plan / MIB:.0f}", f"{plan / taken:.2f}")
                    lines.append(f"| {' | '.join(map(str, cells))} |")
                    print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
