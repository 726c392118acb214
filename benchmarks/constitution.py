"""Constitutional AI against TRL's DPO: the same helpful-only model, the same revisions, the same CPU-seconds.

    OMP_NUM_THREADS=1 hfllm constitution --seed 1 --output_dir outputs/constitution-1      # and 2, 3
    OMP_NUM_THREADS=1 python benchmarks/constitution.py --runs outputs/constitution-1 outputs/constitution-2 \
        --learning_rates 1e-5 3e-5 1e-4 --output_dir outputs/constitution_benchmark

From each finished run come the helpful-only model and the revisions. SL-CAI and RL-CAI are trained over again by the
recipe's own classes, and their CPU-seconds are taken: of sampling, judging and `Trainer.train`, without loading,
evaluation and plots. DPO learns from the same revisions (last one against first answer, equal ones left out), for as
long as SL-CAI took, and for as long as SL-CAI and RL-CAI took; and, from SL-CAI, from the comparisons that the
preference model learned from, for as long as that and PPO took. Its learning rate is chosen on the first run, by
right answers to harmless prompts less compliance with harm; judge by the others. RL-CAI is trained over again for the
first run alone, unless `--retrain_all`; the others keep their own, with the same seconds. Finished arms are kept.

Writes `constitution.md`: harmlessness, helpfulness, and the KL to the helpful-only model, from answers sampled at
temperature 1. SL-CAI also learns the model's own answers to harmless prompts, sampled at a lower temperature; "right,
cooler" is the share of right answers when every arm is sampled so.
"""

import argparse
import json
import math
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
from hfllm.outputs.figures import mean_of, plus_minus, readable
from hfllm.outputs.report import markdown_table, write_atomically
from hfllm.stages.constitution.build import HARMLESS
from hfllm.stages.constitution.flags import HELPFUL, REWARD, RL, SL, ConstitutionArguments, course_of
from hfllm.stages.constitution.report import HELPFUL as HARMLESS_GROUP
from hfllm.stages.constitution.report import (
    NEW,
    NEW_PHRASING,
    Probe,
    answer,
    figures,
    is_right,
    judged,
    prompts_to_ask,
)
from hfllm.stages.shared import Speaking

if TYPE_CHECKING:
    from trl import SFTConfig

Arm = dict[str, float]
DPO_SHORT, DPO_LONG, DPO_AI = PEERS = ("dpo_sl", "dpo_rl", "dpo_ai")
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
    "right_cool": "right, cooler",
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
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="only these arms of DPO")
    parser.add_argument(
        "--allow_biased_judge", action="store_true", help="RL-CAI also where the run refused its judge"
    )
    parser.add_argument("--retrain_all", action="store_true", help="RL-CAI of all runs, not of the first one alone")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/constitution_benchmark"))
    return parser.parse_args(argv)


class Comparison:
    """All arms on one run, each kept in `arms.json` once it has been trained and measured."""

    def __init__(self, args: argparse.Namespace, run: Path, folder: Path, rl_like: Ours | None = None):
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
        asked = prompts_to_ask(World(self.script_args.world_seed), count, round(HARMLESS * count))
        self.asked = [each for each in asked if each.group in (NEW, NEW_PHRASING, HARMLESS_GROUP)]
        self.ours = self._ours(rl_like)
        self._steps: dict[str, float] = {}

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.script_args.seed

    def _ours(self, rl_like: Ours | None) -> Ours:
        """Train our course over again, or return what it took."""
        path = self.folder / "ours.json"
        folder = self.folder / "ours"
        if path.is_file():
            self.course_args = replace(self.script_args, output_dir=str(folder))
            return Ours(**json.loads(path.read_text()))
        self.course_args, course = course_in(self.run, folder, self.script_args, self.model_args)
        ours = retrain(self.run, self.course_args, self.model_args, course, rl_like)
        write_atomically(path, json.dumps(asdict(ours), indent=1) + "\n")
        return ours

    def measured(self, name: str, folder: Path, took: Mapping[str, float]) -> Arm:
        """Return the figures of an arm's model, those of before and what is missing, and keep them."""
        arm = {**self.arms.get(name, {}), **took}
        if not arm.keys() >= FIGURES.keys():
            said, length, seed = load(folder), self.script_args.longest, self.seed
            if "kl_harmful" not in arm:
                arm |= figures(answer(said.model, said.tokenizer, self.asked, length, seed)) | self._kl(said)
            harmless = self._of((HARMLESS_GROUP,))
            prompts, temperature = [each.prompt for each in harmless], self.script_args.temperature
            cool = said.answers(prompts, length, seed, temperature=temperature)
            right = [float(is_right(judged(each, texts[0]))) for each, texts in zip(harmless, cool, strict=True)]
            arm |= mean_of("right_cool", right)
            print(f"{self.folder.name}, {name}: {line_of(arm)}", flush=True)
        self._keep(name, arm)
        return arm

    def _kl(self, said: Speaking) -> dict[str, float]:
        """Return the KL to the helpful-only model, on harmless and on harmful prompts."""
        found, reference = {}, load(self.run / HELPFUL)
        for name, groups in (("kl_harmless", (HARMLESS_GROUP,)), ("kl_harmful", (NEW, NEW_PHRASING))):
            prompts = [each.prompt for each in self._of(groups)]
            settings = (prompts, self.script_args.longest, self.seed)
            found |= mean_of(name, kl_of_responses(said.model, reference.model, self.run / HELPFUL, *settings))
        return found

    def of_ours(self) -> dict[str, Arm]:
        """Return the figures of the helpful-only model, of SL-CAI, and of RL-CAI if there is one."""
        ours = self.ours
        arms = {
            HELPFUL: self.measured(HELPFUL, self.run / HELPFUL, {"cpu_seconds": 0.0}),
            SL: self.measured(SL, Path(ours.folder, SL), {"cpu_seconds": ours.of_sl}),
        }
        if not ours.no_rl:
            arms[RL] = self.measured(RL, Path(ours.folder, RL), {"cpu_seconds": ours.of_sl + ours.of_rl})
        return arms

    def of_dpo(self, name: str, learning_rate: float) -> Arm:
        """Train and measure an arm of DPO at a learning rate."""
        arm = f"{name}@{learning_rate:g}"
        folder = self.folder / arm
        if arm not in self.arms:
            ours, before, seconds = self.ours, 0.0, self.ours.of_sl
            start, pairs = self.run / HELPFUL, pairs_of_revisions(self.run)
            if name == DPO_LONG:
                seconds += ours.of_rl
            elif name == DPO_AI:
                # What it learns from is sampled and judged for it, too.
                before, seconds = ours.of_sl + ours.rows[REWARD], ours.of_rl_training
                start, pairs = Path(ours.folder, SL), pairs_of_ai(ours.folder)
            dpo = DPO(start, pairs, self._sft_config(), self.args.beta, self.args.loss_type, self.seed)
            key = str(start)
            if key not in self._steps:
                self._steps[key] = dpo.seconds_per_step(folder)
            took = dpo.run(folder, learning_rate, seconds, self._steps[key])
            self._keep(arm, {**took, "cpu_seconds": took["cpu_seconds"] + before})
        return self.measured(arm, folder, {})

    def _keep(self, name: str, arm: Arm) -> None:
        self.arms[name] = arm
        write_atomically(self.path, json.dumps(self.arms, indent=1) + "\n")

    def _sft_config(self) -> "SFTConfig":
        return next(
            each for each in course_of(self.course_args, self.model_args).runs[SL] if hasattr(each, "max_length")
        )

    def _of(self, groups: Sequence[str]) -> list[Probe]:
        return [each for each in self.asked if each.group in groups]


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
    """Return the lines of a Markdown table: an arm a row, by its title."""
    return markdown_table(
        [{"": title, "CPU-s": f"{arm['cpu_seconds']:.0f}", **shown(arm)} for title, arm in arms.items()]
    )


