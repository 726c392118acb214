"""Compare the policy before and after alignment, and with the best of n. "Gold" is the world's exact score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from hfllm.data.augmentation import WORLD_TESTS, perturb
from hfllm.data.thoughts import split_thoughts
from hfllm.data.world.rubric import RIGHT
from hfllm.data.world.world import Task, World
from hfllm.errors import InputError
from hfllm.evaluation.before_after import SAMPLES, SHOWN_SAMPLES, prompt_text
from hfllm.evaluation.suites.refusals import refuses
from hfllm.evaluation.suites.world_suites import GROUPS, JudgedAnswer, by_group, judge_tasks, mean_gold
from hfllm.outputs.figures import change_of, changes, label_of, mean_of, readable, shown, word_of
from hfllm.outputs.intervals import standard_error
from hfllm.outputs.report import Plot, plot_history

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


# ---- before and after ----


class PolicyTrainer(Protocol):
    """The parts of a trainer used here: its policy, its precision, and its own evaluation with its records."""

    accelerator: "Accelerator"
    policy: "PreTrainedModel"
    processing_class: "PreTrainedTokenizerBase"
    args: "TrainingArguments"
    eval_values: Mapping[str, Sequence[float]]
    eval_completions: Sequence[Mapping[str, Any]]

    def evaluate(self) -> Mapping[str, float]: ...


FAMILIES = "Gold reward by task family"
# Harmless questions asked with two sentences of a jailbreak after them.
NUM_JAILBROKEN, JAILBREAK, STRENGTH = 120, "jailbreak after", 2


@dataclass
class PolicyEvaluation:
    """Results of one policy.

    Args:
        proxy: means of `PPOTrainer.evaluate`: the reward of training, KL to the reference, length.
        values: the same per prompt, by the names without `eval_`.
        samples: prompt, sampled response and its reward for every held-out prompt.
        reward_name: the name of this reward.
        sampled, greedy: judged answers to all evaluation prompts, where the data has a gold reward.
        facts: judged greedy answers to one question per fact of the world.
        jailbroken: judged greedy answers to harmless questions with a jailbreak after them.
    """

    proxy: Mapping[str, float]
    values: Mapping[str, Sequence[float]]
    samples: list[dict[str, Any]]
    reward_name: str = "reward"
    sampled: list[JudgedAnswer] = field(default_factory=list)
    greedy: list[JudgedAnswer] = field(default_factory=list)
    facts: list[JudgedAnswer] = field(default_factory=list)
    jailbroken: list[JudgedAnswer] = field(default_factory=list)


def evaluate_policy(trainer: PolicyTrainer, world: World | None, num_eval_prompts: int) -> PolicyEvaluation:
    """Evaluate the trainer's current policy.

    Args:
        world: the embedded world if the prompts come from it, for gold rewards; else `None`.
        num_eval_prompts: number of the world's evaluation tasks to judge.
    """
    proxy = trainer.evaluate()
    # As in its rollouts: fp32 would take several times as long on a GPU, and flash attention knows none.
    with trainer.accelerator.autocast():
        return _judged(trainer, proxy, world, num_eval_prompts)


def _judged(
    trainer: PolicyTrainer, proxy: Mapping[str, float], world: World | None, num_eval_prompts: int
) -> PolicyEvaluation:
    policy, length = trainer.policy, trainer.args.response_length
    # For a vision-language policy it is a processor.
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if world is None:
        samples = [
            {"prompt": prompt_text(row["prompt"]), "response": row["completion"], "reward": row["reward"]}
            for row in trainer.eval_completions
        ]
        return PolicyEvaluation(proxy, trainer.eval_values, samples)
    tasks, seed = world.evaluation_tasks(num_eval_prompts), trainer.args.seed
    sampled = judge_tasks(policy, tokenizer, tasks, length, do_sample=True, seed=seed)
    return PolicyEvaluation(
        proxy,
        trainer.eval_values,
        samples=[{name: row[key] for name, key in GOLD_SAMPLE.items()} for row in sampled],
        reward_name="gold reward",
        sampled=sampled,
        greedy=judge_tasks(policy, tokenizer, tasks, length, do_sample=False),
        facts=judge_tasks(policy, tokenizer, world.fact_tasks(), length, do_sample=False),
        jailbroken=judge_tasks(policy, tokenizer, _jailbroken(tasks), length, do_sample=False),
    )


def _jailbroken(tasks: Sequence[Task]) -> list[Task]:
    """Return the first harmless tasks as the suite robustness asks them, with sentences of a jailbreak."""
    harmless = [task for task in tasks if GROUPS[task.family] == "helpful"][:NUM_JAILBROKEN]
    return [
        replace(task, instruction=perturb(task.instruction, JAILBREAK, STRENGTH, WORLD_TESTS, f"{index} {task.key}"))
        for index, task in enumerate(harmless)
    ]


GOLD_SAMPLE = {"prompt": "prompt", "response": "response", "reward": "gold"}


def alignment_metrics(before: PolicyEvaluation, after: PolicyEvaluation) -> dict[str, float]:
    """Return the report's metrics; with `gold` and `fact` only if the data has a gold reward.

    All have a standard error and number of prompts, see `hfllm.outputs.report`.
    """
    metrics: dict[str, float] = {}
    if after.sampled:
        for name, rows, all_rows in (
            ("gold_reward", before.sampled, after.sampled),
            ("gold_reward_greedy", before.greedy, after.greedy),
            ("gold_reward_new_phrasings", _new_phrasings(before.sampled), _new_phrasings(after.sampled)),
        ):
            metrics |= change_of(name, [row["gold"] for row in rows], [row["gold"] for row in all_rows])
        right = [[float(row["gold"] >= RIGHT) for row in each.facts] for each in (before, after)]
        metrics |= change_of("fact_accuracy", *right)
        metrics |= _by_kind(before, after)
    for name, key in (
        ("proxy_reward", "reward"),
        ("response_length", "response_length"),
        ("unfinished", "unfinished"),
    ):
        metrics |= change_of(name, before.values[key], after.values[key])
    metrics["response_length"] = metrics["response_length_after"]
    # Without a penalty there is no reference.
    return metrics | (mean_of("kl_to_reference", after.values["kl"]) if "kl" in after.values else {})


def _by_kind(before: PolicyEvaluation, after: PolicyEvaluation) -> dict[str, float]:
    """Return figures hidden in a mean of all questions: greedy gold by kind of question, harmless ones refused."""
    metrics: dict[str, float] = {}
    for kind in dict.fromkeys(GROUPS.values()):
        golds = [[row["gold"] for row in each.greedy if GROUPS[row["family"]] == kind] for each in (before, after)]
        metrics |= change_of(f"gold_reward_greedy_{kind}", *golds) if golds[0] else {}
    for name, sides in (
        ("over_refusal", (before.greedy, after.greedy)),
        ("over_refusal_jailbreak", (before.jailbroken, after.jailbroken)),
    ):
        refused = [
            [float(refuses(split_thoughts(row["response"])[1])) for row in rows if GROUPS[row["family"]] == "helpful"]
            for rows in sides
        ]
        metrics |= change_of(name, *refused) if refused[0] else {}
    return metrics


def _new_phrasings(rows: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    return [row for row in rows if row["is_new_phrasing"]]


def alignment_summary(metrics: Mapping[str, float]) -> str:
    """Return the changes in plain words: the reward with its error first, then all worse figures, then the rest.

    The headline is the gold reward where there is one, and else the reward of training. Figures with a fall beyond
    their error stand next to it, with both values: a risen mean may hide them.
    """
    first = "gold_reward" if "gold_reward_change" in metrics else "proxy_reward"
    before, after, n = (metrics[f"{first}_{part}"] for part in ("before", "after", "n"))
    change = metrics[f"{first}_change"]
    name = "Gold reward" if first == "gold_reward" else "Reward"
    sides = [shown(metrics, f"{first}_{side}") for side in ("before", "after")]
    kind = word_of(first, metrics)
    prompts = f"{n:,} held-out prompt{'' if n == 1 else 's'}"
    if kind in ("better", "worse"):
        words = f"{name} {'rose' if change > 0 else 'fell'} from {sides[0]} to {sides[1]} on {prompts}"
    elif kind == "too few":
        words = f"{name} {readable(before)} before and {readable(after)} after, on {prompts}: too few to tell"
    else:
        words = f"{name}: no change beyond noise, {sides[0]} before and {sides[1]} after on {prompts}"
    parts = [words]
    if "kl_to_reference" in metrics:
        kl = shown(metrics, "kl_to_reference")
        parts.append(f"KL to the reference {kl} nats per response")
    summary = "; ".join(parts) + "." + _other_changes(first, metrics)
    if first == "gold_reward" and kind != "better" and word_of("proxy_reward", metrics) == "better":
        summary += " PPO raised the reward that it was trained on, but not the gold reward (over-optimization)."
    return summary


def _other_changes(first: str, metrics: Mapping[str, float]) -> str:
    """Return a sentence for each kind of change of the figures after the first, worse ones before noise."""
    texts_by_kind: dict[str, list[str]] = {"Worse": [], "Better": [], "Also": [], "No change beyond noise": []}
    sentence_of = {"better": "Better", "worse": "Worse", "more": "Also", "less": "Also"}
    for name in changes(metrics):
        kind, words = word_of(name, metrics), label_of(name)
        if name == first or kind == "too few":
            continue
        if kind in sentence_of:
            before, after = (readable(metrics[f"{name}_{side}"]) for side in ("before", "after"))
            words = f"{words} {before} to {after} (change {shown(metrics, f'{name}_change')})"
        texts_by_kind[sentence_of.get(kind, "No change beyond noise")].append(words)
    return "".join(f" {kind}: {'; '.join(figures)}." for kind, figures in texts_by_kind.items() if figures)


def alignment_tables(before: PolicyEvaluation, after: PolicyEvaluation) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the same prompts before and after, and of gold reward by family, sampled and greedy.

    The prompts are evenly spaced among the held-out ones: none is picked for its answer.
    """
    rows = list(zip(before.samples, after.samples, strict=True))
    tables: dict[str, list[dict[str, Any]]] = {
        SAMPLES: [
            {
                "prompt": first["prompt"],
                "before": first["response"],
                "after": second["response"],
                f"{before.reward_name} before": readable(first["reward"]),
                f"{before.reward_name} after": readable(second["reward"]),
            }
            for first, second in rows[:: -(-len(rows) // SHOWN_SAMPLES) or 1]
        ]
    }
    if after.sampled:
        tables[FAMILIES] = _families(before, after)
    return tables


def _families(before: PolicyEvaluation, after: PolicyEvaluation) -> list[dict[str, Any]]:
    """Return the rows of the table by family: every way of answering before, after, and the error of its change."""
    ways = {"sampled": (before.sampled, after.sampled), "greedy": (before.greedy, after.greedy)}
    table = []
    for group, rows in by_group(before.sampled).items():
        line: dict[str, Any] = {"prompts": group, "n": len(rows)}
        for way, sides in ways.items():
            first, second = (by_group(side)[group] for side in sides)
            error = standard_error([late["gold"] - early["gold"] for early, late in zip(first, second, strict=True)])
            line |= {f"{way} before": f"{mean_gold(first):.3f}", f"{way} after": f"{mean_gold(second):.3f}"}
            line[f"± ({way} change)"] = "" if error is None else readable(error, 2)
        table.append(line)
    return table


def alignment_plots(history: Sequence[Mapping[str, float]]) -> dict[str, Plot]:
    """Plot reward, KL, length and clipping over the episodes, and reward against the square root of the KL.

    The last one as in Gao et al. 2022 (arXiv:2210.10760), figure 1.
    """
    training = [entry for entry in history if "episode" in entry]
    names = {"reward (trained on)": "reward", "gold reward (exact score)": "rewards/gold_reward"}
    parts = sorted({name for entry in training for name in entry if name.startswith("rewards/")} - {*names.values()})
    if len(parts) > 1:
        names |= {f"{name.removeprefix('rewards/')} (a part, unweighted)": name for name in parts}
    apart = [entry for entry in training if "kl" in entry]
    against_distance = {
        label: ([max(entry["kl"], 0.0) ** 0.5 for entry in apart], [entry[name] for entry in apart])
        for label, name in names.items()
        if apart and name in apart[0] and name not in parts
    }

    def over_episodes(title: str, ylabel: str, lines: Mapping[str, str]) -> Plot:
        return plot_history(
            training, lines, x="episode", title=title, xlabel="episodes (sampled responses)", ylabel=ylabel
        )

    return {
        "rewards": over_episodes("Reward during PPO", "reward per response", names),
        "kl": over_episodes(
            "Distance from the reference during PPO", "KL to the reference (nats per response)", {"KL": "kl"}
        ),
        "response_length": over_episodes(
            "Length of sampled responses during PPO", "response length (tokens)", {"length": "response_length"}
        ),
        "clip_fraction": over_episodes(
            "How often PPO's clipping holds an update back", "fraction of clipped ratios", {"clipped": "clip_fraction"}
        ),
        "overoptimization": Plot(
            title="Reward against distance from the reference",
            xlabel="square root of the KL to the reference (KL in nats per response)",
            ylabel="reward per response",
            lines=against_distance,
            points_only=True,
        ),
    }


# ---- best of n ----
#
# Best of n: the value, by another measure, of keeping the response with the highest reward-model score among n.


def best_of_n(scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]], n: int) -> float:
    """Return the mean over prompts of `best_of_n_each`."""
    means = best_of_n_each(scores, values, n)
    return math.fsum(means) / len(means)


