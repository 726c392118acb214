"""A federation: its flags, its checks, and the tokenized rows of its organisations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from hfllm.data.loading import InstructionArguments
from hfllm.data.sources import WORLD
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse
from hfllm.federation.organisations import (
    Organisation,
    check_organisations,
    dirichlet_shares,
    family_shares,
    split_evenly,
    world_organisations,
)
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import ALWAYS, NAMED, NOT_NEGATIVE, SHARE, Fact, Refused, at_least, check_flags, flag, given_names
from hfllm.outputs.report import CHANGED, CONTENTS
from hfllm.runs.arguments import changed
from hfllm.runs.identity import data_files
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, RewardConfig, RewardTrainer, SFTConfig

    from hfllm.federation.privacy import RowPrivacy
    from hfllm.federation.rounds import RoundSettings


# ---- flags ----


FULL, LORA, FROZEN_A = AVERAGES = ("full", "lora", "lora_frozen_a")
MEAN, MEDIAN, TRIMMED_MEAN = AGGREGATIONS = ("mean", "median", "trimmed_mean")
SFT, REWARD = LEARNERS = ("sft", "reward")
CENTRAL, EQUAL_STEPS, LOCAL = CONTROLS = ("central", "equal_steps", "local")
SERVER_OPTIMIZERS = ("fedavg", "momentum", "fedadagrad", "fedadam", "fedyogi")
NOT_OF_THE_ROUNDS = ("processes", "round_timeout", "controls")
# Tokens of rows, by column.
Rows = Sequence[Mapping[str, Sequence[int]]]
LENGTH = "--rounds and --local_steps say how much is trained"
BETWEEN_MACHINES = "organisations are on other machines: --timeout of hfllm.federation.flower_app"
ELSEWHERE = Fact(lambda flags: flags.organisation_names, "organisations are on other machines")
NOT_WORLD = Fact(
    lambda flags: flags.dataset_name != WORLD or flags.organisation_files or flags.organisation_names,
    "it is of the embedded world",
)
CLIPPED = Fact(lambda flags: flags.clip_norm is not None, "--clip_norm is given")
NO_NOISE = Fact(
    lambda flags: not (flags.noise_multiplier > 0 or flags.row_noise_multiplier > 0),
    "without --noise_multiplier or --row_noise_multiplier nothing is private",
)
NO_TRAINER = "local steps are not taken by Trainer.train, which would switch it on"
ON_PAIRS = Fact(lambda flags: flags.learner == REWARD, "of comparisons whole answers are scored")


def is_adafactor(optim: object) -> bool:
    """Return whether `--optim`, a word or the library's name of it, is Adafactor."""
    return str(getattr(optim, "value", optim)) == "adafactor"


def organisation_names(files: Sequence[str]) -> list[str]:
    """Return names for files: their stems, with numbers for equal ones."""
    stems = [Path(name).stem for name in files]
    return [f"{stem}-{index}" if stems.count(stem) > 1 else stem for index, stem in enumerate(stems, 1)]


