"""What the sections of gpu.py share: the device, sizes, models, and clocks that wait for the device."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

import hfllm
from hfllm.models.devices import has_native_bf16
from hfllm.scaling.devices import DEVICES

# A part of the name that the driver gives, and the name in hfllm.scaling.devices; the first that fits counts.
KNOWN = {
    "GH200": "gh200",
    "B200": "b200",
    "MI300X": "mi300x",
    "H100": "h100",
    "H200": "h200",
    "A100-SXM4-80GB": "a100-80gb",
    "A100 80GB": "a100-80gb",
    "A100": "a100-40gb",
    "V100": "v100",
    "4090": "rtx4090",
}
FULL = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Bench:
    """The device, the sizes and where figures go.

    Args:
        device: its type; `None` is the accelerator if there is one.
        tiny: sizes for a test.
        folder: where models and reports go.
        record: called with what was measured, the value and its unit.
    """

    def __init__(self, device: str | None, tiny: bool, folder: Path, record: Callable[[str, float | str, str], None]):
        self.tiny, self.folder, self.record = tiny, folder, record
        self.device = torch.device(device or (torch.accelerator.current_accelerator() or "cpu"))
        self.is_cpu = self.device.type == "cpu"
        self.bf16 = not self.is_cpu and has_native_bf16()

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the size for this run."""
        return tiny if self.tiny else full

    # ---- models ----

    def fields(self, vocab_size: int) -> dict[str, Any]:
        """Return the sizes that Llama and ours share: a body of 60 million parameters."""
        body = self.pick(FULL, TINY)
        heads = body["num_attention_heads"] // 2
        more = {"num_key_value_heads": heads, "max_position_embeddings": 2048, "tie_word_embeddings": True}
        return {"vocab_size": vocab_size, **body, **more, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}

    def ours(self, vocab_size: int, seed: int = 0) -> PreTrainedModel:
        """Return a new model of the family, on the CPU in fp32."""
        torch.manual_seed(seed)
        return hfllm.HfllmForCausalLM(hfllm.HfllmConfig(**self.fields(vocab_size)))

    def llama(self, vocab_size: int, seed: int = 0) -> PreTrainedModel:
        """Return transformers' Llama of the same shape."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**self.fields(vocab_size)))

    def autocast(self) -> Any:
        """Return the context of mixed precision, if the device has bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of weights that are only read."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def training_flags(self) -> dict[str, Any]:
        """Return the arguments of trainers that follow from the device."""
        common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        return {**common, "bf16": self.bf16, "use_cpu": self.is_cpu}

    # ---- the device ----

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if not self.is_cpu:
            torch.accelerator.synchronize(self.device)

    @property
    def name(self) -> str:
        """Return the device's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def peak_flops(self, measured: float) -> float:
        """Return the vendor's peak of 16-bit products, or the measured one of a device that we do not know."""
        known = next((DEVICES[ours] for part, ours in KNOWN.items() if part in self.name), None)
        return measured if known is None or not self.bf16 else known.peak_16bit

    @contextmanager
    def peak_memory(self, what: str) -> Iterator[None]:
        """Record the most memory that was allocated inside, above what was there before; a CPU's is not counted."""
        if self.device.type != "cuda":
            yield
            return
        # Trainers are circles of references.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        self.wait()
        self.record(f"{what}: peak memory", (torch.cuda.max_memory_allocated(self.device) - before) / 1e6, "MB")

    @contextmanager
    def exact_fp32(self) -> Iterator[None]:
        """Multiply fp32 in fp32, not in TF32, inside."""
        before = torch.backends.fp32_precision
        torch.backends.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.backends.fp32_precision = before


class Phases(TrainerCallback):
    """Seconds of each phase of each step, with the device's work; time in no phase belongs to `optimize`.

    Args:
        bench: whose device is waited for.
    """

    def __init__(self, bench: Bench):
        self.bench = bench
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = {}
        self._inner = [0.0]
        self._began = time.perf_counter()

    def _now(self) -> float:
        self.bench.wait()
        return time.perf_counter()

    def timed(self, phase: str, function: Callable) -> Callable:
        """Return the function with its time counted, without that of timed functions that it calls."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = self._now() - began
                self.current[phase] = self.current.get(phase, 0.0) + took - self._inner.pop()
                self._inner[-1] += took

        return wrapper

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        now = self._now()
        rest = now - self._began - sum(self.current.values())
        self.steps.append({**self.current, "optimize": rest})
        self.current, self._began = {}, now
