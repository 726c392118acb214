"""Each ingredient of PPO left out and put in: what it does to the reward by CPU-second, on runs of your own.

    hfllm reason --seed 1 --output_dir outputs/reason-1          # and tools, and other seeds
    OMP_NUM_THREADS=1 python benchmarks/ppo_ablation.py outputs/reason-1/rl outputs/reason-2/rl --output ablation.md

Takes finished runs of `hfllm rlhf`, also those inside other recipes, whose first model still lies where it was; of the
main job (`outputs/rlhf`), which is paid by a reward model, the figure is the gold reward.
Repeats each with its own flags as every arm, in a process of its own: `vanilla` as it was, `all` with every
ingredient, `less NAME` with all but one, `grpo` by TRL's GRPOTrainer (same model, prompts, reward functions, episodes
and optimizer steps) where no tool and no reward model takes part, and `shuffled`, which must not gain: all
ingredients, with the rewards dealt out by chance (of `right_answer` and `gold`). CPU-seconds are those of `train()`.
Runs whose folders are named alike but for digits (`outputs/reason-1`, `outputs/reason-2`) are seeds of one task.

`--more` names a YAML file of further arms, each with the flags that it adds to those of the run, such as a model that
judges steps and a control of it whose labels were dealt by chance. In them a rollout's reward is what the run's own
functions pay.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfllm.data.sources import WORLD
from hfllm.outputs.intervals import standard_error
from hfllm.rewards.functions import load_reward_function, reward_name
from hfllm.runs.recipes import settings_file

# Each ingredient, and the flags that put it in.
INGREDIENTS: dict[str, dict[str, object]] = {
    "decoupled lambda": {"value_lam": 1.0},
    "value pretraining": {"critic_warmup_steps": 8, "critic_warmup_lam": 1.0},
    "clip higher": {"cliprange_high": 0.28},
    "language modeling": {"positive_lm_coef": 0.1},
    "group baseline": {"num_generations": 4, "baseline": "both"},
    "dynamic sampling": {"dynamic_sampling_rounds": 2},
}
# What TRL's GRPO is given as well.
SAME = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "logging_steps", "seed"),
)
VANILLA, ALL, GRPO, SHUFFLED, LESS = "vanilla", "all", "grpo", "shuffled", "less "
ARMS = (VANILLA, ALL, *(LESS + name for name in INGREDIENTS), GRPO, SHUFFLED)
# The share of a run at whose end its reward is measured.
LAST = 0.25

Row = dict[str, object]
Arms = Mapping[str, Mapping[str, object]]


# ---- one arm, in a process of its own ----


class Clock(TrainerCallback):
    """Writes the reward and the CPU-seconds since the beginning of training at each log."""

    file: Path
    # The functions whose pay is the figure, as they are logged; without a name it is the whole reward.
    judges: tuple[str, ...] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Begin to count."""
        self.began = time.process_time()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Add a line."""
        if logs and "reward" in logs:
            judged = [logs[name] for name in self.judges if name in logs]
            reward = logs.get("rewards/gold_reward", sum(judged) if judged else logs["reward"])
            seen = {"step": state.global_step, "reward": reward, "cpu": time.process_time() - self.began}
            with self.file.open("a") as file:
                file.write(json.dumps(seen) + "\n")


def train(flags: Mapping[str, object], by: str) -> None:
    """Run `hfllm rlhf` or TRL's GRPO with these flags, watched."""
    from transformers import trainer

    Clock.file = Path(str(flags["output_dir"])).with_suffix(".jsonl")
    functions = [load_reward_function(each) for each in flags.get("reward_funcs", ())]
    Clock.judges = tuple(f"rewards/{reward_name(each)}" for each in functions)
    trainer.DEFAULT_CALLBACKS.append(Clock)
    if by == GRPO:
        train_by_grpo(flags)
    else:
        from hfllm.runs.launcher import run_recipe

        run_recipe("rlhf", as_arguments(flags))


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Return flags as a command line has them."""
    arguments: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values)]
    return arguments


def train_by_grpo(flags: Mapping[str, object]) -> None:
    """Train by TRL's GRPO with the same episodes in a rollout and optimizer steps, groups of eight."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    name = str(flags["model_name_or_path"])
    args = GRPOConfig(
        str(flags["output_dir"]),
        **{each: flags[each] for each in SAME},
        **{"steps_per_generation": flags["num_mini_batches"], "num_iterations": flags["num_ppo_epochs"]},
        **{"num_generations": 8, "max_completion_length": flags["response_length"], "beta": flags["kl_coef"]},
        **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    )
    GRPOTrainer(
        saved_model(AutoModelForCausalLM, name),
        [load_reward_function(each) for each in flags["reward_funcs"]],
        args,
        load_dataset("json", data_files=str(flags["dataset_name"]), split="train"),
        processing_class=saved_tokenizer(name),
    ).train()


