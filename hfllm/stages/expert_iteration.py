"""Expert iteration: its flags and checks, the rounds of fine-tuning, their rows, and the evaluation."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.formats import as_completion
from hfllm.data.loading import RowArguments
from hfllm.data.rows import split_beginning
from hfllm.data.sources import WORLD
from hfllm.data.thoughts import thinking_message
from hfllm.errors import InputError
from hfllm.fingerprint import file_fingerprint, fingerprint
from hfllm.flags import NAMED, NOT_NEGATIVE, POSITIVE, SEED, UNNAMED, Refused, at_least, check_flags, flag
from hfllm.generation.responses import sample_responses
from hfllm.outputs.report import Plot, Promise, change_of, is_noise, plus_minus, write_atomically
from hfllm.runs import schedule
from hfllm.runs.arguments import flags_for_all, flags_of_adapter
from hfllm.runs.command_line import main_process, say
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.identity import model_files
from hfllm.runs.pipeline import Chain, Parsed, chain_before, output_dir_of, run_stage
from hfllm.runs.recipes import load_recipe, settings_file
from hfllm.trainers.ppo.options import REWARD_TIMEOUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.rewards.functions import RewardFunction
    from hfllm.stages.shared import Speaking


# ---- flags ----


BASE, LAST = START_FROM = ("base", "last")


@dataclass(frozen=True)
class ExpertIterationArguments(RowArguments, RemoteCodeArguments):
    """Prompts, the reward, and how much is sampled and kept."""

    output_dir: str = flag("outputs/expert_iteration", "Where the models, the data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    reward_funcs: list[str] | None = flag(
        None,
        "Reward functions: path/to/file.py:function, exact_match (the final answer is that of the column "
        "answer), or gold (the embedded world's); several are added.",
    )
    reward_timeout: float = flag(
        REWARD_TIMEOUT, "Seconds after which a reward function is given up; 0: none.", takes=NOT_NEGATIVE
    )
    min_reward: float = flag(1.0, "Responses with at least this reward are kept.")
    num_rounds: int = flag(2, "Rounds of sampling and fine-tuning.", takes=at_least(1))
    num_samples: int = flag(4, "Responses sampled for each prompt in a round.", takes=at_least(1))
    max_kept_per_prompt: int = flag(2, "Different responses kept of a prompt, at most.", takes=at_least(1))
    start_from: str = flag(
        BASE,
        "What a round tunes: base, the model of the beginning (STaR), or last, that of the round before.",
        choices=list(START_FROM),
    )
    shuffle_rewards: bool = flag(
        False, "Control that must not gain: keep as many responses, drawn by chance, as were right."
    )
    response_length: int = flag(256, "Longest response in tokens; longer ones are cut.", takes=at_least(1))
    temperature: float = flag(1.0, "Of the sampling; above 0.", takes=POSITIVE)
    batch_size: int = flag(64, "Prompts that are answered at once.", takes=at_least(1))
    num_prompts: int = flag(1500, "Prompts of the embedded world to sample from.", takes=at_least(1))
    num_eval_prompts: int = flag(100, "Held-out prompts, at most this many.", takes=at_least(1))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining stage.", never=NAMED)
    sft_config: str | None = flag(None, "YAML flags of the world model's fine-tuning.", never=NAMED)
    round_config: str | None = flag(None, "YAML flags of the fine-tuning in each round.")

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True
    # As in fine-tuning, a text is a user's turn.
    apply_chat_template: ClassVar[bool] = True
    refused: ClassVar[Refused] = {"use_peft": UNNAMED.because("the world's model is trained whole")}

    @property
    def is_world(self) -> bool:
        """Whether the prompts are the embedded world's."""
        return self.dataset_name == WORLD