@dataclass(frozen=True)
class FederatedArguments(InstructionArguments):
    """Who learns together, and how."""

    num_organisations: int = flag(
        6,
        "Organisations that the embedded world, or --dataset_name, is dealt out to.",
        never=Fact(lambda flags: flags.organisation_files or flags.organisation_names, "they are named one by one"),
    )
    organisation_files: list[str] | None = flag(None, "Files or Hub datasets, each the rows of one organisation.")
    organisation_names: list[str] | None = flag(
        None,
        "Organisations on other machines, which Flower reaches and whose rows are not here.",
        never=Fact(lambda flags: flags.organisation_files or flags.dataset_name != WORLD, "the rows are here"),
    )
    dirichlet_alpha: float | None = flag(
        None,
        "Draw each organisation's share of the world's families from a Dirichlet distribution of this "
        "concentration (0.1: nearly one family each; 100: all alike); of --dataset_name the sizes.",
        never=Fact(lambda flags: flags.organisation_files, "organisations have files"),
    )
    main_share: float = flag(
        0.9, "Share of an organisation's rows of the world that are of one family.", takes=SHARE, never=NOT_WORLD
    )
    num_examples: int = flag(640, "Rows of the world that each organisation has.", never=NOT_WORLD, takes=at_least(1))
    rounds: int = flag(10, "How often the server takes the mean.", takes=at_least(1))
    local_steps: int = flag(4, "Optimizer steps of an organisation in a round.", takes=at_least(1))
    learner: str = flag(
        SFT,
        "What organisations train: sft (answers), or reward (a reward model, on files of comparisons).",
        choices=list(LEARNERS),
        never=Fact(
            lambda flags: flags.learner == REWARD and not NOT_WORLD.holds(flags),
            "the embedded world's rows are answers",
        ),
    )
    average: str = flag(
        LORA,
        "What is trained and travels: full (all weights), lora (both factors of an adapter, whose mean is "
        "not that of their products), lora_frozen_a (one of them, whose mean is exact).",
        choices=list(AVERAGES),
    )
    aggregation: str = flag(
        MEAN,
        "What is made of the updates: their mean by tokens, or by coordinate, organizations counting "
        "alike, median or trimmed_mean, which a hostile minority moves little.",
        choices=list(AGGREGATIONS),
        never=Fact(
            lambda flags: flags.clip_norm is not None and flags.aggregation != MEAN, "--clip_norm is of a mean"
        ),
    )
    trim: float = flag(
        0.2,
        "Share of the updates that trimmed_mean leaves out at each end.",
        never=Fact(lambda flags: flags.aggregation != TRIMMED_MEAN, "it is of --aggregation trimmed_mean"),
    )
    max_norm_ratio: float = flag(
        2.0,
        "An update longer than this many times the median of its round is scaled to that; 0: none.",
        never=CLIPPED.because("--clip_norm bounds"),
    )
    server_optimizer: str = flag(
        "fedavg", "What the server does with the mean change.", choices=list(SERVER_OPTIMIZERS)
    )
    server_learning_rate: float | None = flag(None, "By default 1 for fedavg and momentum, 0.01 for the others.")
    server_momentum: float = flag(
        0.9,
        "Of all server optimizers but fedavg.",
        never=Fact(lambda flags: flags.server_optimizer == "fedavg", "fedavg has none: --server_optimizer momentum"),
    )
    proximal_mu: float = flag(
        0.0, "FedProx: how strongly local steps are held to the round's beginning.", takes=NOT_NEGATIVE
    )
    keep_optimizer: bool = flag(
        False,
        "Organisations keep the state of their optimizer from round to round, on their side.",
        never=Fact(lambda flags: is_adafactor(flags.optim), "the state of adafactor is not tensors alone"),
    )
    participation: float = flag(1.0, "Share of the organisations that a round asks.")
    min_organisations: int = flag(
        1,
        "Updates without which a round is not taken, and the run stops.",
        never=Fact(
            lambda flags: flags.noise_multiplier > 0 and flags.min_organisations > 1,
            "who takes part must stay unknown",
        ),
    )
    compression: str = flag("none", "Of updates on the wire.", choices=["none", "int8"])
    clip_norm: float | None = flag(None, "Longest update of an organisation.")
    noise_multiplier: float = flag(
        0.0,
        "Noise on the mean, in units of --clip_norm: organisation-level privacy.",
        never=CLIPPED.absent("it is in units of --clip_norm"),
    )
    row_clip_norm: float | None = flag(
        None, "Longest gradient of a single row; organisations then count alike, whatever their tokens."
    )
    row_noise_multiplier: float = flag(
        0.0,
        "Noise on each local step, in units of --row_clip_norm: row-level privacy (DP-SGD).",
        never=Fact(lambda flags: flags.row_clip_norm is None, "it is in units of --row_clip_norm"),
    )
    max_epsilon: float | None = flag(
        None, "Refuse a run that would spend more than this epsilon, of organisations or of rows.", never=NO_NOISE
    )
    delta: float = flag(1e-5, "Of the privacy guarantee (epsilon, delta).", never=NO_NOISE)
    processes: int = flag(
        1,
        "Processes of this machine that organisations train in.",
        takes=at_least(1),
        never=ELSEWHERE.because(BETWEEN_MACHINES),
    )
    round_timeout: float | None = flag(
        None,
        "Seconds after which a process that still trains is left out of the round.",
        never=(
            ELSEWHERE.because(BETWEEN_MACHINES),
            Fact(lambda flags: flags.processes == 1, "organisations train in this process, one by one"),
        ),
    )
    controls: list[str] | None = flag(
        None,
        "What to compare with: central (pooled rows, as many rows learned), equal_steps (pooled rows, as "
        "many steps), local (each organisation alone), or none; by default all.",
        some_of=CONTROLS,
    )
    eval_rounds: int = flag(5, "Measure after every so many rounds, and the last one.", takes=at_least(1))
    num_eval_prompts: int = flag(480, "Held-out questions of the world.", never=NOT_WORLD, takes=at_least(1))
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining that makes the base model, if none is named.", never=NAMED
    )

    refused: ClassVar[Refused] = {
        "dataset_name": Fact(lambda flags: flags.organisation_files, "--organisation_files takes its place"),
        "use_peft": Fact(lambda flags: flags.average == FULL, "--average full trains all weights"),
        **dict.fromkeys(("loss_on", "completion_only_loss", "assistant_only_loss", "chat_template_path"), ON_PAIRS),
        "neftune_noise_alpha": ALWAYS.because(NO_TRAINER),
        **dict.fromkeys(("num_train_epochs", "max_steps"), ALWAYS.because(LENGTH)),
        "fp16": ALWAYS.because("local steps scale no gradients: --bf16, or neither"),
        **dict.fromkeys(("packing", "padding_free"), ALWAYS.because("rows of a round are few, and padded")),
        "eval_strategy": ALWAYS.because("--eval_rounds says when it is measured"),
        "resume_from_checkpoint": ALWAYS.because("rounds are kept and resumed by themselves"),
    }

    @property
    def is_world(self) -> bool:
        """Whether the rows are the embedded world's."""
        return self.dataset_name == WORLD and not (self.organisation_files or self.organisation_names)

    @property
    def has_pairs(self) -> bool:
        """Whether rows are comparisons, for training a reward model."""
        return self.learner == REWARD

    @property
    def count(self) -> int:
        """The number of organisations."""
        return len(self.organisation_files or self.organisation_names or ()) or self.num_organisations

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        return tuple(arm for arm in CONTROLS if self.controls is None or arm in self.controls)


