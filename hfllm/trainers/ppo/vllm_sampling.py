"""Sampling responses by vLLM, through TRL's own generation back end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hfllm.errors import InputError, refuse_if
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.rollout import sampling_logprobs
from hfllm.trainers.ppo.setup import UNMODIFIED_SAMPLING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# TRL's back end passes these as its own arguments; other fields of a GenerationConfig do not reach vLLM.
SHAPING = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")
HEARD = {*SHAPING, "pad_token_id", "eos_token_id", "bos_token_id", "suppress_tokens", "stop_strings"}
# Added to the logit of forbidden tokens: the lowest value accepted by vLLM.
NEVER = -100.0


def check_vllm(args: PPOConfig) -> None:
    """Refuse `use_vllm` where vLLM is not installed, or would ignore sampling settings."""
    from trl.import_utils import is_vllm_available

    refuse_if(not is_vllm_available(), "use_vllm=True: vLLM is not installed; pip install 'trl[vllm]'")
    requested = (args.generation_kwargs or {}).items()
    if unheard := sorted(
        name for name, value in requested if name not in HEARD and value != UNMODIFIED_SAMPLING.get(name)
    ):
        raise InputError(f"use_vllm=True cannot be combined with {', '.join(unheard)} of generation_kwargs")


class VllmSampler:
    """A vLLM engine, in this process or a server, following the policy's weights.

    Args:
        args: the `vllm_*` options.
        policy: the model whose weights it samples from.
        generation_config: the trainer's; stop strings and tokens, temperature and the like are taken from it.
        episodes: episodes sampled at once, per process.

    Raises:
        InputError: when vLLM is not installed, or for an unknown setting.
    """

    def __init__(
        self,
        args: PPOConfig,
        policy: "PreTrainedModel",
        accelerator: "Accelerator",
        tokenizer: "PreTrainedTokenizerBase",
        generation_config: "GenerationConfig",
        episodes: int,
    ):
        check_vllm(args)
        from trl.generation.vllm_generation import VLLMGeneration

        self.config, self.tokenizer = generation_config, tokenizer
        self.corrects = args.importance_sampling_cap is not None
        self.longest, self.context = generation_config.max_new_tokens, args.vllm_max_model_length
        sampling: dict[str, Any] = {"stop_token_ids": list(generation_config.eos_token_id)}
        if generation_config.suppress_tokens:
            sampling["logit_bias"] = {token: NEVER for token in generation_config.suppress_tokens}
        if generation_config.stop_strings:
            sampling |= {"stop": generation_config.stop_strings, "include_stop_str_in_output": True}
        self.engine = VLLMGeneration(
            model=policy,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=episodes * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            max_completion_length=self.longest,
            generation_kwargs=sampling,
            **{
                name: getattr(generation_config, name)
                for name in SHAPING
                if getattr(generation_config, name) is not None
            },
        )
        self._synced_at: int | None = None

    def __call__(
        self, prompts: Sequence[Sequence[int]], step: int, device: torch.device, longest: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Sample one response per prompt.

        Args:
            prompts: token ids.
            step: the policy's optimizer step; its weights are sent when the step has changed.
            longest: the most tokens of a response, at most the engine's, the default; further tokens from the engine
                are cut off.

        Returns:
            The same as `generate_responses`, and `sampling_logprobs` (N, R), where the engine gives any.
        """
        if step != self._synced_at:
            self.engine.sync_weights()
            self._synced_at = step
        _, completions, logprobs, *_ = self.engine.generate(
            prompts=[list(ids) for ids in prompts], images=None, num_generations=1
        )
        longest = min(longest or self.longest, self.longest)
        completions = [list(ids)[:longest] for ids in completions]
        width = max(map(len, completions), default=0) or 1
        response_ids = torch.full((len(prompts), width), self.config.pad_token_id, device=device)
        response_mask = torch.zeros_like(response_ids)
        for row, ids in enumerate(completions):
            response_ids[row, : len(ids)] = torch.tensor(ids, device=device)
            response_mask[row, : len(ids)] = 1
        rooms = [min(self._room(prompt), longest) for prompt in prompts]
        ended = [self._is_ended(*pair) for pair in zip(completions, rooms, strict=True)]
        is_ended = torch.tensor(ended, device=device)
        sampled = {"response_ids": response_ids, "response_mask": response_mask, "is_ended": is_ended}
        if logprobs is not None and self.corrects:
            known = [list(each)[:longest] for each in logprobs]
            masks = [[1] * len(ids) for ids in completions]
            sampled["sampling_logprobs"] = sampling_logprobs(
                known, masks, response_ids.shape, "vLLM", may_lack=True
            ).to(device)
        return sampled

    def _room(self, prompt: Sequence[int]) -> int:
        """Return the longest response to a prompt: `vllm_max_model_length` may end one before the length limit."""
        return self.longest if self.context is None else min(self.longest, self.context - len(prompt))

    def _is_ended(self, ids: list[int], room: int) -> bool:
        if len(ids) < room or (ids and ids[-1] in self.config.eos_token_id):
            return True
        text = self.tokenizer.decode(ids) if self.config.stop_strings else ""
        return any(stop in text for stop in self.config.stop_strings or ())
