"""Rows with images, drawn or the user's, the vision-language models for them, and their PPO."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import to_sft
from hfllm.data.images.rows import (
    Convert,
    FreezingArguments,
    PictureArguments,
    Rows,
    as_dataset,
    by_turns,
    flaw_of_pictures,
    picture_mapper,
    png_of,
    text_of,
)
from hfllm.data.sources import DIGITS, PICTURES
from hfllm.data.tokenizer import train_tokenizer
from hfllm.data.world.pictures import (
    ABSENT,
    CAPTIONS,
    FAMILIES,
    QUESTIONS,
    TRAINED_NUMBERS,
    DrawnWorld,
    PictureRow,
    TwoDigits,
    picture_side,
    trained_families,
)
from hfllm.errors import InputError
from hfllm.evaluation.pictures import Asked, shuffled_questions
from hfllm.models.family.configuration_hfllm import HfllmConfig
from hfllm.models.family.layers_hfllm import HfllmMLP
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM
from hfllm.models.loading.saved import is_for_pictures, reason_of
from hfllm.multimodal.composed import with_vision
from hfllm.multimodal.freezing import freeze
from hfllm.multimodal.processors import IMAGE_TOKEN, vision_processor
from hfllm.outputs.report import change_of
from hfllm.rewards.functions import gold_reward
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import say
from hfllm.runs.models import load_config, peft_config
from hfllm.stages.shared import check_split_weights, is_mixed, load_seeing_model, user_rows
from hfllm.stages.vision.flags import VisionArguments
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.pretraining.trainer import optimizer_of
from hfllm.trainers.trl_trainers import PictureTrainer, SFTTrainer, TurnTokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer
    from trl import ModelConfig, SFTConfig

    from hfllm.trainers.ppo.trainer import PPOTrainer


# ---- drawn rows ----


SEEN, HELD_OUT, SHUFFLED = "seen", "held_out", "shuffled"
# The evaluation's images are the same for any seed of training.
EVAL_SEED = 777
# Number of other questions per question of the evaluation, for finding the best guess without an image.
PRIOR = 20
# One in this many images with questions has captions, too.
CAPTION_EVERY = 3


def caption_rows(script_args: VisionArguments, seed: int) -> DrawnWorld | None:
    """Return the captions to learn first, `None` without captions."""
    if script_args.dataset_name != PICTURES or not script_args.num_captions:
        return None
    return DrawnWorld(seed, script_args.num_captions, CAPTIONS)


def question_rows(script_args: VisionArguments, seed: int) -> DrawnWorld | TwoDigits:
    """Return the drawn rows of questions to train on."""
    count, turns = script_args.num_examples, script_args.questions_per_picture
    if script_args.dataset_name == DIGITS:
        return TwoDigits(seed, count, num_questions=turns)
    # Captions continue: with only answers about single things, colors and shapes are learned much later.
    families = trained_families(script_args.share_absent)
    mix = {"caption_every": CAPTION_EVERY, "families": families, "numbers": TRAINED_NUMBERS}
    return DrawnWorld(seed, count, QUESTIONS, turns, **mix)


def eval_parts(script_args: VisionArguments) -> dict[str, list[Asked]]:
    """Return the drawn questions of each part of the evaluation, and the first part's with other images."""
    count = script_args.num_eval_examples
    if script_args.dataset_name == DIGITS:
        rows: dict[str, Sequence[PictureRow]] = {HELD_OUT: TwoDigits(EVAL_SEED, count, is_held_out=True)}
    else:
        rows = {
            SEEN: DrawnWorld(EVAL_SEED, count, part="evaluation"),
            HELD_OUT: DrawnWorld(EVAL_SEED, count, held_out=True, part="evaluation"),
        }
    parts = {name: [asked(row) for row in each] for name, each in rows.items()}
    return {**parts, SHUFFLED: shuffled_questions(next(iter(parts.values())))}


def parts_of(held_out: list[Asked]) -> dict[str, list[Asked]]:
    """Return the parts of the evaluation of the user's held-out rows: with their own and with others' images.

    Rows without another row of different images are left out of the second, thus it may be missing.
    """
    pairs = zip(held_out, shuffled_questions(held_out), strict=True)
    shuffled = [other for own, other in pairs if other.images is not own.images]
    return {HELD_OUT: held_out, **({SHUFFLED: shuffled} if shuffled else {})}


