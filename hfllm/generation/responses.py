"""Sample a model's responses to prompts, and let several samples of one prompt vote."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from hfllm.data.formats import as_completion, split_beginning
from hfllm.data.thoughts import answer_of, final_answer, plain_answer
from hfllm.data.tokenizer import end_tokens, tokenize_prompts
from hfllm.errors import InputError, check_positive
from hfllm.outputs.progress import progress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


# ---- sampling ----


# Fields of a generation config without effect on tokens, or set by every call below itself.
NO_OPTIONS = frozenset(("transformers_version", "bos_token_id", "decoder_start_token_id", "max_length"))
# Batches whose prompts are decoded together: without drafts the model runs on full batches while some wait.
BATCHES = 8
# Warnings given per model, to give them only once.
_WARNED: "WeakKeyDictionary[PreTrainedModel, set[str]]" = WeakKeyDictionary()


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
    fast: bool = True,
    tools: Sequence[Any] | None = None,
    temperature: float = 1.0,
) -> list[list[str]]:
    """Sample responses of `model` to every prompt, by default at temperature 1, or decode greedily.

    They end at the tokenizer's end token, and at the end tokens of the model's generation config.

    Args:
        prompts: text, or lists of messages for the tokenizer's chat template.
        num_return_sequences: responses per prompt.
        seed: seed of the sampling; the caller's random state is not changed.
        only_ended: leave out responses truncated by `max_new_tokens`.
        fast: on a CPU decode by `fast_generate`, prompts of like length together: other samples of the same
            distribution. Where this is impossible, as for a family that does not convert, adapters, quantized weights,
            stop strings or a penalty in its generation config, `generate` decodes, and a warning says why, once per
            model.
        tools: the tools per prompt, shown with its messages by the chat template.
        temperature: of the sampling; above 0.

    Returns:
        One list of `num_return_sequences` texts per prompt, or fewer with `only_ended`, without special tokens.
    """
    responses = sample_with_ends(
        *(model, tokenizer, prompts, max_new_tokens, do_sample, num_return_sequences, batch_size, seed, fast),
        tools=tools,
        temperature=temperature,
    )
    return [[text for text, has_ended in samples if has_ended or not only_ended] for samples in responses]


def sample_with_ends(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    max_new_tokens: int,
    do_sample: bool = True,
    num_return_sequences: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    fast: bool = True,
    stop_strings: Sequence[str] = (),
    tools: Sequence[Any] | None = None,
    temperature: float = 1.0,
) -> list[list[Response]]:
    """Sample responses as in `sample_responses`, with whether they have ended.

    Args:
        stop_strings: texts also ending a response; it is returned without them and the text after them.

    Returns:
        One list of `num_return_sequences` responses per prompt.
    """
    import torch

    from hfllm.generation.scoring import evaluating
    from hfllm.models.devices import forked_random

    ends = sorted(end_tokens(tokenizer, model))
    # A model's own generation config may ask for beams, neither sampled nor greedy.
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
    with evaluating(model), forked_random(model.device), torch.inference_mode():
        longest = max(map(len, tokens_of), default=0)
        decode = _decoder(model, settings, longest, batch_size) if fast else None
        size = batch_size if decode is None else BATCHES * batch_size
        decode = decode or partial(model.generate, **settings)
        if fast:
            order.sort(key=lambda index: len(tokens_of[index]))
        torch.manual_seed(seed)
        # One batch is no progress.
        starts = range(0, len(prompts), size)
        for start in progress(starts, unit="batch") if len(starts) > 1 else starts:
            indices = order[start : start + size]
            batch = tokenizer.pad(
                {"input_ids": [tokens_of[index] for index in indices]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            tokens = decode(**batch)[:, batch["input_ids"].shape[1] :]
            has_ended = torch.isin(tokens, tokens.new_tensor(ends)).any(1).tolist()
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            completions = [_cut(text, ended, stop_strings) for text, ended in zip(texts, has_ended, strict=True)]
            for row, index in enumerate(indices):
                responses[index] = completions[row * num_return_sequences : (row + 1) * num_return_sequences]
    return responses


def _decoder(
    model: "PreTrainedModel", settings: dict[str, Any], longest: int, batch_size: int
) -> "Callable[..., torch.Tensor] | None":
    """Return `fast_generate` within `generate`, of `input_ids` and `attention_mask`.

    `None` where that is impossible; a warning says why.

    Args:
        longest: tokens of the longest prompt.
        batch_size: prompts decoded at a time; others may wait.
    """
    from hfllm.generation.speculative.speculative import fast_generate

    with without_cpu_autocast(model):
        reason = _declined_reason(model, settings, longest)
    if reason is not None:
        warn_of_generate(model, reason)
        return None
    rows = batch_size * settings["num_return_sequences"]

    def decode(**batch: "torch.Tensor") -> "torch.Tensor":
        with without_cpu_autocast(model):
            return model.generate(**batch, **settings, custom_generate=fast_generate, most_rows=rows)

    return decode


def without_cpu_autocast(model: "PreTrainedModel") -> "AbstractContextManager":
    """Return a context without autocast for a model on a CPU: packed weights know none."""
    import torch

    return torch.autocast("cpu", enabled=False) if model.device.type == "cpu" else nullcontext()


def _cut(text: str, has_ended: bool, stop_strings: Sequence[str]) -> Response:
    """Return a response up to its first stop text."""
    result = [index for index in map(text.find, stop_strings) if index >= 0]
    return Response(text[: min(result)], True) if result else Response(text, has_ended)


def warn_of_generate(model: "PreTrainedModel", reason: str) -> None:
    """Warn once per model and reason that `generate` decodes it, which is slower.

    Only on a CPU: elsewhere `generate` decodes all models.
    """
    if model.device.type == "cpu" and reason not in _WARNED.setdefault(model, set()):
        _WARNED[model].add(reason)
        name = str(getattr(model, "name_or_path", ""))
        name = type(model).__name__ if name in ("", "None") else name
        warnings.warn(f"{name} is decoded by generate, not by the faster fast_generate: {reason}", stacklevel=4)


def fast_option(
    model: "PreTrainedModel", length: int, settings: Mapping[str, Any] | None = None
) -> dict[str, "Callable[..., torch.Tensor]"]:
    """Return the argument by which `generate` decodes texts of up to `length` tokens fast; none where it cannot.

    A line says why, once.

    Args:
        settings: the other arguments; with them the model's own generation config is looked at too.
    """
    from hfllm.generation.speculative.speculative import fast_generate

    reason = undecodable_reason(model, length)
    if settings is not None and reason is None:
        reason = _declined_reason(model, {**settings, "max_new_tokens": 0}, length)
    if reason is not None:
        warn_of_generate(model, reason)
        return {}
    return {"custom_generate": fast_generate}


def undecodable_reason(model: "PreTrainedModel", length: int) -> str | None:
    """Return why `fast_generate` cannot decode texts of up to `length` tokens, or `None` if it can."""
    from hfllm.generation.packed.model import unsupported_reason
    from hfllm.generation.packed.ragged_model import check_context

    if reason := unsupported_reason(model):
        return reason
    try:
        check_context(model, length)
    except InputError as error:
        return str(error)
    return None


def _declined_reason(model: "PreTrainedModel", settings: dict[str, Any], longest: int) -> str | None:
    """Return why prompts of up to `longest` tokens cannot be decoded fast by these arguments, or `None`."""
    from hfllm.models.loading.saved import SAMPLING

    if "stop_strings" in settings:
        return "stop strings end the responses"
    provided = {*settings, *(() if settings["do_sample"] else SAMPLING)}
    if options := _own_options(model.generation_config, provided):
        return (
            f"its generation_config.json sets {', '.join(f'{name}={value!r:.60}' for name, value in options.items())}"
        )
    return undecodable_reason(model, longest + settings["max_new_tokens"])


def _own_options(config: "GenerationConfig", excluded: Collection[str]) -> dict[str, Any]:
    """Return a model's own generation options that could change the samples, besides the options of a call.

    They are transformers' own fields with a value neither unset, nor off, nor at transformers' default: compared with
    the default, since a saved model's config holds more fields with every version.
    """
    from transformers import GenerationConfig

    defaults, fields = GenerationConfig._get_default_generation_params(), vars(GenerationConfig())
    return {
        name: value
        for name, value in vars(config).items()
        if name in fields
        and not name.startswith("_")
        and name not in NO_OPTIONS
        and name not in excluded
        and value is not None
        and value is not False
        and value != defaults.get(name)
    }


# ---- voting ----
#
# Several answers to a prompt, and the one to keep: the majority's, or the best by a reward.


@dataclass(frozen=True)
class Chosen:
    """The kept response of several to one prompt.

    Args:
        response: its text, with its thoughts.
        answer: its final answer.
        share: of the responses with this answer, from 0 to 1.
        score: its reward, `None` where a majority decided.
    """

    response: str
    answer: str
    share: float
    score: float | None = None


def majority(answers: Sequence[str]) -> tuple[str, float]:
    """Return the most frequent answer and its share; of equally frequent ones the first, empty ones last.

    Args:
        answers: at least one; an empty one is a response without an answer.
    """
    nonempty = [answer for answer in answers if answer]
    if not nonempty:
        return "", 0.0
    best = max(nonempty, key=nonempty.count)
    return best, nonempty.count(best) / len(answers)


def majority_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    n: int,
    max_new_tokens: int,
    extract: Callable[[str], str] = final_answer,
    **sampling: Any,
) -> list[Chosen]:
    """Return for each prompt the most frequent answer of `n` sampled responses, regardless of their thoughts.

    Self-consistency (Wang et al. 2023, arXiv:2203.11171): thoughts differ, and right ones agree in the answer.

    Args:
        extract: returns the final answer of a response without its thoughts.
        sampling: of `sample_responses`, such as `temperature`, `seed` or `tools`.

    Raises:
        InputError: for fewer than one response.
    """
    chosen = []
    for texts in _sampled(model, tokenizer, prompts, n, max_new_tokens, sampling):
        answers = [plain_answer(extract(answer_of(text))) for text in texts]
        best, share = majority(answers)
        chosen.append(Chosen(texts[answers.index(best)], best, share))
    return chosen


def best_by_reward(
    prompts: Sequence[str | list], responses: Sequence[Sequence[str | list]], reward: Callable[..., Sequence[float]]
) -> list[tuple[int, float]]:
    """Return the index of each prompt's response with the highest reward, and its score; of equal ones the first.

    Args:
        responses: at least one per prompt, texts or messages; the reward gets texts in the form of their prompt.
        reward: see `best_answers`; it is called once per prompt.

    Raises:
        InputError: for a NaN score, or another number of scores.
    """
    best = []
    for prompt, texts in zip(prompts, responses, strict=True):
        completions = [as_completion(prompt, text) if isinstance(text, str) else text for text in texts]
        base_prompt, _ = split_beginning(prompt)
        scores = list(reward(prompts=[base_prompt] * len(texts), completions=completions))
        if len(scores) != len(texts):
            raise InputError(f"the reward gave {len(scores)} scores for {len(texts)} responses; expected one for each")
        if any(math.isnan(score) for score in scores):
            raise InputError(f"the reward of a response to prompt {len(best) + 1} is NaN; expected a number")
        index = max(range(len(texts)), key=scores.__getitem__)
        best.append((index, float(scores[index])))
    return best


def best_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    n: int,
    max_new_tokens: int,
    reward: Callable[..., Sequence[float]],
    extract: Callable[[str], str] = final_answer,
    **sampling: Any,
) -> list[Chosen]:
    """Return for each prompt the one of `n` sampled responses with the highest reward (best of n).

    Args:
        reward: `(prompts, completions) -> numbers`, such as a `RewardModel`.
        extract, sampling: see `majority_answers`.

    Raises:
        InputError: for fewer than one response, or input refused by `best_by_reward`.
    """
    sampled = _sampled(model, tokenizer, prompts, n, max_new_tokens, sampling)
    chosen = []
    for texts, (index, score) in zip(sampled, best_by_reward(prompts, sampled, reward), strict=True):
        answers = [plain_answer(extract(answer_of(text))) for text in texts]
        chosen.append(Chosen(texts[index], answers[index], answers.count(answers[index]) / n, score))
    return chosen


def _sampled(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    n: int,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> list[list[str]]:
    check_positive(n=n)
    return sample_responses(model, tokenizer, prompts, max_new_tokens, num_return_sequences=n, **sampling)
