"""Reward models that see: comparisons of answers about pictures, their trainer, and the control."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfllm.data.picture_batches import words_of_places
from hfllm.errors import InputError, refuse
from hfllm.stages.own_pictures import FREEZING, OF_PICTURES, given_flags
from hfllm.stages.reward import RewardArguments, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin
    from trl import ModelConfig, RewardConfig

    from hfllm.trainers.trl_trainers import PictureRewardTrainer

STAGE = "hfllm reward"
COLUMNS = ("prompt", "chosen", "rejected")


def processor_of(model_args: "ModelConfig") -> "ProcessorMixin | None":
    """Return the processor of the named model if it sees; `None` for one of text, or where none is named.

    Raises:
        InputError: when it sees and has none, or transformers has no class of its type that scores.
    """
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config
    from hfllm.stages.rlhf_pictures import load_processing_class

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


def user_comparisons(
    script_args: RewardArguments, seed: int, processor: "ProcessorMixin | None"
) -> tuple[Rows, Rows] | None:
    """Return comparisons as `reward.user_comparisons` does; for a model that sees they may have `images`.

    If one row has pictures, the messages of all have parts as their content.
    """
    from hfllm.data.formats import Row, to_preference
    from hfllm.data.images import flaw_of_pictures, place_images
    from hfllm.data.rows import flaw_of, origin_of
    from hfllm.data.sources import WORLD
    from hfllm.stages import reward
    from hfllm.stages.own_pictures import Convert, picture_mapper, refuse_tools, words_or_pictures
    from hfllm.stages.sft_pictures import shows_pictures
    from hfllm.stages.user_rows import user_rows

    if processor is None or script_args.dataset_name == WORLD:
        return reward.user_comparisons(script_args, seed)

    def mapper_of(name: str) -> Convert:
        tokens = words_of_places(processor)
        pictures = picture_mapper(script_args, name, to_preference, STAGE, tokens)
        return words_or_pictures(pictures, to_preference, tokens)

    def flaw(row: Row) -> str | None:
        return flaw_of_pictures(row) if row.get("images") else flaw_of(row)

    name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
    parts = user_rows(script_args, mapper_of(name), seed, flaw_of=flaw, eval_mapper=mapper_of(eval_name))
    if not shows_pictures(*parts):
        return reward.augmented(script_args, *parts, seed)
    for row in (row for part in parts for row in part if not row.get("images")):
        origin = origin_of(row, "a row")
        refuse_tools(origin, row, STAGE)
        row |= {**place_images(origin, row, 0), "images": []}
    return parts


def check(
    script_args: RewardArguments,
    training_args: "RewardConfig",
    model_args: "ModelConfig",
    rows: tuple[Rows, Rows] | None,
    processor: "ProcessorMixin | None",
) -> bool:
    """Return whether a row has pictures; refuse flags that do not go with that, or with a model that sees.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.multimodal.processors import check_template
    from hfllm.runs.command_line import given_names
    from hfllm.stages.own_pictures import check_freezing
    from hfllm.stages.picture_checks import check_sampling, check_split_weights
    from hfllm.stages.sft_pictures import shows_pictures

    shows = rows is not None and shows_pictures(*rows)
    for flag in given_flags(script_args, (*FREEZING, *OF_PICTURES)):
        refuse(not shows, f"--{flag}", "no row has a picture")
    sees = processor is not None
    # It would be read with another one by whoever takes it with its processor.
    refuse(
        sees and bool(training_args.chat_template_path),
        "--chat_template_path",
        "the model sees: its processor has one",
    )
    if not shows:
        return False
    check_template(processor, model_args.model_name_or_path)
    check_freezing(script_args, model_args)
    check_split_weights(training_args, *rows)
    check_sampling(training_args)
    is_given = "max_length" in (given_names(script_args, training_args) or ())
    refuse(is_given and training_args.max_length is not None, "--max_length", "rows with pictures are not cut")
    refuse(bool(script_args.augment), "--augment", "the rows have pictures")
    for flag in ("eos_token", "pad_to_multiple_of"):
        is_given = bool(getattr(training_args, flag, None))
        refuse(is_given, f"--{flag}", "rows with pictures are read by the model's processor, as they are")
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
    """Return the trainer of a model that sees and scores."""
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import peft_config
    from hfllm.stages.own_pictures import as_dataset
    from hfllm.stages.vision_models import freeze, warn_of_frozen_projector
    from hfllm.trainers.trl_trainers import PictureRewardTrainer

    freeze(model, script_args.freeze_vision, script_args.freeze_text)
    # In a batch without pictures the tower gets no gradient, which several processes would wait for.
    finds = training_args.ddp_find_unused_parameters
    args = changed(training_args, max_length=None, ddp_find_unused_parameters=True if finds is None else finds)
    train, held_out = (as_dataset(rows, script_args.max_pixels, COLUMNS) for rows in (train_rows, eval_rows))
    adapter = peft_config(model_args, "SEQ_CLS")
    sets = {"train_dataset": train, "eval_dataset": held_out}
    trainer = PictureRewardTrainer(processor, model=model, args=args, peft_config=adapter, **sets)
    warn_of_frozen_projector(trainer.model, model_args.use_peft, "reward")
    return trainer


def control(script_args: RewardArguments, trainer: "PictureRewardTrainer", eval_rows: Rows) -> dict[str, float]:
    """Return the accuracy on held-out comparisons that are shown the pictures of others.

    Nothing where weights are spread over processes, or no other row has as many pictures.
    """
    from hfllm.evaluation.pictures import other_places
    from hfllm.outputs.report import mean_of
    from hfllm.stages.own_pictures import as_dataset

    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return {}
    others = other_places([row["images"] for row in eval_rows])
    shown = [
        {**row, "images": eval_rows[other]["images"]}
        for place, (row, other) in enumerate(zip(eval_rows, others, strict=True))
        if row["images"] and other != place
    ]
    if not shown:
        return {}
    found = trainer.is_right(as_dataset(shown, script_args.max_pixels, COLUMNS))
    return mean_of("other_pictures_accuracy", found)


def control_summary(metrics: Mapping[str, Any]) -> str:
    """Return the control in words; nothing where it was not measured."""
    from hfllm.outputs.report import plus_minus

    name = "other_pictures_accuracy"
    if name not in metrics:
        return ""
    return f"; with the pictures of other rows {plus_minus(metrics[name], metrics.get(f'{name}_se'))}"
