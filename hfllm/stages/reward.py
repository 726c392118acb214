"""Reward modeling: its flags, what it refuses, the stages before it, and its comparisons."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.loading import RowArguments
from hfllm.errors import InputError, refuse
from hfllm.runs.chain import Chain, chain_before
from hfllm.stages.own_pictures import FreezingArguments, PictureArguments
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig, RewardConfig, RewardTrainer

Rows = list[Mapping[str, Any]]


@dataclass(frozen=True)
class RewardArguments(RowArguments, AugmentationArguments, BatchArguments, FreezingArguments, PictureArguments):
    """Comparison data."""

    num_pairs: int = field(default=6000, metadata={"help": "Prompts of the embedded world to compare responses to."})
    on_policy_fraction: float = field(
        default=2 / 3, metadata={"help": "Share of the world's comparisons between the model's own samples."}
    )
    num_samples: int = field(default=3, metadata={"help": "Samples of the model for each prompt of that share."})
    label_noise: float = field(
        default=0.1, metadata={"help": "Share of wrong labels in the world's comparisons; 0.5 makes them worthless."}
    )
    comparison_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of the world's comparisons, if not --seed, to train several models on the same ones."},
    )
    response_length: int = field(default=40, metadata={"help": "Longest response sampled for comparison, in tokens."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts of the world to compare on."})
    pretrain_config: str | None = field(
        default=None,
        metadata={"help": "YAML flags of the pretraining, over those for the world."},
    )
    sft_config: str | None = field(
        default=None,
        metadata={"help": "YAML flags of the fine-tuning, over those for the world."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("on_policy_fraction", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


def check(script_args: RewardArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.sources import WORLD

    is_named, is_world = bool(model_args.model_name_or_path), script_args.dataset_name == WORLD
    for flag in ("pretrain_config", "sft_config"):
        refuse(is_named and bool(getattr(script_args, flag)), f"--{flag}", "the model is named")
    has_seed = script_args.comparison_seed is not None
    refuse(has_seed and not is_world, "--comparison_seed", "it applies only to the embedded world")


def stages_before(script_args: RewardArguments, training_args: "RewardConfig", model_args: "ModelConfig") -> Chain:
    """Return the stages that make the fine-tuned model, if none is named."""
    return chain_before(
        "reward",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"sft": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config, "sft": script_args.sft_config},
        over_world=True,
    )


def user_comparisons(script_args: RewardArguments, seed: int) -> tuple[Rows, Rows] | None:
    """Return the user's training and held-out rows with `prompt`, `chosen` and `rejected`, or `None` for the world."""
    from hfllm.data import formats
    from hfllm.data.images import without_images
    from hfllm.data.sources import WORLD
    from hfllm.stages.user_rows import user_rows

    if script_args.dataset_name == WORLD:
        return None
    rows = user_rows(script_args, without_images(formats.to_preference, "the model"), seed)
    return augmented(script_args, *rows, seed)


def augmented(script_args: RewardArguments, train_rows: Rows, eval_rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Return training rows, a share `--augment` of them in other forms, and the held-out rows."""
    from hfllm.data.augmentation import augmented_prompts, begun_comparisons, training_texts
    from hfllm.evaluation.suites.refusals import refuses

    if script_args.augment:
        texts = training_texts(script_args.dataset_name)
        train_rows = augmented_prompts(train_rows, script_args.augment, seed, texts)
        train_rows = begun_comparisons(train_rows, script_args.augment, seed, texts, refuses)
    return train_rows, eval_rows


def comparisons_of(rows: Rows, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Return rows as a dataset for TRL's RewardTrainer; with tools in them as tokens.

    A table would give every call the arguments of all others, and every message the fields of all others, empty.
    """
    from datasets import Dataset

    from hfllm.data.conversations import Conversations, has_more_than_text

    sides = ("chosen", "rejected")
    is_plain = not any(
        row.get("tools") or has_more_than_text([*row["prompt"], *row["chosen"], *row["rejected"]]) for row in rows
    )
    if is_plain:
        return Dataset.from_list(rows)
    conversations = Conversations(tokenizer)
    return Dataset.from_dict({f"{side}_ids": [conversations.whole(row, side) for row in rows] for side in sides})


def kept_comparisons(
    script_args: RewardArguments, trainer: "RewardTrainer", train_rows: Rows, eval_rows: Rows
) -> dict[str, int]:
    """Return how many comparisons the trainer keeps, and say how many it leaves out.

    Raises:
        InputError: when no training row or no held-out row is left.
    """
    from hfllm.runs.command_line import say

    longest, kept = trainer.args.max_length, {}
    sides = {"train": (train_rows, trainer.train_dataset), "eval": (eval_rows, trainer.eval_dataset)}
    for side, (rows, dataset) in sides.items():
        kept[f"{side}_comparisons"] = dataset.num_rows
        if dataset.num_rows < len(rows):
            left_out = len(rows) - dataset.num_rows
            what = "training" if side == "train" else "held-out"
            say(f"{what} rows: {left_out:,} of {len(rows):,} rows dropped: longer than --max_length {longest}")
    if 0 in kept.values():
        raise InputError(f"no comparison in {script_args.dataset_name!r} fits into --max_length {longest} tokens")
    return kept


def world_comparisons(
    script_args: RewardArguments, training_args: "RewardConfig", model_args: "ModelConfig"
) -> tuple[Rows, Rows]:
    """Return training and held-out comparisons between the named model's samples and the demonstrators' responses."""
    from hfllm.data.augmentation import begun_comparisons
    from hfllm.data.tokenizer import WORLD_TRAINING
    from hfllm.data.world.world import World
    from hfllm.evaluation.suites.refusals import refuses
    from hfllm.runs.models import load_policy
    from hfllm.synthesis.answers import ComparisonSettings, compare_samples
    from hfllm.trainers.engines import unshard

    model, tokenizer = load_policy(model_args)
    unshard(model).to(training_args.device)
    settings = ComparisonSettings(
        num_pairs=script_args.num_pairs,
        num_eval_prompts=script_args.num_eval_prompts,
        on_policy_fraction=script_args.on_policy_fraction,
        num_samples=script_args.num_samples,
        label_noise=script_args.label_noise,
        response_length=script_args.response_length,
        seed=training_args.seed if script_args.comparison_seed is None else script_args.comparison_seed,
        augment=script_args.augment,
    )
    train_rows, eval_rows = compare_samples(World(script_args.world_seed), model, tokenizer, settings)
    if settings.augment:
        train_rows = begun_comparisons(train_rows, settings.augment, settings.seed, WORLD_TRAINING, refuses)
    return train_rows, eval_rows


def in_batches_of_like_length(rows: Rows, training_args: "RewardConfig") -> Rows:
    """Return the order for `train_sampling_strategy: sequential`: a random one would add two fifths of padding."""
    from hfllm.data.packing import length_grouped

    def length(row: Mapping[str, Any]) -> int:
        said = max(len(row[side][0]["content"]) for side in ("chosen", "rejected"))
        return said + sum(len(message["content"]) for message in row["prompt"])

    steps = training_args.gradient_accumulation_steps * training_args.world_size
    return length_grouped(rows, training_args.per_device_train_batch_size * steps, training_args.seed, length=length)
