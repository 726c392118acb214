"""Reward modeling: its flags and checks, the stages before it, and its comparisons, also of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import SEES, SHOWS, FreezingArguments, ImageReading, PictureArguments, without_images
from hfllm.data.loading import OFF_WORLD, RowArguments, RowSources
from hfllm.errors import InputError, refuse_if
from hfllm.flags import NAMED, SEED, SHARE, WORLD_GROUP, Fact, Refused, at_least, changed, flag
from hfllm.outputs.verdict import Promise
from hfllm.runs.command_line import say
from hfllm.runs.recipes import settings_for_the_world
from hfllm.stages.shared import (
    NOT_CUT,
    WHOLE,
    load_processing_class,
    rows_with_images,
    shows_pictures,
    user_rows,
    warn_of_frozen_projector,
)
from hfllm.trainers.learning_rate import BatchArguments, MuonArguments

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import RewardConfig

    from hfllm.data.world.world import World
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.synthesis.answers import ComparisonSettings
    from hfllm.trainers.trl_trainers import PictureRewardTrainer, RewardTrainer

PREFERENCE, PROCESS = TASKS = ("preference", "process")
OF_STEPS = Fact(lambda flags: flags.task == PROCESS, "--task process compares no answers")
AS_THEY_ARE = "with --task process solutions are tokenized and padded here, by the model's own tokenizer as it is"
CLAIMS = [Promise("held-out comparisons in the right order", "reward_model_accuracy", 0.5, "by chance")]


# ---- flags and comparisons ----


Rows = list[Mapping[str, Any]]
STAGE = "hfllm reward"


@dataclass(frozen=True)
class RewardArguments(
    RowArguments, AugmentationArguments, BatchArguments, MuonArguments, FreezingArguments, PictureArguments
):
    """Comparison data."""

    task: str = flag(
        PREFERENCE,
        "What is learned: which of two answers is better, or which steps of a solution are right.",
        choices=[*TASKS],
    )
    num_pairs: int = flag(
        6000,
        "Prompts of the embedded world to compare responses to, or solutions to label.",
        takes=at_least(1),
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    on_policy_fraction: float = flag(
        2 / 3,
        "Share of the world's comparisons between the model's own samples.",
        takes=SHARE,
        never=(OFF_WORLD, OF_STEPS),
        group=WORLD_GROUP,
    )
    num_samples: int = flag(
        3,
        "Samples of the model for each prompt of that share.",
        takes=at_least(1),
        never=(OFF_WORLD, OF_STEPS),
        group=WORLD_GROUP,
    )
    label_noise: float = flag(
        0.1,
        "Share of wrong labels in the world's comparisons; 0.5 makes them worthless.",
        takes=SHARE,
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    comparison_seed: int | None = flag(
        None,
        "Seed of the world's comparisons, if not --seed, to train several models on the same ones.",
        takes=SEED,
        never=(OFF_WORLD, OF_STEPS),
        group=WORLD_GROUP,
    )
    response_length: int = flag(
        40,
        "Longest response sampled for comparison, in tokens.",
        takes=at_least(1),
        never=(OFF_WORLD, OF_STEPS),
        group=WORLD_GROUP,
    )
    num_eval_prompts: int = flag(
        360, "Held-out prompts of the world to compare on.", takes=at_least(1), never=OFF_WORLD, group=WORLD_GROUP
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining, over those for the world.", never=NAMED, group=WORLD_GROUP
    )
    sft_config: str | None = flag(
        None, "YAML flags of the fine-tuning, over those for the world.", never=(NAMED, OF_STEPS), group=WORLD_GROUP
    )

    refused: ClassVar[Refused] = {
        "augment": (SHOWS, OF_STEPS),
        # Anyone loading the model with its processor would read it with another template.
        "chat_template_path": (SEES, OF_STEPS),
        **dict.fromkeys(("eos_token", "pad_to_multiple_of"), (SHOWS.because(WHOLE), OF_STEPS.because(AS_THEY_ARE))),
        **dict.fromkeys(("pad_token", "dataset_num_proc"), OF_STEPS.because(AS_THEY_ARE)),
        "train_sampling_strategy": OF_STEPS.because("with --task process solutions come in random order"),
        "activation_offloading": OF_STEPS.because("--task process trains with transformers' Trainer, which has none"),
        "center_rewards_coefficient": OF_STEPS,
        "max_length": SHOWS.because(NOT_CUT),
    }

    def comparison_settings(self, seed: int) -> "ComparisonSettings":
        """Return the number and the sources of the world's comparisons, whose seed is `seed` by default."""
        from hfllm.synthesis.answers import ComparisonSettings

        return ComparisonSettings(
            num_pairs=self.num_pairs,
            num_eval_prompts=self.num_eval_prompts,
            on_policy_fraction=self.on_policy_fraction,
            num_samples=self.num_samples,
            label_noise=self.label_noise,
            response_length=self.response_length,
            seed=seed if self.comparison_seed is None else self.comparison_seed,
            augment=self.augment,
        )


