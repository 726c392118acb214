"""The parts of a causal model, whatever its class, and forward hooks on them that are always removed.

Hooks see the outputs of modules (B, S, E). Every function here and above runs the model's own code: nothing of an
architecture is written again. Shapes: B batch, S sequence, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names that models of transformers give to the two halves of a layer.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
MLP, ATTENTION = "mlp", "attention"
COMPONENTS = (MLP, ATTENTION)

Hook = Callable[[torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Parts:
    """A causal model and where to look into it.

    Args:
        model: without a wrapper of PEFT; the adapter's layers are in it.
        embeddings: the module whose output is the vectors of tokens.
        layers: the decoder's, from the first to the last.
    """

    model: "PreTrainedModel"
    embeddings: nn.Module
    layers: Sequence[nn.Module]

    def component(self, layer: int, name: str) -> nn.Module:
        """Return the MLP or the attention of a layer, counted from 0.

        Raises:
            InputError: when the layer has no such part under a known name.
        """
        children = dict(self.layers[layer].named_children())
        known = MLP_NAMES if name == MLP else ATTENTION_NAMES
        for each in known:
            if each in children:
                return children[each]
        raise InputError(
            f"layer {layer} of {type(self.model).__name__} has no {name}: its parts are {', '.join(children)}; "
            f"known names are {', '.join(known)}"
        )

    def components(self, name: str) -> list[nn.Module]:
        """Return the MLP or the attention of each layer."""
        return [self.component(layer, name) for layer in range(len(self.layers))]


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a causal model of transformers, with or without an adapter.

    Raises:
        InputError: for an adapter of virtual tokens, before which no place is where it was, and for a model whose
            layers are in no list.
    """
    if hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise InputError("an adapter of virtual tokens cannot be interpreted: it moves the places of all tokens")
        model = model.get_base_model()
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of its {count} layers, so nothing can look into it")
    # The outermost one: experts may be as many as layers.
    return Parts(model, model.get_input_embeddings(), list(min(lists, key=lambda each: each[0])[1]))


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Context manager that passes each module's output (B, S, E) to its function, and removes all hooks afterwards.

    A function that returns a tensor replaces the output. Of a module that returns several, as attention does, the
    first is meant.
    """
    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_hook(_hook(function)).remove)
        yield


def _hook(function: Hook) -> Callable[[nn.Module, tuple, object], object]:
    def hook(module: nn.Module, args: tuple, output: object) -> object:
        is_tuple = isinstance(output, tuple)
        changed = function(output[0] if is_tuple else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if is_tuple else changed

    return hook


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Context manager in which all of a model is in evaluation mode, without dropout or activation checkpointing."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def last_logits(parts: Parts, input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, V) in 32 bits at one place of each row.

    Args:
        input_ids: (B, S), padded on the right, which a causal model does not see.
        last: (B,), the places.

    Raises:
        InputError: for logits that are not numbers, which would compare as if they were the best.
    """
    logits = parts.model(input_ids=input_ids, use_cache=False, logits_to_keep=last[:, None]).logits
    return as_numbers(parts, logits[:, 0])


def as_numbers(parts: Parts, logits: torch.Tensor) -> torch.Tensor:
    """Return logits in 32 bits.

    Raises:
        InputError: for logits that are not numbers.
    """
    if logits.isnan().any():
        raise InputError(
            f"{type(parts.model).__name__} has logits that are not numbers (NaN): its weights are damaged"
        )
    return logits.float()


def recorded(
    parts: Parts, input_ids: torch.Tensor, last: torch.Tensor, modules: Sequence[nn.Module]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits (B, V) of `last_logits`, and the outputs (B, S, E) of modules in the same pass."""
    kept: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Hook:
        def record(output: torch.Tensor) -> None:
            kept[place] = output.detach()

        return record

    with torch.no_grad(), hooked((module, keep(place)) for place, module in enumerate(modules)):
        logits = last_logits(parts, input_ids, last)
    return logits, [kept[place] for place in range(len(modules))]


def with_outputs(
    parts: Parts,
    input_ids: torch.Tensor,
    last: torch.Tensor,
    outputs: Mapping[nn.Module, tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Return the logits (B, V) of `last_logits` when some outputs of modules are others.

    Args:
        outputs: for each module a mask (B, S), true where its output is replaced, and values (B, S, E).
    """

    def put(mask: torch.Tensor, values: torch.Tensor) -> Hook:
        return lambda output: torch.where(mask[..., None], values.to(output), output)

    with torch.no_grad(), hooked((module, put(*each)) for module, each in outputs.items()):
        return last_logits(parts, input_ids, last)
