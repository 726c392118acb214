"""Over-optimization without PPO: best of n (Gao et al. 2022, arXiv:2210.10760), and the effect of ensembles.

    python benchmarks/best_of_n.py --seeds 1 2 3 --output_dir outputs/best_of_n

For each seed, five reward models are trained on a few comparisons of the embedded world each, a quarter of them with
the wrong label, and one on as many as the five have together. Of n samples of one fine-tuned model, the one is kept
with the highest score by one of the five, or by the lowest or the mean of the five; the gold reward of the
kept ones, the world's exact score, is reported. Writes `best_of_n.png`, gold reward against the square root of the
KL, and `best_of_n.md`,
the peaks and ends, and how much less the ensembles lose from their peaks than their members, with intervals from
resampled prompts. Finished parts are reused.
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
MEMBERS, PROMPTS, SAMPLES, RESPONSE_LENGTH, RESAMPLES = 5, 180, 512, 40, 1000
ALONE, WORST, MEAN = "one alone", f"worst of {MEMBERS}", f"mean of {MEMBERS}"
ALL = f"one with the comparisons of {MEMBERS}"
# Gold reward of the best of 1, 2, 4 ... samples, and of each prompt.
Curve = list[list[float]]
SIZES = [2**power for power in range(SAMPLES.bit_length())]


def recipe(name: str, output_dir: Path, *flags: Any) -> Path:
    """Run a recipe unless it has finished before, and return its folder."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), "--output_dir", str(output_dir), *map(str, flags)]
    subprocess.run(command, check=True)
    return output_dir


def reward_models(folder: Path, seed: int, model: Path, starts: list[Path]) -> list[Path]:
    """Train five models on separate comparisons, and one on as many as the five have together.

    Args:
        folder: the seed's folder.
        seed: seed of comparisons and heads.
        model: the fine-tuned model, from which the last one starts.
        starts: the models from which the five start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = (CONFIGS / "reward" / "world.yaml").read_text().splitlines()
    kept = [line for line in kept if line.partition(":")[0] not in COMPARISONS]
    config = folder / "reward.yaml"
    config.write_text("\n".join([*kept, *(f"{name}: {value}" for name, value in COMPARISONS.items())]) + "\n")

    def train(name: str, number: int, start: Path, *flags: Any) -> Path:
        flags = ("--config", config, "--model_name_or_path", start, "--num_eval_prompts", PROMPTS, *flags)
        return recipe("reward", folder / name, *flags, "--seed", 100 * seed + number)

    members = [train(f"reward_{number}", number, start) for number, start in enumerate(starts, 1)]
    return [*members, train("reward_all", 0, model, "--num_pairs", MEMBERS * COMPARISONS["num_pairs"])]


def draw_samples(model: Path, file: Path) -> dict[str, list]:
    """Draw samples of the fine-tuned model for held-out prompts, with gold rewards; store them in a file."""
    if file.is_file():
        return json.loads(file.read_text())
    from transformers import AutoModelForCausalLM

    from hfllm.data.world.rubric import gold_score
    from hfllm.data.world.world import World
    from hfllm.generation.responses import sample_responses
    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    tasks = World(0).evaluation_tasks(3 * PROMPTS)
    random.Random(0).shuffle(tasks)
    tasks = tasks[:PROMPTS]
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    policy = saved_model(AutoModelForCausalLM, str(model))
    tokenizer = saved_tokenizer(str(model))
    responses = sample_responses(
        policy, tokenizer, prompts, RESPONSE_LENGTH, num_return_sequences=SAMPLES, batch_size=4
    )
    gold = [[gold_score(text, task.gold) for text in texts] for task, texts in zip(tasks, responses, strict=True)]
    drawn = {"prompts": prompts, "responses": responses, "gold": gold}
    file.write_text(json.dumps(drawn))
    return drawn


def scores_of(path: Path, drawn: dict[str, list]) -> list[list[float]]:
    """Return a reward model's scores of all samples."""
    from transformers import AutoModelForSequenceClassification

    from hfllm.data.formats import as_completion
    from hfllm.models.loading.saved import saved_model, saved_tokenizer
    from hfllm.rewards.models import RewardModel

    reward = RewardModel(
        saved_model(AutoModelForSequenceClassification, str(path)),
        saved_tokenizer(str(path)),
    )
    scores = []
    for prompt, texts in zip(drawn["prompts"], drawn["responses"], strict=True):
        different = list(dict.fromkeys(texts))
        found = reward([prompt] * len(different), [as_completion(prompt, text) for text in different])
        score = dict(zip(different, found, strict=True))
        scores.append([score[text] for text in texts])
    return scores


def standardized(scores: list[list[float]]) -> list[list[float]]:
    """Scale scores to mean 0 and spread 1 over all samples, as `RewardEnsemble.calibrate` does."""
    values = [score for row in scores for score in row]
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    return [[(score - mean) / spread for score in row] for row in scores]


