"""Compare the policy before and after alignment on prompts unseen in training. "Gold" is the world's exact score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hfllm.data.world.world import World
from hfllm.evaluation.responses import gold_by_group, judge_tasks, mean_gold, right_share
from hfllm.generation.responses import sample_responses
from hfllm.outputs.report import Plot, plot_history

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


class PolicyTrainer(Protocol):
    """The parts of a trainer used here: its policy, its precision, and its own evaluation."""

    accelerator: "Accelerator"
    policy: "PreTrainedModel"
    processing_class: "PreTrainedTokenizerBase"
    args: "TrainingArguments"

    def evaluate(self) -> Mapping[str, float]: ...


SHOWN_SAMPLES = 12


@dataclass
class PolicyEvaluation:
    """Results of one policy.

    Args:
        proxy: means of `PPOTrainer.evaluate`: the reward of training, KL to the reference, length.
        samples: prompt and sampled response for a few held-out prompts.
        sampled, greedy: judged answers to all evaluation prompts, where the data has a gold reward.
        facts: judged greedy answers to one question per fact of the world.
    """

    proxy: Mapping[str, float]
    samples: list[dict[str, Any]]
    sampled: list[dict[str, Any]] = field(default_factory=list)
    greedy: list[dict[str, Any]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)


def evaluate_policy(
    trainer: PolicyTrainer, eval_prompts: Sequence[Any], world: World | None, num_eval_prompts: int
) -> PolicyEvaluation:
    """Evaluate the trainer's current policy.

    Args:
        eval_prompts: held-out prompts, for the displayed samples.
        world: the embedded world if the prompts come from it, for gold rewards; else `None`.
        num_eval_prompts: number of the world's evaluation tasks to judge.
    """
    proxy = trainer.evaluate()
    # As in its rollouts: fp32 would take several times as long on a GPU, and flash attention knows none.
    with trainer.accelerator.autocast():
        return _judged(trainer, proxy, eval_prompts, world, num_eval_prompts)


def _judged(
    trainer: PolicyTrainer,
    proxy: Mapping[str, float],
    eval_prompts: Sequence[Any],
    world: World | None,
    num_eval_prompts: int,
) -> PolicyEvaluation:
    policy, tokenizer, length = trainer.policy, trainer.processing_class, trainer.args.response_length
    if world is None:
        shown = list(eval_prompts[:SHOWN_SAMPLES])
        texts = sample_responses(policy, tokenizer, shown, length, seed=trainer.args.seed)
        return PolicyEvaluation(
            proxy, [{"prompt": _text(prompt), "response": text} for prompt, (text,) in zip(shown, texts, strict=True)]
        )
    tasks, seed = world.evaluation_tasks(num_eval_prompts), trainer.args.seed
    sampled = judge_tasks(policy, tokenizer, tasks, length, do_sample=True, seed=seed)
    return PolicyEvaluation(
        proxy,
        samples=sampled[:: max(1, len(sampled) // SHOWN_SAMPLES)],
        sampled=sampled,
        greedy=judge_tasks(policy, tokenizer, tasks, length, do_sample=False),
        facts=judge_tasks(policy, tokenizer, world.fact_tasks(), length, do_sample=False),
    )


def _text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else " / ".join(message["content"] for message in prompt)


def alignment_metrics(before: PolicyEvaluation, after: PolicyEvaluation) -> dict[str, float]:
    """Return the report's metrics; those with `gold` and `fact` only where the data has a gold reward."""
    metrics: dict[str, float] = {}
    if after.sampled:
        for name, judgment in (("before", before), ("after", after)):
            groups = gold_by_group(judgment.sampled)
            metrics |= {
                f"gold_reward_{name}": mean_gold(judgment.sampled),
                f"gold_reward_greedy_{name}": mean_gold(judgment.greedy),
                f"gold_reward_new_phrasings_{name}": groups["held-out phrasings"],
                f"fact_accuracy_{name}": right_share(judgment.facts),
            }
    return {
        **metrics,
        "proxy_reward_before": before.proxy["eval_reward"],
        "proxy_reward_after": after.proxy["eval_reward"],
        # Without a penalty there is no reference.
        **({"kl_to_reference": after.proxy["eval_kl"]} if "eval_kl" in after.proxy else {}),
        "response_length": after.proxy["eval_response_length"],
    }


def alignment_tables(before: PolicyEvaluation, after: PolicyEvaluation) -> dict[str, list[dict[str, Any]]]:
    """Return tables of gold reward by family, sampled and greedy, and samples side by side."""
    tables: dict[str, list[dict[str, Any]]] = {}
    if after.sampled:
        columns = {
            "sampled before": gold_by_group(before.sampled),
            "sampled after": gold_by_group(after.sampled),
            "greedy before": gold_by_group(before.greedy),
            "greedy after": gold_by_group(after.greedy),
        }
        tables["Gold reward by task family"] = [
            {"prompts": group, **{title: f"{means[group]:.3f}" for title, means in columns.items()}}
            for group in columns["sampled before"]
        ]
    tables["Samples"] = [
        {"prompt": first["prompt"], "before": first["response"], "after": second["response"]}
        for first, second in zip(before.samples, after.samples, strict=True)
    ]
    return tables


def alignment_plots(history: Sequence[Mapping[str, float]]) -> dict[str, Plot]:
    """Plot rewards over steps, and against the square root of the KL (Gao et al. 2022, arXiv:2210.10760, figure 1)."""
    names = {"proxy reward": "reward", "gold reward": "rewards/gold_reward"}
    training = [entry for entry in history if "kl" in entry]
    distance = [max(entry["kl"], 0.0) ** 0.5 for entry in training]
    against_distance = {
        label: (distance, [entry[name] for entry in training])
        for label, name in names.items()
        if training and name in training[0]
    }
    return {
        "rewards": plot_history(training, names, title="Rewards of sampled responses", xlabel="step", ylabel="reward"),
        "overoptimization": Plot(
            title="Reward against distance from the reference",
            xlabel="square root of KL (nats per response)",
            ylabel="reward",
            lines=against_distance,
            points_only=True,
        ),
    }
