"""Sample a model's responses to prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.data.tokenizer import end_tokens, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
) -> list[list[str]]:
    """Sample responses of `model` to each prompt at temperature 1, or decode greedily.

    They end at the tokenizer's end token, and at those of the model's generation config.

    Args:
        prompts: text, or lists of messages for the tokenizer's chat template.
        num_return_sequences: responses per prompt.
        seed: seed of the sampling; the caller's random state is not changed.
        only_ended: leave out the responses that `max_new_tokens` cut off.

    Returns:
        One list of `num_return_sequences` texts per prompt, or fewer with `only_ended`, without special tokens.
    """
    import torch

    was_training = model.training
    model.eval()
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    ends = sorted(end_tokens(tokenizer, model))
    texts: list[list[str]] = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            ids = tokenize_prompts(prompts[start : start + batch_size], tokenizer)
            batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
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
            texts += [
                [text for text, ended in responses[index : index + num_return_sequences] if ended or not only_ended]
                for index in range(0, len(responses), num_return_sequences)
            ]
    model.train(was_training)
    return texts