def check(script_args: ExpertIterationArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect, contradict each other, or would fail later."""
    check_flags(script_args, model_args)
    named = bool(model_args.model_name_or_path)
    if named == script_args.is_world:
        raise InputError("--model_name_or_path and --dataset_name: give both, or neither for the embedded world")
    if named and not script_args.reward_funcs:
        raise InputError("--reward_funcs is needed: exact_match, or path/to/file.py:function")


@dataclass(frozen=True)
class Rounds:
    """The runs in their order: the stages before, and the fine-tuning of each round.

    Args:
        before: the stages to make the first model, if it is not named.
        runs: the flags of each round's fine-tuning, by its name.
        first: the initial model.
    """

    before: Chain
    runs: Mapping[str, Parsed]
    first: str

    @property
    def parsed(self) -> dict[str, Parsed]:
        """The flags of all runs."""
        return {**self.before.parsed, **self.runs}

    def folder(self, name: str) -> str:
        """Return the folder of a round, also the folder of its model."""
        return output_dir_of(self.runs[name])

    @property
    def models(self) -> list[str]:
        """The initial model, and the model of each round."""
        return [self.first, *map(self.folder, self.runs)]

    def announce(self) -> None:
        """Print the upcoming runs."""
        planned = [schedule.Planned(name, output_dir_of(flags)) for name, flags in self.parsed.items()]
        if schedule.plan("expert_iteration", planned, None) and main_process():
            print(f"expert_iteration: {schedule.described(schedule.current_job())}", flush=True)

    def tune(self, name: str) -> dict[str, float]:
        """Fine-tune on a round's rows, which must exist, or reuse the earlier result; return its metrics."""
        names = list(self.runs)
        later = {self.folder(each): "sft" for each in names[names.index(name) + 1 :]}
        return run_stage("sft", self.runs[name], later)

    def end(self) -> None:
        """Note that all runs have ended."""
        schedule.come_back("expert_iteration")


def rows_file(script_args: ExpertIterationArguments, name: str) -> Path:
    """Return the file of a round's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


def rounds_of(script_args: ExpertIterationArguments, model_args: "ModelConfig") -> Rounds:
    """Return the runs requested by the flags."""
    named, output_dir, seed = model_args.model_name_or_path, script_args.output_dir, script_args.seed
    before = chain_before(
        *("expert_iteration", output_dir, seed, script_args.world_seed),
        given_models={"sft": named},
        configs={"pretrain": script_args.pretrain_config, "sft": script_args.sft_config},
    )
    first = named or before.model("sft")
    config = script_args.round_config or (None if named else str(settings_file("expert_iteration/sft.yaml")))
    runs: dict[str, Parsed] = {}
    start = first
    for number in range(1, script_args.num_rounds + 1):
        name = f"round_{number}"
        words = ["--model_name_or_path", start, "--dataset_name", str(rows_file(script_args, name))]
        words += flags_for_all(model_args)
        if start == first:
            words += flags_of_adapter(model_args)
            words += ["--model_revision", model_args.model_revision] if named else []
        words += ["--config", config] if config else []
        folder = str(Path(output_dir, name))
        runs[name] = load_recipe("sft").parse([*words, "--seed", str(seed), "--output_dir", folder])
        start = first if script_args.start_from == BASE else folder
    return Rounds(before, runs, first)


# ---- checks ----
#
# The inputs and the checks of expert iteration before its first run.


Row = Mapping[str, Any]


def reward_functions(script_args: ExpertIterationArguments) -> "list[RewardFunction]":
    """Return the reward functions; on the embedded world by default its exact score."""
    from hfllm.rewards.functions import gold_reward
    from hfllm.stages.rlhf.build import checked_functions

    if script_args.is_world and not script_args.reward_funcs:
        return [gold_reward]
    return checked_functions(script_args.reward_funcs)


def prompts_of(
    script_args: ExpertIterationArguments, model_args: "ModelConfig", functions: "Sequence[RewardFunction]"
) -> tuple[list[Row], list[Row]]:
    """Return the prompts to sample from and the held-out prompts; prompts without room for a response are left out."""
    from hfllm.models.loading.saved import max_length_of
    from hfllm.runs.models import load_config, load_tokenizer
    from hfllm.stages.rlhf.build import prompt_data
    from hfllm.trainers.ppo.prompts import check_pictures, unfit_prompts

    train_rows, eval_rows = prompt_data(script_args, script_args.seed, functions, timeout=script_args.reward_timeout)
    for rows in (train_rows, eval_rows):
        check_pictures(rows, None, "hfllm expert_iteration")
    if not (name := model_args.model_name_or_path):
        return train_rows, eval_rows
    tokenizer = load_tokenizer(name, model_args.model_revision)
    context, remaining = max_length_of(load_config(name, model_args.model_revision)), []
    for kind, rows in (("prompts", train_rows), ("held-out prompts", eval_rows)):
        unfit = dict(unfit_prompts(rows, tokenizer, script_args.response_length, context))
        room = f"no room for --response_length {script_args.response_length} in the context of {context} tokens"
        if len(unfit) == len(rows):
            raise InputError(f"{kind}: all {len(rows)} leave {room}")
        if unfit:
            say(f"expert_iteration: {len(unfit)} of {len(rows)} {kind} are left out: {room}")
        remaining.append([row for index, row in enumerate(rows) if index not in unfit])
    return remaining[0], remaining[1]


def check_before(script_args: ExpertIterationArguments, model_args: "ModelConfig", rounds: Rounds) -> None:
    """Refuse cases that a round's fine-tuning would refuse after the sampling, and inputs where the rounds write."""
    import torch

    from hfllm.data.sources import PYDOC
    from hfllm.models.devices import forked_random
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import check_trainable, load_config, peft_config, try_adapter
    from hfllm.runs.stage import Stage
    from hfllm.stages.sft import flags as sft_flags

    written = Path(script_args.output_dir).resolve()
    indices = {"model_name_or_path": model_args.model_name_or_path, "dataset_name": script_args.dataset_name}
    for each, name in indices.items():
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(written):
            raise InputError(f"--{each} {name} lies in {written}, where the rounds write: choose another --output_dir")
    if model_args.model_name_or_path:
        check_trainable(model_args)
        if model_args.use_peft:
            with forked_random(torch.device("cpu")):
                try_adapter(
                    load_config(model_args.model_name_or_path, model_args.model_revision), peft_config(model_args)
                )
    for flags in rounds.runs.values():
        # Its rows do not exist yet; an always available source stands for their file.
        stand_in = changed(flags[0], dataset_name=PYDOC), *flags[1:]
        sft_flags.check(*stand_in)
        Stage("sft", *stand_in).check_flags()


# ---- data ----
#
# The rows of each round of expert iteration: responses with enough reward, and their number.


@dataclass(frozen=True)
class Kept:
    """The counts of a round: its kept rows and its responses.

    Args:
        rows: rows for fine-tuning.
        responses: sampled responses.
        right: responses with at least the required reward.
        solved: prompts with at least one of them.
        reward: mean reward of all responses.
    """

    rows: int
    responses: int
    right: int
    solved: int
    reward: float


def rewards_of(
    functions: "Sequence[RewardFunction]",
    rows: Sequence[Row],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    timeout: float = REWARD_TIMEOUT,
) -> list[float]:
    """Return the sum of the rewards of a response to each row's prompt; rewards of tokens or steps are added up.

    Each function has `timeout` seconds, see `time_limit`.
    """
    from hfllm.rewards.functions import BEGINNING, checked_rewards, reward_columns, time_limit

    prompts, begun = map(list, zip(*(split_beginning(row["prompt"]) for row in rows), strict=True))
    completions = [[thinking_message(put + text)] for put, text in zip(begun, texts, strict=True)]
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    columns = {**reward_columns(rows), "completion_ids": ids, BEGINNING: begun}
    total = [0.0] * len(rows)
    for function in functions:
        with time_limit(function, timeout):
            values = checked_rewards(function, prompts, completions, **columns)
        for index, value in enumerate(values):
            total[index] += sum(value) if isinstance(value, list) else value
    return total


def write_round(
    script_args: ExpertIterationArguments,
    name: str,
    rows: Sequence[Row],
    functions: "Sequence[RewardFunction]",
    model: str,
    load: "Callable[[], Speaking]",
    seed: int,
) -> Kept:
    """Sample responses to the rows' prompts, write those with enough reward for fine-tuning, and return the counts.

    A round written before, by the same model with the same settings, is read instead.

    Args:
        model: name or folder of the sampling model.
        load: returns it with its tokenizer.
    """
    path = rows_file(script_args, name)
    record = path.with_suffix(".json")
    description = _description(script_args, rows, model, seed)
    if (before := _read(record)).get("asked") == description and before.get("rows sha256") == _hash_of(path):
        return Kept(**before["kept"])
    if before:
        say(f"{name}: sampled again: {path} is of another model or other flags, was changed, or is an older hfllm's")
    speaking = load()
    responses = sampled(script_args, speaking, rows, seed, script_args.num_samples, only_ended=True)
    repeated = [row for row, texts in zip(rows, responses, strict=True) for _ in texts]
    texts = [text for each in responses for text in each]
    if not texts:
        raise InputError(f"{name}: no response ends within --response_length {script_args.response_length}")
    rewards = rewards_of(functions, repeated, texts, speaking.tokenizer, script_args.reward_timeout)
    chosen, counts = _chosen(script_args, rows, responses, rewards, seed)
    if counts.solved < 2 or len({str(row["prompt"]) for row in chosen}) < 2:
        raise InputError(
            f"{name}: of {len(rows):,} prompts {counts.solved} have a response with a reward of at least --min_reward "
            f"{script_args.min_reward:g}; fine-tuning needs two. Mean reward {counts.reward:.3g}: more --num_samples, "
            "a lower --min_reward, or a better model to begin with"
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _hash_of(path) != _digest(text.encode()):
        write_atomically(path, text)
    written = {"asked": description, "kept": asdict(counts), "rows sha256": _hash_of(path)}
    write_atomically(record, json.dumps(written, indent=2) + "\n")
    say(
        f"{name}: {counts.right:,} of {counts.responses:,} responses are right, to {counts.solved:,} of {len(rows):,} "
        f"prompts; {counts.rows:,} are learned"
    )
    return counts


def sampled(
    script_args: ExpertIterationArguments,
    speaking: "Speaking",
    rows: Sequence[Row],
    seed: int,
    num_samples: int = 1,
    only_ended: bool = False,
) -> list[list[str]]:
    """Return sampled responses to each row's prompt; with `only_ended` without truncated responses."""
    return sample_responses(
        *(speaking.model, speaking.tokenizer, [row["prompt"] for row in rows], script_args.response_length),
        num_return_sequences=num_samples,
        batch_size=script_args.batch_size,
        seed=seed,
        only_ended=only_ended,
        fast=True,
        tools=[row.get("tools") for row in rows],
        temperature=script_args.temperature,
    )


def _chosen(
    script_args: ExpertIterationArguments,
    rows: Sequence[Row],
    responses: Sequence[Sequence[str]],
    rewards: Sequence[float],
    seed: int,
) -> tuple[list[dict[str, Any]], Kept]:
    """Return the rows to learn, different responses of each prompt, and the counts."""
    is_right = [reward >= script_args.min_reward for reward in rewards]
    right, mean = sum(is_right), sum(rewards) / max(len(rewards), 1)
    if script_args.shuffle_rewards:
        random.Random(f"expert-iteration-control-{seed}").shuffle(is_right)
    chosen, solved, at = [], 0, 0
    for row, texts in zip(rows, responses, strict=True):
        marks, at = is_right[at : at + len(texts)], at + len(texts)
        # As they were sampled, thoughts and all: a dictionary keeps their order and drops duplicates.
        selected = list(dict.fromkeys(text for text, mark in zip(texts, marks, strict=True) if mark and text.strip()))
        solved += bool(selected)
        shared = {"tools": row["tools"]} if row.get("tools") else {}
        for text in selected[: script_args.max_kept_per_prompt]:
            prompt, _ = split_beginning(row["prompt"])
            chosen.append({"prompt": prompt, "completion": as_completion(row["prompt"], text), **shared})
    return chosen, Kept(len(chosen), len(is_right), right, solved, mean)


def _description(
    script_args: ExpertIterationArguments, rows: Sequence[Row], model: str, seed: int
) -> dict[str, str | int | float | bool]:
    """Return all dependencies of the rows of a round."""
    names = ("min_reward", "num_samples", "max_kept_per_prompt", "shuffle_rewards", "response_length", "temperature")
    files = model_files(model) if Path(model).is_dir() else []
    functions = [Path(name.rpartition(":")[0]) for name in script_args.reward_funcs or []]
    return {
        **{name: getattr(script_args, name) for name in names},
        "batch_size": script_args.batch_size,
        "seed": seed,
        "model": model,
        "model's files": file_fingerprint(files, dates_large=True),
        "rewards": " ".join(script_args.reward_funcs or []),
        "rewards' files": file_fingerprint(
            (str(index), path) for index, path in enumerate(functions) if path.is_file()
        ),
        "prompts": fingerprint([fingerprint(row, f"prompt {index}") for index, row in enumerate(rows)]),
    }


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _hash_of(path: Path) -> str:
    return _digest(path.read_bytes()) if path.is_file() else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- evaluation ----
#
# The effect of expert iteration, on held-out prompts.


SAMPLES = 6


@dataclass(frozen=True)
class Evaluation:
    """One sampled response of a model to each held-out prompt, and its reward."""

    texts: list[str]
    rewards: list[float]


def evaluate(
    script_args: ExpertIterationArguments,
    speaking: "Speaking",
    rows: Sequence[Mapping[str, Any]],
    functions: "Sequence[RewardFunction]",
) -> Evaluation:
    """Sample a response to each held-out prompt, with the same settings as in the rounds."""
    responses = sampled(script_args, speaking, rows, script_args.seed + 1_000_000)
    texts = [text for (text,) in responses]
    return Evaluation(texts, rewards_of(functions, rows, texts, speaking.tokenizer, script_args.reward_timeout))


def found_metrics(
    script_args: ExpertIterationArguments, evaluations: Sequence[Evaluation], kept: Sequence[Kept]
) -> dict[str, float]:
    """Return reward and share of right responses before and after, with errors, and the figures of each round."""
    first, last = evaluations[0], evaluations[-1]
    metrics = change_of("reward", first.rewards, last.rewards)
    metrics |= change_of("right", *(_right(script_args, each) for each in (first, last)))
    for number, each in enumerate(evaluations[1:], 1):
        metrics[f"right_round_{number}"] = _mean(_right(script_args, each))
    for number, each in enumerate(kept, 1):
        metrics[f"kept_rows_round_{number}"] = each.rows
        metrics[f"right_responses_round_{number}"] = each.right / max(each.responses, 1)
    return metrics


def promises_of(script_args: ExpertIterationArguments) -> list[Promise]:
    """Return the promises about the figures; none for the control."""
    learned = Promise("change of right responses to held-out prompts", "right_change", 0.0, "no change")
    return [] if script_args.shuffle_rewards else [learned]


def summary_of(script_args: ExpertIterationArguments, metrics: Mapping[str, float]) -> str:
    """Return the change, in a sentence."""
    before, after = (plus_minus(metrics[f"right_{at}"], metrics.get(f"right_{at}_se")) for at in ("before", "after"))
    change, error = metrics["right_change"], metrics.get("right_change_se")
    word = "did not change beyond noise" if is_noise(change, error) else "rose" if change > 0 else "fell"
    control = " (control: what was learned is drawn by chance)" if script_args.shuffle_rewards else ""
    about = f"right responses to {metrics['right_n']} held-out prompts"
    return f"the share of {about} {word}: {before} before, {after} after{control}"


def tables_of(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation], kept: Sequence[Kept]
) -> dict[str, list[dict[str, Any]]]:
    """Return the table of rounds, and a table of some prompts with the responses before and after."""
    rounds = [
        {"round": number, "responses": each.responses, "right": each.right, "prompts solved": each.solved}
        | {"learned": each.rows, "held-out reward after": _mean(evaluations[number].rewards)}
        for number, each in enumerate(kept, 1)
    ]
    first, last = evaluations[0], evaluations[-1]
    step = max(len(rows) // SAMPLES, 1)
    samples = [
        {"prompt": rows[index]["prompt"][-1]["content"], "before": first.texts[index], "after": last.texts[index]}
        for index in range(0, len(rows), step)
    ][:SAMPLES]
    return {"Rounds": rounds, "Held-out prompts before and after": samples}


def plots_of(script_args: ExpertIterationArguments, evaluations: Sequence[Evaluation]) -> dict[str, Plot]:
    """Return the plot of right responses by round."""
    shares = [_mean(_right(script_args, each)) for each in evaluations]
    line = {"held-out prompts": (list(range(len(shares))), shares)}
    return {"right": Plot("Right responses", "round", "share", line)}


def _right(script_args: ExpertIterationArguments, each: Evaluation) -> list[float]:
    return [float(reward >= script_args.min_reward) for reward in each.rewards]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
