"""A federation: its flags and their checks, and the terms of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import InstructionArguments
from hfllm.data.sources import WORLD
from hfllm.data.world.world import Task, World
from hfllm.errors import InputError
from hfllm.federation.settings import (
    AGGREGATIONS,
    COMPRESSIONS,
    MAX_NORM_RATIO,
    MEAN,
    NORM_RATIOS,
    PARTICIPATIONS,
    SERVER_OPTIMIZERS,
    TRIM,
    TRIMMED_MEAN,
    TRIMS,
    Averaging,
    RoundSettings,
    check_settings,
)
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import (
    ALWAYS,
    GIVEN,
    NAMED,
    NOT_NEGATIVE,
    SHARE,
    WORLD_GROUP,
    Clashes,
    Fact,
    Refused,
    at_least,
    check_flags,
    flag,
)
from hfllm.outputs.report import CHANGED, CONTENTS
from hfllm.runs.identity import data_files
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from hfllm.federation.privacy import RowPrivacy


FULL, LORA, FROZEN_A = AVERAGES = ("full", "lora", "lora_frozen_a")
SFT, REWARD = LEARNERS = ("sft", "reward")
CENTRAL, EQUAL_STEPS, LOCAL = CONTROLS = ("central", "equal_steps", "local")
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
# On by default, and off on a machine without an accelerator: only the user's own request matters.
CHECKPOINTING = {
    name: Fact(lambda flags, name=name: name in (flags[GIVEN] or ()), NO_TRAINER)
    for name in ("gradient_checkpointing", "activation_checkpointing")
}
ADAFACTOR = Fact(
    # A word, or the library's name of it.
    lambda flags: str(getattr(flags.optim, "value", flags.optim)) == "adafactor",
    "the state of adafactor is not tensors alone",
)
ON_PAIRS = Fact(lambda flags: flags.learner == REWARD, "of comparisons whole answers are scored")


@dataclass(frozen=True)
class Terms:
    """The terms of a run: what the server and all organisations must agree on.

    Args:
        learner: what organisations train, sft or reward.
        average: what is trained and travels: full, lora or lora_frozen_a.
        local_steps: optimizer steps of an organisation in a round.
        rounds: their number.
        compression: of updates on the wire, none or int8.
        row_clip_norm: longest gradient of a single row; `None` without privacy of rows.
        row_noise_multiplier: noise on each local step, in units of `row_clip_norm`.
        seed: of the run.
    """

    learner: str
    average: str
    local_steps: int
    rounds: int
    compression: str
    row_clip_norm: float | None
    row_noise_multiplier: float
    seed: int

    @property
    def has_pairs(self) -> bool:
        """Whether rows are comparisons, for training a reward model."""
        return self.learner == REWARD

    @property
    def num_steps(self) -> int:
        """The optimizer steps of an organisation in all rounds."""
        return self.rounds * self.local_steps

    @property
    def row_privacy(self) -> "RowPrivacy | None":
        """The protection of single rows, if there is one."""
        from hfllm.federation.privacy import RowPrivacy

        if self.row_clip_norm is None:
            return None
        return RowPrivacy(self.row_clip_norm, self.row_noise_multiplier)


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
        0.9,
        "Share of an organisation's rows of the world that are of one family.",
        takes=SHARE,
        never=NOT_WORLD,
        group=WORLD_GROUP,
    )
    num_examples: int = flag(
        640, "Rows of the world that each organisation has.", never=NOT_WORLD, takes=at_least(1), group=WORLD_GROUP
    )
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
        TRIM,
        "Share of the updates that trimmed_mean leaves out at each end.",
        takes=TRIMS,
        never=Fact(lambda flags: flags.aggregation != TRIMMED_MEAN, "it is of --aggregation trimmed_mean"),
    )
    max_norm_ratio: float = flag(
        MAX_NORM_RATIO,
        "An update longer than this many times the median of its round is scaled to that; 0: none.",
        takes=NORM_RATIOS,
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
        never=ADAFACTOR,
    )
    participation: float = flag(1.0, "Share of the organisations that a round asks.", takes=PARTICIPATIONS)
    min_organisations: int = flag(
        1,
        "Updates without which a round is not taken, and the run stops.",
        never=Fact(
            lambda flags: flags.noise_multiplier > 0 and flags.min_organisations > 1,
            "who takes part must stay unknown",
        ),
    )
    compression: str = flag("none", "Of updates on the wire.", choices=list(COMPRESSIONS))
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
    num_eval_prompts: int = flag(
        480, "Held-out questions of the world.", never=NOT_WORLD, takes=at_least(1), group=WORLD_GROUP
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining that makes the base model, if none is named.", never=NAMED
    )

    refused: ClassVar[Refused] = {
        "dataset_name": Fact(lambda flags: flags.organisation_files, "--organisation_files takes its place"),
        "use_peft": Fact(lambda flags: flags.average == FULL, "--average full trains all weights"),
        **dict.fromkeys(("loss_on", "completion_only_loss", "assistant_only_loss", "chat_template_path"), ON_PAIRS),
        "neftune_noise_alpha": ALWAYS.because(NO_TRAINER),
        **CHECKPOINTING,
        **dict.fromkeys(("num_train_epochs", "max_steps"), ALWAYS.because(LENGTH)),
        "fp16": ALWAYS.because("local steps scale no gradients: --bf16, or neither"),
        **dict.fromkeys(("packing", "padding_free"), ALWAYS.because("rows of a round are few, and padded")),
        "eval_strategy": ALWAYS.because("--eval_rounds says when it is measured"),
        "resume_from_checkpoint": ALWAYS.because("rounds are kept and resumed by themselves"),
    }
    clashes: ClassVar[Clashes] = {
        "--model_name_or_path and --organisation_files (or --dataset_name): give both, or neither for the embedded "
        "world": lambda flags: bool(flags.model_name_or_path) == flags.is_world,
        "--controls cannot be used here: rows are elsewhere: --controls none": lambda flags: (
            flags.organisation_names and flags.arms
        ),
        "--num_organisations {count}: expected at least 2": lambda flags: (
            flags.count < 2 and not flags.organisation_files
        ),
        "--organisation_files {organisation_files[0]}: expected at least 2, one for each organisation": lambda flags: (
            len(flags.organisation_files or ()) == 1
        ),
        "{world_size} processes: start one by accelerate launch --num_processes 1; --processes says in how many "
        "organisations train": lambda flags: (flags.world_size or 1) > 1,
    }

    @property
    def is_world(self) -> bool:
        """Whether the rows are the embedded world's."""
        return self.dataset_name == WORLD and not (self.organisation_files or self.organisation_names)

    @property
    def count(self) -> int:
        """The number of organisations."""
        return len(self.organisation_files or self.organisation_names or ()) or self.num_organisations

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        return tuple(arm for arm in CONTROLS if self.controls is None or arm in self.controls)

    @property
    def tasks(self) -> list[Task]:
        """The world's held-out questions; none for the user's rows."""
        return World(self.world_seed).evaluation_tasks(self.num_eval_prompts) if self.is_world else []

    @property
    def named_files(self) -> list[tuple[str, str]]:
        """The organisations' files after their names: stems, with numbers for equal ones."""
        files = self.organisation_files or []
        stems = [Path(file).stem for file in files]
        names = [f"{stem}-{index}" if stems.count(stem) > 1 else stem for index, stem in enumerate(stems, 1)]
        return list(zip(names, files, strict=True))

    @property
    def averaging(self) -> Averaging:
        """How updates become one change."""
        return Averaging(self.aggregation, self.trim, self.max_norm_ratio, self.clip_norm, self.noise_multiplier)

    def round_settings(self, seed: int) -> RoundSettings:
        """Return the settings of the rounds."""
        return RoundSettings(
            num_rounds=self.rounds,
            participation=self.participation,
            min_organisations=self.min_organisations,
            seed=seed,
            is_private=self.noise_multiplier > 0,
        )

    def terms(self, seed: int) -> Terms:
        """Return the terms of the run."""
        return Terms(
            learner=self.learner,
            average=self.average,
            local_steps=self.local_steps,
            rounds=self.rounds,
            compression=self.compression,
            row_clip_norm=self.row_clip_norm,
            row_noise_multiplier=self.row_noise_multiplier,
            seed=seed,
        )


