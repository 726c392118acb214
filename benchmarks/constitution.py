"""Constitutional AI against TRL's DPO: the same helpful-only model, the same revisions, the same CPU-seconds.

    OMP_NUM_THREADS=1 hfllm constitution --seed 1 --output_dir outputs/constitution-1      # and 2, 3
    OMP_NUM_THREADS=1 python benchmarks/constitution.py --runs outputs/constitution-1 outputs/constitution-2 \
        --learning_rates 1e-5 3e-5 1e-4 --output_dir outputs/constitution_benchmark

From each finished run come the helpful-only model and the revisions. SL-CAI and RL-CAI are trained over again by the
recipe's own classes, and their CPU-seconds are taken: of sampling, judging and `Trainer.train`, without loading,
evaluation and plots. DPO learns from the same revisions (last one against first answer, equal ones left out), for as
long as SL-CAI took, and for as long as SL-CAI and RL-CAI took; and, from SL-CAI, from the comparisons that the
preference model learned from, for as long as that and PPO took. Its learning rate is chosen on the first run, by
right answers to harmless prompts less compliance with harm; judge by the others. Finished arms are reused.

Writes `constitution.md`: harmlessness, helpfulness, and the KL to the helpful-only model, from sampled answers.
"""

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from constitution_arms import (
    DPO,
    Ours,
    arguments_of,
    course_in,
    kl_of_responses,
    load,
    pairs_of_ai,
    pairs_of_revisions,
    retrain,
)

from hfllm.data.world.world import World
from hfllm.evaluation.constitution import HELPFUL as HARMLESS_GROUP
from hfllm.evaluation.constitution import NEW, NEW_PHRASING, Asked, answer, figures, prompts_to_ask
from hfllm.outputs.figures import mean_of, plus_minus, readable
from hfllm.outputs.report import markdown_table, write_atomically
from hfllm.stages.constitution import RL, ConstitutionArguments
from hfllm.stages.constitution_evaluation import HARMLESS
from hfllm.stages.constitution_runs import HELPFUL, SL

if TYPE_CHECKING:
    from trl import SFTConfig

