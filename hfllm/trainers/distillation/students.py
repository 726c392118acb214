"""Students and teachers: whether they can be compared, how they make logits, and students made from a teacher."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hfllm.errors import InputError, refuse_if
from hfllm.models.family.configuration_fields_hfllm import WINDOWS, follow_layers
from hfllm.models.loading.adapters import find_adapter, load_apart, load_merged
from hfllm.models.loading.saved import location_of, reason_of
from hfllm.models.loading.weights import cast_weights, load_weights_of
from hfllm.trainers.distillation.data import check_fits_memory
from hfllm.trainers.engines import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ALTERNATIVE = (
    "their logits cannot be compared. Train on the teacher's answers instead, which needs no common vocabulary "
    "(sequence-level distillation: hfllm distill --sequence_level, or SFT on the teacher's answers)"
)


def check_same_vocabulary(
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    teacher_tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Refuse a teacher whose logits do not belong to the student's tokens."""
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    refuse_if(sizes[0] != sizes[1], f"the teacher has {sizes[1]} tokens and the student {sizes[0]}: {ALTERNATIVE}")
    if tokenizer is None or teacher_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = min((token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)), default="")
        one, other = theirs.get(token), ours.get(token)
        raise InputError(f"token {token!r} is number {one} of the teacher and {other} of the student: {ALTERNATIVE}")


def student_from_layers(teacher: "PreTrainedModel", every: int) -> "PreTrainedModel":
    """Return a student of every `every`-th layer of its teacher, from the first on, with the teacher's embeddings.

    It starts from the teacher's weights, as DistilBERT's does (Sanh et al. 2019, arXiv:1910.01108, section 3). It has
    no name, so an adapter on it does not record the teacher as its base.

    Raises:
        InputError: when the student does not have at least one layer fewer, or the teacher's weights cannot be copied.
    """
    config = teacher.config
    total = config.num_hidden_layers
    refuse_if(not 2 <= every <= total, f"every {every}th layer: the teacher has {total}, so 2 to {total} are possible")
    if getattr(teacher, "is_quantized", False):
        raise InputError("a student cannot be made from a quantized teacher: load the teacher unquantized")
    layer_indices = range(0, total, every)
    smaller = copy.deepcopy(config)
    smaller.name_or_path = ""
    smaller.num_hidden_layers = len(layer_indices)
    _take_layers(smaller, layer_indices)
    student = cast_weights(type(teacher)(smaller), teacher.dtype)
    prefix = _layers_name(teacher, total)
    weights = teacher.state_dict()
    state_dict = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    for new, old in enumerate(layer_indices):
        start = f"{prefix}{old}."
        state_dict |= {
            f"{prefix}{new}.{name[len(start) :]}": value for name, value in weights.items() if name.startswith(start)
        }
    student.load_state_dict(state_dict)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device)


def smaller_student(
    teacher: "PreTrainedModel",
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
    initializer_range: float | None = None,
) -> "PreTrainedModel":
    """Return a student of the teacher's architecture with new weights, and no name, as in `student_from_layers`.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, initializer_range: as in the teacher unless given. The
            MLP keeps its ratio to the width, and key-value heads their ratio to the query heads if it is whole.

    Raises:
        InputError: when they do not describe a valid model.
    """
    config, ours = teacher.config, copy.deepcopy(teacher.config)
    overrides = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "initializer_range": initializer_range,
    }
    for name, value in overrides.items():
        if value is not None:
            setattr(ours, name, value)
    width, heads = ours.hidden_size, ours.num_attention_heads
    if width < 1 or heads < 1 or width % heads:
        raise InputError(f"a student of width {width} with {heads} attention heads: the heads must divide the width")
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(ours, name, None):
            setattr(ours, name, max(16, round(getattr(config, name) * width / config.hidden_size / 16) * 16))
    if getattr(ours, "num_key_value_heads", None):
        group = config.num_attention_heads // config.num_key_value_heads
        ours.num_key_value_heads = heads // group if heads % group == 0 else heads
    # Sizes of latent attention, including this one, do not depend on the width.
    if getattr(ours, "head_dim", None) and not getattr(ours, "kv_lora_rank", None):
        ours.head_dim = width // heads
    # A deeper student repeats the teacher's pattern of layers.
    _take_layers(ours, [layer % config.num_hidden_layers for layer in range(ours.num_hidden_layers)])
    fields = ours.to_dict()
    # This describes the teacher's weights; the student's are new, in floating point.
    fields.pop("quantization_config", None)
    fields.pop("_name_or_path", None)
    try:
        # Rebuilt, to check it and to derive the fields dependent on the sizes again.
        student = type(teacher)(type(config).from_dict(fields))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"the student's sizes describe no model: {' '.join(str(error).split())[:200]}") from None
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _take_layers(config: "PreTrainedConfig", layers: Sequence[int]) -> None:
    """Reduce the fields with a value per layer to the values of these layers."""
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in layers])
    if config.model_type != "hfllm":
        return
    for kind, field in WINDOWS.items():
        if kind not in config.layer_types:
            setattr(config, field, None)
    if config.mlp_layer_types is not None:
        follow_layers(config)