def prior_of(script_args: VisionArguments) -> list[Asked]:
    """Return more drawn questions, for finding the best answer without an image; none for the user's rows."""
    count = PRIOR * script_args.num_eval_examples
    if script_args.dataset_name == DIGITS:
        # For two questions, this many answers are equally informative.
        return [asked(row) for row in TwoDigits(EVAL_SEED + 1, script_args.num_eval_examples)]
    drawn = script_args.dataset_name == PICTURES
    return [asked(row) for row in DrawnWorld(EVAL_SEED + 1, count, part="evaluation")] if drawn else []


def asked(row: PictureRow) -> Asked:
    """Return a drawn row's question."""
    return Asked(row.prompt(), [row.picture], row.turns[0][1], row.family, row.gold, row.scene)


class JoinedRows(Sequence[PictureRow]):
    """Rows of several sequences, one after the other."""

    def __init__(self, *parts: Sequence[PictureRow]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, number: int) -> PictureRow:
        for part in self.parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)


# ---- the user's rows, and drawn ones for the user's model ----


def own_rows(script_args: VisionArguments, seed: int, tokens: Sequence[str] = ()) -> tuple[Rows, list[Asked]]:
    """Return rows with `prompt`, `completion` and `images` to train on, and the held-out ones as questions.

    Args:
        seed: of the split.
        tokens: the processor's placeholders for images; rows with one of them in their text are left out.
    """

    def mapper(name: str) -> Convert:
        return picture_mapper(script_args, name, to_sft, "hfllm vision", tokens)

    name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
    settings = {"most": script_args.max_eval_samples, "flaw_of": flaw_of_pictures, "eval_mapper": mapper(eval_name)}
    train, held_out = user_rows(script_args, mapper(name), seed, **settings)
    return [turn for row in train for turn in by_turns(row)], [asked_of(by_turns(row)[0]) for row in held_out]


def drawn_rows(script_args: VisionArguments, seed: int) -> Rows:
    """Return drawn rows as `own_rows` does, for the user's model."""
    rows: Rows = []
    for row in question_rows(script_args, seed):
        question, *rest = row.messages()
        rows += by_turns({"prompt": [question], "completion": rest, "images": [png_of(row.picture)]})
    return rows


def asked_of(row: Mapping[str, Any]) -> Asked:
    """Return a row of `by_turns` as a question."""
    return Asked(row["prompt"], row["images"], text_of(row["completion"][0]).strip(), "all")


# ---- models ----
#
# The models of the vision-language recipe: a small one for the drawn images, or the user's.


# The bytes, the marks of the chat template, and the words of the drawn world and more.
VOCAB_SIZE = 640
# Longer than any conversation about a drawn image.
CONTEXT = 512
# Mean and deviation of the drawn world's pixels, from 0 to 1. Its background is dark: around 0.5, SigLIP's mean,
# drawings would be a small change of a large constant, and shapes would be learned late.
MEAN, DEVIATION = 0.15, 0.15


