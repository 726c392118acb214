"""The loop of answer, critique and revision, chunk by chunk, who speaks in it, and its files."""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfllm.data.formats import Message, as_messages, read_messages
from hfllm.data.tokenizer import next_turn, to_prompt, tokenize_prompts
from hfllm.errors import InputError, check_positive, refuse_if
from hfllm.generation import responses
from hfllm.generation.responses import Response
from hfllm.models.loading.saved import check_padding, check_vocabulary, max_length_of, saved_tokenizer
from hfllm.models.loading.weights import weights_fingerprint
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import main_process, say
from hfllm.synthesis.constitution import Constitution, critique_turns, exchange, finds_fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- revision files ----
#
# Revisions on disk: whole chunks of rows, and their inputs, for continuing a stopped run.


ROWS_FILE, STATE_FILE = "revisions.jsonl", "revisions.state"
# Names of differences in values that are digests, or too long for a line.
DIGESTS = {
    **{"prompts": "other prompts", "constitution": "another constitution", "model": "other weights of the model"},
    **{
        "tokenizer": "another tokenizer",
        "critic": "other weights of the critic",
        "layout": "another version of hfllm",
    },
    **{"critic_tokenizer": "another tokenizer of the critic"},
}


class RevisionFile:
    """The rows of a run, `revisions.jsonl`, and next to it `revisions.state`, with their inputs.

    A chunk of rows counts once the state has its end; rows after this end were cut off and are written again.

    Args:
        folder: made if missing.
        made_from: JSON values that determine the rows.

    Raises:
        InputError: when the folder holds the rows of another run, naming the first difference, or rows of unknown
            origin.
    """

    def __init__(self, folder: str | Path, made_from: Mapping[str, Any]):
        self.rows_path, self.state_path = Path(folder) / ROWS_FILE, Path(folder) / STATE_FILE
        self.made_from = json.loads(json.dumps(made_from))
        self.ends, self.figures = self._read_state()
        size = self.rows_path.stat().st_size if self.rows_path.is_file() else 0
        whole = sum(end <= size for end in self.ends)
        self.ends, self.figures = self.ends[:whole], self.figures[:whole]
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._write_state()
        with self.rows_path.open("ab") as stream:
            stream.truncate(self.ends[-1] if self.ends else 0)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, as they were when they were written."""
        with self.rows_path.open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    def append(self, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, int]) -> None:
        """Write the rows of a chunk and its figures: both, or after a kill neither."""
        with self.rows_path.open("ab") as stream:
            stream.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            stream.flush()
            os.fsync(stream.fileno())
            end = stream.tell()
        self.ends, self.figures = [*self.ends, end], [*self.figures, dict(figures)]
        self._write_state()

    def _write_state(self) -> None:
        state = {"made_from": self.made_from, "ends": self.ends, "figures": self.figures}
        write_atomically(self.state_path, json.dumps(state, indent=1) + "\n")

    def _read_state(self) -> tuple[list[int], list[dict[str, int]]]:
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            before, ends, figures = state["made_from"], state["ends"], state["figures"]
        except FileNotFoundError:
            # The state is there before the first row.
            if self.rows_path.exists():
                raise InputError(
                    f"{self.rows_path} would be overwritten, and no {STATE_FILE} beside it says that hfllm wrote it: "
                    "move it or choose another folder"
                ) from None
            return [], []
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.state_path}: damaged; remove it and {ROWS_FILE} to begin again") from None
        for key in {**before, **self.made_from}:
            was, now = before.get(key), self.made_from.get(key)
            if was != now:
                difference = DIGESTS.get(key) or f"{key}={was!r}, this run has {key}={now!r}"
                raise InputError(
                    f"{self.rows_path} holds revisions made with {difference}: choose another folder or remove it"
                )
        return ends, figures


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of a tokenizer's vocabulary and chat template."""
    return digest_of([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def digest_of(value: object) -> str:
    """Return a digest of JSON values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


# ---- speakers ----
#
# A model with its tokenizer, as a speaker in conversations: their length in its tokens, and its next message.


# Conversations tokenized at a time.
ROWS = 1000


class Speaker:
    """A language model in the assistant's role.

    Args:
        model: a causal language model.
        tokenizer: its own. With a chat template conversations follow it; without one they are transcripts.
        name: its name in errors.

    Raises:
        InputError: for a tokenizer without padding token, or with tokens without embeddings in the model.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str):
        check_padding(tokenizer, f"the {name}'s")
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.context, self.next_turn = max_length_of(model.config), next_turn(tokenizer)

    def lengths(self, conversations: Sequence[list[Message]]) -> list[int]:
        """Return the tokens of conversations, up to where the assistant speaks."""
        lengths: list[int] = []
        for start in range(0, len(conversations), ROWS):
            prompts = [to_prompt(messages, self.tokenizer) for messages in conversations[start : start + ROWS]]
            lengths += map(len, tokenize_prompts(prompts, self.tokenizer))
        return lengths

    def words(self, text: str) -> int:
        """Return the tokens of a text by itself."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def has_room(self, length: int) -> bool:
        """Return whether so many tokens fit into the model's context."""
        return self.context is None or length <= self.context

    def say(
        self,
        conversations: Sequence[list[Message]],
        max_new_tokens: int,
        do_sample: bool,
        batch_size: int,
        seed: int,
        temperature: float = 1.0,
    ) -> list[Response]:
        """Return the assistant's next message in every conversation, without spaces around it.

        Conversations of like length are sampled together.
        """
        lengths = self.lengths(conversations)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        sampled = responses.sample_with_ends(
            *(self.model, self.tokenizer),
            [to_prompt(conversations[index], self.tokenizer) for index in order],
            max_new_tokens,
            do_sample,
            batch_size=batch_size,
            seed=seed,
            stop_strings=(self.next_turn,) if self.next_turn else (),
            temperature=temperature,
        )
        by_index = dict(zip(order, sampled, strict=True))
        return [Response(by_index[index][0].text.strip(), by_index[index][0].has_ended) for index in range(len(order))]


def tokenizer_of_critic(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    critic: "PreTrainedModel | None",
    critic_tokenizer: "PreTrainedTokenizerBase | None",
) -> "PreTrainedTokenizerBase":
    """Return the critic's tokenizer.

    Raises:
        InputError: when the critic has none of its own and cannot read with the model's: it has another number of
            embeddings, or lies in a folder with another tokenizer; or when only a tokenizer was given.
    """
    if critic is None:
        if critic_tokenizer is not None and critic_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError("critic_tokenizer is not the model's, and no critic was given that would read with it")
        return tokenizer
    if critic_tokenizer is not None:
        return critic_tokenizer
    ours, theirs = (each.get_input_embeddings().weight.shape[0] for each in (model, critic))
    if ours != theirs:
        raise InputError(
            f"the critic has embeddings for {theirs} tokens and the model for {ours}: give the critic's own tokenizer "
            "as critic_tokenizer"
        )
    folder = Path(getattr(critic.config, "_name_or_path", "") or "")
    has_its_own = folder.name and (folder / "tokenizer.json").is_file()
    if has_its_own and saved_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"the critic's tokenizer in {folder} is not the model's: give it as critic_tokenizer")
    return tokenizer


