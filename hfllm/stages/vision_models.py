"""The models of the recipe that learns to see: a small one that is made for the drawn pictures, or the user's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.sources import PICTURES
from hfllm.data.world.pictures import DrawnWorld, TwoDigits, picture_side
from hfllm.errors import InputError, refuse
from hfllm.stages.own_pictures import FreezingArguments, PictureArguments, Rows, as_dataset
from hfllm.stages.vision import VisionArguments
from hfllm.stages.vision_data import JoinedRows, caption_rows, question_rows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer
    from trl import ModelConfig, SFTConfig

# The bytes, the marks of the chat template, and the words of the drawn world and more.
VOCAB_SIZE = 640
# Longer than any conversation about a drawn picture.
CONTEXT = 512
# Mean and deviation of the drawn world's pixels, from 0 to 1. Its ground is dark: about 0.5, where SigLIP has its
# middle, what is drawn would be a small change of a large constant, and shapes would be learned late.
MEAN, DEVIATION = 0.15, 0.15


def new_model(
    script_args: VisionArguments, rows: DrawnWorld | TwoDigits, texts: Sequence[str], seed: int
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return a small model that sees, with nothing learned, and its processor.

    Args:
        script_args: its sizes.
        rows: whose pictures it is for.
        texts: what its tokenizer learns words from.
        seed: of the weights.
    """
    from transformers import SiglipVisionConfig, set_seed

    from hfllm.data.tokenizer import train_tokenizer
    from hfllm.models.family.configuration_hfllm import HfllmConfig
    from hfllm.models.family.layers_hfllm import HfllmMLP
    from hfllm.models.family.modeling_hfllm import HfllmForCausalLM
    from hfllm.multimodal.composed import with_vision
    from hfllm.multimodal.processors import IMAGE_TOKEN, vision_processor

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
        # Its weights would wait for gradients that never come.
        vision_use_head=False,
    )
    text = HfllmConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=script_args.num_hidden_layers,
        num_attention_heads=script_args.num_attention_heads,
        max_position_embeddings=CONTEXT,
        # A thing of the drawn world is found by what it is: every other layer compares without positions. Of two
        # digits the side is asked for.
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
            # Memory is no matter here, and computing a part of each layer twice takes a twentieth of the time.
            module.recompute = False
    return model, processor


def load_model(model_args: "ModelConfig") -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return the user's vision-language model and its processor.

    Raises:
        InputError: when either cannot be loaded, or the model reads text alone.
    """
    from hfllm.models.loading.saved import reason_of
    from hfllm.stages.rlhf_pictures import load_seeing_model

    name, processor = model_args.model_name_or_path, load_processor(model_args)
    try:
        return load_seeing_model(model_args), processor
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {reason_of(error)}") from error


def load_processor(model_args: "ModelConfig") -> "ProcessorMixin":
    """Return the processor of the user's vision-language model.

    Raises:
        InputError: when it cannot be loaded or has no chat template, or the model reads text alone.
    """
    from hfllm.multimodal.processors import check_template
    from hfllm.runs.models import load_config
    from hfllm.stages import rlhf_pictures

    name, revision = model_args.model_name_or_path, model_args.model_revision
    refuse_text_model(name, load_config(name, revision))
    processor = rlhf_pictures.load_processor(name, revision)
    check_template(processor, name)
    return processor


def refuse_text_model(name: str, config: "PreTrainedConfig") -> None:
    """Refuse a model that reads text alone.

    Raises:
        InputError: naming it.
    """
    from hfllm.models.loading.saved import is_for_pictures

    if not is_for_pictures(config):
        raise InputError(
            f"--model_name_or_path {name}: a {config.model_type} model reads text alone; name a vision-language "
            "model, or give it eyes by hfllm.with_vision"
        )


def freeze(model: "PreTrainedModel", vision: bool, text: bool) -> None:
    """Keep the tower, or the decoder with its head, from learning; what is between them always learns.

    Raises:
        InputError: when the model is an adapter, its layout names no tower, or nothing is left to learn.
    """
    for flag, is_given in (("--freeze_vision", vision), ("--freeze_text", text)):
        is_idle = is_given and hasattr(model, "peft_config")
        refuse(is_idle, flag, "the model is an adapter, below which all weights are frozen")
    if not (vision or text):
        return
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    of_text = [decoder, *([] if head is None else [head])]
    if text:
        for part in of_text:
            part.requires_grad_(False)
    if vision:
        tower = tower_of(model)
        inside = [] if _has_more(model.base_model, [tower, *of_text]) else inner_projector(tower, width_of(model))
        tower.requires_grad_(False)
        for part in inside:
            part.requires_grad_(True)
    if vision and text and not _has_more(model, of_text, only_learned=True):
        raise InputError(
            f"--freeze_vision and --freeze_text: of a {type(model).__name__} nothing is left to learn, since it has "
            "no projector between tower and decoder: give one of them"
        )


def _has_more(model: "nn.Module", parts: "Sequence[nn.Module]", only_learned: bool = False) -> bool:
    """Return whether a model has weights beside those of some parts, or such that learn."""
    known = {id(weight) for part in parts for weight in part.parameters()}
    return any(id(weight) not in known and (weight.requires_grad or not only_learned) for weight in model.parameters())


def width_of(model: "PreTrainedModel") -> int:
    """Return the length of the decoder's embeddings, to which pictures are projected."""
    return model.get_input_embeddings().weight.shape[-1]


