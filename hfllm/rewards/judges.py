"""A language model as the judge of two answers, by the questions of a constitution: AI feedback.

Bai et al. 2022 (arXiv:2212.08073, section 4.1): the judge reads both answers and a principle's question, and its
log-probabilities of `(A)` and `(B)` are the preference. Judges favor a place as well as an answer, so that each pair
is asked about in both orders here, and the place's part cancels out; `measure_bias` says how large it is.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import as_messages
from hfllm.data.rows import Message
from hfllm.data.tokenizer import end_tokens, to_prompt, tokenize_prompts
from hfllm.errors import InputError
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.judge_questions import (
    BEGINS_TO_THINK,
    HAS_THOUGHT,
    LETTERS,
    judge_question,
    letter_tokens,
    was_trained_on_questions,
)
from hfllm.rewards.passes import batches_of_like_length, evaluating, pass_precision, reply_log_odds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfllm.synthesis.constitution import Constitution

Said = str | list[Message]
# The bounds of the paper for judges that think before they reply, whose probabilities are near 0 or 1 otherwise.
PAPER_CLAMP = (0.4, 0.6)


class PreferenceJudge:
    """A causal language model that is asked which of two answers is better.

    The model is neither frozen nor changed; it may be an adapter's, and lie on any device. In 16 bits its logits come
    in coarse steps (1/16 nat at 8 to 16 in bf16): load a judge of small signal in fp32.

    Args:
        model: the judge.
        tokenizer: its own. Without a chat template the question is a transcript (`Human:`, `Assistant:`).
        constitution: each of its principles needs a preference question.
        chain_of_thought: let the judge write, greedily, what it thinks before it replies. This takes a text per
            question; its replies are then near certain, so that `clamp` is advised.
        thought_length: longest thought in tokens.
        clamp: lowest and highest probability per principle, such as `PAPER_CLAMP`; none by default.
        letters: the two replies; see `letter_tokens` for those that can be told apart.
        ask_for_letter: see `judge_question`; by default so unless the chat template is hfllm's, whose models know the
            bare question from their training.
        num_principles: principles asked about each pair, drawn by prompt and seed; all by default. The paper draws 1.
        batch_size: questions in one pass.
        seed: of principles and wordings; both orders of a pair, and all pairs of a prompt, have the same.

    Raises:
        InputError: for a principle without a preference question, letters that cannot be told apart, a clamp that is
            none, or a tokenizer without padding token or with tokens that the model has no embeddings for.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        constitution: "Constitution",
        *,
        chain_of_thought: bool = False,
        thought_length: int = 128,
        clamp: tuple[float, float] | None = None,
        letters: tuple[str, str] = LETTERS,
        ask_for_letter: bool | None = None,
        num_principles: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ):
        from hfllm.models.loading.saved import check_vocabulary

        if tokenizer.pad_token_id is None:
            raise InputError("the judge's tokenizer has no padding token: set tokenizer.pad_token")
        if clamp is not None and not (len(clamp) == 2 and 0 < clamp[0] < clamp[1] < 1):
            raise InputError(f"clamp must be two probabilities in order, such as {PAPER_CLAMP}, got {clamp}")
        for name, number in (("batch_size", batch_size), ("thought_length", thought_length)):
            if number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        check_vocabulary(model, tokenizer, "judge")
        self.principles = constitution.judging_principles()
        most = len(self.principles)
        if num_principles is not None and not 1 <= num_principles <= most:
            raise InputError(f"num_principles must lie between 1 and the constitution's {most}, got {num_principles}")
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        self.chain_of_thought, self.thought_length, self.clamp = chain_of_thought, thought_length, clamp
        self.letters, self.num_principles = letters, num_principles or most
        self.ask_for_letter = not was_trained_on_questions(tokenizer) if ask_for_letter is None else ask_for_letter
        # A transcript ends with a colon.
        self.lead = HAS_THOUGHT if chain_of_thought else "" if tokenizer.chat_template else " "
        self.tokens = letter_tokens(tokenizer, letters, self.lead)
        self.context = max_length_of(model.config)
        self.__name__ = Path(getattr(model.config, "_name_or_path", "") or "judge").name

    def compare(self, prompts: Sequence[Said], first: Sequence[Said], second: Sequence[Said]) -> list[float]:
        """Return, for each pair, the log-odds in nats that the first answer is better than the second.

        It is log P(A) - log P(B) with the first answer as (A), averaged over both orders, clamped if asked, and
        averaged over principles. Equal answers get exactly 0.

        Args:
            prompts: texts or messages.
            first, second: answers, text or messages.

        Raises:
            InputError: naming the first pair whose question is longer than the judge's context.
        """
        return [
            sum(self._clamped((one + other) / 2) for one, other in pair) / len(pair)
            for pair in self.in_both_orders(prompts, first, second)
        ]

    def in_both_orders(
        self, prompts: Sequence[Said], first: Sequence[Said], second: Sequence[Said]
    ) -> list[list[tuple[float, float]]]:
        """Return, for each pair and principle, the log-odds that the first is better: shown as (A), shown as (B).

        Raises:
            InputError: as `compare`.
        """
        asked = [self._questions(*pair) for pair in zip(prompts, first, second, strict=True)]
        # Equal questions, such as both orders of equal answers, are asked once and have equal replies.
        texts = list(dict.fromkeys(text for pair in asked for both in pair for text in both))
        ids, most = self._token_ids(texts), self.context
        for number, pair in enumerate(asked, 1):
            longest = max(self._whole_length(ids[text]) for both in pair for text in both)
            if most is not None and longest > most:
                raise InputError(
                    f"pair {number}: the question takes {longest} tokens, and the judge's context has {most}; "
                    "leave it out or cut the answers"
                )
        replies = dict(zip(texts, self._replies([ids[text] for text in texts]), strict=True))
        return [[(replies[one], -replies[other]) for one, other in pair] for pair in asked]

    def has_room(self, prompts: Sequence[Said], first: Sequence[Said], second: Sequence[Said]) -> list[bool]:
        """Return whether the questions about each pair fit into the judge's context."""
        asked = [self._questions(*pair) for pair in zip(prompts, first, second, strict=True)]
        ids = self._token_ids([text for pair in asked for both in pair for text in both])
        lengths = [max(self._whole_length(ids[text]) for both in pair for text in both) for pair in asked]
        return [self.context is None or length <= self.context for length in lengths]

    def _questions(self, prompt: Said, first: Said, second: Said) -> list[tuple[str, str]]:
        """Return, for each principle, the question with the first answer as (A), and with it as (B)."""
        # By the prompt, so that a reward does not depend on what else is in a batch.
        rng = random.Random(f"judge-{self.seed}-{[message['content'] for message in as_messages(prompt)]}")
        drawn = range(len(self.principles))
        if self.num_principles < len(self.principles):
            drawn = sorted(rng.sample(drawn, self.num_principles))
        wordings = [self.principles[place].draw("preference", rng) for place in drawn]
        return [
            tuple(
                judge_question(prompt, *pair, wording, self.letters, self.ask_for_letter)
                for pair in ((first, second), (second, first))
            )
            for wording in wordings
        ]

    def _token_ids(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return the tokens of each question, up to where the judge replies or thinks."""
        if not texts:
            return {}
        prompts = [to_prompt([{"role": "user", "content": text}], self.tokenizer) for text in texts]
        begins = ("" if self.tokenizer.chat_template else " ") + BEGINS_TO_THINK
        opening = self.tokenizer(begins, add_special_tokens=False)["input_ids"] if self.chain_of_thought else []
        return {
            text: [*ids, *opening] for text, ids in zip(texts, tokenize_prompts(prompts, self.tokenizer), strict=True)
        }

    def _whole_length(self, ids: Sequence[int]) -> int:
        return len(ids) + (self.thought_length if self.chain_of_thought else 0) + len(self.tokens.before) + 1

    def _replies(self, questions: Sequence[list[int]]) -> list[float]:
        """Return log P(A) - log P(B) of each question."""
        import torch

        if self.chain_of_thought:
            with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
                questions = self._with_thoughts(questions)
        rows = [[*ids, *self.tokens.before] for ids in questions]
        return reply_log_odds(self.model, self.tokenizer, rows, self.tokens.first, self.tokens.second, self.batch_size)

    def _with_thoughts(self, questions: Sequence[list[int]]) -> list[list[int]]:
        """Return the questions with what the judge thinks about each."""
        thought: list[list[int]] = [[] for _ in questions]
        ends = end_tokens(self.tokenizer, self.model)
        for rows in batches_of_like_length(self.model, [len(ids) for ids in questions], self.batch_size):
            batch = self._padded([questions[row] for row in rows], "left")
            output = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=self.thought_length,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=sorted(ends),
                use_cache=True,
            )
            for row, said in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((place for place, number in enumerate(said) if number in ends), len(said))
                thought[row] = said[:length]
        return [[*ids, *said] for ids, said in zip(questions, thought, strict=True)]

    def _padded(self, ids: list[list[int]], side: str) -> dict[str, Any]:
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(self.model.device)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _clamped(self, odds: float) -> float:
        if self.clamp is None:
            return odds
        low, high = (math.log(share / (1 - share)) for share in self.clamp)
        return min(max(odds, low), high)


class JudgeReward:
    """A judge as a reward: the log-odds in nats that a completion is better than the row's `baseline` answer.

    Args:
        judge: see `PreferenceJudge`. `check_bias(measure_bias(...))` first says whether it can be relied on.
    """

    def __init__(self, judge: PreferenceJudge):
        self.judge, self.__name__ = judge, f"{judge.__name__}_preference"

    def __call__(
        self,
        prompts: Sequence[Said],
        completions: Sequence[Said],
        baseline: Sequence[Said] | None = None,
        **columns: Sequence[object],
    ) -> list[float]:
        """Return a number per completion.

        Args:
            baseline: the dataset's column of answers to compare with, such as the model's own before training.

        Raises:
            InputError: when the dataset has no such column, or a row has no such answer.
        """
        missing = [row for row, answer in enumerate(baseline or [], 1) if answer is None]
        if baseline is None or missing:
            where = "the dataset has" if baseline is None else f"row {missing[0]} of the batch has"
            raise InputError(f"{where} no column 'baseline' with an answer that the judge compares completions with")
        return self.judge.compare(prompts, completions, baseline)
