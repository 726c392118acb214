"""PPO on answers that a copy of the policy in lower precision has sampled, with importance weights and without.

    OMP_NUM_THREADS=1 python benchmarks/off_policy.py

A random model of 50,000 parameters is paid for the share of its 32 tokens that belong to a quarter of the vocabulary.
Before each rollout its weights are copied, and the copy answers: in bfloat16, or with the weights of all linear layers
rounded to 8 or 4 bits, one scale for each output. Training is in float32. `cap 2` multiplies each token's advantage by
the ratio of both probabilities, at most 2 (`importance_sampling_cap`), `no cap` takes the samples for its own. Prints,
for each precision and arm, the reward of the last quarter of the rollouts, the mean size of the difference of
log-probabilities, and how far a rollout's updates moved the policy (approximate KL), over seeds.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from ppo import build_tokenizer

from hfllm import HfllmConfig, HfllmForCausalLM, PPOConfig, PPOTrainer
from hfllm.outputs.intervals import standard_error

VOCABULARY, PROMPT, RESPONSE, EPISODES, TARGETS, FIRST_WORD = 128, 8, 32, 64, 32, 2
NEVER = [0, 1]  # the tokens for padding and for the end
# Of the size that training gives it: with the usual .02 no layer below it could make a word likely.
HEAD_STD = 0.2
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
CAPS = {"no cap": None, "cap 2": 2.0}
# Of a seed and arm: the reward of each rollout, and the means of what the log says.
Run = dict[str, object]


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a matrix as `bits` and a scale for each output hold it."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / most
    return (weight / scale).round().clamp(-most, most) * scale


@torch.no_grad()
def in_precision(policy: HfllmForCausalLM, precision: str) -> HfllmForCausalLM:
    """Return a copy of a policy whose weights have another precision."""
    sampler = copy.deepcopy(policy).eval()
    if precision == "bfloat16":
        return sampler.to(torch.bfloat16)
    if precision.startswith("int"):
        for module in sampler.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight, int(precision[3:])))
    return sampler


def rollout_in(precision: str) -> Callable[[list[str], PPOTrainer], dict[str, list]]:
    """Return a `rollout_func` that samples in a precision, and says with which log-probabilities."""

    @torch.no_grad()
    def rollout(prompts: list[str], trainer: PPOTrainer) -> dict[str, list]:
        sampler = in_precision(trainer.accelerator.unwrap_model(trainer.model).policy, precision)
        ids = torch.tensor(trainer.processing_class(prompts)["input_ids"])
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": RESPONSE, "suppress_tokens": NEVER}
        output = sampler.generate(ids, output_scores=True, return_dict_in_generate=True, **settings)
        taken = output.sequences[:, PROMPT:]
        chances = torch.stack(output.scores, 1).float().log_softmax(-1).gather(2, taken.unsqueeze(2)).squeeze(2)
        return {"prompt_ids": ids.tolist(), "completion_ids": taken.tolist(), "logprobs": chances.tolist()}

    return rollout


def run(precision: str, cap: float | None, seed: int, args: argparse.Namespace) -> Run:
    """Train one model; return its rewards and the log."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(VOCABULARY)
    sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    policy = HfllmForCausalLM(HfllmConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes, **special))
    torch.nn.init.normal_(policy.get_output_embeddings().weight, std=HEAD_STD)
    words = torch.randint(FIRST_WORD, VOCABULARY, (256, PROMPT), generator=torch.Generator().manual_seed(seed))
    prompts = Dataset.from_dict({"prompt": [tokenizer.decode(row) for row in words]})
    seen: list[float] = []

    def share(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence, **columns) -> list[float]:
        shares = [sum(FIRST_WORD <= each < FIRST_WORD + TARGETS for each in ids) / RESPONSE for ids in completion_ids]
        seen.append(statistics.fmean(shares))
        return shares

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            folder,
            **{"response_length": RESPONSE, "total_episodes": EPISODES * args.rollouts, "seed": seed},
            generation_kwargs={"suppress_tokens": NEVER},
            # No penalty for leaving the first policy: a random one is far from every policy that is paid.
            **{"learning_rate": args.learning_rate, "importance_sampling_cap": cap, "kl_coef": 0.0},
            **{"logging_steps": 8, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
            **{"use_cpu": True, "bf16": False},
        )
        funcs = {"reward_funcs": share, "rollout_func": rollout_in(precision)}
        trainer = PPOTrainer(policy, args=settings, train_dataset=prompts, processing_class=tokenizer, **funcs)
        trainer.train()
    last = max(1, args.rollouts // 4)
    logs = [row for row in trainer.state.log_history if "approx_kl" in row]
    means = {
        name: statistics.fmean(row[name] for row in logs)
        for name in ("approx_kl", "importance_sampling/gap", "importance_sampling/capped")
        if name in logs[0]
    }
    return {
        **{"precision": precision, "cap": cap, "seed": seed, "reward": statistics.fmean(seen[-last:])},
        **means,
        **{"cpu_seconds": round(time.process_time() - began, 1), "curve": [round(each, 2) for each in seen]},
    }


def cell(runs: Sequence[Run], name: str, digits: int) -> str:
    """Return the mean over seeds with its error."""
    values = [float(run[name]) for run in runs if name in run]
    if not values:
        return "-"
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rollouts", type=int, default=40, help="Of 64 answers, with eight optimizer steps each.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    lines = ["| sampled in | weights | reward, last quarter | by seed | gap (nats) | capped | approximate KL |"]
    lines.append("| - " * 7 + "|")
    for precision in args.precisions:
        for name, cap in CAPS.items():
            runs = [run(precision, cap, seed, args) for seed in args.seeds]
            for each in runs:
                print(json.dumps(each), flush=True)
            by_seed = ", ".join(f"{each['reward']:.3f}" for each in runs)
            figures = [cell(runs, "importance_sampling/gap", 4), cell(runs, "importance_sampling/capped", 4)]
            cells = [precision, name, cell(runs, "reward", 3), by_seed, *figures, cell(runs, "approx_kl", 5)]
            lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
