"""Sample a model's responses to prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.tokenizer import end_tokens, tokenize_prompts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
) -> list[list[str]]:
    """Sample responses of `model` to each prompt at temperature 1, or decode greedily.

    They end at the tokenizer's end token, and at those of the model's generation config.

    Args:
        prompts: text, or lists of messages for the tokenizer's chat template.
        num_return_sequences: responses per prompt.
        seed: seed of the sampling; the caller's random state is not changed.
        only_ended: leave out the responses that `max_new_tokens` cut off.
        fast: decode by `fast_generate` where the model is of the family, prompts of like length together. These are
            other samples of the same distribution.
        tools: for each prompt those that the chat template shows with its messages.

    Returns:
        One list of `num_return_sequences` texts per prompt, or fewer with `only_ended`, without special tokens.
    """
    import torch

    from hfllm.generation.fast import fast_generate
    from hfllm.generation.packed.model import unsupported_reason
    from hfllm.models.devices import forked_random

    was_training = model.training
    model.eval()
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    ends = sorted(end_tokens(tokenizer, model))
    texts: list[list[str]] = [[] for _ in prompts]
    tokens_of = tokenize_prompts(prompts, tokenizer, tools) if prompts else []
    order = list(range(len(prompts)))
    if fast and unsupported_reason(model) is None and not _bends_sampling(model.generation_config):
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
            responses = [*zip(tokenizer.batch_decode(tokens, skip_special_tokens=True), has_ended, strict=True)]
            for row, place in enumerate(places):
                said = responses[row * num_return_sequences : (row + 1) * num_return_sequences]
                texts[place] = [text for text, ended in said if ended or not only_ended]
    model.train(was_training)
    return texts


def _bends_sampling(config: "GenerationConfig") -> bool:
    """Whether a model's own generation options go beyond what a call overrides, such as by a penalty on repetition."""
    overridden = {"do_sample", "temperature", "top_k", "top_p", "use_cache", "max_length", "max_new_tokens"}
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    return bool(config.to_diff_dict().keys() - overridden - tokens)