# ---- reviser ----


# Version of draws and stored fields: files of another version are not continued.
LAYOUT = 1
# Batches of prompts per write.
BATCHES_PER_CHUNK = 4
# After so many critiques, a critic without a word so far is given up.
ENOUGH_CRITIQUES = 32

# The kept parts of a round, in conversational order.
TURN = ("answer", "principle", "critique_request", "critique", "is_flagged", "revision_request", "revision")


@dataclass(frozen=True)
class RevisionFigures:
    """Counts of a run.

    Args:
        num_prompts: given prompts.
        dropped: of them without room in a context for their conversation.
        critiques: requested critiques, one per prompt and round.
        empty_critiques: of them without a word.
        flagged: of them with something to revise.
        revisions: requested revisions.
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
    """How answers are revised: see `critique_and_revise`."""

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
        check_positive(
            num_revisions=self.num_revisions, response_length=self.response_length, batch_size=self.batch_size
        )
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}; do_sample=False is greedy")


@dataclass
class Draft:
    """One prompt on its way.

    Args:
        index: among all prompts, from 0.
        prompt: its messages.
    """

    index: int
    prompt: list[Message]
    first: str = ""
    answer: str = ""
    is_cut: bool = False
    is_dropped: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the row of a dataset."""
        last, first = ([{"role": "assistant", "content": text}] for text in (self.answer, self.first))
        # SFTTrainer wants a completion next to a prompt.
        columns = {"prompt": self.prompt, "completion": last, "messages": [*self.prompt, *last]}
        return {**columns, "chosen": last, "rejected": first, "turns": self.turns}


