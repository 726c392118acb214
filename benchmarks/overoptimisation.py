"""Reward-model over-optimisation in miniature (Gao et al. 2022, arXiv:2210.10760), and what an ensemble does to it.

    python benchmarks/overoptimisation.py --seeds 1 2 3 --output_dir outputs/overoptimisation

All seeds begin from one fine-tuned model, the first seed's. For each, reward models are trained on the same few
comparisons of the embedded world with many wrong labels, and PPO maximises their score with a small KL penalty for
long: once against one of them, once against the least score of several, itself among them. The gold reward is logged
beside. Writes `overoptimisation.png`, gold reward against the square root of the KL, and `overoptimisation.md`, the
peaks and ends. Finished runs are reused.
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
PPO = {"kl_coef": 0.05, "max_steps": 960, "logging_steps": 16, "lr_scheduler_type": "constant"}
MEMBERS = 5
SMOOTHING = 3


def run(output_dir: Path, *flags: str) -> list[dict[str, Any]]:
    """One run of the main job. Returns its log."""
    command = [sys.executable, str(ROOT / "recipes" / "rlhf.py"), "--output_dir", str(output_dir), *flags]
    subprocess.run(command, check=True)
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def both(folder: Path, seed: int, model: Path | None) -> dict[str, list[dict[str, Any]]]:
    """The logs of PPO against one reward model and against an ensemble.

    Args:
        folder: of the seed.
        seed: of comparisons, reward models and PPO.
        model: the fine-tuned model; `None` makes it first, under `folder / "single"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = (ROOT / "recipes" / "configs" / "reward" / "world.yaml").read_text().splitlines()
    kept = [line for line in world if line.partition(":")[0] not in COMPARISONS]
    config = folder / "reward.yaml"
    config.write_text("\n".join([*kept, *(f"{name}: {value}" for name, value in COMPARISONS.items())]) + "\n")
    ppo = ["--config", str(ROOT / "recipes" / "configs" / "rlhf" / "world.yaml"), "--reward_config", str(config)]
    ppo += [word for name, value in PPO.items() for word in (f"--{name}", str(value))]
    ppo += ["--seed", str(seed)]
    single = run(folder / "single", *ppo, *(["--model_name_or_path", str(model)] if model else []))
    ppo += ["--model_name_or_path", str(model or folder / "single" / "sft"), "--num_reward_models", str(MEMBERS)]
    return {"one reward model": single, f"worst of {MEMBERS}": run(folder / "ensemble", *ppo)}


def curve(log: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Square root of the KL, and gold reward, both as means over a few neighbouring entries."""
    entries = [entry for entry in log if "kl" in entry]
    points = [
        [
            statistics.mean(entry[name] for entry in entries[at : at + SMOOTHING])
            for name in ("kl", "rewards/gold_reward")
        ]
        for at in range(len(entries) - SMOOTHING + 1)
    ]
    return [max(kl, 0.0) ** 0.5 for kl, _ in points], [gold for _, gold in points]


def table(curves: dict[int, dict[str, tuple[list[float], list[float]]]]) -> str:
    lines = ["| | first | peak | at sqrt(KL) | end | at sqrt(KL) | lost |", "| - | - | - | - | - | - | - |"]
    lost: dict[str, list[float]] = {}
    for seed, pair in curves.items():
        for name, (distance, gold) in pair.items():
            top = max(range(len(gold)), key=gold.__getitem__)
            cells = [gold[0], gold[top], distance[top], gold[-1], distance[-1], gold[top] - gold[-1]]
            lost.setdefault(name, []).append(cells[-1])
            lines.append(f"| seed {seed}, {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    for name, values in lost.items():
        lines.append(f"| median, {name} | | | | | | {statistics.median(values):.3f} |")
    return "\n".join(lines)


def draw(curves: dict[int, dict[str, tuple[list[float], list[float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), sharey=True, squeeze=False)
    for axis, (seed, pair) in zip(axes[0], curves.items(), strict=True):
        for name, (distance, gold) in pair.items():
            axis.plot(distance, gold, label=name)
        axis.set(title=f"seed {seed}", xlabel="square root of KL (nats a response)")
    axes[0][0].set_ylabel("gold reward of sampled responses")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model_name_or_path", type=Path, help="The fine-tuned model, if there is one.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/overoptimisation"))
    args = parser.parse_args()
    logs, model = {}, args.model_name_or_path
    for seed in args.seeds:
        folder = args.output_dir / f"seed-{seed}"
        logs[seed] = both(folder, seed, model)
        model = model or folder / "single" / "sft"
    curves = {seed: {name: curve(log) for name, log in pair.items()} for seed, pair in logs.items()}
    draw(curves, args.output_dir / "overoptimisation.png")
    text = table(curves)
    (args.output_dir / "overoptimisation.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
