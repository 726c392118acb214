"""Reward-model over-optimization in miniature (Gao et al. 2022, arXiv:2210.10760), and the effect of an ensemble.

    python benchmarks/overoptimization.py --seeds 1 2 3 --output_dir outputs/overoptimization

All seeds begin from one fine-tuned model, the first seed's. For each, reward models are trained on the same few
comparisons of the embedded world with many wrong labels, and PPO maximizes their score with a small KL penalty for a
long time: of some of them, each alone, and of the lowest score of all. The gold (exact) reward is logged. Writes
`overoptimization.png`, gold reward against the square root of the KL, and `overoptimization.md`, the peaks and ends.
Finished runs are reused.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COMPARISONS = {"num_pairs": 400, "label_noise": 0.25, "num_train_epochs": 3}
PPO = {"augment": 0, "kl_coef": 0.05, "max_steps": 960, "logging_steps": 16, "lr_scheduler_type": "constant"}
MEMBERS = 5
WORST = f"worst of {MEMBERS}"
SMOOTHING = 3
# Square roots of the KL to the start, and gold rewards there.
Curve = tuple[list[float], list[float]]


def run(output_dir: Path, *flags: str) -> Curve:
    """Run the main job once, and return its curve."""
    command = [sys.executable, str(ROOT / "recipes" / "rlhf.py"), "--output_dir", str(output_dir), *flags]
    subprocess.run(command, check=True)
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return curve(json.loads((output_dir / "report.json").read_text())["metrics"]["gold_reward_before"], log)


def curve(start: float, log: list[dict[str, Any]]) -> Curve:
    """Return the curve from the fine-tuned model's gold reward on unseen prompts, through means of log entries."""
    entries = [entry for entry in log if "kl" in entry]
    windows = [entries[at : at + SMOOTHING] for at in range(len(entries) - SMOOTHING + 1)]
    kl, gold = (
        [statistics.mean(entry[name] for entry in window) for window in windows]
        for name in ("kl", "rewards/gold_reward")
    )
    return [0.0, *(max(value, 0.0) ** 0.5 for value in kl)], [start, *gold]


def runs_of(folder: Path, seed: int, alone: int, model: Path | None) -> dict[str, Curve]:
    """Run PPO against single reward models and against an ensemble of them.

    Args:
        folder: the seed's folder.
        seed: seed of comparisons, reward models and PPO.
        alone: number of members that are also maximized alone.
        model: the fine-tuned model; `None` makes it first, under `folder / "single"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = (ROOT / "recipes" / "configs" / "reward" / "world.yaml").read_text().splitlines()
    kept = [line for line in world if line.partition(":")[0] not in COMPARISONS]
    config = folder / "reward.yaml"
    config.write_text("\n".join([*kept, *(f"{name}: {value}" for name, value in COMPARISONS.items())]) + "\n")
    ppo = ["--config", str(ROOT / "recipes" / "configs" / "rlhf" / "world.yaml"), "--seed", str(seed)]
    ppo += [word for name, value in PPO.items() for word in (f"--{name}", str(value))]
    trained = [*ppo, "--reward_config", str(config)]
    first = run(folder / "single", *trained, *(["--model_name_or_path", str(model)] if model else []))
    start = ["--model_name_or_path", str(model or folder / "single" / "sft")]
    together = run(folder / "ensemble", *trained, *start, "--num_reward_models", str(MEMBERS))
    curves = {"model 1 alone": first}
    for number in range(2, alone + 1):
        member = ["--reward_model_name_or_path", str(folder / "ensemble" / f"reward_{number}")]
        curves[f"model {number} alone"] = run(folder / f"single-{number}", *ppo, *start, *member)
    return {**curves, WORST: together}


def table(curves: dict[int, dict[str, Curve]]) -> str:
    """Return a table of gold reward at the start, peak and end of each run, and medians of both kinds."""
    lines = ["| | start | peak | at sqrt(KL) | end | at sqrt(KL) | lost |", "| - | - | - | - | - | - | - |"]
    kinds: dict[str, list[list[float]]] = {"models alone": [], WORST: []}
    for seed, runs in curves.items():
        for name, (distance, gold) in runs.items():
            top = max(range(len(gold)), key=gold.__getitem__)
            cells = [gold[0], gold[top], distance[top], gold[-1], distance[-1], gold[top] - gold[-1]]
            kinds[WORST if name == WORST else "models alone"].append(cells)
            lines.append(f"| seed {seed}, {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    for name, rows in kinds.items():
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        lines.append(f"| median, {name} | " + " | ".join(f"{cell:.3f}" for cell in medians) + " |")
    return "\n".join(lines)


def draw(curves: dict[int, dict[str, Curve]], path: Path) -> None:
    """Draw a panel per seed, with one scale for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), sharey=True, squeeze=False)
    for axis, (seed, runs) in zip(axes[0], curves.items(), strict=True):
        for name, (distance, gold) in runs.items():
            width = 2 if name == WORST else 1
            axis.plot(distance, gold, label=name, marker=".", markersize=4, linewidth=width)
        axis.set(title=f"seed {seed}", xlabel="square root of KL (nats per response)")
    axes[0][0].set_ylabel("gold reward of sampled responses")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--alone", type=int, default=2, help="How many members are also maximized alone.")
    parser.add_argument("--model_name_or_path", type=Path, help="The fine-tuned model, if there is one.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/overoptimization"))
    args = parser.parse_args()
    curves, model = {}, args.model_name_or_path
    for seed in args.seeds:
        folder = args.output_dir / f"seed-{seed}"
        curves[seed] = runs_of(folder, seed, args.alone, model)
        model = model or folder / "single" / "sft"
    draw(curves, args.output_dir / "overoptimization.png")
    text = table(curves)
    (args.output_dir / "overoptimization.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
