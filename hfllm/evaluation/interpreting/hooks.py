"""The parts of a causal model, forward hooks on them that are always removed, and the prompts they run on.

Hooks see the outputs of modules (B, S, E). Every function here and above runs the model's own code: nothing of an
architecture is written again. Shapes: B batch, S sequence, E hidden size, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- parts and hooks ----


# Names of the two halves of a layer in transformers models.
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
        names = MLP_NAMES if name == MLP else ATTENTION_NAMES
        for each in names:
            if each in children:
                return children[each]
        raise InputError(
            f"layer {layer} of {type(self.model).__name__} has no {name}: its parts are {', '.join(children)}; "
            f"known names are {', '.join(names)}"
        )

    def components(self, name: str) -> list[nn.Module]:
        """Return the MLPs or the attentions of all layers."""
        return [self.component(layer, name) for layer in range(len(self.layers))]


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a causal model of transformers, with or without an adapter.

    Raises:
        InputError: for an adapter with virtual tokens, shifting all positions, and for a model without a list of its
            layers.
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
    refuse_if(not lists, f"{type(model).__name__} has no list of its {count} layers, so nothing can look into it")
    # The outermost one: experts may be as many as layers.
    return Parts(model, model.get_input_embeddings(), list(min(lists, key=lambda each: each[0])[1]))


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Context manager that passes each module's output (B, S, E) to its function, and removes all hooks afterwards.

    A tensor returned by a function replaces the output. Of a module with several outputs, such as attention, the first
    is meant.
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
    """Context manager to keep all of a model in evaluation mode, without dropout or activation checkpointing."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def last_logits(parts: Parts, input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, V) in 32 bits at one position per row.

    Args:
        input_ids: (B, S), padded on the right, invisible to a causal model.
        last: (B,), the positions.

    Raises:
        InputError: for NaN logits, which would compare as if they were the best.
    """
    logits = parts.model(input_ids=input_ids, use_cache=False, logits_to_keep=last[:, None]).logits
    return as_numbers(parts, logits[:, 0])


def as_numbers(parts: Parts, logits: torch.Tensor) -> torch.Tensor:
    """Return logits in 32 bits.

    Raises:
        InputError: for logits that are not numbers.
    """
    name = type(parts.model).__name__
    refuse_if(logits.isnan().any(), f"{name} has logits that are not numbers (NaN): its weights are damaged")
    return logits.float()


def recorded(
    parts: Parts, input_ids: torch.Tensor, last: torch.Tensor, modules: Sequence[nn.Module]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits (B, V) of `last_logits`, and the outputs (B, S, E) of modules in the same pass."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Hook:
        def record(output: torch.Tensor) -> None:
            outputs[index] = output.detach()

        return record

    with torch.no_grad(), hooked((module, keep(index)) for index, module in enumerate(modules)):
        logits = last_logits(parts, input_ids, last)
    return logits, [outputs[index] for index in range(len(modules))]


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


# ---- prompts ----
#
# Facts as prompts whose next token is the value, with the positions of the subject's tokens.


@dataclass(frozen=True)
class Fact:
    """A question about a subject, and how its answer begins.

    Args:
        subject: as both texts spell it, such as `fox`.
        question: such as `What colour is the fox?`.
        beginning: of the answer, up to the value, such as `The fox is`; it may be empty.
        value: the next word, such as `red`; empty where nothing is to be judged.
        others: other values that could stand there.
    """

    subject: str
    question: str
    beginning: str = ""
    value: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactPrompt:
    """A `Fact` in tokens.

    Args:
        fact: its source.
        ids: its tokens, up to the last position before the value.
        mentions: the positions of the subject's tokens, one group per mention.
        value: the first token of the value; -1 without one.
        others: the first tokens of the other values, each once; tokens equal to the value's are left out.
    """

    fact: Fact
    ids: tuple[int, ...] = field(repr=False)
    mentions: tuple[tuple[int, ...], ...]
    value: int
    others: tuple[int, ...]

    @property
    def subject_positions(self) -> list[int]:
        """The positions of all tokens of the subject."""
        return [index for mention in self.mentions for index in mention]


def encode_facts(
    tokenizer: "PreTrainedTokenizerBase", facts: Sequence[Fact], uses_chat_template: bool
) -> list[FactPrompt]:
    """Return facts as prompts: by the chat template, or question and beginning as plain text.

    Raises:
        InputError: for a tokenizer without the offsets of its tokens in the text, and for other values all beginning
            with the same token as the right one.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} does not tell the places of tokens in a text: a fast one does")
    return [_encoded(tokenizer, fact, uses_chat_template) for fact in facts]


