"""The sections of gpu.py, but for the last: the device, exactness, training, decoding, int8 and PPO's speed."""

import copy
import statistics
from typing import Any

import torch
import transformers
from gpu_chain import chain
from gpu_parts import Bench, Phases
from ppo import build_tokenizer
from torch import nn

import hfllm
from hfllm.generation.speculative.measure import interleaved
from hfllm.generation.speculative.speculative import fast_generate
from hfllm.models.loading.saved import saved_model
from hfllm.scaling.speed import palm_flops_per_token, utilization
from hfllm.trainers.ppo import formulas
from hfllm.trainers.ppo.actor_critic import ActorCritic

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# ---- the device ----


def measured_flops(bench: Bench) -> float:
    """Return the FLOP/s of a large matrix product, in bf16 where the device has it."""
    size = bench.pick(8192 if not bench.is_cpu else 1024, 128)
    left, right = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: left @ right}, rounds=bench.pick(20, 3))["product"]
    return 2 * size**3 / statistics.median(seconds)


def machine(bench: Bench) -> None:
    """Record what this is, and the speed of a plain product, with which the others can be compared."""
    bench.record("device", bench.name, "")
    bench.record("versions", f"torch {torch.__version__}, transformers {transformers.__version__}", "")
    bench.record("hfllm", hfllm.__version__, "")
    bench.record("bf16", str(bench.bf16), "")
    if bench.device.type == "cuda":
        bench.record("memory", torch.cuda.get_device_properties(bench.device).total_memory / 1e9, "GB")
    flops = measured_flops(bench)
    bench.record("a large product", flops / 1e12, "TFLOP/s")
    bench.record("peak taken for MFU", bench.peak_flops(flops) / 1e12, "TFLOP/s")


# ---- exactness ----


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    expected = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


def gradient(model: nn.Module) -> torch.Tensor:
    """Return all gradients as one vector on the CPU."""
    return torch.cat([each.grad.detach().float().cpu().flatten() for each in model.parameters()])


def exactness(bench: Bench) -> None:
    """Compare the device with the CPU: the same weights and batch, in fp32 and under bf16 autocast."""
    vocab_size = bench.pick(8192, 256)
    reference = bench.ours(vocab_size).train()
    model = copy.deepcopy(reference).to(bench.device)
    ids = torch.randint(2, vocab_size, (bench.pick(4, 2), bench.pick(128, 16)))
    expected = reference(input_ids=ids, labels=ids)
    expected.loss.backward()
    on_device = ids.to(bench.device)
    loss, grad = ppo_loss(bench, copy.deepcopy(reference), torch.device("cpu"), is_bf16=False)
    for name, is_bf16 in (("fp32", False), ("bf16", True)):
        model.zero_grad()
        with bench.exact_fp32():
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=is_bf16):
                found = model(input_ids=on_device, labels=on_device)
            found.loss.backward()
            found_loss, found_grad = ppo_loss(bench, copy.deepcopy(reference), bench.device, is_bf16)
        bench.record(f"{name} logits, relative difference", difference(found.logits, expected.logits), "")
        bench.record(f"{name} loss, difference", abs(found.loss.item() - expected.loss.item()), "nats")
        bench.record(f"{name} gradient, relative difference", difference(gradient(model), gradient(reference)), "")
        bench.record(f"{name} PPO loss, difference", abs(found_loss - loss), "")
        bench.record(f"{name} PPO gradient, relative difference", difference(found_grad, grad), "")


