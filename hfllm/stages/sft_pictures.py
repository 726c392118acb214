"""Fine-tuning of models that see: on rows with pictures, on text alone, or on both mixed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.picture_batches import words_of_places
from hfllm.errors import refuse
from hfllm.stages.own_pictures import FREEZING, OF_PICTURES, Rows, given_flags
from hfllm.stages.sft import SftArguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import ModelConfig, SFTConfig

    from hfllm.evaluation.before_after import TunedEvaluation
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.trainers.trl_trainers import SFTTrainer

STAGE = "hfllm sft"
ANSWER_TOKENS = 48


def processor_of(model_args: "ModelConfig") -> "ProcessorMixin | None":
    """Return the processor of the named model if it sees; `None` for one of text, or where none is named.

    Raises:
        InputError: when a model that sees has none.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config
    from hfllm.stages.rlhf_pictures import load_processor

    name, revision = model_args.model_name_or_path, model_args.model_revision
    return load_processor(name, revision) if name and is_for_pictures(load_config(name, revision)) else None


def instruction_data(
    script_args: SftArguments, seed: int, processor: "ProcessorMixin | None", model_name: str | None
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return training and held-out rows as `sft.instruction_data` does; of a model that sees they may have `images`.

    If one row has pictures, the messages of all have parts as their content.

    Args:
        processor: the model's, `None` for one of text.
        model_name: of the model, for complaints.
    """
    from hfllm.data import formats
    from hfllm.data.images import flaw_of_pictures, place_images
    from hfllm.data.rows import flaw_of, origin_of
    from hfllm.data.sources import WORLD
    from hfllm.stages import sft
    from hfllm.stages.own_pictures import Convert, picture_mapper, refuse_tools, words_or_pictures
    from hfllm.stages.user_rows import user_rows

    if processor is None or script_args.dataset_name == WORLD:
        return sft.instruction_data(script_args, script_args.num_examples, seed, model_name)

    def words(origin: str, row: formats.Row) -> formats.Row:
        row = formats.to_sft(origin, row)
        return formats.last_turn(row) if script_args.loss_on == "last" else row

    def mapper_of(name: str) -> Convert:
        tokens = words_of_places(processor)
        return words_or_pictures(picture_mapper(script_args, name, words, STAGE, tokens), words, tokens)

    def flaw(row: formats.Row) -> str | None:
        return flaw_of_pictures(row) if row.get("images") else flaw_of(row)

    name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
    parts = user_rows(script_args, mapper_of(name), seed, flaw_of=flaw, eval_mapper=mapper_of(eval_name))
    if not shows_pictures(*parts):
        return parts
    for row in (row for part in parts for row in part if not row.get("images")):
        origin = origin_of(row, "a row")
        refuse_tools(origin, row, STAGE)
        row |= {**place_images(origin, row, 0), "images": []}
    return parts


def shows_pictures(*parts: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a row has pictures."""
    return any(row.get("images") for part in parts for row in part)


def check(
    script_args: SftArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
) -> bool:
    """Return whether a row has pictures; refuse flags that do not go with that, or have no effect on rows of text.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config
    from hfllm.stages.own_pictures import by_turns, check_freezing
    from hfllm.stages.picture_checks import check_split_weights, check_whole_rows

    shows = shows_pictures(train_rows, eval_rows)
    for flag in given_flags(script_args, (*FREEZING, *OF_PICTURES)):
        refuse(not shows, f"--{flag}", "no row has a picture")
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if shows or (name and is_for_pictures(load_config(name, revision))):
        refuse(bool(script_args.added_tokens), "--added_tokens", "the model sees, and its tokens are its processor's")
        refuse(bool(training_args.chat_template_path), "--chat_template_path", "the model sees: its processor has one")
    if not shows:
        return False
    check_freezing(script_args, model_args)
    # The first answers of a conversation may come before its first picture.
    turns = ([turn for row in rows for turn in by_turns(row)] for rows in (train_rows, eval_rows))
    check_split_weights(training_args, *turns)
    check_whole_rows(script_args, training_args)
    refuse(bool(script_args.augment), "--augment", "the rows have pictures")
    refuse(bool(script_args.retrieval_dataset_name), "--retrieval_dataset_name", "the rows have pictures")
    return True


def load_policy(
    script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig", config: "PreTrainedConfig"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, ProcessingClass]":
    """Load the model that learns from text, its tokenizer, and what is saved with it: that, or its processor.

    Args:
        config: the model's.
    """
    from hfllm.stages import rlhf_pictures, sft

    model, processing_class = rlhf_pictures.load_policy(model_args, config, training_args.output_dir)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    sees = tokenizer is not processing_class
    model, tokenizer = sft.with_template(training_args, model, tokenizer, script_args.added_tokens)
    return model, tokenizer, processing_class if sees else tokenizer


def trainer_of(
    script_args: SftArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    train_rows: Rows,
    eval_rows: Rows,
) -> "tuple[SFTTrainer, Rows]":
    """Return TRL's trainer on rows with pictures, and the held-out rows, one for each answer, as it reads them."""
    from hfllm.runs.arguments import changed
    from hfllm.stages.own_pictures import by_turns
    from hfllm.stages.vision_models import own_trainer

    train, held_out = ([turn for row in rows for turn in by_turns(row)] for rows in (train_rows, eval_rows))
    args = changed(training_args, max_length=None)
    trainer, _ = own_trainer(script_args, args, model_args, train, held_out, stage="sft")
    return trainer, held_out


# ---- what it has learned ----


def evaluate(trainer: "SFTTrainer", held_out: Rows) -> "TunedEvaluation | None":
    """Evaluate the trainer's current model on the first held-out rows, and let it answer the first of them."""
    from hfllm.evaluation.before_after import evaluate_tuned
    from hfllm.multimodal.answers import answer_pictures

    def answer(model: "PreTrainedModel", rows: Sequence[Mapping[str, Any]]) -> list[str]:
        asked = [row["prompt"] for row in rows]
        return answer_pictures(model, trainer.processing_class, asked, [row["images"] for row in rows], ANSWER_TOKENS)

    return evaluate_tuned(trainer, held_out, answer=answer)


def control(script_args: SftArguments, trainer: "SFTTrainer", held_out: Rows) -> dict[str, float]:
    """Return the loss of held-out rows with the pictures of others, and how much more that is than with their own."""
    from hfllm.evaluation.before_after import MOST_ROWS, evaluate_tuned, tuning_metrics
    from hfllm.evaluation.pictures import other_places
    from hfllm.stages.own_pictures import as_dataset

    rows = held_out[:MOST_ROWS]
    others = other_places([row["images"] for row in rows])
    places = [place for place, other in enumerate(others) if rows[place]["images"] and other != place]
    if not places:
        return {}

    def measured(pictures_of: Callable[[int], int]) -> "TunedEvaluation | None":
        shown = [{**rows[place], "images": rows[pictures_of(place)]["images"]} for place in places]
        dataset = as_dataset(shown, script_args.max_pixels)
        return evaluate_tuned(trainer, [], dataset, collate=trainer.data_collator)

    found = tuning_metrics(measured(int), measured(others.__getitem__))
    new = {"other_pictures_loss": "held_out_loss_after", "other_pictures_extra_loss": "held_out_loss_change"}
    made = {f"{ours}{end}": found.get(f"{theirs}{end}") for ours, theirs in new.items() for end in ("", "_se")}
    made |= {f"{ours}_n": found.get("held_out_loss_n") for ours in new}
    return {name: value for name, value in made.items() if value is not None}


def control_summary(metrics: Mapping[str, float]) -> str:
    """Return the control in words; nothing where it was not measured."""
    from hfllm.outputs.report import plus_minus

    if "other_pictures_loss" not in metrics:
        return ""
    loss, change = (
        plus_minus(metrics[name], metrics.get(f"{name}_se"))
        for name in ("other_pictures_loss", "other_pictures_extra_loss")
    )
    return f"; with the pictures of other rows {loss}, which is {change} more"
