"""Episodes: what a policy and its environment write in turn after a prompt, token by token.

Tokens in, tokens out: what was sampled is never decoded and tokenized again, so the policy is trained on the very
tokens that it chose, after those that it read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hfllm.data.rows import Message

# From sequences of token ids and the most tokens to add: for each the sampled tokens, and whether they came to an end.
Continue = Callable[[Sequence[Sequence[int]], int], Sequence[tuple[list[int], bool]]]


@dataclass
class Episode:
    """One prompt and all that follows it.

    Args:
        prompt_ids: the prompt's tokens.
        response_ids: what policy and environment wrote, in order.
        action_mask: for each of `response_ids` 1 if the policy chose it, 0 if the environment wrote it.
        is_ended: whether it came to its end, and was not cut off by a limit of length.
        messages: the response as messages, if it is a conversation.
        calls, failures: calls of tools, and how many of them failed.
        place: among the prompts that were sampled with it.
    """

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)
    is_ended: bool = False
    messages: list[Message] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    place: int = 0

    @property
    def ids(self) -> list[int]:
        """Return all tokens so far."""
        return [*self.prompt_ids, *self.response_ids]

    def act(self, ids: Sequence[int]) -> None:
        """Append tokens that the policy chose."""
        self.response_ids += ids
        self.action_mask += [1] * len(ids)

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens that the environment wrote."""
        self.response_ids += ids
        self.action_mask += [0] * len(ids)


class Environment(Protocol):
    """What answers the policy's turns."""

    def reply(self, episode: Episode, turn_ids: Sequence[int], is_ended: bool, room: int) -> list[int] | None:
        """Return the tokens that follow a turn of the policy, with all that opens its next turn.

        Args:
            episode: all so far, with the turn.
            turn_ids: the tokens of the policy's last turn.
            is_ended: whether it ended its turn; one that was cut off has no room for an answer.
            room: the most tokens that a reply may have.

        Returns:
            `None` to end the episode. A reply that is longer than `room` is left out, and the episode is cut off.
        """
        ...


def run_episodes(
    prompts: Sequence[Sequence[int]],
    continue_ids: Continue,
    environment: Environment,
    response_length: int,
    before_turn: Callable[[Sequence[Episode]], None] | None = None,
) -> list[Episode]:
    """Let the policy act until each episode ends, all unfinished ones together in each turn.

    Args:
        prompts: token ids.
        continue_ids: samples from the policy.
        environment: answers its turns.
        response_length: the most tokens of an episode, with those of the environment.
        before_turn: called with the episodes that continue, before the policy writes their next turns.
    """
    episodes = [Episode(list(prompt), place=place) for place, prompt in enumerate(prompts)]
    going = episodes
    while going:
        if before_turn is not None:
            before_turn(going)
        room = response_length - min(len(episode.response_ids) for episode in going)
        turns = continue_ids([episode.ids for episode in going], room)
        going = [
            episode
            for episode, (ids, is_ended) in zip(going, turns, strict=True)
            if _take_turn(episode, ids, is_ended, environment, response_length)
        ]
    return episodes


def _take_turn(
    episode: Episode, ids: Sequence[int], is_ended: bool, environment: Environment, response_length: int
) -> bool:
    """Append a turn of the policy and the reply to it; return whether the policy's next turn follows."""
    room = response_length - len(episode.response_ids)
    # Others of the batch may have had more room.
    ids, episode.is_ended = list(ids[:room]), is_ended and len(ids) <= room
    episode.act(ids)
    # A reply that fills the episode would leave the policy no token to answer with.
    left = room - len(ids) - 1
    reply = environment.reply(episode, ids, episode.is_ended, left)
    if reply is None:
        return False
    if len(reply) > left:
        episode.is_ended = False
        return False
    episode.read(reply)
    episode.is_ended = False
    return True
