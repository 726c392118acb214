"""The loop of answer, critique and revision, chunk by chunk."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hfllm.data.rows import Message
from hfllm.errors import InputError
from hfllm.generation.responses import Response
from hfllm.models.loading.weights import weights_fingerprint
from hfllm.runs.command_line import main_process, say
from hfllm.synthesis.constitution import Constitution
from hfllm.synthesis.critiques import critique_turns, exchange
from hfllm.synthesis.revision_files import RevisionFile, digest_of, tokenizer_fingerprint
from hfllm.synthesis.speakers import Speaker

# Version of what is drawn and stored: files of another one are not continued.
LAYOUT = 1
# Batches of prompts that are written together.
BATCHES_PER_CHUNK = 4
# After so many critiques, a critic that has not said a word is given up.
ENOUGH_CRITIQUES = 32

# What is kept of a round, in the order in which it was said.
TURN = ("answer", "principle", "critique_request", "critique", "is_flagged", "revision_request", "revision")


@dataclass(frozen=True)
class RevisionFigures:
    """What happened, in numbers.

    Args:
        num_prompts: prompts that were given.
        dropped: of them without room in a context for their conversation.
        critiques: critiques that were asked for, one per prompt and round.
        empty_critiques: of them without a word.
        flagged: of them that find something to revise.
        revisions: revisions that were asked for.
        echoes: of them equal to the answer, but for spaces around it.
        empty_revisions: of them without a word; the answer is kept.
        cut_off: rows whose last answer was cut off at the longest length.
    """

    num_prompts: int = 0
    dropped: int = 0
    critiques: int = 0
    empty_critiques: int = 0
    flagged: int = 0
    revisions: int = 0
    echoes: int = 0
    empty_revisions: int = 0
    cut_off: int = 0

    def __add__(self, other: "RevisionFigures") -> "RevisionFigures":
        return RevisionFigures(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True)
class RevisionSettings:
    """How answers are revised: see `hfllm.synthesis.revisions.critique_and_revise`."""

    num_revisions: int
    seed: int
    response_length: int
    revise_only_flagged: bool
    is_flagged: Callable[[str], bool]
    do_sample: bool
    batch_size: int
    use_examples: bool | None
    temperature: float = 1.0

    def __post_init__(self):
        for name in ("num_revisions", "response_length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}; do_sample=False is greedy")


@dataclass
class Draft:
    """One prompt on its way.

    Args:
        place: its place among all prompts, from 0.
        prompt: its messages.
    """

    place: int
    prompt: list[Message]
    first: str = ""
    answer: str = ""
    is_cut: bool = False
    is_dropped: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the row of a dataset."""
        last, first = ([{"role": "assistant", "content": text}] for text in (self.answer, self.first))
        # SFTTrainer wants a completion beside a prompt.
        said = {"prompt": self.prompt, "completion": last, "messages": [*self.prompt, *last]}
        return {**said, "chosen": last, "rejected": first, "turns": self.turns}