class Reviser:
    """Writes answers and revises them.

    Args:
        model: writes the first answers.
        critic: writes critiques and revisions.
    """

    def __init__(self, model: Speaker, critic: Speaker, constitution: Constitution, settings: RevisionSettings):
        self.model, self.critic, self.constitution, self.settings = model, critic, constitution, settings
        # Models trained to converse copy from examples.
        wants_examples = bool(critic.next_turn) if settings.use_examples is None else settings.use_examples
        self.examples = constitution.examples if wants_examples else ()

    def description(self, drafts: Sequence[Draft]) -> dict[str, Any]:
        """Return the inputs that determine the rows, as JSON values; differences are reported in this order."""
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
        """Return the drafts whose whole conversation fits into both contexts, whatever the length of sampled texts.

        Raises:
            InputError: when none does.
        """
        response_length, principles = self.settings.response_length, self.constitution.principles
        requests = [
            max((text for each in principles for text in getattr(each, request)), key=self.critic.words)
            for request in ("critique", "revision")
        ]
        answering = self.model.lengths([draft.prompt for draft in drafts])
        turns = [
            [*critique_turns(draft.prompt, ".", requests[0], self.examples), *exchange(".", requests[1])]
            for draft in drafts
        ]
        revising = [length + 3 * response_length for length in self.critic.lengths(turns)]
        fitting = [
            draft
            for draft, first, whole in zip(drafts, answering, revising, strict=True)
            if self.model.has_room(first + response_length) and self.critic.has_room(whole)
        ]
        if not fitting:
            raise InputError(
                f"no prompt has room for its conversation in contexts of {self.model.context} (model) and "
                f"{self.critic.context} (critic) tokens: with examples, requests and 3 x response_length "
                f"{response_length} the shortest takes {min(revising)}"
            )
        if len(fitting) < len(drafts):
            left_out = len(drafts) - len(fitting)
            say(f"constitution: {left_out} of {len(drafts)} prompts are left out: their conversation is too long")
        return fitting

    def run(
        self, drafts: Sequence[Draft], figures: RevisionFigures, saved: RevisionFile | None
    ) -> tuple[list[dict[str, Any]], RevisionFigures]:
        """Return the rows of all drafts, and `figures` with new counts added; chunks in `saved` are not made again.

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
        """Answer and revise the drafts of a chunk, and return the counts."""
        prompts = [draft.prompt for draft in chunk]
        for draft, response in self._ask(self.model, chunk, prompts, (chunk[0].index, "answer")):
            draft.first = draft.answer = response.text
            draft.is_cut = not response.has_ended
        progress(len(chunk))
        counts: Counter[str] = Counter()
        for number in range(self.settings.num_revisions):
            self._round(chunk, number, counts)
            progress(2 * len(chunk))
        counts["dropped"] = sum(draft.is_dropped for draft in chunk)
        counts["cut_off"] = sum(draft.is_cut and not draft.is_dropped for draft in chunk)
        return RevisionFigures(**counts)

    def _round(self, chunk: Sequence[Draft], number: int, counts: "Counter[str]") -> None:
        """Let the answers of a chunk be criticized and revised once."""
        settings, start = self.settings, chunk[0].index
        requests = {draft.index: self._draw(draft, number) for draft in chunk}
        turns = {
            draft.index: critique_turns(
                draft.prompt, draft.answer, requests[draft.index]["critique_request"], self.examples
            )
            for draft in chunk
        }
        to_revise, conversations = [], []
        for draft, response in self._ask(self.critic, chunk, [*turns.values()], (start, "critique", number)):
            turn = requests[draft.index] | {
                "answer": draft.answer,
                "critique": response.text,
                "revision": draft.answer,
            }
            turn["is_flagged"] = bool(response.text) and bool(settings.is_flagged(response.text))
            counts.update(critiques=1, empty_critiques=not response.text, flagged=turn["is_flagged"])
            if turn["is_flagged"] or not settings.revise_only_flagged:
                to_revise.append(draft)
                conversations.append([*turns[draft.index], *exchange(response.text, turn["revision_request"])])
            else:
                turn["revision_request"] = ""
            draft.turns.append({name: turn[name] for name in TURN})
        for draft, response in self._ask(self.critic, to_revise, conversations, (start, "revision", number)):
            draft.turns[-1]["revision"] = response.text
            counts.update(revisions=1, echoes=response.text == draft.answer, empty_revisions=not response.text)
            if response.text:
                draft.answer, draft.is_cut = response.text, not response.has_ended

    def _draw(self, draft: Draft, number: int) -> dict[str, Any]:
        """Return the principle of a draft's round and the wordings of its requests."""
        # Not one source of random numbers for all, so a draw depends on nothing but this.
        rng = random.Random(f"constitution-{self.settings.seed}-{draft.index}-{number}")
        principle = self.constitution.draw(rng)
        requests = {f"{request}_request": principle.draw(request, rng) for request in ("critique", "revision")}
        return {"principle": principle.name, **requests}

    def _ask(
        self, speaker: Speaker, drafts: Sequence[Draft], conversations: Sequence[list[Message]], label: tuple
    ) -> list[tuple[Draft, Response]]:
        """Return the next message for every undropped draft; drafts too long for the context are dropped."""
        settings = self.settings
        lengths = speaker.lengths(conversations)
        for draft, length in zip(drafts, lengths, strict=True):
            # A sampled text may take more tokens when it is read again.
            draft.is_dropped |= not speaker.has_room(length + settings.response_length)
        remaining = [pair for pair in zip(drafts, conversations, strict=True) if not pair[0].is_dropped]
        if not remaining:
            return []
        # Of this chunk only, so a continued run draws as a run without stops.
        seed = random.Random(f"constitution-{settings.seed}-{label}").getrandbits(31)
        replies = speaker.say(
            *([conversation for _, conversation in remaining], settings.response_length),
            *(settings.do_sample, settings.batch_size, seed),
            # First answers show the model's behavior; critiques and revisions its abilities.
            temperature=1.0 if "answer" in label else settings.temperature,
        )
        return [(draft, response) for (draft, _), response in zip(remaining, replies, strict=True)]