def default_settings(given: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model if no model is named, and else the settings of an adapter."""
    if not given.get("model_name_or_path"):
        return [settings_file("federated/world.yaml")]
    return [settings_file("federated/model.yaml")]


def check(script_args: FederatedArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse flags without effect, contradictory flags, and flags that would fail later."""
    check_flags(script_args, training_args, model_args)
    # On by default, and off on a machine without an accelerator: only the user's own request matters.
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        refuse(name in (given_names(script_args, training_args) or ()), f"--{name}", NO_TRAINER)
    files, named = script_args.organisation_files, bool(model_args.model_name_or_path)
    if named == script_args.is_world:
        raise InputError(
            "--model_name_or_path and --organisation_files (or --dataset_name): give both, or neither for the "
            "embedded world"
        )
    names = script_args.organisation_names
    if doubled := next((name for name in names or () if names.count(name) > 1), None):
        raise InputError(f"--organisation_names: {doubled!r} comes twice, each organisation needs a name of its own")
    refuse(bool(names) and bool(set(script_args.arms)), "--controls", "rows are elsewhere: --controls none")
    if script_args.count < 2 and not files:
        raise InputError(f"--num_organisations {script_args.count}: expected at least 2")
    if files and len(files) < 2:
        raise InputError(f"--organisation_files {' '.join(files)}: expected at least 2, one for each organisation")
    _check_server(script_args)
    _check_trainer(script_args, training_args)


def _check_server(script_args: FederatedArguments) -> None:
    from hfllm.federation.privacy import check_clip_norm
    from hfllm.federation.rounds import check_robust, check_settings

    check_robust(script_args.aggregation, script_args.trim, script_args.max_norm_ratio)
    check_settings(round_settings(script_args, 0), script_args.count)
    private = script_args.clip_norm is not None
    if private:
        check_clip_norm(script_args.clip_norm, "--clip_norm")
    row_privacy_of(script_args)


def row_privacy_of(script_args: FederatedArguments) -> "RowPrivacy | None":
    """Return the flags' protection of single rows, `None` if there is none."""
    from hfllm.federation.privacy import RowPrivacy

    if script_args.row_clip_norm is None:
        return None
    return RowPrivacy(script_args.row_clip_norm, script_args.row_noise_multiplier)


def _check_trainer(script_args: FederatedArguments, training_args: "SFTConfig") -> None:
    from hfllm.trainers.engines import schedule_of

    if training_args.world_size > 1:
        raise InputError(
            f"{training_args.world_size} processes: start one by accelerate launch --num_processes 1; --processes "
            "says in how many organisations train"
        )
    schedule_of(training_args, 1)


def round_settings(script_args: FederatedArguments, seed: int) -> "RoundSettings":
    """Return the settings of the rounds."""
    from hfllm.federation.rounds import RoundSettings

    return RoundSettings(
        num_rounds=script_args.rounds,
        participation=script_args.participation,
        min_organisations=script_args.min_organisations,
        seed=seed,
        is_private=script_args.noise_multiplier > 0,
    )


def row_epsilons(
    script_args: FederatedArguments, training_args: "SFTConfig", organisations: Iterable["HasRows"]
) -> dict[str, float]:
    """Return the privacy loss of one row by organisation with rows here; nothing without noise on rows."""
    from hfllm.federation.privacy import check_row_budget

    num_rows = {each.name: len(each.rows) for each in organisations if each.rows}
    if script_args.row_noise_multiplier == 0 or not num_rows:
        return {}
    batch_size = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    steps = (script_args.rounds, script_args.local_steps)
    privacy = (script_args.row_noise_multiplier, script_args.delta, script_args.max_epsilon)
    return check_row_budget(num_rows, batch_size, *steps, *privacy)


class HasRows(Protocol):
    """An organisation, as it is or tokenized."""

    name: str
    rows: Sequence[Any]


def terms_of(script_args: FederatedArguments, training_args: "SFTConfig") -> dict[str, str | int | float | None]:
    """Return the settings required to be equal on all machines of a run, by flag."""
    names = ("learner", "average", "local_steps", "rounds", "compression", "row_clip_norm", "row_noise_multiplier")
    return {name: getattr(script_args, name) for name in names} | {"seed": training_args.seed}


def stages_before(script_args: FederatedArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> Chain:
    """Return the pretraining of the base model, if none is named."""
    return chain_before(
        "federated",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"pretrain": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config},
    )


def adapted(script_args: FederatedArguments, model_args: "ModelConfig") -> "ModelConfig":
    """Return the flags of the model, with an adapter if adapters are averaged."""
    return changed(model_args, use_peft=script_args.average != FULL)


def identity_of(arguments: Mapping[str, Any], base_sha256: str) -> dict[str, Any]:
    """Return the identity of the rounds of this run: without the place of training and the comparisons.

    Args:
        arguments: all flags of the run.
        base_sha256: of the base model.
    """
    named = {name: value for name, value in arguments.items() if name not in NOT_OF_THE_ROUNDS}
    return {**named, "base_sha256": base_sha256}


def next_steps(script_args: FederatedArguments, training_args: "SFTConfig") -> list[str]:
    """Return the lines for using the model; none for a reward model."""
    from hfllm.outputs.card import chat_lines

    if script_args.has_pairs:
        return []
    return list(chat_lines(training_args.output_dir, [{"role": "user", "content": "Hello!"}]))


def contents(script_args: FederatedArguments) -> dict[str, int | str]:
    """Return the last changes of the organisations' files, and a hash of their contents."""
    named = [
        (f"{index}/{name}", file)
        for index, each in enumerate(script_args.organisation_files or ())
        for name, file in data_files(each)
        if file.is_file()
    ]
    if not named:
        return {}
    return {
        f"organisation_files{CHANGED}": max(file.stat().st_mtime_ns for _, file in named),
        f"organisation_files{CONTENTS}": file_fingerprint(named, dates_large=True),
    }


# ---- data ----
#
# The organisations of a federation: their rows by the flags, tokenized.


# Held-out rows of an organisation, at most; without separate held-out rows, this share of its own rows.
MOST_HELD_OUT, HELD_OUT_SHARE = 64, 0.1
# Placeholder without rows, as at the server: a trainer needs one row.
NOTHING = {"input_ids": [0, 0], "labels": [0, 0]}


def organisations_of(script_args: FederatedArguments, seed: int) -> list[Organisation]:
    """Return the organisations selected by the flags, with their rows."""
    if script_args.organisation_names:
        return [Organisation(name, [], []) for name in script_args.organisation_names]
    if script_args.is_world:
        world, count = World(script_args.world_seed), script_args.num_organisations
        if script_args.dirichlet_alpha is None:
            shares = family_shares(count, script_args.main_share)
        else:
            shares = dirichlet_shares(count, script_args.dirichlet_alpha, seed)
        result = world_organisations(world, shares, script_args.num_examples, MOST_HELD_OUT, seed)
    elif script_args.organisation_files:
        names = organisation_names(script_args.organisation_files)
        result = [
            organisation_of_file(script_args, name, file, seed)
            for name, file in zip(names, script_args.organisation_files, strict=True)
        ]
    else:
        parts = split_evenly(_rows(script_args), script_args.num_organisations, script_args.dirichlet_alpha, seed)
        is_private = script_args.row_clip_norm is not None
        result = [
            _held_apart(f"organisation-{number}", rows, seed, is_private) for number, rows in enumerate(parts, 1)
        ]
        result = [_unknown_to_others(each, result) for each in result]
    check_organisations(result)
    return result


def organisation_of_file(script_args: FederatedArguments, name: str, file: str, seed: int) -> Organisation:
    """Return the organisation with the rows of a file or a dataset of the Hub."""
    rows = _rows(replace(script_args, dataset_name=file))
    return _held_apart(name, rows, seed, script_args.row_clip_norm is not None)


def _rows(script_args: FederatedArguments) -> list[Mapping[str, object]]:
    from hfllm.data import formats
    from hfllm.data.images.rows import refuse_images
    from hfllm.data.rows import flaw_of
    from hfllm.stages.shared import kept_rows

    def mapper(origin: str, row: formats.Row) -> formats.Row:
        refuse_images(origin, row, "hfllm federated")
        if script_args.has_pairs:
            return formats.to_preference(origin, row)
        row = formats.to_sft(origin, row)
        return formats.last_turn(row) if script_args.loss_on == "last" else row

    assert script_args.dataset_name != WORLD
    return kept_rows(script_args, mapper, flaw_of)


def _held_apart(name: str, rows: Sequence[Mapping[str, object]], seed: int, is_private: bool) -> Organisation:
    """Return an organisation with a held-out part of its rows, unless it has too few of them.

    Args:
        is_private: whether single rows are protected: then only a row's own prompt decides on its side, since with a
            shuffle of all rows one row would move the others.
    """
    from hfllm.data.loading import prompt_key, split_rows

    if len(set(map(prompt_key, rows))) < 2:
        return Organisation(name, list(rows), [])
    if is_private:
        is_held = [_share_of(f"{seed} {prompt_key(row)}") < HELD_OUT_SHARE for row in rows]
        sides = [
            [row for row, held_out in zip(rows, is_held, strict=True) if held_out is side] for side in (False, True)
        ]
        return Organisation(name, sides[0], sides[1][:MOST_HELD_OUT])
    return Organisation(name, *split_rows(list(rows), seed, HELD_OUT_SHARE, MOST_HELD_OUT))


def _share_of(text: str) -> float:
    """Return a number from 0 to 1 from a text's hash."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def _unknown_to_others(each: Organisation, every: Sequence[Organisation]) -> Organisation:
    """Return an organisation, its held-out rows without prompts of any training rows: the model learns from all."""
    from hfllm.data.loading import prompt_key

    learned = {prompt_key(row) for other in every for row in other.rows}
    return replace(each, held_out=[row for row in each.held_out if prompt_key(row) not in learned])


@dataclass(frozen=True)
class Tokenized:
    """An organisation's rows as tokens.

    Args:
        name: of the organisation.
        rows, held_out: with `input_ids` and `labels`, or `chosen_ids` and `rejected_ids`.
        num_sources: the number of source rows of the organisation's rows: one may become several, or none.
    """

    name: str
    rows: Rows
    held_out: Rows
    num_sources: int


def tokenized(
    organisations: Sequence[Organisation], tokenizer: "PreTrainedTokenizerBase", training_args: "SFTConfig"
) -> list[Tokenized]:
    """Return the rows of organisations as tokens."""
    from hfllm.stages.sft.build import examples, tokenization_of

    def tokens(rows: Sequence[Mapping[str, object]], what: str) -> tuple[Rows, int]:
        if not rows:
            return [], 0
        result, num_left_out = examples(list(rows), tokenizer, tokenization_of(training_args), what)
        return result.to_list(), len(rows) - num_left_out

    return [
        Tokenized(each.name, rows, tokens(each.held_out, f"{each.name}, held out")[0], num_sources)
        for each in organisations
        for rows, num_sources in [tokens(each.rows, each.name)]
    ]


def tokenized_pairs(
    organisations: Sequence[Organisation], tokenizer: "PreTrainedTokenizerBase", training_args: "SFTConfig"
) -> list[Tokenized]:
    """Return the comparisons of organisations as tokens."""

    pairs = pairs_of(organisations, tokenizer, training_args.max_length)
    return [
        Tokenized(each.name, rows, held_out, len(rows))
        for each, (rows, held_out) in zip(organisations, pairs, strict=True)
    ]


def check_one_each(organisations: Sequence[Tokenized]) -> None:
    """Refuse organisations with a row split into several: privacy is of drawn, clipped and counted rows."""
    for each in organisations:
        if len(each.rows) > each.num_sources:
            raise InputError(
                f"--row_clip_norm: {each.num_sources} rows of organisation {each.name!r} become {len(each.rows)} "
                "examples, and the privacy of one of these is not that of a row; expected one each, such as by "
                "--loss_on last"
            )


def pooled(organisations: Sequence[Tokenized]) -> Rows:
    """Return the rows of all organisations together, as the rows of a single one."""
    return [row for each in organisations for row in each.rows]


# ---- pairs ----
#
# Reward models in a federation: comparisons as tokens, and the trainer with a mean over pairs as loss.


SIDES = ("chosen", "rejected")
# Placeholder without pairs, as at the server: a trainer needs one pair.
NO_PAIR = {f"{side}_ids": [0, 0] for side in SIDES}


def load_scorer(
    training_args: "SFTConfig", model_args: "ModelConfig"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model with one score for a sequence, and its tokenizer. A new head is drawn, the same by one seed."""
    from hfllm.runs.models import load_scorer_to_train, load_tokenizer

    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    model = load_scorer_to_train(model_args, training_args.output_dir)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def pairs_of(
    organisations: Sequence[Organisation], tokenizer: "PreTrainedTokenizerBase", longest: int | None
) -> list[tuple[Rows, Rows]]:
    """Return organisations' rows and held-out rows as tokens; too long pairs are left out and reported."""
    from hfllm.data.conversations import Conversations
    from hfllm.runs.command_line import say

    conversations = Conversations(tokenizer)

    def tokens(rows: Sequence[Mapping[str, object]], what: str) -> Rows:
        result = [{f"{side}_ids": conversations.whole(row, side) for side in SIDES} for row in rows]
        remaining = [pair for pair in result if longest is None or max(map(len, pair.values())) <= longest]
        if len(remaining) < len(rows):
            say(
                f"{what}: {len(rows) - len(remaining):,} of {len(rows):,} pairs are longer than --max_length {longest}"
            )
        if rows and not remaining:
            raise InputError(f"no pair of {what} fits into --max_length {longest} tokens")
        return remaining

    return [(tokens(each.rows, each.name), tokens(each.held_out, f"{each.name}, held out")) for each in organisations]


def reward_trainer(
    model: "PreTrainedModel",
    training_args: "SFTConfig",
    pairs: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    adapter: "PeftConfig | None",
) -> "RewardTrainer":
    """Return TRL's trainer of reward models with the flags' settings, for use without its own training."""
    from datasets import Dataset

    from hfllm.trainers.trl_trainers import RewardTrainer

    return RewardTrainer(
        model=model,
        args=reward_config(training_args),
        train_dataset=Dataset.from_list(list(pairs[:1]) or [NO_PAIR]),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def reward_config(training_args: "SFTConfig") -> "RewardConfig":
    """Return arguments of a RewardTrainer with all settings shared with an SFTTrainer."""
    from trl import RewardConfig

    kinds = {name: getattr(training_args, name) for name in ("output_dir", "use_cpu", "bf16")}
    config = RewardConfig(**kinds, gradient_checkpointing=False, report_to="none")
    names = {each.name for each in fields(config)}
    common = {each.name: getattr(training_args, each.name) for each in fields(training_args) if each.name in names}
    return changed(config, **{**common, "chat_template_path": None})
