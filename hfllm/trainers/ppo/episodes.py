"""From episodes, partly written by an environment, to the training tensors of PPO."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hfllm.environments.episodes import EnvironmentFactory, Episode, ToolEnvironment, run_episodes
from hfllm.environments.tools import Tool
from hfllm.errors import InputError, refuse_if
from hfllm.multimodal.processors import Pictures, ProcessingClass
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.rollout import pad_prompts, sampling_logprobs
from hfllm.trainers.ppo.sampling import SampledLogprobs, TurnCaches

if TYPE_CHECKING:
    from hfllm.trainers.ppo.base_trainer import ActorCriticTrainer

# The results of a `rollout_func` besides columns for the rewards; TRL's names, and `completions` and `is_ended`.
PICTURES_IN_SOME = "deepspeed with pictures in some episodes of a rollout only: let each have one, or use DDP"
NEEDED, KNOWN = ("prompt_ids", "completion_ids"), ("env_mask", "logprobs", "completions", "is_ended")


def as_batch(episodes: Sequence[Episode], pad_token_id: int, device: torch.device) -> dict[str, Any]:
    """Return episodes as the tensors of `PPOTrainer.sample`, and `columns` for the rewards: their `action_mask`."""
    prompt_ids, prompt_mask = pad_prompts([episode.prompt_ids for episode in episodes], pad_token_id, device)
    longest = max(1, *(len(episode.response_ids) for episode in episodes))
    response_ids = torch.full((len(episodes), longest), pad_token_id, dtype=torch.long)
    response_mask, action_mask = torch.zeros_like(response_ids), torch.zeros_like(response_ids)
    for row, episode in enumerate(episodes):
        length = len(episode.response_ids)
        response_ids[row, :length] = torch.tensor(episode.response_ids, dtype=torch.long)
        response_mask[row, :length] = 1
        action_mask[row, :length] = torch.tensor(episode.action_mask, dtype=torch.long)
    pictures = Pictures.of_episodes([episode.images for episode in episodes])
    return {
        **({} if pictures is None else {"pictures": pictures}),
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "response_ids": response_ids.to(device),
        "response_mask": response_mask.to(device),
        "action_mask": action_mask.to(device),
        "is_ended": torch.tensor([episode.is_ended for episode in episodes], device=device),
        "witness": None,
        "columns": {"action_mask": [list(episode.action_mask) for episode in episodes]},
    }


def check_engine(trainer: "ActorCriticTrainer", what: str) -> None:
    """Refuse what samples more often in one process than in another, such as tools, where all must sample in step."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError(f"{what} do not work with DeepSpeed ZeRO-3, which samples in step: use ZeRO-2 or DDP")
    if trainer.vllm is not None and trainer.accelerator.num_processes > 1:
        raise InputError(f"{what} with use_vllm=True work in one process, since vLLM samples for all in step")


def environment_of(
    tools: Sequence[Tool] | None,
    factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None,
    rollout_func: object,
    processing_class: ProcessingClass,
    end_token_ids: Sequence[int],
    args: PPOConfig,
) -> ToolEnvironment | None:
    """Return the environment of a policy with tools, `None` without any.

    Args:
        processing_class: the policy's processor if it reads images, or else its tokenizer.

    Raises:
        InputError: for unusable tools or an unusable factory, or next to a `rollout_func`.
    """
    if not tools and factory is None:
        return None
    if rollout_func is not None:
        argument = "tools" if tools else "environment_factory"
        raise InputError(f"{argument} and rollout_func: give one of them, which says how episodes go")
    limits = (args.max_tool_calling_iterations, args.tool_timeout, args.max_tool_result_length)
    return ToolEnvironment(tools or [], processing_class, end_token_ids, *limits, factory, args.episode_timeout)


def own_rewards(environment: ToolEnvironment | None) -> list[Callable[..., list[float]]]:
    """Return the environments' own rewards, with the names of their classes."""
    return [] if environment is None or environment.states is None else environment.states.rewards


def act(
    rows: Sequence[Mapping[str, Any]], environment: ToolEnvironment, trainer: "ActorCriticTrainer"
) -> dict[str, Any]:
    """Return the episodes of a policy with tools as `as_batch` does, with their `completions` and `metrics`.

    Raises:
        InputError: when an environment makes a prompt too long for the model.
    """
    rows = environment.begin(rows)
    prompts, pictures, filled_prompts = environment.read(rows)
    longest = max(map(len, prompts))
    if trainer.context is not None and longest + trainer.args.response_length > trainer.context:
        raise InputError(
            f"environment_factory: after reset a prompt has {longest} tokens; with response_length="
            f"{trainer.args.response_length} the model's context of {trainer.context} has no room for it"
        )
    device, witness = trainer.accelerator.device, trainer._witness(len(rows))
    done = _recorded(prompts, environment, trainer, witness, pictures)
    batch = as_batch(done, trainer.sampling_config.pad_token_id, device)
    if trainer.args.deepspeed_plugin is not None:
        counts = torch.tensor([sum(bool(episode.images) for episode in done), len(done)], device=device)
        with_images, total = trainer._sum_over_processes(counts).tolist()
        refuse_if(0 < with_images < total, PICTURES_IN_SOME)
    # A replacement of `continue_ids` may attribute tokens to the policy that it did not sample.
    if witness is not None and witness.saw(batch["response_ids"], batch["action_mask"]):
        batch["witness"] = witness
    batch["columns"]["tools"] = [*map(environment.schemas_of, rows)]
    if environment.states is not None:
        batch["columns"]["environments"] = environment.states.current
    if environment.states is not None or pictures is not None:
        batch["prompts"] = filled_prompts
    batch["completions"] = [episode.messages for episode in done]
    batch["metrics"] = {
        "tools/call_frequency": torch.tensor([float(episode.calls) for episode in done], device=device),
        "tools/failed_calls": torch.tensor([float(episode.failures) for episode in done], device=device),
    }
    return batch


