"""The main job over several seeds, and a control run whose reward model learned from random labels.

    python benchmarks/alignment.py --seeds 1 2 42 --output_dir outputs/alignment

Runs `recipes/rlhf.py` once per seed and once more on the first seed's fine-tuned model with `label_noise: 0.5`, and
writes `alignment.md` with the medians into the output folder. Finished runs are reused.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = {
    "sampled gold reward, SFT": "gold_reward_before",
    "sampled gold reward, PPO": "gold_reward_after",
    "greedy gold reward, SFT": "gold_reward_greedy_before",
    "greedy gold reward, PPO": "gold_reward_greedy_after",
    "on held-out phrasings, SFT": "gold_reward_new_phrasings_before",
    "on held-out phrasings, PPO": "gold_reward_new_phrasings_after",
    "reward model accuracy": "reward_model_accuracy",
    "KL to the reference (nats per response)": "kl_to_reference",
    "greedy fact accuracy, SFT": "fact_accuracy_before",
    "greedy fact accuracy, PPO": "fact_accuracy_after",
}


def run(output_dir: Path, *flags: str) -> dict:
    """Run the main job once, and return its report."""
    command = [sys.executable, str(ROOT / "recipes" / "rlhf.py"), "--output_dir", str(output_dir), *flags]
    subprocess.run(command, check=True)
    return json.loads((output_dir / "report.json").read_text())


def control(output_dir: Path, first: Path, seed: int) -> dict:
    """Run the same PPO against a reward model trained on random labels."""
    output_dir.mkdir(parents=True, exist_ok=True)
    world = (ROOT / "recipes" / "configs" / "reward" / "world.yaml").read_text()
    settings = ROOT / "recipes" / "configs" / "rlhf" / "world.yaml"
    # A stage with a config of its own takes `augment` from there.
    (augment,) = (line for line in settings.read_text().splitlines() if line.startswith("augment:"))
    noisy = output_dir / "reward_noise.yaml"
    noisy.write_text(f"{world}label_noise: 0.5\n{augment}\n")
    flags = ["--config", str(settings), "--seed", str(seed)]
    return run(output_dir, *flags, "--model_name_or_path", str(first / "sft"), "--reward_config", str(noisy))


def table(reports: dict[str, dict], control_report: dict) -> str:
    """Return a Markdown table: a row per metric, a column per seed, the median, the control."""
    head = ["", *reports, "median", "control"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for label, name in ROWS.items():
        values = [report["metrics"][name] for report in reports.values()]
        cells = [*values, statistics.median(values), control_report["metrics"][name]]
        lines.append(f"| {label} | " + " | ".join(f"{value:.3f}" for value in cells) + " |")
    seconds = [report["wall_seconds"] for report in reports.values()]
    cells = [*seconds, statistics.median(seconds), control_report["wall_seconds"]]
    lines.append("| seconds | " + " | ".join(f"{value:.0f}" for value in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 42])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/alignment"))
    args = parser.parse_args()
    folders = {f"seed {seed}": args.output_dir / f"seed-{seed}" for seed in args.seeds}
    reports = {
        name: run(folder, "--seed", str(seed))
        for (name, folder), seed in zip(folders.items(), args.seeds, strict=True)
    }
    shuffled = control(args.output_dir / "control", next(iter(folders.values())), args.seeds[0])
    text = table(reports, shuffled)
    (args.output_dir / "alignment.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