def settings_table(tried: Mapping[str, Sequence[Arm]], chosen: Mapping[str, float]) -> list[str]:
    """Return the lines of the table of the arms of DPO on the run that the learning rates were chosen on."""
    rows = [
        {
            "": TITLES[name],
            "learning rate": f"{arm['learning_rate']:g}",
            "chosen": "yes" if arm["learning_rate"] == chosen[name] else "",
            "steps": readable(int(arm["steps"])),
            "epochs": f"{arm['epochs']:.1f}",
            "score": f"{score_of(arm):.3f}",
            **shown(arm),
        }
        for name, arms in tried.items()
        for arm in arms
    ]
    return markdown_table(rows)


def shown(arm: Arm) -> dict[str, str]:
    """Return an arm's figures with their errors, by the heads of their columns."""
    return {head: plus_minus(arm[name], arm.get(f"{name}_se")) for name, head in FIGURES.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms on all runs, and write the tables."""
    args = parse(argv)
    chosen: dict[str, float] = {}
    found: dict[str, dict[str, Arm]] = {}
    tried: dict[str, list[Arm]] = {}
    first: Ours | None = None
    notes = []
    for run in args.runs:
        folder = args.output_dir / f"seed-{arguments_of(run).seed}"
        comparison = Comparison(args, run, folder, None if args.retrain_all else first)
        first = first or comparison.ours
        arms, no_rl = comparison.of_ours(), comparison.ours.no_rl
        for name in args.peers:
            if no_rl and name != DPO_SHORT:
                continue
            if name not in chosen:
                tried[name] = [comparison.of_dpo(name, rate) for rate in rates_to_try(args, name)]
                chosen[name] = max(tried[name], key=score_of)["learning_rate"]
            arms[name] = comparison.of_dpo(name, chosen[name])
        title = f"seed {comparison.seed}"
        found[title] = {name: arms[name] for name in TITLES if name in arms}
        same = "has the bytes of the run's own" if comparison.ours.same_weights else "differs from the run's own"
        notes.append(f"- {title}: the retrained SL-CAI {same}" + (f"; no RL-CAI: {no_rl}" if no_rl else ""))
    text = page(found, settings_table(tried, chosen), notes)
    write_atomically(args.output_dir / "constitution.md", text)
    print(text)


def rates_to_try(args: argparse.Namespace, name: str) -> list[float]:
    """Return the learning rates to try for an arm of DPO."""
    own = {DPO_LONG: args.long_learning_rates, DPO_AI: args.ai_learning_rates}
    return own.get(name) or args.learning_rates


def page(found: Mapping[str, Mapping[str, Arm]], settings: Sequence[str], notes: Sequence[str]) -> str:
    """Return the tables: the mean of the runs after the first, each run, and what the rates were chosen by there."""
    judged_by = dict(list(found.items())[1:]) or found
    everywhere = [name for name in TITLES if all(name in arms for arms in judged_by.values())]
    mean = {TITLES[name]: mean_arm([arms[name] for arms in judged_by.values()]) for name in everywhere}
    parts = [f"## Mean of {', '.join(judged_by)}", "", *table(mean)] if len(judged_by) > 1 else []
    for title, arms in found.items():
        parts += ["", f"## {title.capitalize()}", "", *table({TITLES[name]: arm for name, arm in arms.items()})]
    return "\n".join([*parts, "", "## Learning rates of DPO", "", *settings, "", *notes]) + "\n"


if __name__ == "__main__":
    main()