def default_settings(flags: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model if no model is named, and else the settings of an adapter."""
    if not flags.get("model_name_or_path"):
        return [settings_file("federated/world.yaml")]
    return [settings_file("federated/model.yaml")]


def check(script_args: FederatedArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse flags without effect, contradictory flags, and flags that would fail later."""
    from hfllm.federation.privacy import check_clip_norm
    from hfllm.trainers.engines import schedule_of

    check_flags(script_args, training_args, model_args)
    names = script_args.organisation_names or []
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--organisation_names: {doubled!r} comes twice, each organisation needs a name of its own")
    check_settings(script_args.round_settings(training_args.seed), script_args.count)
    if script_args.clip_norm is not None:
        check_clip_norm(script_args.clip_norm, "--clip_norm")
    _ = script_args.terms(training_args.seed).row_privacy
    schedule_of(training_args, 1)


def contents(files: Sequence[str]) -> dict[str, int | str]:
    """Return the last changes of the organisations' files, and a hash of their contents."""
    named = [
        (f"{index}/{name}", path)
        for index, each in enumerate(files)
        for name, path in data_files(each)
        if path.is_file()
    ]
    if not named:
        return {}
    return {
        f"organisation_files{CHANGED}": max(path.stat().st_mtime_ns for _, path in named),
        f"organisation_files{CONTENTS}": file_fingerprint(named, dates_large=True),
    }