def curves_of(scores: list[list[list[float]]], gold: list[list[float]]) -> dict[str, list[Curve]]:
    """Return the best of 1, 2, 4 ... samples by each of five, by their minimum, their mean, and by `ALL`."""
    from hfllm.evaluation.alignment import best_of_n_each

    *alone, together = scores
    calibrated = [*zip(*map(standardized, alone), strict=True)]

    def curve(own: list[list[float]]) -> Curve:
        return [best_of_n_each(own, gold, n) for n in SIZES]

    worst, mean = (
        [[aggregate(each) for each in zip(*rows, strict=True)] for rows in calibrated]
        for aggregate in (min, statistics.fmean)
    )
    return {ALONE: list(map(curve, alone)), WORST: [curve(worst)], MEAN: [curve(mean)], ALL: [curve(together)]}


def distances() -> list[float]:
    """Return the square roots of the KL to the fine-tuned model, in the order of `SIZES`."""
    from hfllm.scaling.laws import best_of_n_kl

    return [best_of_n_kl(n) ** 0.5 for n in SIZES]


def table(by_seed: dict[int, dict[str, list[Curve]]]) -> str:
    """Return a table of gold reward at start, peak and end; means over the single models of a seed, and over seeds."""
    lines = ["| | start | peak | at sqrt(KL) | end | at sqrt(KL) | lost |", "| - | - | - | - | - | - | - |"]
    kinds: dict[str, list[list[float]]] = {}

    def cells(curve: Curve) -> list[float]:
        distance, gold = distances(), list(map(statistics.fmean, curve))
        top = max(range(len(gold)), key=gold.__getitem__)
        return [gold[0], gold[top], distance[top], gold[-1], distance[-1], gold[top] - gold[-1]]

    def line(name: str, rows: list[list[float]]) -> list[float]:
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in means) + " |")
        return means

    for seed, runs in by_seed.items():
        for name, curves in runs.items():
            count = f", mean over {len(curves)}" if len(curves) > 1 else ""
            kinds.setdefault(name, []).append(line(f"seed {seed}, {name}{count}", list(map(cells, curves))))
    for name, rows in kinds.items():
        line(f"mean over seeds, {name}", rows)
    return "\n".join(lines)


def spared(by_seed: dict[int, dict[str, list[Curve]]]) -> str:
    """Return how much less the ensembles lose than single members, with 95% intervals over resampled prompts."""
    import numpy

    generator = numpy.random.default_rng(0)
    picks = [numpy.arange(PROMPTS), *generator.integers(0, PROMPTS, (RESAMPLES, PROMPTS))]

    def lost(curves: list[Curve]) -> "numpy.ndarray":
        """Return the mean over these curves, (1 + RESAMPLES,)."""
        each = numpy.array(curves)
        gold = numpy.stack([each[:, :, pick].mean(-1) for pick in picks])
        return (gold.max(-1) - gold[..., -1]).mean(-1)

    lines = ["| lost less than one alone | " + " | ".join(f"seed {seed}" for seed in by_seed) + " | mean of seeds |"]
    lines.append("|" + " - |" * (len(by_seed) + 2))
    for name in (WORST, MEAN):
        gains = [lost(runs[ALONE]) - lost(runs[name]) for runs in by_seed.values()]
        cells = []
        for gain in (*gains, numpy.mean(gains, axis=0)):
            low, high = numpy.quantile(gain[1:], (0.025, 0.975))
            cells.append(f"{gain[0]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(by_seed: dict[int, dict[str, list[Curve]]], path: Path) -> None:
    """Draw a panel per seed, with one scale for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {ALONE: "tab:gray", WORST: "tab:blue", MEAN: "tab:green", ALL: "tab:orange"}
    figure, axes = pyplot.subplots(1, len(by_seed), figsize=(4.5 * len(by_seed), 3.8), sharey=True, squeeze=False)
    for axis, (seed, runs) in zip(axes[0], by_seed.items(), strict=True):
        for name, curves in runs.items():
            for number, curve in enumerate(curves):
                style = {"linewidth": 1, "alpha": 0.6} if name == ALONE else {"linewidth": 2}
                style |= {"color": colors[name], "marker": ".", "label": None if number else name}
                axis.plot(distances(), list(map(statistics.fmean, curve)), **style)
        axis.set(title=f"seed {seed}", xlabel="square root of KL (nats per response)")
    axes[0][0].set_ylabel("gold reward of the best of n")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model_name_or_path", type=Path, help="The fine-tuned model, if there is one.")
    parser.add_argument(
        "--pretraining_seeds", type=int, nargs=MEMBERS, help="Pretrain and fine-tune a model for each of the five."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/best_of_n"))
    args = parser.parse_args()
    folder, by_seed = args.output_dir, {}
    model = args.model_name_or_path or recipe("sft", folder / "sft", "--seed", args.seeds[0])
    starts = [recipe("sft", folder / f"sft-{each}", "--seed", each) for each in args.pretraining_seeds or []]
    for seed in args.seeds:
        own = folder / f"seed-{seed}"
        models = reward_models(own, seed, model, starts or [model] * MEMBERS)
        drawn, file = draw_samples(model, folder / "samples.json"), own / "scores.json"
        if not file.is_file():
            file.write_text(json.dumps([scores_of(path, drawn) for path in models]))
        by_seed[seed] = curves_of(json.loads(file.read_text()), drawn["gold"])
    draw(by_seed, folder / "best_of_n.png")
    text = f"{table(by_seed)}\n\n{spared(by_seed)}"
    (folder / "best_of_n.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