def inner_projector(tower: "nn.Module", width: int) -> "list[nn.Module]":
    """Return the parts of a tower that project to the decoder, such as Qwen2-VL's merger; none of most towers.

    These are the parts after the stack of layers with a linear layer or a convolution onto the decoder's width: so are
    they registered in transformers' classes that have no projector outside of the tower.

    Args:
        width: of the decoder.
    """
    from torch import nn

    parts = list(tower.children())
    stack = next((place for place, part in enumerate(parts) if isinstance(part, nn.ModuleList)), len(parts))

    def projects(part: "nn.Module") -> bool:
        return any(
            isinstance(each, nn.Linear | nn.Conv2d) and each.weight.shape[0] == width for each in part.modules()
        )

    return [part for part in parts[stack + 1 :] if projects(part)]


def tower_of(model: "PreTrainedModel") -> "nn.Module":
    """Return the vision tower of a composed model.

    Raises:
        InputError: when the layout has none by a name that transformers knows.
    """
    # Without such a name it returns the model itself, or its base.
    found = model.base_model.get_encoder(modality="image")
    if found is model or found is model.base_model:
        raise InputError(f"--freeze_vision: no vision tower is known in a {type(model).__name__}")
    return found


def new_trainer(
    script_args: VisionArguments, training_args: "SFTConfig", seed: int
) -> "tuple[Trainer, ProcessorMixin]":
    """Return the trainer of a model that is made here: captions first, then questions."""
    from hfllm.runs.arguments import changed
    from hfllm.stages.pretrain_trainers import optimizer_of
    from hfllm.trainers.trl_trainers import PictureTrainer, TurnTokens

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
    """What a trainer of pictures asks of a stage's flags."""


def own_trainer(
    script_args: PictureTraining,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    rows: Rows,
    eval_rows: Rows | None = None,
    stage: str = "vision",
) -> "tuple[Trainer, ProcessorMixin]":
    """Return TRL's trainer of the user's model on rows with pictures.

    Args:
        script_args: the flags of a stage that has those of `PictureTraining`.
        rows: with `prompt`, `completion` and `images`; some may have no pictures.
        eval_rows: likewise, or none.
        stage: the command, for what is said.

    Raises:
        InputError: for pictures in some rows only where weights are split, a model that cannot be loaded, or one of
            which nothing is left to learn.
    """
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import peft_config
    from hfllm.stages.picture_checks import check_split_weights, is_mixed
    from hfllm.trainers.trl_trainers import SFTTrainer

    check_split_weights(training_args, rows, eval_rows or ())
    if is_mixed(rows) and training_args.ddp_find_unused_parameters is None:
        # In a batch without pictures the tower gets no gradient, which several processes would wait for.
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
    """Say that an adapter leaves the projector as it is, where it does."""
    from hfllm.runs.command_line import say

    learned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if has_adapter and not any("projector" in name for name in learned):
        say(f"{stage}: the adapter leaves the projector as it is; --lora_modules_to_save with its name lets it learn")
