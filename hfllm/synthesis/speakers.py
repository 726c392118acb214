"""A model with its tokenizer, as a speaker in conversations: how long they are for it, and what it says next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.rows import Message
from hfllm.data.tokenizer import next_turn, to_prompt, tokenize_prompts
from hfllm.errors import InputError
from hfllm.generation import responses
from hfllm.generation.responses import Response
from hfllm.models.loading.saved import check_vocabulary, max_length_of, saved_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Conversations tokenized at a time.
ROWS = 1000


class Speaker:
    """A language model that takes the assistant's part.

    Args:
        model: a causal language model.
        tokenizer: its own. With a chat template conversations follow that; without one they are transcripts.
        name: what errors call it.

    Raises:
        InputError: for a tokenizer without padding token, or with tokens that the model has no embeddings for.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str):
        if tokenizer.pad_token_id is None:
            raise InputError(f"the {name}'s tokenizer has no padding token: set tokenizer.pad_token")
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
        """Return what the assistant says next in each conversation, without spaces around it.

        Conversations of like length are sampled together.
        """
        lengths = self.lengths(conversations)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        said = responses.sample_with_ends(
            *(self.model, self.tokenizer),
            [to_prompt(conversations[place], self.tokenizer) for place in order],
            max_new_tokens,
            do_sample,
            batch_size=batch_size,
            seed=seed,
            fast=True,
            stop_strings=(self.next_turn,) if self.next_turn else (),
            temperature=temperature,
        )
        by_place = dict(zip(order, said, strict=True))
        return [Response(by_place[place][0].text.strip(), by_place[place][0].has_ended) for place in range(len(order))]


def check_critic(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    critic: "PreTrainedModel | None",
    critic_tokenizer: "PreTrainedTokenizerBase | None",
) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that the critic reads with.

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
