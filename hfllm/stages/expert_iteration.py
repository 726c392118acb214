"""Expert iteration: its flags and checks, the rounds of fine-tuning, their rows, and the evaluation."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.formats import as_completion, split_beginning
from hfllm.data.loading import RowArguments
from hfllm.data.sources import WORLD
from hfllm.data.thoughts import thinking_message
from hfllm.errors import InputError, refuse_if
from hfllm.fingerprint import file_fingerprint, fingerprint
from hfllm.flags import (
    NAMED,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    UNNAMED,
    WORLD_GROUP,
    Clashes,
    Refused,
    at_least,
    flag,
    flags_for_all,
    flags_of_adapter,
)
from hfllm.generation.responses import sample_responses
from hfllm.outputs.figures import change_of, shown, word_of
from hfllm.outputs.report import Found, Plot, write_atomically
from hfllm.outputs.verdict import Promise
from hfllm.runs import pipeline
from hfllm.runs.command_line import given_values, say
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.identity import model_files
from hfllm.runs.pipeline import Chain, Parsed, chain_before
from hfllm.runs.recipes import settings_file
from hfllm.trainers.ppo.options import REWARD_TIMEOUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.rewards.functions import RewardFunction
    from hfllm.stages.shared import Speaking


# ---- flags ----


BASE, LAST = START_FROM = ("base", "last")


@dataclass(frozen=True)
class RoundSettings:
    """How responses are sampled in a round, and which of them are learned: the flags of these names."""

    min_reward: float
    num_samples: int
    max_kept_per_prompt: int
    shuffle_rewards: bool
    response_length: int
    temperature: float
    batch_size: int


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
    shuffle_rewards: bool = flag(False, "Control that must not gain: learn as many responses, drawn by chance.")
    response_length: int = flag(256, "Longest response in tokens; longer ones are cut.", takes=at_least(1))
    temperature: float = flag(1.0, "Of the sampling; above 0.", takes=POSITIVE)
    batch_size: int = flag(64, "Prompts that are answered at once.", takes=at_least(1))
    num_prompts: int = flag(1500, "Prompts of the embedded world to sample from.", takes=at_least(1))
    num_eval_prompts: int = flag(100, "Held-out prompts, at most this many.", takes=at_least(1))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining stage.", never=NAMED, group=WORLD_GROUP)
    sft_config: str | None = flag(None, "YAML flags of the world model's fine-tuning.", never=NAMED, group=WORLD_GROUP)
    round_config: str | None = flag(None, "YAML flags of the fine-tuning in each round.")

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True
    # As in fine-tuning, a text is a user's turn.
    apply_chat_template: ClassVar[bool] = True
    refused: ClassVar[Refused] = {"use_peft": UNNAMED.because("the world's model is trained whole")}
    clashes: ClassVar[Clashes] = {
        "--model_name_or_path and --dataset_name: give both, or neither for the embedded world": lambda flags: (
            bool(flags.model_name_or_path) == flags.is_world
        ),
        "--reward_funcs is needed: exact_match, or path/to/file.py:function": lambda flags: (
            NAMED.holds(flags) and not flags.reward_funcs
        ),
    }

    @property
    def is_world(self) -> bool:
        """Whether the prompts are the embedded world's."""
        return self.dataset_name == WORLD

    @property
    def of_rounds(self) -> RoundSettings:
        """The settings of each round."""
        return RoundSettings(**{item.name: getattr(self, item.name) for item in fields(RoundSettings)})