class Reviser:
    """Writes answers and revises them.

    Args:
        model: writes the first answers.
        critic: writes critiques and revisions.
    """

    def __init__(self, model: Speaker, critic: Speaker, constitution: Constitution, settings: RevisionSettings):
        self.model, self.critic, self.constitution, self.settings = model, critic, constitution, settings
        # Those that have learned to converse copy from examples.
        wants_examples = bool(critic.next_turn) if settings.use_examples is None else settings.use_examples
        self.examples = constitution.examples if wants_examples else ()

    def description(self, drafts: Sequence[Draft]) -> dict[str, Any]:
        """Return what the rows depend on, as JSON values; the first things that differ are named first."""
        test, ours, theirs = self.settings.is_flagged, self.model.model, self.critic.model
        settings = {**vars(self.settings), "is_flagged": getattr(test, "__qualname__", type(test).__qualname__)}
        weights = weights_fingerprint(ours)
        return {
            "layout": LAYOUT,
            "prompts": digest_of([draft.prompt for draft in drafts]),
            "constitution": digest_of(self.constitution.as_dict()),
            **settings,
            "tokenizer": tokenizer_fingerprint(self.model.tokenizer),
            "critic_tokenizer": tokenizer_fingerprint(self.critic.tokenizer),
            "model": weights,
            "critic": weights if theirs is ours else weights_fingerprint(theirs),
        }

    def with_room(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts whose whole conversation fits into both contexts, however long what is said.

        Raises:
            InputError: when none does.
        """
        said, principles = self.settings.response_length, self.constitution.principles
        asked = [
            max((text for each in principles for text in getattr(each, request)), key=self.critic.words)
            for request in ("critique", "revision")
        ]
        answering = self.model.lengths([draft.prompt for draft in drafts])
        turns = [
            [*critique_turns(draft.prompt, ".", asked[0], self.examples), *exchange(".", asked[1])] for draft in drafts
        ]
        revising = [length + 3 * said for length in self.critic.lengths(turns)]
        fitting = [
            draft
            for draft, first, whole in zip(drafts, answering, revising, strict=True)
            if self.model.has_room(first + said) and self.critic.has_room(whole)
        ]
        if not fitting:
            raise InputError(
                f"no prompt has room for its conversation in contexts of {self.model.context} (model) and "
                f"{self.critic.context} (critic) tokens: with examples, requests and 3 x response_length {said} the "
                f"shortest takes {min(revising)}"
            )
        if len(fitting) < len(drafts):
            left_out = len(drafts) - len(fitting)
            say(f"constitution: {left_out} of {len(drafts)} prompts are left out: their conversation is too long")
        return fitting

    def run(
        self, drafts: Sequence[Draft], figures: RevisionFigures, saved: RevisionFile | None
    ) -> tuple[list[dict[str, Any]], RevisionFigures]:
        """Return the rows of all drafts, and `figures` with what happened added; chunks in `saved` are not made again.

        Raises:
            InputError: when no critique has a word.
        """
        from tqdm import tqdm

        size = self.settings.batch_size * BATCHES_PER_CHUNK
        chunks = [drafts[start : start + size] for start in range(0, len(drafts), size)]
        done = [] if saved is None else [RevisionFigures(**each) for each in saved.figures]
        rows = [] if saved is None else saved.rows()
        figures = sum(done, figures)
        answers = (1 + 2 * self.settings.num_revisions) * len(drafts)
        with tqdm(total=answers, unit="text", disable=not (main_process() and sys.stderr.isatty())) as bar:
            bar.update(sum(map(len, chunks[: len(done)])) * answers // len(drafts))
            for chunk in chunks[len(done) :]:
                added = self._revise(chunk, bar.update)
                figures += added
                is_last, is_mute = chunk is chunks[-1], figures.empty_critiques == figures.critiques
                if is_mute and figures.critiques and (is_last or figures.critiques >= ENOUGH_CRITIQUES):
                    raise InputError(
                        f"the critic said nothing: all {figures.critiques} critiques are empty; take another critic, "
                        "or a constitution with examples if it is a base model"
                    )
                new = [draft.row() for draft in chunk if not draft.is_dropped]
                rows += new
                if saved is not None:
                    saved.append(new, asdict(added))
        return rows, figures

    def _revise(self, chunk: Sequence[Draft], progress: Callable[[int], object]) -> RevisionFigures:
        """Answer and revise the drafts of a chunk, and return what happened."""
        prompts = [draft.prompt for draft in chunk]
        for draft, said in self._ask(self.model, chunk, prompts, (chunk[0].place, "answer")):
            draft.first = draft.answer = said.text
            draft.is_cut = not said.has_ended
        progress(len(chunk))
        seen: Counter[str] = Counter()
        for number in range(self.settings.num_revisions):
            self._round(chunk, number, seen)
            progress(2 * len(chunk))
        seen["dropped"] = sum(draft.is_dropped for draft in chunk)
        seen["cut_off"] = sum(draft.is_cut and not draft.is_dropped for draft in chunk)
        return RevisionFigures(**seen)

    def _round(self, chunk: Sequence[Draft], number: int, seen: "Counter[str]") -> None:
        """Let the answers of a chunk be criticized and revised once."""
        settings, start = self.settings, chunk[0].place
        asked = {draft.place: self._draw(draft, number) for draft in chunk}
        turns = {
            draft.place: critique_turns(
                draft.prompt, draft.answer, asked[draft.place]["critique_request"], self.examples
            )
            for draft in chunk
        }
        to_revise, conversations = [], []
        for draft, said in self._ask(self.critic, chunk, [*turns.values()], (start, "critique", number)):
            turn = asked[draft.place] | {"answer": draft.answer, "critique": said.text, "revision": draft.answer}
            turn["is_flagged"] = bool(said.text) and bool(settings.is_flagged(said.text))
            seen.update(critiques=1, empty_critiques=not said.text, flagged=turn["is_flagged"])
            if turn["is_flagged"] or not settings.revise_only_flagged:
                to_revise.append(draft)
                conversations.append([*turns[draft.place], *exchange(said.text, turn["revision_request"])])
            else:
                turn["revision_request"] = ""
            draft.turns.append({name: turn[name] for name in TURN})
        for draft, said in self._ask(self.critic, to_revise, conversations, (start, "revision", number)):
            draft.turns[-1]["revision"] = said.text
            seen.update(revisions=1, echoes=said.text == draft.answer, empty_revisions=not said.text)
            if said.text:
                draft.answer, draft.is_cut = said.text, not said.has_ended

    def _draw(self, draft: Draft, number: int) -> dict[str, Any]:
        """Return the principle of a draft's round and the wordings of its requests."""
        # Not one source of random numbers for all, so that a draw depends on nothing but this.
        rng = random.Random(f"constitution-{self.settings.seed}-{draft.place}-{number}")
        principle = self.constitution.draw(rng)
        requests = {f"{request}_request": principle.draw(request, rng) for request in ("critique", "revision")}
        return {"principle": principle.name, **requests}

    def _ask(
        self, speaker: Speaker, drafts: Sequence[Draft], conversations: Sequence[list[Message]], label: tuple
    ) -> list[tuple[Draft, Response]]:
        """Return what is said next to each draft that is not dropped; those that have outgrown the context are."""
        settings = self.settings
        lengths = speaker.lengths(conversations)
        for draft, length in zip(drafts, lengths, strict=True):
            # A text that was sampled may take more tokens when it is read again.
            draft.is_dropped |= not speaker.has_room(length + settings.response_length)
        kept = [pair for pair in zip(drafts, conversations, strict=True) if not pair[0].is_dropped]
        if not kept:
            return []
        # Of this chunk alone, so that a run that is continued draws as one that was never stopped.
        seed = random.Random(f"constitution-{settings.seed}-{label}").getrandbits(31)
        said = speaker.say(
            *([conversation for _, conversation in kept], settings.response_length),
            *(settings.do_sample, settings.batch_size, seed),
            # First answers show what the model does; critiques and revisions what it can do.
            temperature=1.0 if "answer" in label else settings.temperature,
        )
        return [(draft, response) for (draft, _), response in zip(kept, said, strict=True)]