# ---- all arms of a run ----


def flags_of(run: Path) -> dict[str, object]:
    """Return the flags that a finished run was given."""
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{run}: no report of a finished run: {error}") from None
    if report.get("stage") != "rlhf":
        raise SystemExit(f"{run}: a run of {report.get('stage')}, expected one of rlhf (in other recipes: OUTPUT/rl)")
    given, arguments = dict(report["given"]), report["arguments"]
    if not given.get("model_name_or_path") and not given.get("dataset_name"):
        # The main job has made its models itself; a named model no longer has the world's settings by default.
        given |= {"config": str(settings_file("rlhf/world.yaml")), "model_name_or_path": str(run / "sft")}
        given |= {"reward_model_name_or_path": str(run / "reward"), "dataset_name": WORLD}
    name = given.get("model_name_or_path")
    if not name or not any(Path(str(name)).glob("*.safetensors")):
        raise SystemExit(f"{run}: began with {name}; expected a model with weights in a folder that still exists")
    if not given.get("dataset_name"):
        raise SystemExit(f"{run}: your model drew its prompts from the embedded world; expected --dataset_name")
    needed = (*SAME, "num_mini_batches", "num_ppo_epochs", "response_length", "kl_coef")
    # Runs of before 1 - 20 / tokens^2 have .95.
    lam = {} if arguments.get("lam") is None else {"lam": arguments["lam"]}
    return {each: arguments[each] for each in needed} | lam | given


def arms_of(file: Path | None) -> Arms:
    """Return the user's own arms, flags by name."""
    arms = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}
    if not isinstance(arms, dict) or not all(isinstance(flags, dict) for flags in arms.values()):
        raise SystemExit(f"{file}: expected the names of arms, and below each its flags, as in `steps:` `lam: 1.0`")
    if taken := sorted(set(arms) & set(ARMS)):
        raise SystemExit(f"{file}: {', '.join(taken)}: taken by an arm of the benchmark; expected another name")
    return arms


def flags_of_arm(given: Mapping[str, object], arm: str, more: Arms) -> dict[str, object] | None:
    """Return the flags of an arm, or `None` where it cannot run."""
    if arm == VANILLA or arm in more:
        return {**given, **more.get(arm, {})}
    rewards = given.get("reward_funcs")
    if arm == GRPO:
        return None if given.get("tools") or not rewards else dict(given)
    used = {name: flags for name, flags in INGREDIENTS.items() if arm != LESS + name}
    flags = {**given, **{name: value for each in used.values() for name, value in each.items()}}
    if "num_generations" not in flags:
        flags.pop("dynamic_sampling_rounds", None)
    if arm == SHUFFLED:
        if rewards not in (["right_answer"], ["gold"]):
            return None
        flags["reward_funcs"] = ["shuffled_answer" if rewards == ["right_answer"] else "shuffled_gold"]
    return flags


