"""A causal model over a cache whose rows have different lengths.

Shapes: B rows, Q new tokens of each, C columns of the cache, V vocabulary size.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from hfllm.errors import InputError, refuse_if
from hfllm.generation.packed.model import Output, PackedModel, RaggedCache, packed_model
from hfllm.models.family.configuration_fields_hfllm import longrope_limits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput


# ---- ragged model ----


# Ways to run a model: the model itself, its compiled forward, or its packed form.
Forward = Callable[..., "ModelOutput | Output"]

# Limit on unneeded logits in the pass over a prompt: 256 MB in fp32.
MOST_LOGITS = 2**26
# Tokens by which counts must differ to be read apart, for less time than one more call takes.
LEAST_GAP = 8


class RaggedModel:
    """A causal language model with rows at different positions.

    Args:
        model: any causal language model of transformers with support for `position_ids` and four-dimensional masks.
        capacity: columns of its cache.
        forward: runs in place of the model: a `PackedModel`, or the result of `compiled_forward`.
        cache: the cache to use, by default a new one.
        static: `forward` is compiled for fixed shapes; the model itself reads prompts.
        with_states: also keep the input of the head.

    Attributes:
        states: the input of the head at the last returned logits, (B, Q, E); `None` without `with_states`.
    """

    states: torch.Tensor | None = None

    def __init__(
        self,
        model: "PreTrainedModel",
        capacity: int,
        forward: "Forward | None" = None,
        cache: RaggedCache | None = None,
        static: bool = False,
        with_states: bool = False,
    ):
        self.model, self.forward, self.static = model, forward or model, static
        self.packed = forward if isinstance(forward, PackedModel) else None
        # Native configs name windows and layers in their own ways, and the packed form runs by the family's.
        config = model.config.get_text_config(decoder=True) if self.packed is None else self.packed.config
        self.cache = cache or RaggedCache(config.num_hidden_layers, capacity)
        self.windows = attention_windows(config)
        # For a single token the model then takes no mask, since no layer has a sliding window.
        self.sees_all = self.packed is not None and set(self.windows.values()) == {None}
        self.is_eager = config._attn_implementation == "eager"
        takes = inspect.signature(type(model).forward).parameters
        self.keeps_logits = self.packed is not None or "logits_to_keep" in takes
        self.vocabulary, self.with_states = config.vocab_size, with_states

    def __call__(
        self,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        last: torch.Tensor,
        longest: int,
        logits: int = 0,
        level: bool = False,
    ) -> torch.Tensor:
        """Return the logits (B, Q, V) of `tokens` (B, Q), whose states are written to `columns` (B, Q).

        Args:
            last: (B,), the last necessary position of each row; drafts may reach beyond it, possibly to nonexistent
                positions of the model.
            longest: columns in use after this call.
            logits: return only logits of this many last tokens; 0 means all.
            level: whether there is one token per row, all in the same column.
        """
        width = self.cache.capacity if self.static else longest
        self.cache.set_cells(columns, width)
        keep = {"logits_to_keep": logits} if self.keeps_logits else {}
        with self._states_kept():
            output = self.forward(
                input_ids=tokens,
                attention_mask=None if level and self.sees_all else self._mask(columns, width),
                position_ids=columns.minimum(last.unsqueeze(1)),
                cache=self.cache,
                use_cache=True,
                **keep,
            )
        if self.with_states and self.packed is not None:
            self.states = output.states
        return output.logits

    @contextmanager
    def _states_kept(self) -> Iterator[None]:
        """Keep the input of a model's own head; a packed model returns it."""
        if not self.with_states or self.packed is not None:
            yield
            return

        def keep(module: torch.nn.Module, args: tuple) -> None:
            self.states = args[0]

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def prefill(
        self, tokens: torch.Tensor, lengths: torch.Tensor, last: torch.Tensor, sizes: Sequence[int]
    ) -> torch.Tensor:
        """Read prompts (B, S), padded on the right, into the cache; never compiled, since their lengths vary.

        Args:
            lengths: (B,), tokens per prompt.
            last: as in `__call__`.
            sizes: `lengths` as Python numbers.

        Returns:
            Logits (B, 1, V) after the prompts.
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return self._read(tokens, columns, lengths - 1, last, sizes, tokens.shape[1])

    def read_more(
        self, tokens: torch.Tensor, lengths: torch.Tensor, last: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Read the last `counts` tokens of prompts whose others the cache has already; else as `prefill`.

        Rows of like count, next to each other, are read together.
        """
        cache, logits, states = self.cache, [], []
        for begin, end in pairwise([*_starts(counts), len(counts)]):
            self.cache, part, own = cache.part(begin, end), slice(begin, end), counts[begin:end]
            first = lengths[part] - lengths.new_tensor(own)
            # Tokens after a prompt's end are written to columns that its next tokens take.
            columns = torch.arange(max(own), device=tokens.device) + first.unsqueeze(1)
            new = tokens[part].gather(1, columns.clamp(max=tokens.shape[1] - 1))
            longest = min(int(first.max()) + max(own), cache.capacity)
            logits.append(self._read(new, columns, lengths[part] - first - 1, last[part], own, longest))
            states.append(self.states)
        self.cache, self.states = cache, None if states[0] is None else torch.cat(states)
        return torch.cat(logits)

    def _read(
        self,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        at: torch.Tensor,
        last: torch.Tensor,
        counts: Sequence[int],
        longest: int,
    ) -> torch.Tensor:
        """Return the logits (B, 1, V) of the tokens `at` (B,) these indices, the last of the rows' `counts`."""
        forward, self.forward = self.forward, self.model if self.static else self.forward
        spread = max(counts) - min(counts)
        # The head runs on the columns where rows end. If these are too many, the last tokens are run again.
        together = len(counts) * spread * self.vocabulary <= MOST_LOGITS or not self.keeps_logits
        logits = self(tokens, columns, last, longest, logits=spread + 1 if together else 1)
        at = at.unsqueeze(1)
        if not together:
            logits = self(tokens.gather(1, at), columns.gather(1, at), last, longest)
        elif spread:
            index = (at - (tokens.shape[1] - logits.shape[1])).unsqueeze(-1)
            logits = logits.gather(1, index.expand(-1, 1, logits.shape[-1]))
            if self.states is not None:
                self.states = self.states.gather(1, index.expand(-1, 1, self.states.shape[-1]))
        self.forward = forward
        if self.states is not None:
            self.states = self.states[:, -1:]
        return logits[:, -1:]

    def _mask(self, columns: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask (B, 1, Q, width): columns up to the token's own, and within the window if there is one."""
        behind = columns[:, None, :, None] - torch.arange(width, device=columns.device)
        masks = {}
        for kind, window in self.windows.items():
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            if self.is_eager:
                dtype = self.model.dtype
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _starts(counts: Sequence[int]) -> list[int]:
    """Return where groups of rows begin that are read together: their counts fall or rise by a half at most."""
    starts = [0]
    for row, count in enumerate(counts):
        few, many = sorted((count, counts[starts[-1]]))
        if 2 * few < many and many - few >= LEAST_GAP:
            starts.append(row)
    return starts


def ragged_model(
    model: "PreTrainedModel",
    capacity: int,
    compile: bool = False,
    packed: bool = False,
    with_states: bool = False,
) -> RaggedModel:
    """Return a model over a cache of `capacity` columns.

    Args:
        compile: run it through `torch.compile`.
        packed: run it as a `PackedModel`.
        with_states: keep the input of its head too.

    Raises:
        InputError: for `packed` where it is not supported, with the reason.
    """
    if packed:
        return RaggedModel(model, capacity, packed_model(model), with_states=with_states)
    check_model(model)
    if compile:
        return RaggedModel(model, capacity, compiled_forward(model), static=True, with_states=with_states)
    return RaggedModel(model, capacity, with_states=with_states)


def attention_windows(config: "PreTrainedConfig") -> dict[str, int | None]:
    """Return the windows of all kinds of layers in a model, `None` for kinds without."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not kinds:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def check_model(model: "PreTrainedModel", name: str = "the model") -> None:
    """Refuse a model with any other state than keys and values by position."""
    config = model.config
    kind = f"{name} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{kind} is an encoder-decoder: speculative decoding here takes causal language models; "
            "transformers' generate(assistant_model=...) supports it"
        )
    if hasattr(model, "get_base_model"):
        raise InputError(f"{kind} is wrapped by PEFT: pass model.get_base_model(), whose layers keep the adapter")
    takes = {"position_ids", "cache"} <= set(inspect.signature(type(model).forward).parameters)
    others = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    others -= {"full_attention", "sliding_attention"}
    refuse_if(takes and others, f"{kind} has layers of type {', '.join(sorted(others))}: use its own generate()")
    if getattr(model, "_is_stateful", False) or not takes:
        raise InputError(
            f"{kind} does not take positions and a key-value cache, so drafts could not be undone: "
            "use its own generate()"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise InputError(
            f"{kind} runs attn_implementation={config._attn_implementation!r}, which takes no custom mask: "
            "load it with attn_implementation='sdpa'"
        )


def padded_right(input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the rows' tokens without padding, from column 0 on, in a (B, `columns`) tensor of zeros."""
    mask = attention_mask.bool()
    tokens = input_ids.new_zeros(input_ids.shape[0], columns)
    at = mask.long().cumsum(1) - 1
    rows = torch.arange(input_ids.shape[0], device=input_ids.device).unsqueeze(1).expand_as(at)
    tokens[rows[mask], at[mask]] = input_ids[mask]
    return tokens


def check_context(model: "PreTrainedModel", length: int, name: str = "the model") -> None:
    """Refuse sequences longer than a table of learned positions, or than `longrope` rotates by one set of factors."""
    config = model.config.get_text_config(decoder=True)
    context, rotary = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if context is not None and rotary is None and length > context:
        raise InputError(
            f"prompt and max_new_tokens make {length} tokens, but {name}, a {config.model_type}, has "
            f"positions for {context}: shorten the prompt or max_new_tokens"
        )
    limits = longrope_limits(config)
    if limits and length > min(limits):
        raise InputError(
            f"prompt and max_new_tokens make {length} tokens, but {name}, a {config.model_type}, has other rotary "
            f"factors beyond {min(limits)} (rope_type='longrope'), also for what a cache holds: shorten the prompt or "
            "max_new_tokens, or use its own generate()"
        )


def early_exit(model: "PreTrainedModel", layers: int) -> "PreTrainedModel":
    """Return the same model with only its first layers, with its own final norm and head; no weight is copied.

    Raises:
        InputError: when the model does not have more layers than this, or they cannot be found.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not 1 <= layers < total:
        raise InputError(f"early exit after {layers} layer(s): expected 1 to {total - 1}, the model has {total}")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == total:
            return _with_module(model, name.split("."), torch.nn.ModuleList(list(module)[:layers]))
    raise InputError(f"early exit: {type(model).__name__} has no list of its {total} layers; use another draft")


def _with_module(module: torch.nn.Module, path: Sequence[str], replacement: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of `module` with all its parts shared, except `replacement` at `path`."""
    if not path:
        return replacement
    copy = object.__new__(type(module))
    # A trainer may have set its own `forward` on the original, to run the original's layers.
    copy.__dict__.update({name: value for name, value in vars(module).items() if name != "forward"})
    copy._modules = dict(module._modules)
    copy._modules[path[0]] = _with_module(module._modules[path[0]], path[1:], replacement)
    return copy


def compiled_forward(model: "PreTrainedModel") -> "Forward":
    """Return the model's forward through `torch.compile`, made once per model.

    The first call for a number of tokens takes seconds to minutes; a C++ compiler is needed on a CPU.
    """
    owner, compiled = vars(model).get("_hfllm_compiled", (None, None))
    # A deep copy of a model copies this too, and must not run the weights of the original.
    if owner != id(model):
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
        vars(model)["_hfllm_compiled"] = (id(model), compiled)
    return compiled
