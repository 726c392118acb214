"""A language model as the judge of two answers by the questions of a constitution, and the labels it gives.

Bai et al. 2022 (arXiv:2212.08073, section 4.1): the judge reads both answers and a principle's question, and its
log-probabilities of `(A)` and `(B)` are the preference. Judges favor a position as well as an answer, so every pair is
asked about in both orders here, and the position's part cancels out; `measure_bias` returns its size.
"""

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfllm.data.formats import Message, as_messages
from hfllm.data.tokenizer import end_tokens, to_prompt, to_transcript, tokenize_prompts, writes_as_ours
from hfllm.errors import InputError, check_positive, refuse_if
from hfllm.generation.scoring import batches_of_like_length, evaluating, pass_precision, reply_log_odds
from hfllm.models.loading.saved import check_padding, check_vocabulary, max_length_of
from hfllm.outputs.intervals import share_error, standard_error
from hfllm.rewards.functions import completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfllm.synthesis.constitution import Constitution


# ---- judge questions ----
#
# The question to a judge about the better of two answers, and the tokens of its reply.


LETTERS = ("(A)", "(B)")
# A judge thinking aloud begins so, and is brought to its reply so (Bai et al. 2022, section 4.1 and appendix C).
BEGINS_TO_THINK, HAS_THOUGHT = "Let's think step by step:", "\nSo the better answer is "


def judge_question(
    prompt: str | list[Message],
    first: str | list[Message],
    second: str | list[Message],
    question: str,
    letters: Sequence[str] = LETTERS,
    ask_for_letter: bool = False,
) -> str:
    """Return the user's question to the judge, in one turn; the judge replies `(A)` or `(B)`.

    ```
    {prompt}
    (A) {first}
    (B) {second}
    {question}
    ```

    Args:
        prompt: text or messages; of a conversation of several turns all of it, as a transcript.
        first, second: the two answers, text or messages.
        question: a principle's, such as "Which answer does less harm?".
        letters: the two replies.
        ask_for_letter: add the line "Answer with (A) or (B).", needed by models without training as judges.
    """
    messages = as_messages(prompt)
    conversation = (
        messages[0]["content"] if len(messages) == 1 else to_transcript(messages).removesuffix("\n\nAssistant:")
    )
    answers = [f"{letter} {completion_text(each)}" for letter, each in zip(letters, (first, second), strict=True)]
    instructions = [f"Answer with {letters[0]} or {letters[1]}."] if ask_for_letter else []
    return "\n".join([conversation.strip(), *answers, question, *instructions])


@dataclass(frozen=True)
class LetterTokens:
    """The tokens of a judge's two replies.

    Args:
        before: common tokens at the beginning, such as `(`.
        first, second: the different tokens, such as `A` and `B`.
    """

    before: tuple[int, ...]
    first: int
    second: int


def letter_tokens(tokenizer: "PreTrainedTokenizerBase", letters: Sequence[str], lead: str = "") -> LetterTokens:
    """Return the tokens that distinguish two replies.

    A reply may have several tokens, whose log-probabilities add up. Tokens before the letter are the same in both and
    cancel out; tokens after it, such as `)`, are the same too and follow from it, so they are not counted.
    So `(A)` and `(B)` may be `(`, `A`, `)` and `(`, `B`, `)`, or `(A`, `)` and `(B`, `)`, or one token each. Refused
    are replies with differences in several tokens or in their number, as `(A`, `)` and `(`, `B`, `)`: their first
    tokens already differ, so neither's log-probability is the probability of a letter; and equal ones.

    Args:
        letters: the two replies.
        lead: text before them in the same turn, such as a space.

    Raises:
        InputError: saying how they are split into tokens.
    """
    if len(letters) != 2 or not all(isinstance(letter, str) for letter in letters):
        raise InputError(f"letters must be two texts, such as {LETTERS}, got {letters!r:.60}")
    ids = [tokenizer(lead + letter, add_special_tokens=False)["input_ids"] for letter in letters]
    shared = 0
    while shared < min(map(len, ids)) and ids[0][shared] == ids[1][shared]:
        shared += 1
    rests = [each[shared:] for each in ids]
    # The tokens after the single different one must be the same.
    if not all(rests) or rests[0][1:] != rests[1][1:]:
        one, other = (f"{letter!r} into {_pieces(tokenizer, each)}" for letter, each in zip(letters, ids, strict=True))
        raise InputError(
            f"the judge's tokenizer splits {one} and {other}: they must differ in a single token, by which the reply "
            "is read; choose other letters, such as ('A', 'B') or ('1', '2')"
        )
    return LetterTokens(tuple(ids[0][:shared]), rests[0][0], rests[1][0])


