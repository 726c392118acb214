"""Answer prompts with tools after training, in the very episodes of training."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message
from hfllm.data.tokenizer import end_tokens, tokenize_prompts
from hfllm.environments.episodes import Continue, EnvironmentFactory, Episode, ToolEnvironment, run_episodes
from hfllm.environments.tools import Tool
from hfllm.errors import InputError, refuse_if
from hfllm.generation.responses import fast_option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfllm.environments.tool_turns import ProcessingClass
    from hfllm.multimodal.processors import ImageTensors, Pictures


class ToolRunner:
    """A model with its tools: it calls them, reads their results, and answers, as in the rollouts of `PPOTrainer`.

        runner = ToolRunner(model, tokenizer, [calculator])
        (episode,) = runner([[{"role": "user", "content": "What is 12 * 3?"}]])
        print(episode.messages[-1]["content"])

    Args:
        model: any causal model of transformers, also with an adapter or quantized.
        tokenizer: the model's, or where it reads images its processor; see `ToolTurns`.
        tools: functions, see `ToolBox`; may be empty with an `environment_factory`.
        environment_factory: see `StatefulEnvironments`.
        response_length: the most tokens of an episode, with those of the tools.
        max_tool_calling_iterations, tool_timeout, episode_timeout, max_tool_result_length: as in `PPOConfig`.
        do_sample: sample at `temperature`, instead of decoding greedily.
        seed: of the sampling; the caller's random state is not changed.
        batch_size: prompts answered together.
        suppress_tokens: ids that are never written.

    Raises:
        InputError: for unusable tools, or a tokenizer unable to write or read calls.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "ProcessingClass",
        tools: Sequence[Tool] = (),
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
        *,
        response_length: int = 512,
        max_tool_calling_iterations: int | None = None,
        tool_timeout: float = 10.0,
        episode_timeout: float | None = None,
        max_tool_result_length: int = 1000,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        suppress_tokens: Sequence[int] = (),
    ):
        refuse_if(not tools and environment_factory is None, "ToolRunner: no tools, and no environment_factory")
        for name, value in (("response_length", response_length), ("batch_size", batch_size)):
            refuse_if(value < 1, f"ToolRunner: {name} must be at least 1, got {value}")
        from hfllm.multimodal.processors import place_tokens, unable_to_read

        self.model, self.seed, self.batch_size = model, seed, batch_size
        processing_class, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
        self.tokenizer = tokenizer
        processing_class = tokenizer if unable_to_read(model) else processing_class
        refuse_if(
            tokenizer.pad_token_id is None, "ToolRunner: the tokenizer names no pad_token, by which rows are filled"
        )
        self.response_length, ends = response_length, sorted(end_tokens(tokenizer, model))
        limits = (max_tool_calling_iterations, tool_timeout, max_tool_result_length)
        self.environment = ToolEnvironment(
            tools, processing_class, ends, *limits, factory=environment_factory, episode_timeout=episode_timeout
        )
        self.settings: dict[str, Any] = {"do_sample": do_sample, "pad_token_id": tokenizer.pad_token_id}
        self.settings |= {"eos_token_id": ends, "num_beams": 1, "use_cache": True}
        self.settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
        never = sorted({*suppress_tokens} | place_tokens(model))
        self.settings |= {"suppress_tokens": never} if never else {}

    def __call__(self, prompts: Sequence[Sequence[Message] | Mapping[str, Any]]) -> list[Episode]:
        """Return the episodes of prompts, in their order; `messages` are their turns after the prompt.

        Args:
            prompts: conversations, or rows with a column `prompt`, whose other columns `reset` of an environment gets.

        Raises:
            InputError: for a prompt that leaves the model's context no room for the response.
        """
        rows = [self._row(index, each) for index, each in enumerate(prompts)]
        continue_ids = self._continuing()
        if self.environment.states is None:
            ids, pictures, _ = self.environment.read(rows)
            return self.run(ids, continue_ids, pictures)
        # Each environment has the state of one episode: a batch ends before the next one begins.
        episodes: list[Episode] = []
        for start in range(0, len(rows), self.batch_size):
            begun = self.environment.begin(rows[start : start + self.batch_size])
            ids, pictures, _ = self.environment.read(begun)
            parts = (self._checked(ids), continue_ids, self.environment, self.response_length)
            episodes += run_episodes(*parts, pictures=pictures)
        return episodes

    def run(
        self,
        prompt_ids: Sequence[Sequence[int]],
        continue_ids: Continue | None = None,
        pictures: "Pictures | None" = None,
    ) -> list[Episode]:
        """Return the episodes of tokenized prompts, those of like length together, in the order of the prompts.

        Args:
            continue_ids: samples from the policy; by default the model does, from the seed on.
            pictures: the images of the prompts.
        """
        prompt_ids, continue_ids = self._checked(prompt_ids), continue_ids or self._continuing()
        order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
        result: dict[int, Episode] = {}
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            texts = [prompt_ids[index] for index in indices]
            own = pictures and pictures.of(indices)
            done = run_episodes(texts, continue_ids, self.environment, self.response_length, pictures=own)
            result |= dict(zip(indices, done, strict=True))
        return [result[index] for index in range(len(prompt_ids))]

    def lengths(self, prompts: Sequence[Sequence[Message] | Mapping[str, Any]]) -> list[int]:
        """Return the numbers of tokens of prompts, without what an environment would add to them."""
        rows = [self._row(index, each) for index, each in enumerate(prompts)]
        if self.environment.turns.processor is not None:
            return list(map(len, self.environment.read(rows)[0]))
        schemas = list(map(self.environment.schemas_of, rows))
        return list(map(len, tokenize_prompts([row["prompt"] for row in rows], self.tokenizer, schemas)))

    def _row(self, index: int, prompt: object) -> dict[str, Any]:
        row = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
        messages = row.get("prompt")
        is_conversation = isinstance(messages, Sequence) and not isinstance(messages, str) and bool(messages)
        if not is_conversation or not all(isinstance(each, Mapping) and "role" in each for each in messages):
            raise InputError(
                f"ToolRunner: prompt {index} is {str(prompt)[:80]!r}; expected a list of messages, or a row whose "
                "`prompt` is one"
            )
        return row

    def _checked(self, prompt_ids: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, prompt_ids), default=0)
        if context is not None and longest + self.response_length > context:
            raise InputError(
                f"ToolRunner: a prompt has {longest} tokens; with response_length={self.response_length} the model's "
                f"context of {context} has no room for it"
            )
        return prompt_ids

    def _continuing(self) -> Continue:
        import torch

        from hfllm.generation.scoring import evaluating
        from hfllm.models.devices import forked_random
        from hfllm.multimodal.processors import Pictures

        rounds, ends = itertools.count(), set(self.settings["eos_token_id"])

        def continue_ids(
            sequences: Sequence[Sequence[int]],
            max_new_tokens: int,
            images: "Sequence[Sequence[ImageTensors]] | None" = None,
        ) -> list[tuple[list[int], bool]]:
            inputs = {"input_ids": list(map(list, sequences))}
            batch = self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(self.model.device)
            width = batch["input_ids"].shape[1]
            pictures = Pictures.of_episodes(images) if images else None
            seen = pictures.inputs(batch["input_ids"], batch["attention_mask"].argmax(1).tolist()) if pictures else {}
            with evaluating(self.model), forked_random(self.model.device), torch.inference_mode():
                torch.manual_seed(self.seed + next(rounds))
                fast = {} if seen else fast_option(self.model, width + max_new_tokens, self.settings)
                output = self.model.generate(**batch, **seen, **self.settings, **fast, max_new_tokens=max_new_tokens)
            turns = []
            for row in output[:, width:].tolist():
                length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
                turns.append((row[:length], length > 0 and row[length - 1] in ends))
            return turns

        return continue_ids