# ---- revisions ----
#
# Let a model criticize and revise its own answers by a constitution: the supervised half of constitutional AI.
#
# Bai et al. 2022 (arXiv:2212.08073, section 3): answer, critique, revision, again and again; then fine-tune on the
# last revisions. The rows have the format of TRL's trainers: SFT reads `prompt` and `completion`, DPO and the reward
# trainer `chosen` and `rejected`.


class Revisions(NamedTuple):
    """The rows of `critique_and_revise`, in the order of their prompts, and the counts of the run."""

    rows: list[dict[str, Any]]
    figures: RevisionFigures


def critique_and_revise(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list[Message]],
    constitution: Constitution,
    num_revisions: int = 1,
    seed: int = 0,
    *,
    response_length: int,
    critic: "PreTrainedModel | None" = None,
    critic_tokenizer: "PreTrainedTokenizerBase | None" = None,
    revise_only_flagged: bool = False,
    is_flagged: Callable[[str], bool] | None = None,
    do_sample: bool = True,
    temperature: float = 1.0,
    batch_size: int = 64,
    use_examples: bool | None = None,
    save_to: str | Path | None = None,
) -> Revisions:
    """Answer prompts, then criticize and revise every answer by principles of a constitution, drawn at random.

    In every round the critic reads the prompt, the answer so far and the critique request of a principle; then its own
    critique and the revision request. The revision is the answer of the next round, which begins without the turns of
    the round before. Conversations follow the chat template; without one they are transcripts (`Human:`,
    `Assistant:`), and a base model's text beyond its turn is cut.

    The principle and the wordings depend only on the seed, the prompt's index and the round; sampled texts also on
    the other prompts of the batch, since all prompts of a batch share random numbers. In several processes call it in
    one, and hand on its rows.

    Args:
        model: writes the first answers.
        tokenizer: its own.
        prompts: texts, or lists of messages ending with the user.
        constitution: see `load_constitution`.
        num_revisions: rounds of critique and revision.
        seed: seed of principles, wordings and samples; the caller's random state is not changed.
        response_length: longest answer, critique and revision, in tokens.
        critic: writes critiques and revisions; by default `model`.
        critic_tokenizer: the critic's, by default `tokenizer`, then necessarily the critic's own too.
        revise_only_flagged: keep an answer where the critique finds nothing.
        is_flagged: whether a critique finds something; by default `hfllm.synthesis.constitution.finds_fault`.
        do_sample: sample; greedy if false.
        temperature: of critiques and revisions; first answers are sampled at 1.
        batch_size: prompts in one call of `generate`; four batches are written together.
        use_examples: put the constitution's examples before every critique. By default for base models, which have no
            chat template or the plain one of `hfllm.data.tokenizer`; small instruction-tuned models copy from them.
        save_to: folder for `revisions.jsonl`, a row per line, to which whole chunks are added. A stopped run is
            continued by the same call, with the result of an uninterrupted run; model, prompts and all else must be
            the same.

    Returns:
        The rows and the figures. A row has `prompt` (messages), `completion` and `chosen` (the last revision, as the
        assistant's message), `rejected` (the first answer, likewise), `messages` (prompt and last revision), and
        `turns`: for every round `answer`, `principle`, `critique_request`, `critique`, `is_flagged`,
        `revision_request` (empty if none was asked for) and `revision`. An unrevised answer is its own revision. Rows
        with equal `chosen` and `rejected` teach DPO nothing: leave them out there.

    Raises:
        InputError: for a number below 1, unreadable prompts, no prompt with room in the context for its conversation,
            a critic with another tokenizer, a critic without output, or a folder of another run.
    """
    critic_tokenizer = tokenizer_of_critic(model, tokenizer, critic, critic_tokenizer)
    settings = RevisionSettings(
        *(num_revisions, seed, response_length, revise_only_flagged, is_flagged or finds_fault, do_sample),
        *(batch_size, use_examples, temperature),
    )
    reviser = Reviser(
        Speaker(model, tokenizer, "model"),
        Speaker(critic or model, critic_tokenizer, "critic"),
        constitution,
        settings,
    )
    drafts = _drafts(prompts)
    fitting = reviser.with_room(drafts)
    saved = None if save_to is None else RevisionFile(save_to, reviser.description(drafts))
    return Revisions(*reviser.run(fitting, RevisionFigures(len(drafts), len(drafts) - len(fitting)), saved))


def _drafts(prompts: Sequence[str | list[Message]]) -> list[Draft]:
    """Return the prompts as messages."""
    refuse_if(not prompts, "no prompts: there is nothing to answer")
    drafts = []
    for index, prompt in enumerate(prompts):
        messages = read_messages(f"prompt {index + 1}", as_messages(prompt))
        if messages[-1]["role"] == "assistant":
            raise InputError(f"prompt {index + 1} ends with the assistant; expected the user's words last")
        drafts.append(Draft(index, messages))
    return drafts