def default_settings(provided: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model, by what is learned; none where a model is named."""
    if provided.get("model_name_or_path"):
        return []
    return settings_for_the_world("reward", provided, "steps" if provided.get("task") == PROCESS else "world")


def user_comparisons(
    sources: RowSources, reading: ImageReading | None, augment: float, seed: int
) -> tuple[Rows, Rows]:
    """Return the user's training and held-out rows with `prompt`, `chosen` and `rejected`.

    For a vision-language model they may have `images`. If one has, all rows' messages have parts as their content.

    Args:
        sources: the rows.
        reading: of their images; `None` for a text model.
        augment: share of the training rows in other forms.
        seed: of the split, and of these forms.
    """
    from hfllm.data.augmentation import augmented_prompts, begun_comparisons, training_texts
    from hfllm.data.formats import to_preference
    from hfllm.evaluation.suites.refusals import refuses

    if reading is None:
        train_rows, eval_rows = user_rows(sources, without_images(to_preference, "the model"), seed)
    else:
        train_rows, eval_rows = rows_with_images(sources, reading, to_preference, STAGE, seed)
    # Beside images this flag is refused.
    if augment and not shows_pictures(train_rows, eval_rows):
        texts = training_texts(sources.train.name)
        train_rows = augmented_prompts(train_rows, augment, seed, texts)
        train_rows = begun_comparisons(train_rows, augment, seed, texts, refuses)
    return train_rows, eval_rows


def world_comparisons(
    world: "World",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: "ComparisonSettings",
    device: "torch.device",
) -> tuple[Rows, Rows]:
    """Return training and held-out comparisons between a model's samples and the demonstrators' responses.

    Args:
        device: where the model samples.
    """
    from hfllm.synthesis.answers import compare_samples
    from hfllm.trainers.engines import unshard

    unshard(model).to(device)
    return compare_samples(world, model, tokenizer, settings)


def in_batches_of_like_length(rows: Rows, batch_size: int, seed: int) -> Rows:
    """Return the order for `train_sampling_strategy: sequential`: a random one would add two fifths of padding.

    Args:
        batch_size: comparisons of an optimizer step, over all processes.
        seed: of the order of batches.
    """
    from hfllm.data.packing import length_grouped

    def length(row: Mapping[str, Any]) -> int:
        longest = max(len(row[side][0]["content"]) for side in ("chosen", "rejected"))
        return longest + sum(len(message["content"]) for message in row["prompt"])

    return length_grouped(rows, batch_size, seed, length=length)


# ---- training ----


COLUMNS = ("prompt", "chosen", "rejected")


def scoring_processor(name: str | None, revision: str) -> "ProcessorMixin | None":
    """Return the processor of a named vision-language model; `None` for a text model, or if no model is named."""
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config

    config = load_config(name, revision) if name else None
    if config is None or not is_for_pictures(config):
        return None
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise InputError(
            f"--model_name_or_path {name}: transformers has no model of type {config.model_type} that scores; for an "
            "hfllm model with eyes (hfllm.with_vision) there is one"
        )
    return load_processing_class(name, revision, config)


def comparisons_of(rows: Rows, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Return rows as a dataset of tokens for TRL's RewardTrainer.

    In a table of messages every call would have the arguments of all others, and every message the fields of all
    others, empty; and TRL tokenizes each conversation alone, which takes longer.
    """
    from datasets import Dataset

    from hfllm.data.conversations import Conversations

    conversations = Conversations(tokenizer)
    return Dataset.from_dict({f"{side}_ids": conversations.wholes(rows, side) for side in ("chosen", "rejected")})


def comparison_trainer(
    model: "PreTrainedModel",
    args: "RewardConfig",
    parts: tuple[Rows, Rows],
    processing_class: "ProcessingClass",
    max_pixels: int,
    adapter: "PeftConfig | None",
    use_muon: bool = False,
) -> "RewardTrainer":
    """Return the trainer of a reward model on comparisons, perhaps of answers about images.

    Args:
        args: the trainer's.
        parts: training and held-out comparisons.
        processing_class: the tokenizer, or a vision-language model's processor; it is saved with the model.
        max_pixels: of an image at most.
        adapter: a new one to train.
        use_muon: learn the matrices of the layers by Muon.
    """
    from hfllm.data.images.rows import as_dataset
    from hfllm.multimodal.processors import tokenizer_of
    from hfllm.runs.models import fitting_length
    from hfllm.trainers.pretraining.trainer import optimizer_of
    from hfllm.trainers.trl_trainers import PictureRewardTrainer, RewardTrainer

    tokenizer, shows = tokenizer_of(processing_class), shows_pictures(*parts)
    if shows:
        # In a batch without images the tower gets no gradient, and several processes would wait for one.
        finds = args.ddp_find_unused_parameters
        args = changed(args, max_length=None, ddp_find_unused_parameters=True if finds is None else finds)
        train, held_out = (as_dataset(rows, max_pixels, COLUMNS) for rows in parts)
        new_trainer = partial(PictureRewardTrainer, processing_class)
    else:
        args = changed(args, max_length=fitting_length(args.max_length, model))
        train, held_out = (comparisons_of(rows, tokenizer) for rows in parts)
        new_trainer = partial(RewardTrainer, processing_class=tokenizer)
    sets = {"train_dataset": train, "eval_dataset": held_out}
    optimizer = optimizer_of(use_muon, args)
    trainer = new_trainer(model=model, args=args, peft_config=adapter, optimizer_cls_and_kwargs=optimizer, **sets)
    if processing_class is not tokenizer:
        # A processor is saved with its tokenizer.
        trainer.processing_class = processing_class
    if shows:
        warn_of_frozen_projector(trainer.model, adapter is not None, "reward")
    return trainer


def count_comparisons(
    trainer: "RewardTrainer", train_rows: Rows, eval_rows: Rows, dataset_name: str
) -> dict[str, int]:
    """Return how many comparisons the trainer keeps, and print how many it leaves out.

    Args:
        dataset_name: with the comparisons, for the error if none is left.
    """
    longest, counts = trainer.args.max_length, {}
    sides = {"train": (train_rows, trainer.train_dataset), "eval": (eval_rows, trainer.eval_dataset)}
    for side, (rows, dataset) in sides.items():
        counts[f"{side}_comparisons"] = dataset.num_rows
        if dataset.num_rows < len(rows):
            left_out = len(rows) - dataset.num_rows
            what = "training" if side == "train" else "held-out"
            say(f"{what} rows: {left_out:,} of {len(rows):,} rows dropped: longer than --max_length {longest}")
    refuse_if(0 in counts.values(), f"no comparison in {dataset_name!r} fits into --max_length {longest} tokens")
    return counts


def other_pictures_accuracy(trainer: "PictureRewardTrainer", eval_rows: Rows, max_pixels: int) -> dict[str, float]:
    """Return the accuracy on held-out comparisons with images of other rows.

    Nothing where weights are spread over processes, or no other row has as many images.
    """
    from hfllm.data.images.rows import as_dataset
    from hfllm.evaluation.pictures import other_places
    from hfllm.outputs.figures import mean_of

    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return {}
    others = other_places([row.get("images") or () for row in eval_rows])
    swapped = [
        {**row, "images": eval_rows[other]["images"]}
        for index, (row, other) in enumerate(zip(eval_rows, others, strict=True))
        if other != index
    ]
    return (
        mean_of("other_pictures_accuracy", trainer.is_right(as_dataset(swapped, max_pixels, COLUMNS)))
        if swapped
        else {}
    )


def other_pictures_summary(metrics: Mapping[str, Any]) -> str:
    """Return the result of `other_pictures_accuracy` in words; an empty string if it was not measured."""
    from hfllm.outputs.figures import shown

    name = "other_pictures_accuracy"
    if name not in metrics:
        return ""
    return f"; with the pictures of other rows {shown(metrics, name)}"
