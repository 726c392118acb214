"""Reward modeling: its flags and checks, the stages before it, and its comparisons, also of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.images.rows import (
    SEES,
    SHOWS,
    FreezingArguments,
    PictureArguments,
    words_of_places,
)
from hfllm.data.loading import ON_WORLD, RowArguments
from hfllm.errors import InputError, refuse
from hfllm.flags import NAMED, SEED, SHARE, Refused, at_least, check_flags, flag
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import ModelConfig, RewardConfig, RewardTrainer

    from hfllm.trainers.trl_trainers import PictureRewardTrainer


# ---- flags and comparisons ----


Rows = list[Mapping[str, Any]]


@dataclass(frozen=True)
class RewardArguments(RowArguments, AugmentationArguments, BatchArguments, FreezingArguments, PictureArguments):
    """Comparison data."""

    num_pairs: int = flag(6000, "Prompts of the embedded world to compare responses to.", takes=at_least(1))
    on_policy_fraction: float = flag(
        2 / 3, "Share of the world's comparisons between the model's own samples.", takes=SHARE
    )
    num_samples: int = flag(3, "Samples of the model for each prompt of that share.", takes=at_least(1))
    label_noise: float = flag(
        0.1, "Share of wrong labels in the world's comparisons; 0.5 makes them worthless.", takes=SHARE
    )
    comparison_seed: int | None = flag(
        None,
        "Seed of the world's comparisons, if not --seed, to train several models on the same ones.",
        never=ON_WORLD.absent("it applies only to the embedded world"),
        takes=SEED,
    )
    response_length: int = flag(40, "Longest response sampled for comparison, in tokens.", takes=at_least(1))
    num_eval_prompts: int = flag(360, "Held-out prompts of the world to compare on.", takes=at_least(1))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining, over those for the world.", never=NAMED)
    sft_config: str | None = flag(None, "YAML flags of the fine-tuning, over those for the world.", never=NAMED)

    refused: ClassVar[Refused] = {
        "augment": SHOWS,
        # Anyone loading the model with its processor would read it with another template.
        "chat_template_path": SEES,
        **dict.fromkeys(
            ("eos_token", "pad_to_multiple_of"),
            SHOWS.because("rows with pictures are read by the model's processor, as they are"),
        ),
    }


def check(script_args: RewardArguments, model_args: "ModelConfig") -> None:
    """Refuse flags without effect."""
    check_flags(script_args, model_args)


def stages_before(script_args: RewardArguments, training_args: "RewardConfig", model_args: "ModelConfig") -> Chain:
    """Return the stages to make the fine-tuned model, if none is named."""
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
    from hfllm.data.images.rows import without_images
    from hfllm.data.sources import WORLD
    from hfllm.stages.shared import user_rows

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
    """Return how many comparisons the trainer keeps, and print how many it leaves out."""
    from hfllm.runs.command_line import say

    longest, counts = trainer.args.max_length, {}
    sides = {"train": (train_rows, trainer.train_dataset), "eval": (eval_rows, trainer.eval_dataset)}
    for side, (rows, dataset) in sides.items():
        counts[f"{side}_comparisons"] = dataset.num_rows
        if dataset.num_rows < len(rows):
            left_out = len(rows) - dataset.num_rows
            what = "training" if side == "train" else "held-out"
            say(f"{what} rows: {left_out:,} of {len(rows):,} rows dropped: longer than --max_length {longest}")
    if 0 in counts.values():
        raise InputError(f"no comparison in {script_args.dataset_name!r} fits into --max_length {longest} tokens")
    return counts


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
        longest = max(len(row[side][0]["content"]) for side in ("chosen", "rejected"))
        return longest + sum(len(message["content"]) for message in row["prompt"])

    steps = training_args.gradient_accumulation_steps * training_args.world_size
    return length_grouped(rows, training_args.per_device_train_batch_size * steps, training_args.seed, length=length)


# ---- pictures ----
#
# Vision-language reward models: comparisons of answers about images, their trainer, and the control.


STAGE = "hfllm reward"
COLUMNS = ("prompt", "chosen", "rejected")


def processor_of(model_args: "ModelConfig") -> "ProcessorMixin | None":
    """Return the processor of a named vision-language model; `None` for a text model, or if no model is named."""
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config
    from hfllm.stages.shared import load_processing_class

    name = model_args.model_name_or_path
    config = load_config(name, model_args.model_revision) if name else None
    if config is None or not is_for_pictures(config):
        return None
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise InputError(
            f"--model_name_or_path {name}: transformers has no model of type {config.model_type} that scores; for an "
            "hfllm model with eyes (hfllm.with_vision) there is one"
        )
    return load_processing_class(model_args, config)


def picture_comparisons(
    script_args: RewardArguments, seed: int, processor: "ProcessorMixin | None"
) -> tuple[Rows, Rows] | None:
    """Return comparisons as `user_comparisons` does; for a vision-language model they may have `images`.

    If one row has images, the messages of all rows have parts as their content.
    """
    from hfllm.data.formats import Row, to_preference
    from hfllm.data.images.rows import (
        Convert,
        flaw_of_pictures,
        picture_mapper,
        place_images,
        refuse_tools,
        words_or_pictures,
    )
    from hfllm.data.rows import flaw_of, origin_of
    from hfllm.data.sources import WORLD
    from hfllm.stages.sft.build import shows_pictures
    from hfllm.stages.shared import user_rows

    if processor is None or script_args.dataset_name == WORLD:
        return user_comparisons(script_args, seed)

    def mapper_of(name: str) -> Convert:
        tokens = words_of_places(processor)
        pictures = picture_mapper(script_args, name, to_preference, STAGE, tokens)
        return words_or_pictures(pictures, to_preference, tokens)

    def flaw(row: Row) -> str | None:
        return flaw_of_pictures(row) if row.get("images") else flaw_of(row)

    name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
    parts = user_rows(script_args, mapper_of(name), seed, flaw_of=flaw, eval_mapper=mapper_of(eval_name))
    if not shows_pictures(*parts):
        return augmented(script_args, *parts, seed)
    for row in (row for part in parts for row in part if not row.get("images")):
        origin = origin_of(row, "a row")
        refuse_tools(origin, row, STAGE)
        row |= {**place_images(origin, row, 0), "images": []}
    return parts


def check_pictures(
    script_args: RewardArguments,
    training_args: "RewardConfig",
    model_args: "ModelConfig",
    rows: tuple[Rows, Rows] | None,
    processor: "ProcessorMixin | None",
) -> bool:
    """Return whether a row has images; refuse flags incompatible with this, or with a vision-language model."""
    from hfllm.flags import given_names
    from hfllm.multimodal.processors import check_template
    from hfllm.stages.sft.build import shows_pictures
    from hfllm.stages.shared import check_sampling, check_split_weights

    shows = rows is not None and shows_pictures(*rows)
    check_flags(script_args, training_args, model_args, shows=shows, sees=processor is not None)
    if not shows:
        return False
    check_template(processor, model_args.model_name_or_path)
    check_split_weights(training_args, *rows)
    check_sampling(training_args)
    is_given = "max_length" in (given_names(script_args, training_args) or ())
    refuse(is_given and training_args.max_length is not None, "--max_length", "rows with pictures are not cut")
    return True


def trainer_of(
    script_args: RewardArguments,
    training_args: "RewardConfig",
    model_args: "ModelConfig",
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    train_rows: Rows,
    eval_rows: Rows,
) -> "PictureRewardTrainer":
    """Return the trainer of a vision-language reward model."""
    from hfllm.data.images.rows import as_dataset
    from hfllm.multimodal.freezing import freeze
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import peft_config
    from hfllm.stages.vision.build import warn_of_frozen_projector
    from hfllm.trainers.trl_trainers import PictureRewardTrainer

    freeze(model, script_args.freeze_vision, script_args.freeze_text)
    # In a batch without images the tower gets no gradient, and several processes would wait for one.
    finds = training_args.ddp_find_unused_parameters
    args = changed(training_args, max_length=None, ddp_find_unused_parameters=True if finds is None else finds)
    train, held_out = (as_dataset(rows, script_args.max_pixels, COLUMNS) for rows in (train_rows, eval_rows))
    adapter = peft_config(model_args, "SEQ_CLS")
    sets = {"train_dataset": train, "eval_dataset": held_out}
    trainer = PictureRewardTrainer(processor, model=model, args=args, peft_config=adapter, **sets)
    warn_of_frozen_projector(trainer.model, model_args.use_peft, "reward")
    return trainer


def control(script_args: RewardArguments, trainer: "PictureRewardTrainer", eval_rows: Rows) -> dict[str, float]:
    """Return the accuracy on held-out comparisons with images of other rows.

    Nothing where weights are spread over processes, or no other row has as many images.
    """
    from hfllm.data.images.rows import as_dataset
    from hfllm.evaluation.pictures import other_places
    from hfllm.outputs.report import mean_of

    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return {}
    others = other_places([row["images"] for row in eval_rows])
    swapped = [
        {**row, "images": eval_rows[other]["images"]}
        for index, (row, other) in enumerate(zip(eval_rows, others, strict=True))
        if row["images"] and other != index
    ]
    if not swapped:
        return {}
    result = trainer.is_right(as_dataset(swapped, script_args.max_pixels, COLUMNS))
    return mean_of("other_pictures_accuracy", result)


def control_summary(metrics: Mapping[str, Any]) -> str:
    """Return the control in words; an empty string if it was not measured."""
    from hfllm.outputs.report import plus_minus

    name = "other_pictures_accuracy"
    if name not in metrics:
        return ""
    return f"; with the pictures of other rows {plus_minus(metrics[name], metrics.get(f'{name}_se'))}"
