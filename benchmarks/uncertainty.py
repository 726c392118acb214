"""Who knows when it is wrong? A fine-tuned model of the embedded world and the same after PPO, judged exactly.

    hfllm rlhf --output_dir outputs/rlhf
    python benchmarks/uncertainty.py --rlhf outputs/rlhf --output_dir outputs/uncertainty

For held-out prompts each model answers greedily and ten times by sampling. Printed are the AUROC of being wrong with
its error, inside families of prompts, and with shuffled labels; calibration; what conformal risk control and
learn-then-test do over 200 splits; what the samples cost in tokens; and, on questions about facts, which of the ten
is best kept. Writes `uncertainty.json` and a plot of risk over coverage for each model.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfllm.data.world.rubric import RIGHT, gold_meaning, gold_score
from hfllm.data.world.vocabulary import WELL_SAID
from hfllm.data.world.world import Task, World
from hfllm.grounding.abstention import control_risk, learn_then_test, over_splits
from hfllm.grounding.uncertainty import CONFIDENCE, Answered, answer_with_samples, p_true, sampling_cost, uncertainties
from hfllm.grounding.verification import best_rewarded, compare_choices, contains, first_supported, majority_of_meaning
from hfllm.models.loading.saved import saved_model, saved_tokenizer
from hfllm.outputs.report import markdown_table
from hfllm.outputs.statistics import auroc_within, ece, risk_coverage_plot, uncertainty_metrics
from hfllm.rewards.models import RewardModel


def load(folder: Path, model_class: type = AutoModelForCausalLM) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return saved_model(model_class, str(folder), dtype="float32").eval(), saved_tokenizer(str(folder))


def facts_of(world: World, task: Task) -> list[str]:
    animal = task.key.split()[1]
    return [WELL_SAID[name].format(x=animal, value=value) for name, value in world.facts[animal].items()]


def is_right(text: str, task: Task) -> float:
    return float(gold_score(text, task.gold) >= RIGHT)


def measure(
    name: str, rows: list[Answered], tasks: list[Task], others: dict[str, np.ndarray], folder: Path
) -> dict[str, float | None]:
    """Print and return the figures of one model's uncertainty."""
    meanings = [
        [gold_meaning(answer.text, task.gold) for answer in (row.given, *row.samples)]
        for row, task in zip(rows, tasks, strict=True)
    ]
    wrong = np.array([not is_right(row.given.text, task) for row, task in zip(rows, tasks, strict=True)])
    numbers = {**uncertainties(rows, meanings), **others}
    metrics = uncertainty_metrics(numbers, wrong)
    cost = ", ".join(f"{key} {value:.3g}" for key, value in sampling_cost(rows).items())
    print(f"\n## {name}: {wrong.mean():.3f} of {len(wrong)} greedy answers wrong; {cost}\n")
    table = []
    for measure, values in numbers.items():
        within = auroc_within(values, wrong, [task.family for task in tasks])
        calibrated = ece(CONFIDENCE[measure](values), ~wrong) if measure in CONFIDENCE else None
        metrics |= {f"{measure}_auroc_within": within, f"{measure}_ece": calibrated}
        shown = {part: metrics.get(f"{measure}_{part}") for part in ("auroc", "auroc_se", "auroc_shuffled")}
        shown |= {"within families": within, "AURC": metrics[f"{measure}_aurc"], "ECE": calibrated}
        table.append(
            {"measure": measure, **{key: "" if value is None else f"{value:.3f}" for key, value in shown.items()}}
        )
    print("\n".join([*markdown_table(table), ""]))
    table = []
    for measure in ("sequence_probability", "self_consistency", "semantic_entropy"):
        fits = {f"control_risk {alpha}": partial(control_risk, alpha=alpha) for alpha in (0.02, 0.05, 0.1)}
        fits["learn_then_test 0.1"] = partial(learn_then_test, alpha=0.1, delta=0.1)
        for method, fit in fits.items():
            found = over_splits(numbers[measure], wrong, fit)
            metrics |= {f"{measure} {method} {key}": value for key, value in found.items()}
            table.append(
                {"measure": measure, "method": method, **{key: f"{value:.4f}" for key, value in found.items()}}
            )
    print("\n".join(markdown_table([{**{key: "" for row in table for key in row}, **row} for row in table])))
    # No guarantee holds for other prompts: a threshold of known phrasings, used on new ones.
    new = np.array([task.is_new_phrasing for task in tasks])
    surprise = numbers["sequence_probability"]
    found = control_risk(surprise[~new], wrong[~new], 0.05).answers(surprise[new])
    metrics["new_phrasings_risk"], metrics["new_phrasings_coverage"] = float((found * wrong[new]).mean()), found.mean()
    moved = f"risk {metrics['new_phrasings_risk']:.4f}, coverage {metrics['new_phrasings_coverage']:.3f}"
    print(f"\ncontrol_risk 0.05 by sequence_probability on known phrasings, used on new ones: {moved}")
    risk_coverage_plot(numbers, wrong, f"Risk over coverage: {name}").draw(folder / f"{name}.png")
    return metrics


def choose(rows: list[Answered], tasks: list[Task], reward: RewardModel, world: World) -> dict[str, float]:
    """Print and return how right the kept answer is, on questions about facts, by the way it was chosen."""
    facts = [place for place, task in enumerate(tasks) if task.family == "fact"]
    rows, tasks = [rows[place] for place in facts], [tasks[place] for place in facts]
    samples = [[sample.text for sample in row.samples] for row in rows]
    # What a perfect search would find: what the world says of the animal.
    passages = [facts_of(world, task) for task in tasks]
    right = [[is_right(text, task) for text in texts] for texts, task in zip(samples, tasks, strict=True)]
    meanings = [[gold_meaning(text, task.gold) for text in texts] for texts, task in zip(samples, tasks, strict=True)]
    choices = {
        "majority_of_meaning": majority_of_meaning(samples, meanings),
        "best_rewarded": best_rewarded([row.prompt for row in rows], samples, reward),
        "first_supported": first_supported(samples, passages, contains),
    }
    greedy = [is_right(row.given.text, task) for row, task in zip(rows, tasks, strict=True)]
    metrics, table = compare_choices(right, choices, greedy)
    print("\n".join(["", *markdown_table(table)]))
    return metrics


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rlhf", type=Path, default=Path("outputs/rlhf"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/uncertainty"))
    parser.add_argument("--num_eval_prompts", type=int, default=360)
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--max_new_tokens", type=int, default=40)
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    world = World(0)
    tasks = world.evaluation_tasks(args.num_eval_prompts, seed=5)
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    reward = RewardModel(*load(args.rlhf / "reward", AutoModelForSequenceClassification))
    metrics = {}
    for name, folder in (("sft", args.rlhf / "sft"), ("ppo", args.rlhf)):
        model, tokenizer = load(folder)
        start = time.perf_counter()
        rows = answer_with_samples(model, tokenizer, prompts, args.num_samples, args.max_new_tokens)
        print(f"{name}: {len(rows)} prompts x {1 + args.num_samples} in {time.perf_counter() - start:.0f} s")
        given = [[{"role": "assistant", "content": row.given.text}] for row in rows]
        others = {
            "p_true": p_true(model, tokenizer, rows),
            "reward_model": -np.array(reward(prompts=prompts, completions=given)),
        }
        metrics[name] = measure(name, rows, tasks, others, args.output_dir)
        metrics[name] |= choose(rows, tasks, reward, world)
    (args.output_dir / "uncertainty.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