def curve_of(run: Path, arm: str, flags: Mapping[str, object], folder: Path) -> list[Row]:
    """Train an arm in a process of its own; return its rewards by CPU-second."""
    output = folder / re.sub(r"\W+", "-", f"{run}-{arm}")
    command = [sys.executable, __file__, "--train", GRPO if arm == GRPO else "ppo"]
    done = subprocess.run(
        command,
        input=json.dumps({**flags, "output_dir": str(output), "num_eval_prompts": 1}),
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{run}, {arm}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def end_of(curve: Sequence[Row]) -> float:
    """Return the mean reward of the last quarter."""
    count = max(1, round(LAST * len(curve)))
    return statistics.fmean(row["reward"] for row in curve[-count:])


def reached(curve: Sequence[Row], reward: float) -> float | None:
    """Return the CPU-seconds at which the mean of three logs reaches a reward; `None` where it never does."""
    for number in range(min(2, len(curve) - 1), len(curve)):
        if statistics.fmean(row["reward"] for row in curve[max(0, number - 2) : number + 1]) >= reward:
            return float(curve[number]["cpu"])
    return None


# ---- the page ----


def task_of(run: Path) -> str:
    """Return the name that runs of several seeds share: that of the folder around, without digits."""
    return re.sub(r"[\W\d_]+", " ", run.parent.name).strip() or run.parent.parent.name


def table_of(curves: Mapping[tuple[str, str, str], Sequence[Row]]) -> str:
    """Return a table by task and arm: rewards at the end of the steps and of as much time as vanilla took.

    The last column is the share of vanilla's CPU-seconds in which an arm is where vanilla ends.
    """
    heads = ["task", "arm", "reward at the end", "by seed", "at the end of vanilla's CPU-seconds", "share of them"]
    lines = [f"| {' | '.join(heads)} |", "| - " * len(heads) + "|"]
    for task, arm in dict.fromkeys((task, arm) for task, _, arm in curves):
        runs = [run for each, run, its in curves if (each, its) == (task, arm)]
        ends, as_long, shares = [end_of(curves[task, run, arm]) for run in runs], [], []
        for run in runs:
            own, vanilla = curves[task, run, arm], curves[task, run, VANILLA]
            within = [row for row in own if row["cpu"] <= vanilla[-1]["cpu"]]
            as_long.append(end_of(within or own[:1]))
            aim = end_of(vanilla)
            at, first = reached(own, aim), reached(vanilla, aim)
            shares.append("never" if at is None or first is None else f"{at / first:.2f}")
        by_seed = ", ".join(f"{each:.3f}" for each in ends)
        cells = [task, arm, mean_of(ends), by_seed, mean_of(as_long), ", ".join(shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(ends: Sequence[float]) -> str:
    """Return the mean over seeds, with its standard error where there are several."""
    error = f" ± {standard_error(ends):.3f}" if len(ends) > 1 else ""
    return f"{statistics.fmean(ends):.3f}{error}"


def plot(curves: Mapping[tuple[str, str, str], Sequence[Row]], path: Path) -> None:
    """Draw the curves of each task, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _, _ in curves))
    colors = {arm: f"C{number}" for number, arm in enumerate(dict.fromkeys(arm for _, _, arm in curves))}
    figure, places = pyplot.subplots(
        1, len(tasks), figsize=(6 * len(tasks) + 2, 4), dpi=110, squeeze=False, layout="constrained"
    )
    for axes, task in zip(places[0], tasks, strict=True):
        for (each, _, arm), curve in curves.items():
            if each == task:
                axes.plot([row["cpu"] for row in curve], [row["reward"] for row in curve], color=colors[arm])
        axes.set(title=task, xlabel="CPU-seconds", ylabel="reward of the rollout")
    figure.legend([pyplot.Line2D([], [], color=each) for each in colors.values()], list(colors), loc="outside right")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Repeat each run as each arm; print the table, and write it and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="Finished runs of hfllm rlhf, such as outputs/reason/rl.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="`vanilla` runs always.")
    parser.add_argument("--more", type=Path, help="YAML of further arms: names, and below each the flags it adds.")
    parser.add_argument("--output", type=Path, help="A page to write; its plot lies beside it.")
    parser.add_argument("--train", choices=("ppo", GRPO), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(json.load(sys.stdin), args.train)
        return
    given, more = {run: flags_of(run) for run in args.runs}, arms_of(args.more)
    if not given:
        parser.error("name a finished run, such as outputs/reason/rl")
    curves: dict[tuple[str, str, str], list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for run, flags in given.items():
            for arm in dict.fromkeys((VANILLA, *args.arms, *more)):
                own = flags_of_arm(flags, arm, more)
                if own is None:
                    continue
                curves[task_of(run), str(run), arm] = curve = curve_of(run, arm, own, Path(folder))
                print(f"{run}, {arm}: {end_of(curve):.3f} after {curve[-1]['cpu']:.0f} CPU-seconds", flush=True)
                if args.output:
                    args.output.write_text(f"# PPO's ingredients\n\n{table_of(curves)}\n", encoding="utf-8")
                    plot(curves, args.output.with_suffix(".png"))
    print(table_of(curves))


if __name__ == "__main__":
    main()