def new_model(
    script_args: VisionArguments, rows: DrawnWorld | TwoDigits, texts: Sequence[str], seed: int
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return a small, untrained vision-language model and its processor.

    Args:
        script_args: its sizes.
        rows: with the images for the model.
        texts: to train its tokenizer on.
        seed: of the weights.
    """
    from transformers import SiglipVisionConfig, set_seed

    width, side = script_args.hidden_size, picture_side(script_args.dataset_name)
    tower_width, is_world = script_args.vision_hidden_size or width, script_args.dataset_name == PICTURES
    tokenizer = train_tokenizer(
        texts, vocab_size=VOCAB_SIZE, model_max_length=CONTEXT, extra_special_tokens=[IMAGE_TOKEN]
    )
    tower = SiglipVisionConfig(
        hidden_size=tower_width,
        intermediate_size=2 * tower_width,
        num_hidden_layers=script_args.num_vision_layers,
        num_attention_heads=script_args.num_attention_heads,
        image_size=side,
        patch_size=script_args.patch_size,
        # Its weights would wait for gradients in vain.
        vision_use_head=False,
    )
    text = HfllmConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=script_args.num_hidden_layers,
        num_attention_heads=script_args.num_attention_heads,
        max_position_embeddings=CONTEXT,
        # A thing of the drawn world is found by its attributes: every other layer compares without positions. For two
        # digits the questions are about the side.
        no_rope_layers=[int(not (is_world and layer % 2)) for layer in range(script_args.num_hidden_layers)],
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    processor = vision_processor(tokenizer, tower)
    if is_world:
        processor.image_processor.image_mean, processor.image_processor.image_std = [MEAN] * 3, [DEVIATION] * 3
    set_seed(seed)
    model = with_vision(HfllmForCausalLM(text), tower, image_token_id=processor.image_token_id)
    for module in model.modules():
        if isinstance(module, HfllmMLP):
            # Memory does not matter here, and computing a part of each layer twice takes a twentieth of the time.
            module.recompute = False
    return model, processor


def load_model(model_args: "ModelConfig") -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return the user's vision-language model and its processor."""
    name, processor = model_args.model_name_or_path, load_processor(model_args)
    try:
        return load_seeing_model(model_args), processor
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {reason_of(error)}") from error


def load_processor(model_args: "ModelConfig") -> "ProcessorMixin":
    """Return the processor of the user's vision-language model."""
    from hfllm.multimodal.processors import check_template
    from hfllm.stages import shared

    name, revision = model_args.model_name_or_path, model_args.model_revision
    refuse_text_model(name, load_config(name, revision))
    processor = shared.load_processor(name, revision)
    check_template(processor, name)
    return processor


def refuse_text_model(name: str, config: "PreTrainedConfig") -> None:
    """Refuse a text-only model."""
    if not is_for_pictures(config):
        raise InputError(
            f"--model_name_or_path {name}: a {config.model_type} model reads text alone; name a vision-language "
            "model, or give it eyes by hfllm.with_vision"
        )


def new_trainer(
    script_args: VisionArguments, training_args: "SFTConfig", seed: int
) -> "tuple[Trainer, ProcessorMixin]":
    """Return the trainer of a model built here: captions first, then questions."""
    questions, captions = question_rows(script_args, seed), caption_rows(script_args, seed)
    texts = [text for rows in (captions, questions) if rows is not None for text in rows.texts()]
    model, processor = new_model(script_args, questions, texts, seed)
    pieces = (picture_side(script_args.dataset_name) // script_args.patch_size) ** 2
    rows = questions if captions is None else JoinedRows(captions, questions)
    args = changed(training_args, remove_unused_columns=False)
    tokens = TurnTokens(processor, processor.image_token_id, pieces, args.max_length)
    optimizer = optimizer_of(script_args.use_muon, args)
    return PictureTrainer(
        rows, tokens, processor, model=model, args=args, optimizer_cls_and_kwargs=optimizer
    ), processor


class PictureTraining(FreezingArguments, PictureArguments):
    """The flags of a stage for a trainer on images."""


def own_trainer(
    script_args: PictureTraining,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    rows: Rows,
    eval_rows: Rows | None = None,
    stage: str = "vision",
) -> "tuple[Trainer, ProcessorMixin]":
    """Return TRL's trainer of the user's model on rows with images.

    Args:
        script_args: the flags of a stage, including the flags of `PictureTraining`.
        rows: with `prompt`, `completion` and `images`; some may have no images.
        eval_rows: likewise, or none.
        stage: the command, for messages.
    """
    check_split_weights(training_args, rows, eval_rows or ())
    if is_mixed(rows) and training_args.ddp_find_unused_parameters is None:
        # In a batch without images the tower gets no gradient, and several processes would wait for it.
        training_args = changed(training_args, ddp_find_unused_parameters=True)
    model, processor = load_model(model_args)
    freeze(model, script_args.freeze_vision, script_args.freeze_text)
    if processor.tokenizer.pad_token is None:
        if processor.tokenizer.eos_token is None:
            name = model_args.model_name_or_path
            raise InputError(f"the tokenizer of {name!r} has no end token (eos_token): answers end with one")
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    kwargs: dict[str, Any] = {"processing_class": processor, "peft_config": peft_config(model_args)}
    if eval_rows is not None:
        kwargs["eval_dataset"] = as_dataset(eval_rows, script_args.max_pixels)
    dataset = as_dataset(rows, script_args.max_pixels)
    trainer = SFTTrainer(model=model, args=training_args, train_dataset=dataset, **kwargs)
    warn_of_frozen_projector(trainer.model, model_args.use_peft, stage)
    return trainer, processor


def warn_of_frozen_projector(model: "nn.Module", has_adapter: bool, stage: str) -> None:
    """Warn if an adapter leaves the projector untrained."""
    learned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if has_adapter and not any("projector" in name for name in learned):
        say(f"{stage}: the adapter leaves the projector as it is; --lora_modules_to_save with its name lets it learn")


# ---- ppo ----
#
# PPO on images: sampled answers about drawn images, rewarded by their gold.


# The folder of the model after PPO, below the folder of the model before.
FOLDER = "rl"
# The longest answer, in tokens: an answer about a relation takes eight.
RESPONSE_LENGTH = 8
# New images cost little here, and a second pass over an answer as much as a new one.
MINI_BATCHES, EPOCHS = 8, 1
# Questions about absent things are the most frequent, a third: a model with hardly any such training learns to answer
# them here. With a quarter it does so less often (.81 against .92, seed 1).
PROMPT_FAMILIES = (*FAMILIES, *FAMILIES, *[ABSENT] * 4)
# Answers of an optimizer step, over all processes: where most are right, only few are informative.
BATCH_SIZE = 64
# Of this many optimizer steps one trains only the critic, and over three the rate rises: without this warmup a family
# may be forgotten for good in the first steps. So it may with a faster critic, because its first values are noise.
WARMUP = 64
# Flags of fine-tuning passed on to a trainer: for devices and printed output.
SHARED = ("seed", "use_cpu", "bf16", "report_to", "disable_tqdm", "dataloader_pin_memory", "logging_steps")


def prompt_rows(script_args: VisionArguments, seed: int) -> list[dict[str, object]]:
    """Return prompts with one image each and the columns of the gold reward.

    None of the drawn images is in fine-tuning; digits are the same as there, in other pairs.
    """
    count, part = script_args.num_rl_prompts, "prompts"
    rows = (
        TwoDigits(seed + 1, count)
        if script_args.dataset_name == DIGITS
        else DrawnWorld(seed, count, QUESTIONS, part=part, families=PROMPT_FAMILIES)
    )
    return [{"prompt": row.prompt(), "images": [row.picture], **row.gold} for row in rows]


def policy_trainer(
    script_args: VisionArguments, training_args: "SFTConfig", processor: "ProcessorMixin"
) -> "PPOTrainer":
    """Return the trainer of a policy on drawn images, every prompt once, with the gold reward.

    It starts from the saved model of fine-tuning: a model trained by TRL cannot be copied as a reference.
    """
    from accelerate import PartialState

    from hfllm.trainers.ppo.trainer import PPOTrainer

    state = PartialState()
    # The main process writes the model, and all read it.
    state.wait_for_everyone()
    shared = {name: getattr(training_args, name) for name in SHARED}
    answers = min(BATCH_SIZE, script_args.num_rl_prompts // MINI_BATCHES)
    batch_size = max(1, answers // state.num_processes)
    rollouts = math.ceil(script_args.num_rl_prompts / (batch_size * MINI_BATCHES * state.num_processes))
    steps = rollouts * MINI_BATCHES * EPOCHS
    args = PPOConfig(
        output_dir=str(Path(training_args.output_dir, FOLDER)),
        total_episodes=script_args.num_rl_prompts,
        per_device_train_batch_size=batch_size,
        num_mini_batches=MINI_BATCHES,
        num_ppo_epochs=EPOCHS,
        response_length=RESPONSE_LENGTH,
        learning_rate=script_args.rl_learning_rate,
        lr_scheduler_type="linear",
        kl_coef=script_args.kl_coef,
        save_strategy="no",
        critic_warmup_steps=steps // WARMUP,
        warmup_steps=3 * steps // WARMUP,
        **shared,
    )
    rows = prompt_rows(script_args, training_args.seed)
    policy = training_args.output_dir
    trainer = PPOTrainer(
        model=policy, reward_funcs=gold_reward, args=args, train_dataset=rows, processing_class=processor
    )
    freeze(trainer.policy, script_args.freeze_vision, script_args.freeze_text)
    return trainer


def sampled_gold(
    script_args: VisionArguments, model: "PreTrainedModel", processor: "ProcessorMixin", questions: Sequence[Asked]
) -> list[float]:
    """Return the gold rewards of one sampled answer per question."""
    from hfllm.multimodal.answers import answer_pictures

    prompts, images = [each.prompt for each in questions], [each.images for each in questions]
    responses = answer_pictures(model, processor, prompts, images, script_args.max_new_tokens, do_sample=True)
    columns = {name: [question.gold[name] for question in questions] for name in questions[0].gold}
    return gold_reward(prompts, responses, **columns)


def gain(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the metrics of the gold reward of sampled answers, before PPO and after."""
    return change_of("sampled_gold", before, after)