def _layers_name(model: "PreTrainedModel", count: int) -> str:
    """Return the prefix of the layers in the names of the weights."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name in names if len(model.get_submodule(name)) == count]
    refuse_if(len(names) != 1, f"a model of type {model.config.model_type} has no single list of {count} layers")
    return f"{names[0]}."


def layer_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Return pairs of student and teacher layers to compare, counted from 1 and evenly spaced.

    The last layers are paired; the teacher's layer of student layer l is l * teacher_layers / student_layers, rounded.
    """
    return [(layer, max(1, round(layer * teacher_layers / student_layers))) for layer in range(1, student_layers + 1)]


def logit_scale(model: "PreTrainedModel") -> float:
    """Return the factor on a model's logits."""
    return float(getattr(model.config.get_text_config(), "logit_scale", None) or 1.0)


def check_linear_head(model: "PreTrainedModel", whose: str) -> None:
    """Refuse a model without a linear head alone.

    Args:
        model: the teacher or the student, without adapters around it.
        whose: teacher or student; a student must take `logits_to_keep`, or it would make all logits.
    """
    kind, flag = model.config.model_type, "--loss_chunk_size 0"
    if whose == "student" and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        reason = "takes no logits_to_keep, so its logits are made all at once"
        raise InputError(f"a student of type {kind} {reason}: use {flag}")
    if not has_linear_head(model):
        raise InputError(f"the {whose} is of type {kind}, whose logits are not a linear head's: use {flag}")


@torch.no_grad()
def has_linear_head(model: "PreTrainedModel") -> bool:
    """Return whether a model's logits are its output embedding on its last hidden state, times a factor."""
    device, head = model.get_input_embeddings().weight.device, model.get_output_embeddings()
    ids = torch.arange(4, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with evaluation_mode(model):
        whole = model(input_ids=ids, use_cache=False).logits
        parts = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state) * logit_scale(model)
    return torch.allclose(whole.float(), parts.float(), atol=1e-3, rtol=1e-3)


def load_teacher(name: str, settings: Mapping[str, object]) -> "PreTrainedModel":
    """Load the teacher called `name`; an adapter is merged into its base model, unless the base is quantized.

    Args:
        settings: arguments of `from_pretrained`.

    Raises:
        InputError: when it cannot be loaded with them, or is larger than memory.
    """
    from transformers import AutoModelForCausalLM

    check_fits_memory(name, settings)
    adapter = find_adapter(name, **location_of(settings))
    try:
        if adapter is not None and not adapter.stays_apart(**settings):
            adapter.check("CAUSAL_LM")
            return load_merged(adapter, AutoModelForCausalLM, **settings)
        if adapter is not None:
            return load_apart(adapter, AutoModelForCausalLM, **settings)[0]
        return load_weights_of(AutoModelForCausalLM, name, whose="teacher", **settings)[0]
    except InputError:
        raise
    # The first two come from unknown names of settings and of dtypes.
    except (TypeError, AttributeError, OSError, ValueError) as error:
        raise InputError(f"teacher {name!r} could not be loaded: {reason_of(error)}") from error
