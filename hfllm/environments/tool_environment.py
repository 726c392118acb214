"""Tools as the environment of a policy: it calls them, reads what they return, and answers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.tokenizer import tokenize_prompts
from hfllm.environments.episodes import Episode
from hfllm.environments.stateful import EnvironmentFactory, StatefulEnvironments
from hfllm.environments.tool_turns import ToolTurns
from hfllm.environments.tools import Tool, ToolBox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ToolEnvironment:
    """Environment that answers calls of tools; a turn without calls ends the episode.

    Args:
        tools, timeout, max_length: see `ToolBox`.
        tokenizer, end_token_ids: see `ToolTurns`.
        max_iterations: turns with calls that are answered; the call after them ends the episode. `None` for any
            number, as far as the response has room.
        factory: see `StatefulEnvironments`, or `None` for tools that keep nothing of an episode.

    Raises:
        InputError: for tools without schemas, a factory that does not serve, or a tokenizer that cannot write or read
            calls.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        tokenizer: "PreTrainedTokenizerBase",
        end_token_ids: Sequence[int],
        max_iterations: int | None = None,
        timeout: float = 10.0,
        max_length: int = 1000,
        factory: EnvironmentFactory | None = None,
    ):
        self.states = factory and StatefulEnvironments(factory, tools, timeout, max_length)
        self.tools = self.states.tools if self.states else ToolBox(tools, timeout, max_length)
        self.turns = ToolTurns(tokenizer, self.tools.schemas, end_token_ids)
        self.max_iterations = max_iterations

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Reset what keeps a state, and return the rows with what it says in their prompts."""
        if self.states is None:
            return list(rows)
        return [{**row, "prompt": prompt} for row, prompt in zip(rows, self.states.begin(rows), strict=True)]

    def prompt_ids(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the tokens of the prompts that `begin` has returned.

        What environments say in them is plain text, as results of tools are, also where it spells special tokens.
        """
        tokenizer, schemas = self.turns.tokenizer, self.tools.schemas
        ids = tokenize_prompts([row["prompt"] for row in rows], tokenizer, [schemas] * len(rows))
        for place, told in enumerate(self.states.told if self.states else ()):
            if self.turns.forges(told):
                (ids[place],) = tokenize_prompts([rows[place]["prompt"]], tokenizer, [schemas], as_plain_text=True)
        return ids

    def reply(self, episode: Episode, turn_ids: Sequence[int], is_ended: bool, room: int) -> list[int] | None:
        """Call the tools that a turn asks for, and return the tokens of what they say."""
        message = self.turns.parse(turn_ids)
        answered = sum("tool_calls" in earlier for earlier in episode.messages)
        episode.messages.append(message)
        calls = message.get("tool_calls")
        if not calls or not is_ended or (self.max_iterations is not None and answered >= self.max_iterations):
            return None
        tools = self.states.boxes[episode.place] if self.states else self.tools
        results = [tools.call(call) for call in calls]
        episode.calls += len(results)
        episode.failures += sum(has_failed for _, has_failed in results)
        messages = [result for result, _ in results]
        ids = [*self.turns.end_of(turn_ids), *self.turns.reply_ids(messages)]
        if len(ids) <= room:
            episode.messages += messages
        return ids
