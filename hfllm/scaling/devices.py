"""Accelerators: their memory, their peak, and the bandwidth between them. Numbers are the vendors'.

Only the efficiencies are fitted, to published runs (benchmarks/published_runs.csv; docs/guides/planner.md shows the
errors). GH200, B200 and MI300X have no runs there, and the efficiencies of others, as noted next to them.
"""

import os
from dataclasses import dataclass

from hfllm.errors import InputError, refuse_if

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Args:
        memory: bytes.
        peak_16bit, peak_fp32: FLOP/s of dense matrix products, without sparsity.
        bandwidth: bytes per second of its memory.
        near: bytes per second to another device of the same node, in one direction.
        far: bytes per second to a device of another node, in one direction; each device has its own link.
        per_node: devices per node.
        has_bf16: whether it computes in bf16.
        peak_8bit: FLOP/s of dense matrix products in fp8, `None` where there is no fp8.
        efficiency: share of its peak reached in large matrix products.
        attention_efficiency: the same for attention, counted as if every token attended to all others, although its
            kernels skip masked positions.
        flash1_efficiency: the same for the first FlashAttention and its Triton version, without use of Hopper's new
            features.
        runtime: bytes of a process in addition to its tensors: on a GPU its context and kernels (1,573 MiB on an
            A100, as BigScience measured); on a CPU Python's objects, threads and the allocator's rounding.
        group_buffer: bytes per group of communicating devices: NCCL's 688 MiB on A100 with NVLink
            (github.com/NVIDIA/nccl/issues/964).
        fragments: unusable share of the memory reserved by torch's allocator. Fitted: the smallest whole
            percentage with which no published run needs more than planned. GMLake (arXiv:2401.08156) removes as
            much on average, and 33% at most.
        least_fragments: the same where memory is short, since the allocator then gives free blocks back. Fitted: the
            largest whole percentage with which every published run of the largest micro-batch that fits is planned
            to fit.
        usable: share of the memory available to a plan: the driver of an A100 of 80 GiB leaves 79.3, and a CPU's
            memory is shared with other programs.
    """

    name: str
    memory: float
    peak_16bit: float
    peak_fp32: float
    bandwidth: float
    near: float
    far: float
    per_node: int = 8
    has_bf16: bool = True
    peak_8bit: float | None = None
    efficiency: float = 0.72
    attention_efficiency: float = 0.75
    flash1_efficiency: float = 0.55
    runtime: float = 1573 * MIB
    group_buffer: float = 688 * MIB
    fragments: float = 0.15
    least_fragments: float = 0.04
    usable: float = 0.97

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision of `hfllm.scaling.memory.PRECISIONS`.

        Raises:
            InputError: when the device cannot compute in it.
        """
        if precision.startswith("bf16") and not self.has_bf16:
            raise InputError(f"--precision {precision}: {self.name} has no bf16, use fp16 or fp32")
        if precision.startswith("fp8"):
            if self.peak_8bit is None:
                raise InputError(f"--precision fp8: {self.name} has no fp8, use {'bf16' if self.has_bf16 else 'fp16'}")
            return self.peak_8bit
        return self.peak_fp32 if precision.startswith("fp32") else self.peak_16bit


def _cpu(processes: int) -> Device:
    """Return this machine, or a process's share: 32 fp32 FLOPs per cycle and core (two AVX2 units), at 2.5 GHz."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    peak = (os.cpu_count() or 1) * 32 * 2.5e9 / processes
    links = {"bandwidth": 20e9 / processes, "near": 10e9, "far": 1e9, "per_node": processes}
    # Its allocator returns freed memory, and Gloo's buffers are small.
    own = {"runtime": 16 * MIB, "group_buffer": 0.0, "fragments": 0.0, "least_fragments": 0.0}
    own["usable"] = 0.9
    return Device("cpu", memory, peak, peak, **links, **own)


_HOPPER = {"peak_8bit": 1979e12, "efficiency": 0.6, "attention_efficiency": 0.9, "flash1_efficiency": 0.32}
_LIMITED = {"peak_8bit": 1979e12, "efficiency": 0.44, "attention_efficiency": 0.35, "flash1_efficiency": 0.23}
# SemiAnalysis (December 2024) measured bf16 products at 620 TFLOP/s of an MI300X's 1,307 and at 720 of an H100's 989:
# the shares of Hopper, times 0.65.
_CDNA3 = {"peak_8bit": 2615e12, "efficiency": 0.39, "attention_efficiency": 0.58, "flash1_efficiency": 0.21}
DEVICES = {
    device.name: device
    for device in (
        # NVLink 4, and 400 Gb/s InfiniBand for each GPU, as in a DGX.
        Device("h100", 80 * GIB, 989e12, 67e12, 3.35e12, near=450e9, far=50e9, **_HOPPER),
        # Meta's H100 of 96 GB with slower memory, limited to 500 of 700 W. Its peak is an H100's: the vendor gives no
        # other, and its efficiencies are shares of it.
        Device("h100-500w", 96 * GIB, 989e12, 67e12, 2.4e12, near=450e9, far=50e9, **_LIMITED),
        Device("h200", 141e9, 989e12, 67e12, 4.8e12, near=450e9, far=50e9, **_HOPPER),
        # The H100 of 96 GB with a Grace CPU (datasheet: 4 TB/s), four to a node over NVLink 4, and 200 Gb/s for
        # each, as in Alps of CSCS.
        Device("gh200", 96 * GIB, 989e12, 67e12, 4e12, near=450e9, far=25e9, per_node=4, **_HOPPER),
        # A share of the datasheet's HGX B200: 1.44 TB, 64 TB/s, in bf16 36 PFLOP/s with sparsity, 72 in fp8, 0.6 in
        # fp32; NVLink 5, and 400 Gb/s for each GPU, as in a DGX.
        Device("b200", 180e9, 2250e12, 75e12, 8e12, near=900e9, far=50e9, **_HOPPER | {"peak_8bit": 4500e12}),
        # Datasheet: 192 GB, 5.3 TB/s, 1,307 TFLOP/s in bf16, 163 in fp32; seven links of 64 GB/s each way, and
        # 400 Gb/s for each GPU.
        Device("mi300x", 192 * GIB, 1307e12, 163e12, 5.3e12, near=448e9, far=50e9, **_CDNA3),
        # An H100 with less NVLink.
        Device("h800", 80 * GIB, 989e12, 67e12, 3.35e12, near=200e9, far=50e9, **_HOPPER),
        # NVLink 3, and 200 Gb/s.
        Device("a100-80gb", 80 * GIB, 312e12, 19.5e12, 2.04e12, near=300e9, far=25e9),
        Device("a100-40gb", 40 * GIB, 312e12, 19.5e12, 1.56e12, near=300e9, far=25e9),
        # NVLink 2, and 100 Gb/s for two GPUs.
        Device("v100", 32 * GIB, 125e12, 15.7e12, 0.9e12, near=150e9, far=6.25e9, has_bf16=False),
        # PCIe 4.0, and 100 Gb/s for a node.
        Device("rtx4090", 24 * GIB, 165e12, 82.6e12, 1.01e12, near=32e9, far=1.5e9),
    )
}


def find_device(name: str, processes: int = 1) -> Device:
    """Return a device by its name; `cpu` is this machine, shared by `processes`.

    Raises:
        InputError: for an unknown name.
    """
    if name == "cpu":
        return _cpu(processes)
    refuse_if(name not in DEVICES, f"--device {name!r} is not one of {', '.join(DEVICES)}, cpu")
    return DEVICES[name]
