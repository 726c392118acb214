"""What expert iteration has changed, on held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.outputs.report import Plot, Promise, change_of, is_noise, plus_minus
from hfllm.stages.expert_iteration import ExpertIterationArguments
from hfllm.stages.expert_iteration_data import Kept, rewards_of, sampled

if TYPE_CHECKING:
    from hfllm.rewards.functions import RewardFunction
    from hfllm.stages.course import Speaking

SAMPLES = 6


@dataclass(frozen=True)
class Evaluation:
    """One sampled response of a model to each held-out prompt, and its reward."""

    texts: list[str]
    rewards: list[float]


def evaluate(
    script_args: ExpertIterationArguments,
    speaking: "Speaking",
    rows: Sequence[Mapping[str, Any]],
    functions: "Sequence[RewardFunction]",
) -> Evaluation:
    """Sample a response to each held-out prompt, with the same settings as in the rounds."""
    said = sampled(script_args, speaking, rows, script_args.seed + 1_000_000)
    texts = [text for (text,) in said]
    return Evaluation(texts, rewards_of(functions, rows, texts, speaking.tokenizer, script_args.reward_timeout))


def found_metrics(
    script_args: ExpertIterationArguments, evaluations: Sequence[Evaluation], kept: Sequence[Kept]
) -> dict[str, float]:
    """Return reward and share of right responses before and after, with errors, and the figures of each round."""
    first, last = evaluations[0], evaluations[-1]
    metrics = change_of("reward", first.rewards, last.rewards)
    metrics |= change_of("right", *(_right(script_args, each) for each in (first, last)))
    for number, each in enumerate(evaluations[1:], 1):
        metrics[f"right_round_{number}"] = _mean(_right(script_args, each))
    for number, each in enumerate(kept, 1):
        metrics[f"kept_rows_round_{number}"] = each.rows
        metrics[f"right_responses_round_{number}"] = each.right / max(each.responses, 1)
    return metrics


def promises_of(script_args: ExpertIterationArguments) -> list[Promise]:
    """Return what the figures must show; of the control nothing."""
    learned = Promise("change of right responses to held-out prompts", "right_change", 0.0, "no change")
    return [] if script_args.shuffle_rewards else [learned]


def summary_of(script_args: ExpertIterationArguments, metrics: Mapping[str, float]) -> str:
    """Return what has changed, in a sentence."""
    before, after = (plus_minus(metrics[f"right_{at}"], metrics.get(f"right_{at}_se")) for at in ("before", "after"))
    change, error = metrics["right_change"], metrics.get("right_change_se")
    word = "did not change beyond noise" if is_noise(change, error) else "rose" if change > 0 else "fell"
    control = " (control: what was learned is drawn by chance)" if script_args.shuffle_rewards else ""
    about = f"right responses to {metrics['right_n']} held-out prompts"
    return f"the share of {about} {word}: {before} before, {after} after{control}"


def tables_of(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation], kept: Sequence[Kept]
) -> dict[str, list[dict[str, Any]]]:
    """Return the table of rounds, and that of some prompts with the responses before and after."""
    rounds = [
        {"round": number, "responses": each.responses, "right": each.right, "prompts solved": each.solved}
        | {"learned": each.rows, "held-out reward after": _mean(evaluations[number].rewards)}
        for number, each in enumerate(kept, 1)
    ]
    first, last = evaluations[0], evaluations[-1]
    step = max(len(rows) // SAMPLES, 1)
    said = [
        {"prompt": rows[place]["prompt"][-1]["content"], "before": first.texts[place], "after": last.texts[place]}
        for place in range(0, len(rows), step)
    ][:SAMPLES]
    return {"Rounds": rounds, "Held-out prompts before and after": said}


def plots_of(script_args: ExpertIterationArguments, evaluations: Sequence[Evaluation]) -> dict[str, Plot]:
    """Return the plot of right responses by round."""
    shares = [_mean(_right(script_args, each)) for each in evaluations]
    line = {"held-out prompts": (list(range(len(shares))), shares)}
    return {"right": Plot("Right responses", "round", "share", line)}


def _right(script_args: ExpertIterationArguments, each: Evaluation) -> list[float]:
    return [float(reward >= script_args.min_reward) for reward in each.rewards]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