def _encoded(tokenizer: "PreTrainedTokenizerBase", fact: Fact, uses_chat_template: bool) -> FactPrompt:
    text = _text(tokenizer, fact, uses_chat_template)
    ids, spans = _tokens(tokenizer, text, uses_chat_template)
    mentions = tuple(_tokens_in(spans, start, end) for start, end in _spans_of(text, fact.subject))
    gap = "" if not text or text[-1].isspace() or not fact.beginning else " "
    values = [each for each in (fact.value, *fact.others) if each] if fact.value else []
    firsts = dict.fromkeys(_next(tokenizer, text, gap + each, ids, uses_chat_template) for each in values)
    if fact.others and len(firsts) == 1:
        raise InputError(
            f"all values of {fact.question!r} begin with the same token, so they cannot be compared: "
            f"{', '.join(values)}"
        )
    value, *others = firsts or [-1]
    return FactPrompt(fact, tuple(ids), tuple(each for each in mentions if each), value, tuple(others))


def _text(tokenizer: "PreTrainedTokenizerBase", fact: Fact, uses_chat_template: bool) -> str:
    if not uses_chat_template:
        return f"{fact.question} {fact.beginning}".strip()
    messages = [{"role": "user", "content": fact.question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + fact.beginning


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", text: str, uses_chat_template: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return tokens and their positions in the text; a template has written the special ones itself."""
    encoded = tokenizer(text, add_special_tokens=not uses_chat_template, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if ids and ids[-1] == tokenizer.eos_token_id and not uses_chat_template:
        # Some tokenizers end every text; here the value follows.
        ids, spans = ids[:-1], spans[:-1]
    return ids, spans


def _next(
    tokenizer: "PreTrainedTokenizerBase", text: str, more: str, before: Sequence[int], uses_chat_template: bool
) -> int:
    """Return the next token of a continued text."""
    ids, _ = _tokens(tokenizer, text + more, uses_chat_template)
    if ids[: len(before)] == list(before):
        return ids[len(before)]
    # The end of the text and its continuation are one token: the nearest is the continuation by itself.
    return tokenizer(more, add_special_tokens=False)["input_ids"][0]


def _spans_of(text: str, subject: str) -> Iterator[tuple[int, int]]:
    """Yield where a text names a subject, not inside another word."""
    for result in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text) if subject else ():
        yield result.span()


def _tokens_in(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Return the tokens with a character of a part of the text; a space before it does not count."""
    return tuple(index for index, (first, last) in enumerate(spans) if first < end and last > start)


def batch_of(
    prompts: Sequence[FactPrompt], device: "torch.device | str" = "cpu", pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids (B, S), padded on the right, unseen by causal models, and the rows' last positions (B,)."""
    rows = [torch.tensor(prompt.ids) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return ids.to(device), torch.tensor([len(row) - 1 for row in rows], device=device)


def mask_of(positions: Sequence[Sequence[int]], length: int, device: "torch.device | str" = "cpu") -> torch.Tensor:
    """Return a mask (B, length), true at the rows' positions."""
    mask = torch.zeros(len(positions), length, dtype=torch.bool)
    for row, each in enumerate(positions):
        mask[row, list(each)] = True
    return mask.to(device)
