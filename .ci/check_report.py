"""Fail unless the main job's report shows that alignment helped. Usage: check_report.py OUTPUT_DIR

The bounds hold for any seed on any machine; benchmarks/results/alignment.md says how many standard errors the runs of
three seeds lie inside. A mean over 360 sampled prompts is known to 0.025, over 180 to 0.04, a change of such means to
0.035 and 0.05; an accuracy on 1,430 pairs to 0.009, a share of 60 facts to 0.06. With a reward model that learned from
coin flips the first four are far outside.
"""

import json
import sys
from pathlib import Path

BOUNDS = {
    "gold_reward_after": (0.52, 1.0),
    "gold_reward_gain": (0.33, 2.0),
    "gold_reward_new_phrasings_gain": (0.30, 2.0),
    "reward_model_accuracy": (0.83, 1.0),
    "kl_to_reference": (0.5, 5.0),
    "fact_accuracy_loss": (-1.0, 0.55),
}


def main(output_dir: str) -> int:
    metrics = json.loads((Path(output_dir) / "report.json").read_text())["metrics"]
    for name in ("gold_reward", "gold_reward_new_phrasings"):
        metrics[f"{name}_gain"] = metrics[f"{name}_after"] - metrics[f"{name}_before"]
    metrics["fact_accuracy_loss"] = metrics["fact_accuracy_before"] - metrics["fact_accuracy_after"]
    failed = 0
    for name, (low, high) in BOUNDS.items():
        is_within = low <= metrics[name] <= high
        failed += not is_within
        print(f"{'ok  ' if is_within else 'FAIL'} {name} = {metrics[name]:.3f}, expected {low} to {high}")
    print(f"{len(BOUNDS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