Arm = dict[str, float]
DPO_SHORT, DPO_LONG, DPO_AI = "dpo_sl", "dpo_rl", "dpo_ai"
TITLES = {
    HELPFUL: "helpful-only",
    SL: "hfllm, SL-CAI",
    DPO_SHORT: "TRL, DPO on the revisions, as long as SL-CAI",
    RL: "hfllm, RL-CAI after SL-CAI",
    DPO_LONG: "TRL, DPO on the revisions, as long as both",
    DPO_AI: "TRL, DPO on the comparisons after SL-CAI",
}
FIGURES = {
    f"compliance_{NEW}": "help with new harms",
    f"compliance_{NEW_PHRASING}": "in new wording",
    "helpful_gold": "gold of harmless",
    "helpful_right": "right",
    "evasive": "evasive",
    "rude": "rude",
    "kl_harmless": "KL, harmless",
    "kl_harmful": "KL, harmful",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished folders of `hfllm constitution`")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4], help="of DPO, to try")
    parser.add_argument("--long_learning_rates", type=float, nargs="+", help="for the longer DPO instead")
    parser.add_argument("--ai_learning_rates", type=float, nargs="+", help="for DPO on the comparisons instead")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO")
    parser.add_argument("--loss_type", nargs="+", default=["sigmoid"], help="of DPO: sigmoid, or sigmoid sft")
    parser.add_argument("--arms", nargs="+", choices=list(TITLES), default=list(TITLES), help="only these")
    parser.add_argument(
        "--allow_biased_judge", action="store_true", help="RL-CAI also where the run refused its judge"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/constitution_benchmark"))
    return parser.parse_args(argv)


class Comparison:
    """All arms on one run, each kept in `arms.json` once it has been trained and measured."""

    def __init__(self, args: argparse.Namespace, run: Path, folder: Path):
        from trl import ModelConfig

        self.args, self.run, self.folder = args, run, folder
        self.model_args = ModelConfig(dtype="float32")
        self.script_args: ConstitutionArguments = arguments_of(run)
        if args.allow_biased_judge:
            self.script_args = replace(self.script_args, allow_biased_judge=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "arms.json"
        self.arms: dict[str, Arm] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        count = self.script_args.num_eval_prompts
        self.asked = prompts_to_ask(World(self.script_args.world_seed), count, round(HARMLESS * count))
        self.ours = self._ours()
        self._steps: dict[str, float] = {}

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.script_args.seed

    def _ours(self) -> Ours:
        """Train our course over again, or return what it took."""
        path = self.folder / "ours.json"
        folder = self.folder / "ours"
        if path.is_file():
            self.course_args = replace(self.script_args, output_dir=str(folder))
            return Ours(**json.loads(path.read_text()))
        self.course_args, course = course_in(self.run, folder, self.script_args, self.model_args)
        ours = retrain(self.run, self.course_args, self.model_args, course)
        self._write(path, asdict(ours))
        return ours

    def measured(self, name: str, folder: Path, took: Mapping[str, float]) -> Arm:
        """Return the figures of an arm's model, and keep them."""
        if name not in self.arms:
            said = load(folder)
            length, seed = self.script_args.longest, self.seed
            found = figures(answer(said.model, said.tokenizer, self.asked, length, seed))
            reference = load(self.run / HELPFUL)
            for kind, groups in (("kl_harmless", (HARMLESS_GROUP,)), ("kl_harmful", (NEW, NEW_PHRASING))):
                prompts = [each.prompt for each in self._of(groups)]
                found |= mean_of(
                    kind, kl_of_responses(said.model, reference.model, self.run / HELPFUL, prompts, length, seed)
                )
            self.arms[name] = {**found, **took}
            self._write(self.path, self.arms)
            print(f"{self.folder.name}, {name}: {line_of(self.arms[name])}", flush=True)
        return self.arms[name]

    def ours_measured(self) -> None:
        """Measure the helpful-only model, SL-CAI and RL-CAI."""
        ours = self.ours
        self.measured(HELPFUL, self.run / HELPFUL, {"cpu_seconds": 0.0})
        self.measured(SL, Path(ours.folder, SL), {"cpu_seconds": ours.of_sl})
        if not ours.no_rl:
            self.measured(RL, Path(ours.folder, RL), {"cpu_seconds": ours.of_sl + ours.of_rl})

    def dpo(self, name: str, learning_rate: float, suffix: str = "") -> Arm:
        """Train and measure an arm of DPO."""
        arm = name + suffix
        if arm not in self.arms:
            ours, before, start, pairs = self.ours, 0.0, self.run / HELPFUL, pairs_of_revisions(self.run)
            seconds = ours.of_sl if name == DPO_SHORT else ours.of_sl + ours.of_rl
            if name == DPO_AI:
                # The pairs are sampled and judged for it, too.
                before, start, pairs = (
                    ours.of_sl + ours.rows["reward"],
                    Path(ours.folder, SL),
                    pairs_of_ai(self.course_args),
                )
                seconds = ours.of_rl_training
            args = self.args
            dpo = DPO(start, pairs, self._sft_config(), args.beta, args.loss_type, self.seed)
            folder = self.folder / arm
            key = "ai" if name == DPO_AI else "revisions"
            if key not in self._steps:
                self._steps[key] = dpo.seconds_per_step(folder)
            took = dpo.run(folder, learning_rate, seconds, self._steps[key])
            took["cpu_seconds"] += before
            self.measured(arm, folder, took)
            shutil.rmtree(folder / "runs", ignore_errors=True)
        return self.arms[arm]

    def _sft_config(self) -> "SFTConfig":
        from hfllm.stages.constitution_runs import course_of

        return next(
            each for each in course_of(self.course_args, self.model_args).runs[SL] if hasattr(each, "max_length")
        )

    def _of(self, groups: Sequence[str]) -> list[Asked]:
        return [each for each in self.asked if each.group in groups]

    def _write(self, path: Path, values: object) -> None:
        write_atomically(path, json.dumps(values, indent=1) + "\n")


def score_of(arm: Arm) -> float:
    """Return what the learning rate is chosen by: right answers less compliance with new harms and new wording."""
    return arm["helpful_right"] - (arm[f"compliance_{NEW}"] + arm[f"compliance_{NEW_PHRASING}"]) / 2


def line_of(arm: Arm) -> str:
    """Return an arm's figures in a line."""
    return "  ".join(f"{name} {arm[name]:.3f}" for name in (*FIGURES, "cpu_seconds") if name in arm)


def mean_arm(arms: Sequence[Arm]) -> Arm:
    """Return the mean over runs; errors are those of the prompts, as if the runs were independent."""
    mean = {name: sum(arm[name] for arm in arms) / len(arms) for name in (*FIGURES, "cpu_seconds")}
    for name in FIGURES:
        mean[f"{name}_se"] = math.sqrt(sum(arm.get(f"{name}_se", 0.0) ** 2 for arm in arms)) / len(arms)
    return mean


def table(arms: Mapping[str, Arm]) -> list[str]:
    """Return the lines of a Markdown table: an arm a row."""
    rows = [
        {
            "": title,
            "CPU-s": f"{arm['cpu_seconds']:.0f}",
            **{head: plus_minus(arm[name], arm.get(f"{name}_se")) for name, head in FIGURES.items()},
        }
        for title, arm in arms.items()
    ]
    return markdown_table(rows)


def settings_table(arms: Mapping[str, Arm], chosen: Mapping[str, float]) -> list[str]:
    """Return the lines of the table of the arms of DPO on the run that the learning rates were chosen on."""
    rows = []
    for name, arm in arms.items():
        base = name.partition("@")[0]
        if "learning_rate" in arm:
            rows.append(
                {
                    "": TITLES[base],
                    "learning rate": f"{arm['learning_rate']:g}",
                    "chosen": "yes" if arm["learning_rate"] == chosen.get(base) else "",
                    "steps": readable(int(arm["steps"])),
                    "epochs": f"{arm['epochs']:.1f}",
                    "score": f"{score_of(arm):.3f}",
                    **{head: plus_minus(arm[each], arm.get(f"{each}_se")) for each, head in FIGURES.items()},
                }
            )
    return markdown_table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms on all runs, and write the tables."""
    args = parse(argv)
    chosen: dict[str, float] = {}
    found: dict[str, dict[str, Arm]] = {}
    lines, notes = [], []
    for run in args.runs:
        comparison = Comparison(args, run, args.output_dir / f"seed-{arguments_of(run).seed}")
        comparison.ours_measured()
        no_rl = comparison.ours.no_rl
        names = [
            name for name in (DPO_SHORT, DPO_LONG, DPO_AI) if name in args.arms and not (no_rl and name != DPO_SHORT)
        ]
        for name in names:
            if name not in chosen:
                rates = {DPO_LONG: args.long_learning_rates, DPO_AI: args.ai_learning_rates}.get(name)
                rates = rates or args.learning_rates
                tried = {rate: comparison.dpo(name, rate, f"@{rate:g}") for rate in rates}
                chosen[name] = max(tried, key=lambda rate: score_of(tried[rate]))
                comparison.arms[name] = tried[chosen[name]]
            else:
                comparison.dpo(name, chosen[name])
        title = f"seed {comparison.seed}"
        found[title] = {name: comparison.arms[name] for name in TITLES if name in comparison.arms}
        if len(found) == 1:
            lines = settings_table({name: arm for name, arm in comparison.arms.items() if "@" in name}, chosen)
        same = "has the bytes of the run's own" if comparison.ours.same_weights else "differs from the run's own"
        notes.append(f"- {title}: the retrained SL-CAI {same}" + (f"; no RL-CAI: {no_rl}" if no_rl else ""))
    text = page(found, lines, notes)
    write_atomically(args.output_dir / "constitution.md", text)
    print(text)


def page(found: Mapping[str, Mapping[str, Arm]], settings: Sequence[str], notes: Sequence[str]) -> str:
    """Return the tables: the mean over runs, each run, and what the learning rates were chosen by."""
    everywhere = [name for name in TITLES if all(name in arms for arms in found.values())]
    mean = {TITLES[name]: mean_arm([arms[name] for arms in found.values()]) for name in everywhere}
    parts = [f"## Mean of {', '.join(found)}", *table(mean)]
    for title, arms in found.items():
        parts += ["", f"## {title.capitalize()}", *table({TITLES[name]: arm for name, arm in arms.items()})]
    return "\n".join([*parts, "", "## Learning rates of DPO", *settings, "", *notes]) + "\n"


if __name__ == "__main__":
    main()
