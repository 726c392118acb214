"""Sample a model's responses to prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hfllm.data.tokenizer import end_tokens, tokenize_prompts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
        fast: decode by `fast_generate` where the model is of the family, prompts of like length together. These are
            other samples of the same distribution.
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
    from hfllm.generation.packed.model import unsupported_reason
    from hfllm.models.devices import forked_random

    was_training = model.training
    model.eval()
    # A model's own generation config may ask for beams, of which none is what was sampled, or greedy.
    settings: dict[str, Any] = {"do_sample": do_sample, "num_beams": 1}
    if do_sample:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if stop_strings:
        settings |= {"stop_strings": list(stop_strings), "tokenizer": tokenizer}
    ends = sorted(end_tokens(tokenizer, model))
    responses: list[list[Response]] = [[] for _ in prompts]
    tokens_of = tokenize_prompts(prompts, tokenizer, tools) if prompts else []
    order = list(range(len(prompts)))
    if (
        fast
        and not stop_strings
        and unsupported_reason(model) is None
        and not _bends_sampling(model.generation_config)
    ):
        settings["custom_generate"] = fast_generate
        order.sort(key=lambda place: len(tokens_of[place]))
    with forked_random(model.device), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            places = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [tokens_of[place] for place in places]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                **batch,
                **settings,
                max_new_tokens=max_new_tokens,
                num_return_sequences=num_return_sequences,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                use_cache=True,
            )
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


def _bends_sampling(config: "GenerationConfig") -> bool:
    """Whether a model's own generation options go beyond what a call overrides, such as by a penalty on repetition."""
    overridden = {"do_sample", "temperature", "top_k", "top_p", "use_cache", "max_length", "max_new_tokens"}
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    return bool(config.to_diff_dict().keys() - overridden - tokens)