def _recorded(
    prompts: Sequence[Sequence[int]],
    environment: ToolEnvironment,
    trainer: "ActorCriticTrainer",
    witness: SampledLogprobs | None,
    pictures: Pictures | None,
) -> list[Episode]:
    """Run episodes, and let the witness record all turns at their positions."""
    parts = (prompts, trainer.continue_ids, environment, trainer.args.response_length)
    if witness is None:
        return run_episodes(*parts, pictures=pictures)

    def begin_turn(going: Sequence[Episode]) -> None:
        witness.begin([episode.place for episode in going], [len(episode.response_ids) for episode in going])

    trainer._recorder, witness.caches = witness, TurnCaches()
    try:
        return run_episodes(*parts, begin_turn, pictures)
    finally:
        trainer._recorder = witness.caches = None


def from_rollout_func(
    output: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], trainer: "ActorCriticTrainer"
) -> dict[str, Any]:
    """Return the output of the user's `rollout_func` for the rows' prompts, as `as_batch` does.

    Args:
        output: as of TRL's GRPOTrainer: `prompt_ids` and `completion_ids`, lists of token ids per prompt;
            `env_mask` with 1 for tokens of the completion chosen by the policy and 0 for others, by default all
            ones. `logprobs`, a number for each of the `completion_ids`, are those of whatever sampled them, for
            `importance_sampling_cap`; others are computed by the trained weights. Also `is_ended`, by
            default whether the last token ends a response and is the policy's; `completions`, texts or lists of
            messages for the rewards, by default the decoded tokens. Anything else is a column for the rewards: a list
            with an entry per prompt, or one value for all.
    """
    if missing := [name for name in NEEDED if name not in output]:
        raise InputError(f"rollout_func must return {' and '.join(NEEDED)}; missing: {', '.join(missing)}")
    for name in (*NEEDED, *KNOWN):
        if output.get(name) is not None and len(output[name]) != len(rows):
            raise InputError(f"rollout_func returned {len(output[name])} {name} for {len(rows)} prompts")
    masks = output.get("env_mask") or [[1] * len(ids) for ids in output["completion_ids"]]
    parts = zip(output["prompt_ids"], output["completion_ids"], masks, strict=True)
    episodes = [Episode(*(list(map(int, ids)) for ids in each)) for each in parts]
    for index, episode in enumerate(episodes):
        _check(episode, f"rollout_func, prompt {index}", trainer)
        ends = episode.response_ids[-1:] and episode.response_ids[-1] in trainer.eos_token_ids
        episode.is_ended = bool(ends and episode.action_mask[-1])
    for episode, is_ended in zip(episodes, output.get("is_ended") or [], strict=False):
        episode.is_ended = bool(is_ended)
    batch = as_batch(episodes, trainer.sampling_config.pad_token_id, trainer.accelerator.device)
    for name, values in output.items():
        if name not in (*NEEDED, *KNOWN):
            is_each = isinstance(values, list) and len(values) == len(rows)
            batch["columns"][name] = values if is_each else [values] * len(rows)
    if output.get("logprobs") is not None and trainer.args.importance_sampling_cap is not None:
        shape = batch["response_ids"].shape
        batch["sampling_logprobs"] = sampling_logprobs(output["logprobs"], masks, shape, "rollout_func").to(
            batch["response_ids"].device
        )
    if output.get("completions") is not None:
        batch["completions"] = list(output["completions"])
    return batch


def _check(episode: Episode, origin: str, trainer: "ActorCriticTrainer") -> None:
    """Refuse an episode that does not fit the model, or actions impossible for the policy."""
    length, longest, context = len(episode.response_ids), trainer.args.response_length, trainer.context
    if len(episode.action_mask) != length:
        raise InputError(f"{origin}: env_mask has {len(episode.action_mask)} entries for {length} completion_ids")
    if wrong := {*episode.action_mask} - {0, 1}:
        raise InputError(f"{origin}: env_mask must hold 0 and 1, got {min(wrong)}")
    refuse_if(not episode.prompt_ids, f"{origin}: prompt_ids is empty")
    refuse_if(length > longest, f"{origin}: completion_ids has {length} tokens; response_length is {longest}")
    if context is not None and len(episode.ids) > context:
        raise InputError(f"{origin}: {len(episode.ids)} tokens; the model's context is {context}")
    vocabulary = trainer.policy.config.get_text_config().vocab_size
    if wrong := [token for token in episode.ids if not 0 <= token < vocabulary]:
        raise InputError(f"{origin}: token {wrong[0]} is none of the policy's {vocabulary}")
    chosen = {token for token, is_action in zip(episode.response_ids, episode.action_mask, strict=True) if is_action}
    if never := chosen & {*trainer.actor.never_sampled}:
        raise InputError(f"{origin}: env_mask says that the policy chose token {min(never)}, which is never sampled")