def ppo_loss(
    bench: Bench, policy: transformers.PreTrainedModel, device: torch.device, is_bf16: bool
) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of one PPO step on random episodes, the same for every device and precision."""
    policy.zero_grad()
    torch.manual_seed(1)
    vocab_size, rows, length = policy.config.vocab_size, bench.pick(8, 2), bench.pick(64, 8)
    actor = ActorCritic(policy, None, temperature=1.0, never_sampled=(0,))
    nn.init.normal_(actor.value_head.weight, std=0.02)
    ids = torch.randint(2, vocab_size, (rows, 2 * length))
    mask = torch.ones(rows, length)
    mask[0, length // 2 :] = 0
    old, advantages, returns = (torch.randn(rows, length) * mask for _ in range(3))
    parts = (ids[:, :length], torch.ones_like(ids[:, :length]), ids[:, length:], mask.long())
    actor.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
        logprobs, values, _ = actor(*(part.to(device) for part in parts))
    mask, old, advantages, returns = (part.to(device) for part in (mask, old, advantages, returns))
    # Near the policy's own, so that the ratio is neither 1 nor far from it.
    old = logprobs.detach() + 0.1 * old
    loss = formulas.policy_loss(logprobs, old, advantages, mask, 0.2)[0]
    loss = (loss + 0.1 * formulas.value_loss(values, values.detach(), returns, mask, 0.2)[0]) / mask.sum()
    loss.backward()
    return loss.item(), gradient(actor)


# ---- training ----


def training(bench: Bench) -> None:
    """Compare steps of pretraining: Llama, ours, ours with the loss in chunks or its layers recomputed."""
    vocab_size, length = bench.pick(32768, 256), bench.pick(1024, 16)
    rows = bench.pick(16 if not bench.is_cpu else 2, 2)
    ids = torch.randint(2, vocab_size, (rows, length), device=bench.device)
    settings = {"Llama": {}, "hfllm": {}, "hfllm, loss in chunks": {"loss_chunk_size": 1024}, "hfllm, recomputed": {}}
    runs, shape = {}, None
    for name, more in settings.items():
        model = (bench.llama if name == "Llama" else bench.ours)(vocab_size).to(bench.device).train()
        if name.endswith("recomputed"):
            model.activation_checkpointing_enable()
        shape = shape or model
        runs[name] = training_step(bench, model, {"input_ids": ids, "labels": ids, "use_cache": False, **more})
    seconds = {name: statistics.median(times) for name, times in interleaved(runs, bench.pick(8, 2)).items()}
    config = shape.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    weights = sum(parameter.numel() for parameter in shape.parameters())
    flops = palm_flops_per_token(weights, layers, heads, config.hidden_size // heads, length)
    peak = bench.peak_flops(measured_flops(bench))
    bench.record("weights", weights / 1e6, "million")
    for name, each in seconds.items():
        bench.record(f"{name}: speed", rows * length / each, "tokens/s")
        bench.record(f"{name}: MFU", 100 * utilization(rows * length / each, flops, 1, peak), "%")
        bench.record(f"{name}: speed against Llama", seconds["Llama"] / each, "times")
    for name, run in runs.items():
        with bench.peak_memory(name):
            run()


def training_step(bench: Bench, model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Return a function that takes one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.device.type == "cuda")

    def step() -> None:
        with bench.autocast():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- decoding and int8 ----


def decoding(bench: Bench) -> None:
    """Compare greedy decoding: transformers' `generate`, and with ours passed to it, one sequence and 32."""
    vocab_size, new = bench.pick(32768, 256), bench.pick(128 if not bench.is_cpu else 16, 4)
    model = bench.ours(vocab_size).to(bench.device, bench.dtype).eval()
    for rows in (1, bench.pick(32, 2)):
        ids = torch.randint(2, vocab_size, (rows, bench.pick(64, 8)), device=bench.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        batch |= {"max_new_tokens": new, "eos_token_id": None}
        runs = {
            "generate": lambda batch=batch: model.generate(**batch),
            "fast_generate": lambda batch=batch: model.generate(**batch, custom_generate=fast_generate),
        }
        seconds = {name: statistics.median(times) for name, times in interleaved(runs, bench.pick(5, 2)).items()}
        for name, each in seconds.items():
            bench.record(f"{name}, batch {rows}", rows * new / each, "tokens/s")
        with bench.peak_memory(f"generate, batch {rows}"):
            runs["generate"]()


def int8(bench: Bench) -> None:
    """Compare a model in int8 with the same in 16 bits: speed, size, and how often the likeliest token is the same."""
    from hfllm.compression.schemes import SCHEMES, agreement, default_device, greedy_tokens, speeds, stored_bytes

    if bench.device.type != default_device():
        raise RuntimeError(f"models are quantized on {default_device()}, and this runs on {bench.device.type}")
    vocab_size = bench.pick(32768, 256)
    folder = str(bench.folder / "int8")
    bench.ours(vocab_size).save_pretrained(folder)
    model = saved_model(transformers.AutoModelForCausalLM, folder, dtype=bench.dtype).to(bench.device).eval()
    windows = list(torch.randint(2, vocab_size, (bench.pick(16, 2), 1, bench.pick(256, 16))))
    name = "dynamic" if bench.is_cpu else "int8"
    small = SCHEMES[name].load(folder, dtype=bench.dtype)
    timing = {"prompt_tokens": bench.pick(128, 8), "new_tokens": bench.pick(32, 2), "rounds": bench.pick(5, 1)}
    found = speeds({"original": model, name: small}, **timing)
    for label, phases in found.items():
        for phase, speed in phases.items():
            bench.record(f"{label}: {phase}", speed, "tokens/s")
    bench.record(f"{name}: size", 100 * stored_bytes(small) / stored_bytes(model), "% of the original")
    same = agreement(greedy_tokens(model, windows), greedy_tokens(small, windows))
    bench.record(f"{name}: same most likely token", 100 * same, "%")


# ---- PPO ----


def letters(completions: list[str], **columns: object) -> list[float]:
    """Return a reward that takes no time."""
    return [text.count("1") / 10 for text in completions]


def ppo(bench: Bench) -> None:
    """Compare PPO, with and without LoRA, with TRL's GRPO: one model, prompts, response length, episodes a step."""
    from datasets import Dataset

    vocab_size, folder = bench.pick(8192, 64), str(bench.folder / "policy")
    tokenizer = build_tokenizer(vocab_size)
    bench.ours(vocab_size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = torch.randint(2, vocab_size, (bench.pick(512, 16), bench.pick(64, 8)))
    prompts = Dataset.from_dict({"prompt": [tokenizer.decode(row) for row in words]})
    sides = {"PPO": run_ppo, "PPO with LoRA": run_ppo_lora, "GRPO of TRL": run_grpo}
    totals = {}
    for name, run in sides.items():
        with bench.peak_memory(name):
            phases, episodes = run(bench, folder, tokenizer, prompts)
        # The first step warms up.
        steps = phases.steps[1:]
        medians = {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in steps[0]}
        totals[name] = episodes / sum(medians.values())
        bench.record(f"{name}: speed", totals[name], "episodes/s")
        for phase, seconds in medians.items():
            bench.record(f"{name}: {phase}", 1000 * seconds / episodes, "ms an episode")
    for name in ("PPO", "PPO with LoRA"):
        bench.record(f"{name}: speed against GRPO", totals[name] / totals["GRPO of TRL"], "times")


def step_sizes(bench: Bench) -> dict[str, Any]:
    """Return the arguments that both trainers have: the episodes of a step, and how many steps there are."""
    rows = bench.pick(32 if not bench.is_cpu else 4, 2)
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": bench.pick(4, 2)}
    return {**bench.training_flags, **sizes, "max_steps": bench.pick(5, 2), "learning_rate": 1e-6, "logging_steps": 1}


def run_ppo(bench: Bench, folder: str, tokenizer: Any, prompts: Any, lora: bool = False) -> tuple[Phases, int]:
    """Train by ours. Returns the seconds of each phase, and the episodes of a step."""
    from peft import LoraConfig

    # The base of an adapter is frozen: 16 bits serve it as well.
    dtype = bench.dtype if lora else torch.float32
    arguments = hfllm.PPOConfig(
        str(bench.folder / "ppo"),
        **step_sizes(bench),
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=bench.pick(128, 8),
    )
    trainer = hfllm.PPOTrainer(
        model=saved_model(transformers.AutoModelForCausalLM, folder, dtype=dtype),
        reward_funcs=letters,
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    phases = Phases(bench)
    trainer.add_callback(phases)
    trainer.sample = phases.timed("sample", trainer.sample)
    trainer.collect_rollout = phases.timed("score", trainer.collect_rollout)
    trainer.train()
    return phases, arguments.local_rollout_batch_size


def run_ppo_lora(bench: Bench, folder: str, tokenizer: Any, prompts: Any) -> tuple[Phases, int]:
    """Train an adapter by ours."""
    return run_ppo(bench, folder, tokenizer, prompts, lora=True)


def run_grpo(bench: Bench, folder: str, tokenizer: Any, prompts: Any) -> tuple[Phases, int]:
    """Train by TRL's GRPO, with a reference as PPO has one."""
    from trl import GRPOConfig, GRPOTrainer

    sizes = step_sizes(bench)
    episodes = sizes["per_device_train_batch_size"] * sizes["gradient_accumulation_steps"]
    arguments = GRPOConfig(
        str(bench.folder / "grpo"),
        **sizes,
        beta=0.05,
        num_generations=bench.pick(8, 2),
        max_completion_length=bench.pick(128, 8),
        # As PPO's defaults.
        disable_dropout=True,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=saved_model(transformers.AutoModelForCausalLM, folder, dtype=torch.float32),
        reward_funcs=letters,
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    phases = Phases(bench)
    trainer.add_callback(phases)
    trainer._generate = phases.timed("sample", trainer._generate)
    trainer._generate_and_score_completions = phases.timed("score", trainer._generate_and_score_completions)
    trainer.train()
    return phases, episodes


SECTIONS = {
    "machine": machine,
    "exactness": exactness,
    "training": training,
    "decoding": decoding,
    "int8": int8,
    "ppo": ppo,
    "chain": chain,
}