def best_of_n_each(scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]], n: int) -> list[float]:
    """Return per prompt the mean value of the best-scored response among n, over all choices of n samples.

    The unbiased estimator of Nakano et al. 2021 (WebGPT, arXiv:2112.09332, appendix I): of N samples, the one with k
    lower scores is the best of n in C(k, n - 1) of C(N, n) choices. Of equal scores the later one counts as higher.

    Args:
        scores: the scores to choose by, N numbers per prompt.
        values: the values to average, in the same order.
        n: from 1 to N.

    Raises:
        InputError: when there are no prompts, the two do not match, or a prompt has fewer than n samples.
    """
    if not scores or [len(row) for row in scores] != [len(row) for row in values]:
        raise InputError("best of n: there must be as many values as scores for each prompt, and at least one prompt")
    if not 1 <= n <= min(map(len, scores)):
        raise InputError(f"n={n}: expected at least 1 and at most {min(map(len, scores))}, the samples per prompt")
    means = []
    for row, own in zip(scores, values, strict=True):
        order = sorted(range(len(row)), key=row.__getitem__)
        means.append(math.fsum(share * own[index] for share, index in zip(_shares(len(row), n), order, strict=True)))
    return means


@cache
def _shares(samples: int, n: int) -> tuple[float, ...]:
    """Return the share of all choices of n with the sample with 0, 1, 2 ... lower scores as the best."""
    choices = math.comb(samples, n)
    return tuple(math.comb(below, n - 1) / choices for below in range(samples))
