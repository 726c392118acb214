"""Let a model criticize and revise its own answers by a constitution: the supervised half of constitutional AI.

Bai et al. 2022 (arXiv:2212.08073, section 3): answer, critique, revision, again and again; then fine-tune on the last
revisions. The rows are those of TRL's trainers: SFT reads `prompt` and `completion`, DPO and the reward trainer
`chosen` and `rejected`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfllm.data.formats import as_messages
from hfllm.data.rows import Message, read_messages
from hfllm.errors import InputError
from hfllm.synthesis.constitution import Constitution
from hfllm.synthesis.critiques import finds_fault
from hfllm.synthesis.reviser import Draft, Reviser, RevisionFigures, RevisionSettings
from hfllm.synthesis.revision_files import RevisionFile
from hfllm.synthesis.speakers import Speaker, check_critic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Revisions(NamedTuple):
    """The rows of `critique_and_revise`, in the order of their prompts, and what happened, in numbers."""

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
    """Answer prompts, then criticize and revise each answer by principles of a constitution, drawn at random.

    In each round the critic reads the prompt, the answer so far and the critique request of a principle; then its own
    critique and the revision request. The revision is the answer of the next round, which begins without the turns of
    the round before. Conversations follow the chat template; without one they are transcripts (`Human:`,
    `Assistant:`), and what a base model writes beyond its turn is cut.

    The principle and the wordings depend on the seed, the prompt's place and the round alone; sampled texts also on
    the prompts beside it, since those of a batch share random numbers. In several processes call it in one, and
    hand on its rows.

    Args:
        model: writes the first answers.
        tokenizer: its own.
        prompts: texts, or lists of messages that end with the user.
        constitution: see `load_constitution`.
        num_revisions: rounds of critique and revision.
        seed: seed of principles, wordings and samples; the caller's random state is not changed.
        response_length: longest answer, critique and revision, in tokens.
        critic: writes critiques and revisions; by default `model`.
        critic_tokenizer: the critic's, by default `tokenizer`, which must then be the critic's own too.
        revise_only_flagged: keep an answer where the critique finds nothing.
        is_flagged: whether a critique finds something; by default `hfllm.synthesis.critiques.finds_fault`.
        do_sample: sample; greedy if false.
        temperature: of critiques and revisions; first answers are sampled at 1.
        batch_size: prompts in one call of `generate`; four batches are written together.
        use_examples: put the constitution's examples before each critique. By default for base models, which have no
            chat template or the plain one of `hfllm.data.tokenizer`; small instruction-tuned models copy from them.
        save_to: folder for `revisions.jsonl`, a row per line, to which whole chunks are added. A run that was stopped
            is continued by the same call, with the result of one that was not; model, prompts and all else must be
            the same.

    Returns:
        The rows and the figures. A row has `prompt` (messages), `completion` and `chosen` (the last revision, as the
        assistant's message), `rejected` (the first answer, likewise), `messages` (prompt and last revision), and
        `turns`: for each round `answer`, `principle`, `critique_request`, `critique`, `is_flagged`,
        `revision_request` (empty if none was asked for) and `revision`. An answer that was not revised is its own
        revision. Rows whose `chosen` equals `rejected` teach DPO nothing: leave them out there.

    Raises:
        InputError: for a number below 1, prompts that cannot be read, no prompt with room in the context for its
            conversation, a critic with another tokenizer, a critic that says nothing, or a folder of another run.
    """
    critic_tokenizer = check_critic(model, tokenizer, critic, critic_tokenizer)
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
    if not prompts:
        raise InputError("no prompts: there is nothing to answer")
    drafts = []
    for place, prompt in enumerate(prompts):
        messages = read_messages(f"prompt {place + 1}", as_messages(prompt))
        if messages[-1]["role"] == "assistant":
            raise InputError(f"prompt {place + 1} ends with the assistant; expected the user's words last")
        drafts.append(Draft(place, messages))
    return drafts