@dataclass(frozen=True, kw_only=True)
class Rounds(pipeline.Course):
    """The runs in their order: the stages before, and the fine-tuning of each round.

    Args:
        before: the stages to make the first model, if it is not named.
    """

    before: Chain
    stage = "expert_iteration"

    @property
    def is_timed(self) -> bool:
        """Whether the settings are the timed ones: none are."""
        return False

    @property
    def parsed(self) -> dict[str, Parsed]:
        """The flags of all runs, those of the stages before first."""
        return {**self.before.parsed, **self.runs}

    @property
    def first(self) -> str:
        """The initial model."""
        return self.named or self.before.model("sft")

    @property
    def models(self) -> list[str]:
        """The initial model, and the model of each round."""
        return [self.first, *map(self.folder, self.runs)]

    def check(self) -> None:
        """Refuse cases that a round's fine-tuning would refuse after the sampling."""
        from hfllm.stages.courses import before_its_rows, check_runs
        from hfllm.stages.sft import flags as sft_flags

        for parsed in self.runs.values():
            sft_flags.check(*before_its_rows(parsed))
        check_runs(self)


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
    # Weights in bfloat16 sample several times as fast on a CPU, and lose small updates: a round may set its own type.
    set_by_round = given_values(["--config", config]) if config else {}

    def runs() -> Iterator[tuple[str, str, list[str]]]:
        start = first
        for number in range(1, script_args.num_rounds + 1):
            name = f"round_{number}"
            words = ["--model_name_or_path", start, "--dataset_name", str(pipeline.data_file(output_dir, name))]
            words += flags_for_all(model_args, without=list(set_by_round))
            if start == first:
                words += flags_of_adapter(model_args)
                words += ["--model_revision", model_args.model_revision] if named else []
            words += ["--config", config] if config else []
            yield name, "sft", words
            start = first if script_args.start_from == BASE else str(Path(output_dir, name))

    return Rounds(*pipeline.parsed_runs(runs(), output_dir, seed), named, before=before)


# ---- inputs ----
#
# The inputs of expert iteration, before its first run.


Row = Mapping[str, Any]
# All that the rows of a round depend on.
Description = dict[str, str | int | float | bool]
# What of it decides which responses are learned, and not which ones are sampled.
OF_CHOICE = ("min_reward", "max_kept_per_prompt", "shuffle_rewards", "rewards", "rewards' files")