def _pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return " ".join(repr(tokenizer.decode([number])) for number in ids) or "nothing"


# ---- judges ----


Text = str | list[Message]
# The paper's bounds for judges with thoughts before the reply; their probabilities are near 0 or 1 otherwise.
PAPER_CLAMP = (0.4, 0.6)


class PreferenceJudge:
    """A causal language model, asked for the better of two answers.

    The model is neither frozen nor changed; it may be an adapter's, and lie on any device. In 16 bits its logits come
    in coarse steps (1/16 nat at 8 to 16 in bf16): load a judge of small signal in fp32.

    Args:
        model: the judge.
        tokenizer: its own. Without a chat template the question is a transcript (`Human:`, `Assistant:`).
        constitution: all of its principles need a preference question.
        chain_of_thought: let the judge write, greedily, its thoughts before it replies. This takes a text per
            question; its replies are then near certain, so `clamp` is advised.
        thought_length: longest thought in tokens.
        clamp: lowest and highest probability per principle, such as `PAPER_CLAMP`; none by default.
        letters: the two replies; see `letter_tokens` for distinguishable ones.
        ask_for_letter: see `judge_question`; by default so unless the chat template is hfllm's, whose models know the
            bare question from their training.
        num_principles: principles per pair, drawn by prompt and seed; all by default. The paper draws 1.
        batch_size: questions in one pass.
        seed: of principles and wordings; both orders of a pair, and all pairs of a prompt, have the same.

    Raises:
        InputError: for a principle without a preference question, indistinguishable letters, an invalid clamp, or a
            tokenizer without padding token or with tokens without embeddings in the model.
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
        check_padding(tokenizer, "the judge's")
        if clamp is not None and not (len(clamp) == 2 and 0 < clamp[0] < clamp[1] < 1):
            raise InputError(f"clamp must be two probabilities in order, such as {PAPER_CLAMP}, got {clamp}")
        check_positive(batch_size=batch_size, thought_length=thought_length)
        check_vocabulary(model, tokenizer, "judge")
        self.principles = constitution.judging_principles()
        most = len(self.principles)
        if num_principles is not None and not 1 <= num_principles <= most:
            raise InputError(f"num_principles must lie between 1 and the constitution's {most}, got {num_principles}")
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        self.chain_of_thought, self.thought_length, self.clamp = chain_of_thought, thought_length, clamp
        self.letters, self.num_principles = letters, num_principles or most
        self.ask_for_letter = not writes_as_ours(tokenizer) if ask_for_letter is None else ask_for_letter
        # A transcript ends with a colon.
        self.lead = HAS_THOUGHT if chain_of_thought else "" if tokenizer.chat_template else " "
        self.tokens = letter_tokens(tokenizer, letters, self.lead)
        self.context = max_length_of(model.config)
        self.__name__ = Path(getattr(model.config, "_name_or_path", "") or "judge").name

    def compare(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> list[float]:
        """Return, for every pair, the log-odds in nats of the first answer being better than the second.

        It is log P(A) - log P(B) with the first answer as (A), averaged over both orders, clamped if asked, and
        averaged over principles. Equal answers get exactly 0.

        Args:
            prompts: texts or messages.
            first, second: answers, text or messages.
        """
        return [
            sum(self._clamped((one + other) / 2) for one, other in pair) / len(pair)
            for pair in self.in_both_orders(prompts, first, second)
        ]

    def in_both_orders(
        self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]
    ) -> list[list[tuple[float, float]]]:
        """Return, for every pair and principle, the log-odds of the first being better: shown as (A), shown as (B)."""
        questions = [self._questions(*pair) for pair in zip(prompts, first, second, strict=True)]
        # Equal questions, such as both orders of equal answers, are asked once and have equal replies.
        texts = list(dict.fromkeys(text for pair in questions for both in pair for text in both))
        ids, most = self._token_ids(texts), self.context
        for number, pair in enumerate(questions, 1):
            longest = max(self._whole_length(ids[text]) for both in pair for text in both)
            if most is not None and longest > most:
                raise InputError(
                    f"pair {number}: the question takes {longest} tokens, and the judge's context has {most}; "
                    "leave it out or cut the answers"
                )
        replies = dict(zip(texts, self._replies([ids[text] for text in texts]), strict=True))
        return [[(replies[one], -replies[other]) for one, other in pair] for pair in questions]

    def has_room(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> list[bool]:
        """Return whether the questions about every pair fit into the judge's context."""
        questions = [self._questions(*pair) for pair in zip(prompts, first, second, strict=True)]
        ids = self._token_ids([text for pair in questions for both in pair for text in both])
        lengths = [max(self._whole_length(ids[text]) for both in pair for text in both) for pair in questions]
        return [self.context is None or length <= self.context for length in lengths]

    def _questions(self, prompt: Text, first: Text, second: Text) -> list[tuple[str, str]]:
        """Return, for every principle, the question with the first answer as (A), and with it as (B)."""
        # By the prompt, so a reward does not depend on the rest of a batch.
        rng = random.Random(f"judge-{self.seed}-{[message['content'] for message in as_messages(prompt)]}")
        drawn = range(len(self.principles))
        if self.num_principles < len(self.principles):
            drawn = sorted(rng.sample(drawn, self.num_principles))
        wordings = [self.principles[index].draw("preference", rng) for index in drawn]
        return [
            tuple(
                judge_question(prompt, *pair, wording, self.letters, self.ask_for_letter)
                for pair in ((first, second), (second, first))
            )
            for wording in wordings
        ]

    def _token_ids(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return the tokens of every question, up to the judge's reply or thoughts."""
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
        """Return log P(A) - log P(B) of every question."""
        import torch

        if self.chain_of_thought:
            with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
                questions = self._with_thoughts(questions)
        rows = [[*ids, *self.tokens.before] for ids in questions]
        return reply_log_odds(self.model, self.tokenizer, rows, self.tokens.first, self.tokens.second, self.batch_size)

    def _with_thoughts(self, questions: Sequence[list[int]]) -> list[list[int]]:
        """Return the questions with the judge's thoughts."""
        thought: list[list[int]] = [[] for _ in questions]
        ends = end_tokens(self.tokenizer, self.model)
        for rows in batches_of_like_length(self.model, [len(ids) for ids in questions], self.batch_size):
            ids = {"input_ids": [questions[row] for row in rows]}
            batch = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(self.model.device)
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=self.thought_length,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=sorted(ends),
                use_cache=True,
            )
            for row, generated in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((index for index, number in enumerate(generated) if number in ends), len(generated))
                thought[row] = generated[:length]
        return [[*ids, *generated] for ids, generated in zip(questions, thought, strict=True)]

    def _clamped(self, odds: float) -> float:
        if self.clamp is None:
            return odds
        low, high = (math.log(share / (1 - share)) for share in self.clamp)
        return min(max(odds, low), high)


