"""Reward-model over-optimisation in miniature (Gao et al. 2022, arXiv:2210.10760), and what an ensemble does to it.

    python benchmarks/overoptimisation.py --seeds 1 2 3 --output_dir outputs/overoptimisation

For each seed, five reward models are trained on a few comparisons of the embedded world each, a quarter of them with
the wrong label. Responses of one fine-tuned model are then chosen by best of n, and the model is trained by PPO, for
the score of one of them and for the least score of all. One model that has all the comparisons is chosen by as well.
The gold reward is taken beside. Writes `overoptimisation.png`, gold reward against the square root of the KL, and
`overoptimisation.md`, the peaks and ends. Finished parts are reused.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "configs"
COMPARISONS = {"num_pairs": 200, "label_noise": 0.25, "num_train_epochs": 3}
PPO = {"kl_coef": 0.05, "max_steps": 960, "logging_steps": 16, "lr_scheduler_type": "constant"}
MEMBERS, PROMPTS, SAMPLES, RESPONSE_LENGTH = 5, 120, 128, 40
ALONE, WORST, ALL = "one alone", f"worst of {MEMBERS}", f"one with the comparisons of {MEMBERS}"
METHODS = {"best_of_n": "best of n", "ppo": "PPO"}
SMOOTHING = 3
# Square roots of the KL to the start, and gold rewards there.
Curve = tuple[list[float], list[float]]


def recipe(name: str, output_dir: Path, *flags: Any) -> Path:
    """Run a recipe. Returns its folder; if it has finished there before, nothing is done."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), "--output_dir", str(output_dir), *map(str, flags)]
    subprocess.run(command, check=True)
    return output_dir


def reward_models(folder: Path, seed: int, model: Path) -> list[Path]:
    """Five models on comparisons of their own, and one on as many as the five have together."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = (CONFIGS / "reward" / "world.yaml").read_text().splitlines()
    kept = [line for line in kept if line.partition(":")[0] not in COMPARISONS]
    config = folder / "reward.yaml"
    config.write_text("\n".join([*kept, *(f"{name}: {value}" for name, value in COMPARISONS.items())]) + "\n")
    flags = ["--config", config, "--model_name_or_path", model, "--num_eval_prompts", PROMPTS]
    folders = [
        recipe("reward", folder / f"reward_{number}", *flags, "--seed", 100 * seed + number)
        for number in range(1, MEMBERS + 1)
    ]
    all_pairs = MEMBERS * COMPARISONS["num_pairs"]
    return [*folders, recipe("reward", folder / "reward_all", *flags, "--seed", 100 * seed, "--num_pairs", all_pairs)]


# ---- best of n ----


def best_of_n_curves(folder: Path, model: Path, models: list[Path], samples: Path) -> dict[str, list[Curve]]:
    """Gold reward of the best of 1, 2, 4 ... samples by each model alone, by the least of five, and by `ALL`."""
    from hfllm.evaluation.best_of_n import best_of_n
    from hfllm.scaling.laws import best_of_n_kl

    drawn = draw_samples(model, samples)
    file = folder / "scores.json"
    if not file.is_file():
        file.write_text(json.dumps([scores_of(path, drawn) for path in models]))
    *alone, together = json.loads(file.read_text())
    sizes = [2**power for power in range(SAMPLES.bit_length())]

    def curve(scores: list[list[float]]) -> Curve:
        return [best_of_n_kl(n) ** 0.5 for n in sizes], [best_of_n(scores, drawn["gold"], n) for n in sizes]

    calibrated = [standardised(scores) for scores in alone]
    worst = [[min(each) for each in zip(*rows, strict=True)] for rows in zip(*calibrated, strict=True)]
    return {ALONE: [curve(scores) for scores in alone], WORST: [curve(worst)], ALL: [curve(together)]}


def draw_samples(model: Path, file: Path) -> dict[str, list]:
    """Held-out prompts, samples of the fine-tuned model for each, and their gold rewards; kept in a file."""
    if file.is_file():
        return json.loads(file.read_text())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfllm.data.rubric import gold_reward
    from hfllm.data.world import World
    from hfllm.evaluation.responses import sample_responses

    tasks = World(0).evaluation_tasks(3 * PROMPTS)
    random.Random(0).shuffle(tasks)
    tasks = tasks[:PROMPTS]
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    responses = sample_responses(
        policy, tokenizer, prompts, RESPONSE_LENGTH, num_return_sequences=SAMPLES, batch_size=4
    )
    gold = [[gold_reward(text, task.gold) for text in texts] for task, texts in zip(tasks, responses, strict=True)]
    drawn = {"prompts": prompts, "responses": responses, "gold": gold}
    file.write_text(json.dumps(drawn))
    return drawn


def scores_of(path: Path, drawn: dict[str, list]) -> list[list[float]]:
    """A reward model's scores of all samples."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hfllm.data.formats import as_completion
    from hfllm.rewards import RewardModel

    reward = RewardModel(AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    return [
        reward([prompt] * len(texts), [as_completion(prompt, text) for text in texts])
        for prompt, texts in zip(drawn["prompts"], drawn["responses"], strict=True)
    ]


def standardised(scores: list[list[float]]) -> list[list[float]]:
    """With mean 0 and spread 1 over all samples, as `RewardEnsemble.calibrate` has it on the starting model's."""
    values = [score for row in scores for score in row]
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    return [[(score - mean) / spread for score in row] for row in scores]


# ---- PPO ----


def ppo_curves(folder: Path, seed: int, model: Path, models: list[Path], alone: int) -> dict[str, list[Curve]]:
    """Gold reward on the way, for some of the models alone and for the least of five."""
    flags = ["--config", CONFIGS / "rlhf" / "world.yaml", "--seed", seed, "--model_name_or_path", model]
    flags += [word for name, value in PPO.items() for word in (f"--{name}", value)]

    def curve(name: str, rewards: list[Path]) -> Curve:
        output = recipe("rlhf", folder / name, *flags, "--reward_model_name_or_path", *rewards)
        start = json.loads((output / "report.json").read_text())["metrics"]["gold_reward_before"]
        return smoothed(start, json.loads((output / "trainer_state.json").read_text())["log_history"])

    singles = [curve(f"ppo_{number + 1}", [models[number]]) for number in range(alone)]
    return {ALONE: singles, WORST: [curve("ppo_worst", models[:MEMBERS])]}


def smoothed(start: float, log: list[dict[str, Any]]) -> Curve:
    """From the fine-tuned model's gold reward on unseen prompts, through means over a few entries of the log."""
    entries = [entry for entry in log if "kl" in entry]
    windows = [entries[at : at + SMOOTHING] for at in range(len(entries) - SMOOTHING + 1)]
    kl, gold = (
        [statistics.mean(entry[name] for entry in window) for window in windows]
        for name in ("kl", "rewards/gold_reward")
    )
    return [0.0, *(max(value, 0.0) ** 0.5 for value in kl)], [start, *gold]


# ---- what is written ----


def cells_of(curve: Curve) -> list[float]:
    distance, gold = curve
    top = max(range(len(gold)), key=gold.__getitem__)
    return [gold[0], gold[top], distance[top], gold[-1], distance[-1], gold[top] - gold[-1]]


def table(by_seed: dict[int, dict[str, list[Curve]]]) -> str:
    """Gold reward at the start, at its peak and at the end; means over the models alone of a seed, and over seeds."""
    lines = ["| | start | peak | at sqrt(KL) | end | at sqrt(KL) | lost |", "| - | - | - | - | - | - | - |"]
    kinds: dict[str, list[list[float]]] = {}

    def line(name: str, rows: list[list[float]]) -> list[float]:
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in means) + " |")
        return means

    for seed, runs in by_seed.items():
        for name, curves in runs.items():
            count = f", mean of {len(curves)}" if len(curves) > 1 else ""
            kinds.setdefault(name, []).append(line(f"seed {seed}, {name}{count}", list(map(cells_of, curves))))
    for name, rows in kinds.items():
        line(f"mean over seeds, {name}", rows)
    return "\n".join(lines)


