"""Sample a model's responses to prompts."""

import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from hfllm.data.tokenizer import end_tokens, tokenize_prompts
from hfllm.errors import InputError
from hfllm.models.loading.saved import SAMPLING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Fields of a generation config that choose no token, or that every call below sets itself.
NO_OPTIONS = frozenset(("transformers_version", "bos_token_id", "decoder_start_token_id", "max_length"))
# What was said of each model, so that it is said once.
_SAID: "WeakKeyDictionary[PreTrainedModel, set[str]]" = WeakKeyDictionary()


class Response(NamedTuple):
    """A text, without special tokens, and whether it has ended by itself, or was cut off."""

    text: str
    has_ended: bool


def sample_responses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    max_new_tokens: int,
    do_sample: bool = True,
    num_return_sequences: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    only_ended: bool = False,
    fast: bool = False,
    tools: Sequence[Any] | None = None,
    temperature: float = 1.0,
) -> list[list[str]]:
    """Sample responses of `model` to each prompt, by default at temperature 1, or decode greedily.

    They end at the tokenizer's end token, and at those of the model's generation config.

    Args:
        prompts: text, or lists of messages for the tokenizer's chat template.
        num_return_sequences: responses per prompt.
        seed: seed of the sampling; the caller's random state is not changed.
        only_ended: leave out the responses that `max_new_tokens` cut off.
        fast: decode by `fast_generate`, prompts of like length together: other samples of the same distribution.
            Where that cannot be, as for a model of another family, adapters, quantized weights, stop strings or a
            penalty in its generation config, `generate` decodes, and on a CPU a warning says why, once per model.
        tools: for each prompt those that the chat template shows with its messages.
        temperature: of the sampling; above 0.

    Returns:
        One list of `num_return_sequences` texts per prompt, or fewer with `only_ended`, without special tokens.
    """
    responses = sample_with_ends(
        *(model, tokenizer, prompts, max_new_tokens, do_sample, num_return_sequences, batch_size, seed, fast),
        tools=tools,
        temperature=temperature,
    )
    return [[text for text, has_ended in said if has_ended or not only_ended] for said in responses]


def sample_with_ends(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    max_new_tokens: int,
    do_sample: bool = True,
    num_return_sequences: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    fast: bool = False,
    stop_strings: Sequence[str] = (),
    tools: Sequence[Any] | None = None,
    temperature: float = 1.0,
) -> list[list[Response]]:
    """Sample responses as `sample_responses` does, and say which have ended.

    Args:
        stop_strings: texts that end a response too; it is returned without them and without what follows.

    Returns:
        One list of `num_return_sequences` responses per prompt.
    """
    import torch

    from hfllm.generation.fast import fast_generate
    from hfllm.models.devices import forked_random

    was_training = model.training
    model.eval()
    ends = sorted(end_tokens(tokenizer, model))
    # A model's own generation config may ask for beams, of which none is what was sampled, or greedy.
    settings: dict[str, Any] = {"do_sample": do_sample, "num_beams": 1, "use_cache": True}
    settings |= {"max_new_tokens": max_new_tokens, "num_return_sequences": num_return_sequences}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    if do_sample:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if stop_strings:
        settings |= {"stop_strings": list(stop_strings), "tokenizer": tokenizer}
    responses: list[list[Response]] = [[] for _ in prompts]
    tokens_of = tokenize_prompts(prompts, tokenizer, tools) if prompts else []
    order = list(range(len(prompts)))
    if fast and _can_be_fast(model, settings, max(map(len, tokens_of), default=0)):
        settings["custom_generate"] = fast_generate
        order.sort(key=lambda place: len(tokens_of[place]))
    with forked_random(model.device), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            places = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [tokens_of[place] for place in places]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(**batch, **settings)
            tokens = output[:, batch["input_ids"].shape[1] :]
            has_ended = torch.isin(tokens, tokens.new_tensor(ends)).any(1).tolist()
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            said = [_cut(text, ended, stop_strings) for text, ended in zip(texts, has_ended, strict=True)]
            for row, place in enumerate(places):
                responses[place] = said[row * num_return_sequences : (row + 1) * num_return_sequences]
    model.train(was_training)
    return responses


def _cut(text: str, has_ended: bool, stop_strings: Sequence[str]) -> Response:
    """Return a response up to the first of the texts that end it."""
    found = [place for place in map(text.find, stop_strings) if place >= 0]
    return Response(text[: min(found)], True) if found else Response(text, has_ended)


def _can_be_fast(model: "PreTrainedModel", settings: dict[str, Any], longest: int) -> bool:
    """Return whether `fast_generate` can decode; where it could on this machine, a warning says why it does not."""
    reason = _declined_reason(model, settings, longest)
    if reason is None:
        return True
    # Elsewhere no model is decoded over packed weights, and nobody can change that.
    if model.device.type == "cpu" and reason not in _SAID.setdefault(model, set()):
        _SAID[model].add(reason)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        warnings.warn(f"{name} is decoded by generate, not by the faster fast_generate: {reason}", stacklevel=4)
    return False


def _declined_reason(model: "PreTrainedModel", settings: dict[str, Any], longest: int) -> str | None:
    """Return why `fast_generate` cannot decode prompts of up to `longest` tokens by these arguments, or `None`."""
    from hfllm.generation.packed.model import unsupported_reason
    from hfllm.generation.packed.ragged_model import check_context

    if reason := unsupported_reason(model):
        return reason
    if "stop_strings" in settings:
        return "stop strings end the responses"
    given = {*settings, *(() if settings["do_sample"] else SAMPLING)}
    if options := _own_options(model.generation_config, given):
        return (
            f"its generation_config.json sets {', '.join(f'{name}={value!r:.60}' for name, value in options.items())}"
        )
    try:
        check_context(model, longest + settings["max_new_tokens"])
    except InputError as error:
        return str(error)
    return None


def _own_options(config: "GenerationConfig", given: Collection[str]) -> dict[str, Any]:
    """Return a model's own options of generation that could change what is sampled, besides those that a call gives.

    They are those of transformers' own fields that are neither unset, nor off, nor at transformers' default: compared
    with that, since a saved model's config holds more fields with each version.
    """
    from transformers import GenerationConfig

    defaults, fields = GenerationConfig._get_default_generation_params(), vars(GenerationConfig())
    return {
        name: value
        for name, value in vars(config).items()
        if name in fields
        and not name.startswith("_")
        and name not in NO_OPTIONS
        and name not in given
        and value is not None
        and value is not False
        and value != defaults.get(name)
    }
