"""A model that answers conversations, for the terminal and for a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from hfllm.data.formats import Message, unspelled
from hfllm.data.images.rows import words_of_places
from hfllm.data.thoughts import OPEN, thinking_message
from hfllm.data.tokenizer import end_tokens, template_errors, tokenize_prompts
from hfllm.environments.runner import ToolRunner
from hfllm.environments.tool_turns import ToolTurns
from hfllm.errors import InputError, one_line
from hfllm.generation.streaming import Streamed, StreamSettings, Write, stream
from hfllm.models.loading.saved import max_length_of
from hfllm.multimodal.processors import Pictures, encode_messages, place_tokens
from hfllm.rewards.functions import transcript
from hfllm.runs.models import named_model
from hfllm.stages.chat.flags import ModelArguments
from hfllm.stages.shared import load_speaking, processor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# The end of a prompt, where a chat template may open a thought.
TAIL = 16
Encoded = tuple[list[int], Mapping[str, torch.Tensor]]


@dataclass
class Speaker:
    """A model that answers conversations.

    Args:
        model, tokenizer: loaded.
        processor: of a vision-language model.
        settings: of its sampling, where they differ from its generation config.
        max_new_tokens: the longest answer.
        runner: answers with tools, `None` without.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    processor: "ProcessorMixin | None" = None
    settings: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
    runner: ToolRunner | None = None

    def set_temperature(self, temperature: float) -> None:
        """Sample at a temperature, 0 is greedy."""
        self.settings.pop("temperature", None)
        self.settings |= {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})

    def answer(self, messages: Sequence[Message], write: Write) -> list[Message]:
        """Return the messages that answer a conversation, and write them meanwhile.

        Ctrl-C ends the answer, which is kept as far as it came.

        Raises:
            InputError: when the conversation has no room in the model's context, or the chat template cannot write it.
        """
        if self.runner is not None:
            return self._with_tools(messages, write)
        encoded = self.encoded(messages)
        answer = self.speak(encoded, StreamSettings(self.settings), write)
        return [thinking_message(answer.text, self.opens_thought(encoded[0]))]

    def opens_thought(self, ids: Sequence[int]) -> bool:
        """Return whether a prompt ends with the beginning of a thought, as some chat templates write it."""
        return self.tokenizer.decode(ids[-TAIL:]).rstrip().endswith(OPEN)

    def speak(self, encoded: Encoded, settings: StreamSettings, write: Write, max_new_tokens: int = 0) -> Streamed:
        """Generate one answer to an encoded conversation, and hand on its words meanwhile.

        Args:
            settings: with what differs from the model's generation config.
            max_new_tokens: at most the speaker's own; 0 is that.

        Raises:
            InputError: when the conversation has no room in the model's context.
        """
        ids, images = encoded
        if self.room(len(ids)) <= 0:
            raise InputError(f"{len(ids)} tokens leave no room for an answer in the model's context")
        inputs = Pictures([images]).inputs(torch.tensor([ids], device=self.model.device), [0]) if images else {}
        ends = sorted(end_tokens(self.tokenizer, self.model))
        sampling = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": ends, "num_beams": 1}
        sampling |= {"suppress_tokens": sorted(place_tokens(self.model)) or None, **settings.sampling}
        room = self.room(len(ids))
        sampling["max_new_tokens"] = min(max_new_tokens or room, room)
        return stream(self.model, self.tokenizer, ids, replace(settings, sampling=sampling), write, **inputs)

    def _with_tools(self, messages: Sequence[Message], write: Write) -> list[Message]:
        self.runner.response_length = self.room(self.length(messages))
        sampling = _own_sampling(self.model) | self.settings
        self.runner.settings |= {name: value for name, value in sampling.items() if value is not None}
        # The same question may have another answer.
        self.runner.seed += 1
        try:
            (episode,) = self.runner([self._plain(messages)])
        except (ValueError, *template_errors()) as error:
            raise self._unwritable(error) from None
        write(transcript(episode.messages), ())
        return episode.messages

    def _plain(self, messages: Sequence[Message]) -> list[Message]:
        return plain_messages(messages, self.runner.environment.turns)

    def length(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a conversation."""
        if self.runner is None:
            return len(self.encoded(messages)[0])
        try:
            return self.runner.lengths([self._plain(messages)])[0]
        except (ValueError, *template_errors()) as error:
            raise self._unwritable(error) from None

    def room(self, length: int) -> int:
        """Return how many tokens an answer to a conversation of so many may have; nothing or less is no room."""
        context = max_length_of(self.model.config)
        return self.max_new_tokens if context is None else min(self.max_new_tokens, context - length)

    @staticmethod
    def _unwritable(error: Exception) -> InputError:
        if isinstance(error, InputError):
            return error
        return InputError(f"the chat template cannot write this conversation: {one_line(error)}")

    def encoded(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Encoded:
        """Return the tokens of a conversation up to the answer, and the tensors of its images.

        Args:
            tools: schemas that the chat template shows.

        Raises:
            InputError: when the chat template cannot write the conversation.
        """
        try:
            if self.processor is not None:
                # Not by the processor itself: some cannot take both images and this.
                plain = [_without_tokens(message, self.tokenizer, self.processor) for message in messages]
                options = {"tools": list(tools)} if tools else {}
                return encode_messages(plain, self.processor, add_generation_prompt=True, **options)
            shown = None if tools is None else [list(tools)]
            return tokenize_prompts([list(messages)], self.tokenizer, shown, as_plain_text=True)[0], {}
        except (ValueError, *template_errors()) as error:
            raise self._unwritable(error) from None


def plain_messages(messages: Sequence[Message], turns: ToolTurns) -> list[Message]:
    """Return messages in which what was typed, and what tools said, spells no mark of a turn."""
    return [
        {**message, "content": turns.without_marks(message["content"])}
        if message["role"] != "assistant" and isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _own_sampling(model: "PreTrainedModel") -> dict[str, Any]:
    """Return how a model's generation config samples."""
    own = model.generation_config
    if not own.do_sample:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}


def _without_tokens(message: Message, tokenizer: "PreTrainedTokenizerBase", processor: "ProcessorMixin") -> Message:
    """Return a message of a person in which nothing spells a special token, or one that stands for an image."""
    if message["role"] == "assistant":
        return message
    tokens = [each.content for each in tokenizer.added_tokens_decoder.values() if each.special]
    tokens += words_of_places(processor)
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": unspelled(tokens, content)}
    parts = [{**part, "text": unspelled(tokens, part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


def load_speaker(args: ModelArguments) -> Speaker:
    """Load the model that the flags name."""
    from trl import ModelConfig

    names = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")
    model = named_model(ModelConfig(**{name: getattr(args, name) for name in names}))
    processor = processor_of(model.name, model.revision)
    loaded = load_speaking(model, processor)
    set_seed(args.seed)
    return Speaker(loaded.model, loaded.tokenizer, processor, max_new_tokens=args.max_new_tokens)