def draw(curves: dict[str, dict[int, dict[str, list[Curve]]]], path: Path) -> None:
    """A row of panels a method, a panel a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {ALONE: "tab:gray", WORST: "tab:blue", ALL: "tab:orange"}
    seeds = len(next(iter(curves.values())))
    figure, axes = pyplot.subplots(
        len(curves), seeds, figsize=(4.5 * seeds, 3.6 * len(curves)), sharey="row", squeeze=False
    )
    for row, (method, by_seed) in zip(axes, curves.items(), strict=True):
        for axis, (seed, runs) in zip(row, by_seed.items(), strict=True):
            for name, lines in runs.items():
                for number, (distance, gold) in enumerate(lines):
                    style = {"linewidth": 1, "alpha": 0.6} if name == ALONE else {"linewidth": 2}
                    label = None if number else name
                    axis.plot(distance, gold, color=colors[name], marker=".", markersize=3, label=label, **style)
            axis.set(title=f"{METHODS[method]}, seed {seed}", xlabel="square root of KL (nats a response)")
        row[0].set_ylabel("gold reward")
        row[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--alone", type=int, default=1, help="How many of the models PPO maximises alone.")
    parser.add_argument("--model_name_or_path", type=Path, help="The fine-tuned model, if there is one.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/overoptimisation"))
    args = parser.parse_args()
    if not 1 <= args.alone <= MEMBERS:
        parser.error(f"--alone {args.alone}: expected 1 to {MEMBERS}")
    folder = args.output_dir
    model = args.model_name_or_path or recipe("sft", folder / "sft", "--seed", args.seeds[0])
    curves: dict[str, dict[int, dict[str, list[Curve]]]] = {method: {} for method in args.methods}
    for seed in args.seeds:
        own = folder / f"seed-{seed}"
        models = reward_models(own, seed, model)
        if "best_of_n" in curves:
            curves["best_of_n"][seed] = best_of_n_curves(own, model, models, folder / "samples.json")
        if "ppo" in curves:
            curves["ppo"][seed] = ppo_curves(own, seed, model, models, args.alone)
    draw(curves, folder / "overoptimisation.png")
    text = "\n\n".join(f"{METHODS[method]}\n\n{table(by_seed)}" for method, by_seed in curves.items())
    (folder / "overoptimisation.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