@dataclass(frozen=True)
class Reward:
    """Reward functions, whose values are added up.

    Args:
        functions: the functions.
        names: the user's names of them, none for the embedded world's exact score.
        timeout: the seconds of each, see `time_limit`.
    """

    functions: "Sequence[RewardFunction]"
    names: Sequence[str]
    timeout: float

    def of(self, rows: Sequence[Row], texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[float]:
        """Return the rewards of a response to each row's prompt."""
        return rewards_of(self.functions, rows, texts, tokenizer, self.timeout)


def reward_of(names: Sequence[str] | None, timeout: float, is_world: bool) -> Reward:
    """Return the named reward functions; the embedded world is rewarded by its exact score by default.

    Args:
        timeout: see `Reward`.
        is_world: whether the prompts are the embedded world's.
    """
    from hfllm.rewards.functions import gold_reward
    from hfllm.stages.rlhf.build import checked_functions

    functions = [gold_reward] if is_world and not names else checked_functions(names)
    return Reward(functions, names or [], timeout)


def with_room(
    parts: tuple[list[Row], list[Row]], name: str, revision: str, response_length: int
) -> tuple[list[Row], list[Row]]:
    """Return the prompts with room for a response in a model's context, and print how many have none.

    Args:
        parts: the prompts to sample from, and the held-out ones.
        name: of the model.
        revision: of the model.
        response_length: of a response at most.
    """
    from hfllm.models.loading.saved import max_length_of
    from hfllm.runs.models import load_config, load_tokenizer
    from hfllm.stages.courses import prompts_with_room
    from hfllm.trainers.ppo.prompts import unfit_prompts

    tokenizer = load_tokenizer(name, revision)
    context, remaining = max_length_of(load_config(name, revision)), []
    reason = f"no room for --response_length {response_length} in the context of {context} tokens"
    for kind, rows in zip(("prompts", "held-out prompts"), parts, strict=True):
        unfit = dict(unfit_prompts(rows, tokenizer, response_length, context))
        remaining.append(prompts_with_room("expert_iteration", kind, rows, unfit, reason))
    return tuple(remaining)


# ---- data ----
#
# The rows of each round of expert iteration: responses with enough reward, and their number.


@dataclass(frozen=True)
class RoundCounts:
    """The counts of a round.

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

    Each function has `timeout` seconds, see `RewardCalls`. A response that it does not judge earns nothing of it.
    """
    from hfllm.rewards.calls import RewardCalls, RewardLog
    from hfllm.rewards.functions import BEGINNING, reward_columns

    prompts, begun = map(list, zip(*(split_beginning(row["prompt"]) for row in rows), strict=True))
    completions = [[thinking_message(put + text)] for put, text in zip(begun, texts, strict=True)]
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    columns = {**reward_columns(rows), "completion_ids": ids, BEGINNING: begun}
    total = [0.0] * len(rows)
    calls = RewardCalls(functions, prompts, completions, columns, RewardLog().arguments(), timeout)
    for values in calls.results():
        for index, value in enumerate(values):
            total[index] += sum(value) if isinstance(value, list) else value or 0.0
    return total


@dataclass(frozen=True)
class RoundWriter:
    """Writes the rows of rounds: responses with enough reward.

    Args:
        rows: the prompts.
        reward: of the responses.
        settings: how responses are sampled, and which of them are learned.
        loading: the flags by which models are loaded, such as their type.
    """

    rows: Sequence[Row]
    reward: Reward
    settings: RoundSettings
    loading: str = ""

    def write(self, path: Path, model: str, load: "Callable[[str], Speaking]", seed: int) -> RoundCounts:
        """Sample responses to the prompts, write the rows of a round, and return the counts.

        A round written before, by the same model with the same settings, is read instead.

        Args:
            path: the file of the rows, with the name of the round.
            model: name or folder of the sampling model.
            load: returns a model with its tokenizer.
            seed: of the samples.
        """
        name, record = path.stem, path.with_suffix(".json")
        description = self._description(model, seed)
        if (before := _read(record)).get("asked") == description and before.get("rows sha256") == _hash_of(path):
            return RoundCounts(**before["kept"])
        if before:
            reason = "is of another model or other flags, was changed, or is an older hfllm's"
            say(f"{name}: made again: {path} {reason}")
        chosen, counts = self._choose(path, load(model), description)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        path.parent.mkdir(parents=True, exist_ok=True)
        if _hash_of(path) != _digest(text.encode()):
            write_atomically(path, text)
        written = {"asked": description, "kept": asdict(counts), "rows sha256": _hash_of(path)}
        write_atomically(record, json.dumps(written, indent=2) + "\n")
        say(
            f"{name}: {counts.right:,} of {counts.responses:,} responses are right, to {counts.solved:,} of "
            f"{len(self.rows):,} prompts; {counts.rows:,} are learned"
        )
        return counts

    def _choose(
        self, path: Path, speaking: "Speaking", description: Description
    ) -> tuple[list[dict[str, Any]], RoundCounts]:
        """Return the rows to learn and the counts; fewer than two different prompts are an error."""
        name, settings, seed = path.stem, self.settings, description["seed"]
        responses = self._responses(path.with_name(f"{name}_responses.json"), speaking, description)
        repeated = [row for row, texts in zip(self.rows, responses, strict=True) for _ in texts]
        texts = [text for each in responses for text in each]
        refuse_if(not texts, f"{name}: no response ends within --response_length {settings.response_length}")
        rewards = self.reward.of(repeated, texts, speaking.tokenizer)
        chosen, counts = chosen_rows(self.rows, responses, rewards, settings, seed)
        if counts.solved < 2 or len({str(row["prompt"]) for row in chosen}) < 2:
            raise InputError(
                f"{name}: of {len(self.rows):,} prompts {counts.solved} have a response with a reward of at least "
                f"--min_reward {settings.min_reward:g}; fine-tuning needs two. Mean reward {counts.reward:.3g}: more "
                "--num_samples, a lower --min_reward, or a better model to begin with"
            )
        return chosen, counts

    def _responses(self, path: Path, speaking: "Speaking", description: Description) -> list[list[str]]:
        """Return responses to each prompt; those sampled before are read, whatever was learned of them."""
        asked = {name: value for name, value in description.items() if name not in OF_CHOICE}
        before = _read(path)
        if before.get("asked") == asked and before.get("sha256") == _hash_of_responses(before.get("responses")):
            say(f"{path.stem}: read from {path}")
            return before["responses"]
        responses = sampled(
            speaking, self.rows, self.settings, description["seed"], self.settings.num_samples, only_ended=True
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {"asked": asked, "sha256": _hash_of_responses(responses), "responses": responses}
        write_atomically(path, json.dumps(written, ensure_ascii=False, indent=1) + "\n")
        return responses

    def _description(self, model: str, seed: int) -> Description:
        """Return all dependencies of the rows of a round."""
        files = model_files(model) if Path(model).is_dir() else []
        functions = [Path(name.rpartition(":")[0]) for name in self.reward.names]
        return {
            **asdict(self.settings),
            "seed": seed,
            "model": model,
            "loading": self.loading,
            "model's files": file_fingerprint(files, dates_large=True),
            "rewards": " ".join(self.reward.names),
            "rewards' files": file_fingerprint(
                (str(index), path) for index, path in enumerate(functions) if path.is_file()
            ),
            "prompts": fingerprint([fingerprint(row, f"prompt {index}") for index, row in enumerate(self.rows)]),
        }


def sampled(
    speaking: "Speaking",
    rows: Sequence[Row],
    settings: RoundSettings,
    seed: int,
    num_samples: int = 1,
    only_ended: bool = False,
) -> list[list[str]]:
    """Return sampled responses to each row's prompt; with `only_ended` without truncated responses."""
    return sample_responses(
        *(speaking.model, speaking.tokenizer, [row["prompt"] for row in rows], settings.response_length),
        num_return_sequences=num_samples,
        batch_size=settings.batch_size,
        seed=seed,
        only_ended=only_ended,
        tools=[row.get("tools") for row in rows],
        temperature=settings.temperature,
    )


def chosen_rows(
    rows: Sequence[Row],
    responses: Sequence[Sequence[str]],
    rewards: Sequence[float],
    settings: RoundSettings,
    seed: int,
) -> tuple[list[dict[str, Any]], RoundCounts]:
    """Return the rows to learn, different responses of each prompt, and the counts.

    The control learns as many rows, drawn by chance from all responses.
    """
    is_right, most = [reward >= settings.min_reward for reward in rewards], settings.max_kept_per_prompt
    right, mean = sum(is_right), sum(rewards) / max(len(rewards), 1)
    kept, at = [], 0
    for texts in responses:
        marks, at = is_right[at : at + len(texts)], at + len(texts)
        kept.append(_different(text for text, mark in zip(texts, marks, strict=True) if mark)[:most])
    solved, count = sum(map(bool, kept)), sum(map(len, kept))
    if settings.shuffle_rewards:
        kept = _drawn(responses, count, most, random.Random(f"expert-iteration-control-{seed}"))
    chosen = []
    for row, texts in zip(rows, kept, strict=True):
        shared = {"tools": row["tools"]} if row.get("tools") else {}
        prompt, _ = split_beginning(row["prompt"])
        chosen += [{"prompt": prompt, "completion": as_completion(row["prompt"], text), **shared} for text in texts]
    return chosen, RoundCounts(len(chosen), len(is_right), right, solved, mean)


def _different(texts: Iterable[str]) -> list[str]:
    """Return the different texts but empty ones, as they were sampled, thoughts and all, in their order."""
    return [text for text in dict.fromkeys(texts) if text.strip()]


def _drawn(responses: Sequence[Sequence[str]], count: int, most: int, rng: random.Random) -> list[list[str]]:
    """Return `count` different responses drawn by chance, by prompt, at most `most` of one."""
    candidates = [(at, text) for at, texts in enumerate(responses) for text in _different(texts)]
    rng.shuffle(candidates)
    drawn: list[list[str]] = [[] for _ in responses]
    for at, text in candidates:
        if count and len(drawn[at]) < most:
            drawn[at].append(text)
            count -= 1
    return drawn


def _read(record: Path) -> dict[str, Any]:
    try:
        read = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _hash_of_responses(responses: object) -> str:
    return _digest(json.dumps(responses).encode())


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
    """One sampled response of a model to each held-out prompt, its reward, and whether it is right."""

    texts: list[str]
    rewards: list[float]
    right: list[float]

    @property
    def right_share(self) -> float:
        """The share of right responses."""
        return _mean(self.right)


def evaluation_of(
    speaking: "Speaking", rows: Sequence[Row], reward: Reward, settings: RoundSettings, seed: int
) -> Evaluation:
    """Sample a response to each held-out prompt, with the same settings as in the rounds."""
    texts = [text for (text,) in sampled(speaking, rows, settings, seed + 1_000_000)]
    rewards = reward.of(rows, texts, speaking.tokenizer)
    return Evaluation(texts, rewards, [float(each >= settings.min_reward) for each in rewards])


def rounds_report(
    rows: Sequence[Row], evaluations: Sequence[Evaluation], counts: Sequence[RoundCounts], is_control: bool
) -> Found:
    """Return the report of all rounds, with promises unless it is the control.

    Args:
        rows: the held-out prompts.
        evaluations: of the initial model and the model of each round.
        counts: of each round.
        is_control: whether responses to learn were drawn by chance.
    """
    metrics = round_metrics(evaluations, counts)
    shares = [each.right_share for each in evaluations]
    line = {"held-out prompts": (list(range(len(shares))), shares)}
    learned = Promise("change of right responses to held-out prompts", "right_change", 0.0, "no change")
    return Found(
        metrics,
        summary_of(metrics, is_control),
        tables_of(rows, evaluations, counts),
        {"right": Plot("Right responses", "round", "share", line)},
        [] if is_control else [learned],
    )


def round_metrics(evaluations: Sequence[Evaluation], counts: Sequence[RoundCounts]) -> dict[str, float]:
    """Return reward and share of right responses before and after, with errors, and the figures of each round."""
    first, last = evaluations[0], evaluations[-1]
    metrics = change_of("reward", first.rewards, last.rewards)
    metrics |= change_of("right", first.right, last.right)
    for number, evaluation in enumerate(evaluations[1:], 1):
        metrics[f"right_round_{number}"] = evaluation.right_share
    for number, each in enumerate(counts, 1):
        metrics[f"kept_rows_round_{number}"] = each.rows
        metrics[f"right_responses_round_{number}"] = each.right / max(each.responses, 1)
    return metrics


def summary_of(metrics: Mapping[str, float], is_control: bool) -> str:
    """Return the change, in a sentence."""
    before, after = (shown(metrics, f"right_{at}") for at in ("before", "after"))
    is_changed = word_of("right", metrics) in ("more", "less")
    word = "did not change beyond noise" if not is_changed else "rose" if metrics["right_change"] > 0 else "fell"
    control = " (control: what was learned is drawn by chance)" if is_control else ""
    about = f"right responses to {metrics['right_n']} held-out prompts"
    return f"the share of {about} {word}: {before} before, {after} after{control}"


def tables_of(
    rows: Sequence[Row], evaluations: Sequence[Evaluation], counts: Sequence[RoundCounts]
) -> dict[str, list[dict[str, Any]]]:
    """Return the table of rounds, and a table of some prompts with the responses before and after."""
    rounds = [
        {"round": number, "responses": each.responses, "right": each.right, "prompts solved": each.solved}
        | {"learned": each.rows, "held-out reward after": _mean(evaluations[number].rewards)}
        for number, each in enumerate(counts, 1)
    ]
    first, last = evaluations[0], evaluations[-1]
    step = max(len(rows) // SAMPLES, 1)
    samples = [
        {"prompt": rows[index]["prompt"][-1]["content"], "before": first.texts[index], "after": last.texts[index]}
        for index in range(0, len(rows), step)
    ][:SAMPLES]
    return {"Rounds": rounds, "Held-out prompts before and after": samples}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