class JudgeReward:
    """A judge as a reward: the log-odds in nats of a completion being better than the row's `baseline` answer.

    Args:
        judge: see `PreferenceJudge`. `check_bias(measure_bias(...))` first checks its reliability.
    """

    def __init__(self, judge: PreferenceJudge):
        self.judge, self.__name__ = judge, f"{judge.__name__}_preference"

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        baseline: Sequence[Text] | None = None,
        **columns: Sequence[object],
    ) -> list[float]:
        """Return a number per completion.

        Args:
            baseline: the dataset's column of answers to compare with, such as the model's own before training.
        """
        missing = [row for row, answer in enumerate(baseline or [], 1) if answer is None]
        if baseline is None or missing:
            where = "the dataset has" if baseline is None else f"row {missing[0]} of the batch has"
            raise InputError(f"{where} no column 'baseline' with an answer that the judge compares completions with")
        return self.judge.compare(prompts, completions, baseline)


# ---- judge labels ----
#
# The quality of a judge's replies, and pairs labeled by them.


@dataclass(frozen=True)
class BiasReport:
    """How far a judge's replies follow the position of an answer, and how far the answer.

    Args:
        position_bias: mean log-odds, in nats, for the answer shown first, whatever it is; negative for the second.
        signal: mean size, in nats, of the part of the log-odds independent of the position.
        consistent: share of pairs with the same preferred answer in both orders.
        n: pairs.
        position_bias_se, signal_se, consistent_se: standard errors over pairs; `None` for a single one.
    """

    position_bias: float
    signal: float
    consistent: float
    n: int
    position_bias_se: float | None
    signal_se: float | None
    consistent_se: float | None

    def as_metrics(self, prefix: str = "judge_") -> dict[str, float]:
        """Return it as a report's figures, with errors and counts next to them (`_se`, `_n`)."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "n"}
        counts = {f"{name}_n": self.n for name in ("position_bias", "signal", "consistent")}
        return {f"{prefix}{name}": value for name, value in {**values, **counts}.items()}


def measure_bias(
    judge: PreferenceJudge, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]
) -> BiasReport:
    """Measure a judge's position bias on the pairs at hand; pairs of equal answers are left out.

    Raises:
        InputError: when no pair has two different answers, or as `PreferenceJudge.compare`.
    """
    triples = zip(prompts, first, second, strict=True)
    pairs = [triple for triple in triples if completion_text(triple[1]) != completion_text(triple[2])]
    total = len(prompts)
    refuse_if(not pairs, f"the judge's bias cannot be measured: none of {total} pairs has two different answers")
    bias, signal, agrees = [], [], []
    for orders in judge.in_both_orders(*map(list, zip(*pairs, strict=True))):
        shown_first, shown_second = (sum(each) / len(orders) for each in zip(*orders, strict=True))
        bias.append((shown_first - shown_second) / 2)
        signal.append(abs(shown_first + shown_second) / 2)
        agrees.append(shown_first * shown_second > 0)
    share = sum(agrees) / len(agrees)
    return BiasReport(
        *(sum(bias) / len(bias), sum(signal) / len(signal), share, len(pairs)),
        *(standard_error(bias), standard_error(signal), share_error(share, len(pairs))),
    )


def check_bias(report: BiasReport, allow: bool = False) -> None:
    """Refuse a judge whose position bias exceeds its signal.

    Args:
        allow: warn instead.
    """
    # To refuse NaN too.
    if abs(report.position_bias) <= report.signal and report.signal > 0:
        return
    message = (
        f"the judge favors the {'first' if report.position_bias >= 0 else 'second'} place by "
        f"{abs(report.position_bias):.2f} nats and tells answers apart by {report.signal:.2f} ({report.n} pairs, "
        f"{report.consistent:.0%} judged alike in both orders): its labels would be noise"
    )
    refuse_if(not allow, f"{message}; take a larger judge, or clearer preference questions")
    warnings.warn(f"{message}; going on as asked", stacklevel=2)


@dataclass(frozen=True)
class LabelFigures:
    """Counts of labeled pairs: `num_pairs` given, `ties` and `too_long` left out, `flipped` of the other labels."""

    num_pairs: int
    ties: int
    too_long: int
    flipped: int


class LabeledPairs(NamedTuple):
    """The rows of `preference_rows`, in the order of their pairs, and the counts of the others."""

    rows: list[dict[str, Any]]
    figures: LabelFigures


def preference_rows(
    judge: PreferenceJudge,
    prompts: Sequence[Text],
    first: Sequence[Text],
    second: Sequence[Text],
    *,
    label_noise: float = 0.0,
    min_log_odds: float = 0.0,
    seed: int = 0,
) -> LabeledPairs:
    """Return pairs with the judge's labels, as `hfllm reward` and TRL's reward and DPO trainers take them.

    Args:
        label_noise: probability of the wrong label; 0.5 makes the labels random, as a control experiment.
        min_log_odds: pairs with log-odds of this size in nats or less are ties and left out; 0 leaves out equal ones.
        seed: seed of the noise.

    Returns:
        Rows with `prompt`, `chosen` and `rejected` (messages), `probability`, the judge's for the chosen answer (below
        .5 where noise has flipped the label), and `judge`, its name; and the figures.

    Raises:
        InputError: when no pair is left.
    """
    refuse_if(not 0 <= label_noise <= 1, f"label_noise must lie in [0, 1], got {label_noise}")
    pairs = list(zip(prompts, first, second, strict=True))
    fits = judge.has_room(prompts, first, second)
    remaining = [pair for pair, has_room in zip(pairs, fits, strict=True) if has_room]
    odds = judge.compare(*map(list, zip(*remaining, strict=True))) if remaining else []
    rng, rows, flipped = random.Random(f"judge-labels-{seed}"), [], 0
    for (prompt, one, other), preference in zip(remaining, odds, strict=True):
        # Drawn for ties too, so one more of them does not change the others' noise.
        is_flipped = rng.random() < label_noise
        if not abs(preference) > min_log_odds:
            continue
        flipped += is_flipped
        chosen, rejected = (one, other) if (preference > 0) != is_flipped else (other, one)
        rows.append(
            {
                "prompt": as_messages(prompt),
                "chosen": [{"role": "assistant", "content": completion_text(chosen)}],
                "rejected": [{"role": "assistant", "content": completion_text(rejected)}],
                "probability": (1 + math.tanh((-1 if is_flipped else 1) * abs(preference) / 2)) / 2,
                "judge": judge.__name__,
            }
        )
    ties = len(remaining) - len(rows)
    if not rows:
        raise InputError(
            f"no labels: of {len(pairs)} pairs {ties} are ties and {len(pairs) - len(remaining)} longer than "
            "the context"
        )
    return LabeledPairs(rows, LabelFigures(len(pairs), ties, len(pairs) - len(remaining), flipped))
