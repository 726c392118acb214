"""A model that is judged: how it is asked, with its chat template or without, and how likely it finds answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfllm.data.picture_batches import words_of_places
from hfllm.data.rows import Message, unspelled
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError
from hfllm.evaluation.suites.likelihood import NOT_NUMBERS, Likelihood, Pair, Scorer, encode_pair
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.passes import pass_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Prompt = str | list[Message]


@dataclass
class Subject:
    """A model that is judged.

    Args:
        label: its name in tables.
        model: any causal class of transformers, also with an adapter or quantized.
        tokenizer: with a padding token.
        uses_chat_template: whether questions are messages to it, or plain text.
        batch_size: prompts, or choices of a question, in one pass.
        processor: of a model that sees.
    """

    label: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    uses_chat_template: bool = False
    batch_size: int = 8
    processor: "ProcessorMixin | None" = None
    scorer: Scorer = field(init=False, repr=False)
    _has_numbers: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        self.model.eval()
        self.scorer = Scorer(self.model, self.batch_size)

    def as_asked(self, prompt: Prompt) -> Prompt:
        """Return a prompt as the model is asked it: messages with the chat template, and else text.

        A text becomes the user's message; of messages without a template the contents are kept, a paragraph each. Of a
        model that sees, words that spell the token of a picture's place get a space in it.
        """
        if self.uses_chat_template:
            said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return [{**message, "content": self._plain(message["content"])} for message in said]
        return self._plain(prompt if isinstance(prompt, str) else "\n\n".join(each["content"] for each in prompt))

    def _plain(self, text: str) -> str:
        return unspelled(words_of_places(self.processor), text)

    def text_of(self, prompt: Prompt) -> str:
        """Return the text that the model reads, with its chat template up to the assistant's turn.

        Messages that end with the assistant's are to be continued: the turn stays open after them.
        """
        prompt = self.as_asked(prompt)
        if isinstance(prompt, str):
            return prompt
        is_prefilled = prompt[-1]["role"] == "assistant"
        options = {"continue_final_message": True} if is_prefilled else {"add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(prompt, tokenize=False, **options)

    # ---- answers ----

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str | None]:
        """Return the greedy answer to each prompt, without special tokens; see `iter_answers`."""
        return list(self.iter_answers(prompts, max_new_tokens))

    def iter_answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[str | None]:
        """Yield the greedy answer to each prompt, a batch at a time.

        `None` stands for a prompt that, with the answer, does not fit the model's context.

        Raises:
            InputError: for logits that are not numbers after the first prompt: greedy decoding would not notice.
        """
        for start in range(0, len(prompts), self.batch_size):
            yield from self._answer_batch(prompts[start : start + self.batch_size], max_new_tokens)

    def _answer_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str | None]:
        from hfllm.generation.responses import sample_responses

        asked = [self._to_generate(prompt) for prompt in prompts]
        longest = max_length_of(self.model.config)
        lengths = [len(tokenize_prompts([each], self.tokenizer)[0]) for each in asked]
        fits = [longest is None or length + max_new_tokens <= longest for length in lengths]
        kept = [each for each, is_short in zip(asked, fits, strict=True) if is_short]
        if kept:
            self.check_numbers(kept[0])
        said = iter(
            sample_responses(self.model, self.tokenizer, kept, max_new_tokens, do_sample=False, fast=True)
            if kept
            else []
        )
        return [next(said)[0] if is_short else None for is_short in fits]

    def check_numbers(self, text: str) -> None:
        """Refuse a model whose logits after a text are not numbers, as damaged weights make them; once is enough.

        Raises:
            InputError: naming the model.
        """
        import torch

        if self._has_numbers:
            return

        ids = torch.tensor([self.tokenizer(text)["input_ids"]], device=self.model.device)
        with torch.inference_mode(), pass_precision(self.model):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        if bool(logits.isnan().any()):
            raise InputError(f"{self.label}, prompt {text[-60:]!r}: {NOT_NUMBERS}")
        self._has_numbers = True

    def _to_generate(self, prompt: Prompt) -> str:
        """Return the text of a prompt without the token that the tokenizer itself puts before a text."""
        text, start = self.text_of(prompt), self.tokenizer.bos_token
        adds_start = self.uses_chat_template and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(start) if adds_start and start else text

    # ---- choices ----

    def choices(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        shared: Prompt = "",
        names: Sequence[str] | None = None,
    ) -> list[list[Likelihood] | None]:
        """Return how likely each continuation is after its context; see `iter_choices`."""
        return list(self.iter_choices(contexts, continuations, shared, names))

    def iter_choices(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        shared: Prompt = "",
        names: Sequence[str] | None = None,
    ) -> Iterator[list[Likelihood] | None]:
        """Yield of each context how likely each of its continuations is; `None` where one does not fit the context.

        Args:
            continuations: of each context; for a text with the space that goes before a word.
            shared: what all contexts begin with, such as worked examples: it is read once.
            names: of the contexts, for errors.

        Raises:
            InputError: for logits that are not numbers, naming the context, and a continuation without a token.
        """
        ids = self._shared_ids(shared)
        for place, (context, ends) in enumerate(zip(contexts, continuations, strict=True)):
            name = f"item {place + 1}" if names is None else names[place]
            yield from self.scorer.score([self.pairs(context, ends)], ids, [name])

    def pairs(self, context: Prompt, continuations: Sequence[str]) -> list[Pair]:
        """Return the tokens of a context with each of its continuations."""
        asked, continuations = self.as_asked(context), [self._plain(each) for each in continuations]
        if isinstance(asked, str):
            return [encode_pair(self.tokenizer, asked, each) for each in continuations]
        # After a template's own tokens an answer begins anew, as it does when the model writes it.
        before = list(self.tokenizer(self.text_of(asked), add_special_tokens=False)["input_ids"])
        after = [list(self.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in continuations]
        return [Pair(before, each) for each in after]

    def _shared_ids(self, shared: Prompt) -> list[int]:
        """Return the tokens that contexts share, without the last one, which may be another before other text."""
        if not shared:
            return []
        asked = self.as_asked(shared)
        if isinstance(asked, str):
            return list(self.tokenizer(asked)["input_ids"])[:-1]
        text = self.tokenizer.apply_chat_template(asked, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[:-1]
