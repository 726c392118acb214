"""Text that is written while a model generates it: words, the log-probabilities of their tokens, and stop strings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from hfllm.generation.scoring import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StreamedToken:
    """A generated token.

    Args:
        id: in the vocabulary.
        logprob: of the model, in nats, at temperature 1 and before any cut of the distribution.
        top: ids and log-probabilities of the likeliest tokens there, likeliest first.
        after: the generated token before it, `None` for the first.
    """

    id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()
    after: int | None = None


# Called with the next words, and their tokens where log-probabilities are kept.
Write = Callable[[str, Sequence[StreamedToken]], None]


@dataclass(frozen=True)
class Streamed:
    """A generated text.

    Args:
        ids: its tokens.
        text: without special tokens, up to the first stop string.
        tokens: with log-probabilities, where they were kept.
        is_whole: whether the model or a stop string ended it, and not the limit of its length.
    """

    ids: Sequence[int]
    text: str
    tokens: Sequence[StreamedToken] = ()
    is_whole: bool = True


@dataclass(frozen=True)
class StreamSettings:
    """How a text is generated.

    Args:
        sampling: arguments of `generate`, such as `temperature`.
        stop: strings before which the text ends.
        num_top: of the likeliest tokens kept with each token; `None` keeps no log-probabilities.
        is_cancelled: asked before each token; the text ends as far as it came.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()
    num_top: int | None = None
    is_cancelled: Callable[[], bool] = bool


class _Words(TextStreamer):
    """Streamer that hands on whole words with their tokens, up to the first stop string."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", write: Write, stop: Sequence[str], recorder: "_Recorder"):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.stop, self.recorder = write, [each for each in stop if each], recorder
        self.text, self.ids, self.tokens, self.is_stopped = "", [], [], False
        self._held, self._written = "", 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then each token."""
        is_prompt = self.next_tokens_are_prompt
        if not is_prompt:
            before = self.ids[-1] if self.ids else None
            self.ids += value.flatten().tolist()
            self.tokens += self.recorder.take(self.ids[-1], before)
        super().put(value)
        if self.stop and not is_prompt and not self.is_stopped:
            # A stop string may end within a word, which would come only when it is whole.
            pending = self.tokenizer.decode(self.token_cache, skip_special_tokens=True)[self.print_len :]
            if any(each in self._held + pending for each in self.stop):
                self.on_finalized_text(pending)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on the words that cannot begin a stop string."""
        if self.is_stopped:
            return
        self._held += text
        ends = [index for each in self.stop if (index := self._held.find(each)) >= 0]
        self.is_stopped = bool(ends)
        index = min(ends) if ends else len(self._held) - (0 if stream_end else self._begun())
        words, self._held = self._held[:index], self._held[index:]
        if ends:
            self._cut(self.text + words)
        if words:
            self.text += words
            self.write(words, self.tokens[self._written :])
            self._written = len(self.tokens)

    def _cut(self, text: str) -> None:
        """Leave out the tokens after those of a text that a stop string ended."""
        low, high = 0, len(self.ids)
        while low < high:
            middle = (low + high) // 2
            is_enough = len(self.tokenizer.decode(self.ids[:middle], skip_special_tokens=True)) >= len(text)
            low, high = (low, middle) if is_enough else (middle + 1, high)
        del self.ids[low:], self.tokens[low:]

    def _begun(self) -> int:
        """Return how many of the last letters may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(each.startswith(self._held[-n:]) for each in self.stop)), 0)


class _Recorder(LogitsProcessor):
    """Keeps the log-probabilities of the next token; transformers calls it before temperature and top-p."""

    def __init__(self, num_top: int | None):
        self.num_top, self._last = num_top, None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.num_top is not None:
            self._last = scores[0].float().log_softmax(-1)
        return scores

    def take(self, token: int, before: int | None) -> list[StreamedToken]:
        """Return the chosen token with its log-probability; nothing where none are kept."""
        if self._last is None:
            return []
        top = self._last.topk(min(self.num_top, len(self._last)))
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return [StreamedToken(token, self._last[token].item(), likeliest, before)]


class _Stopped(StoppingCriteria):
    def __init__(self, is_stopped: Callable[[], bool]):
        self.is_stopped = is_stopped

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **settings: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_stopped(), device=input_ids.device)


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    settings: StreamSettings,
    write: Write,
    **inputs: torch.Tensor,
) -> Streamed:
    """Generate one text after a prompt, and hand on its words meanwhile.

    Ctrl-C ends the text, which is returned as far as it came.

    Args:
        ids: of the prompt.
        inputs: of its images.
    """
    begin = torch.tensor([list(ids)], device=model.device)
    recorder = _Recorder(settings.num_top)
    words = _Words(tokenizer, write, settings.stop, recorder)
    options = {
        "attention_mask": torch.ones_like(begin),
        "streamer": words,
        "logits_processor": LogitsProcessorList([recorder]),
        "stopping_criteria": StoppingCriteriaList([_Stopped(lambda: words.is_stopped or settings.is_cancelled())]),
        **settings.sampling,
    }
    with evaluating(model), torch.inference_mode():
        try:
            model.generate(begin, **options, **inputs)
        except KeyboardInterrupt:
            # What waits for the end of a word.
            words.end()
    ends = options.get("eos_token_id") or ()
    is_whole = words.is_stopped or bool(words.ids and words.ids[-1] in ends)
    return Streamed(words.ids, words.text, words.tokens, is_whole)
