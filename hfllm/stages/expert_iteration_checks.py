"""What expert iteration reads and refuses before its first run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.runs.command_line import say
from hfllm.stages.expert_iteration import ExpertIterationArguments, Rounds

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.rewards.functions import RewardFunction

Row = Mapping[str, Any]


def reward_functions(script_args: ExpertIterationArguments) -> "list[RewardFunction]":
    """Return the reward functions; on the embedded world by default its exact score.

    Raises:
        InputError: when one does not exist, or is the world's on other data.
    """
    from hfllm.rewards.functions import gold_reward
    from hfllm.stages.rlhf import checked_functions

    if script_args.is_world and not script_args.reward_funcs:
        return [gold_reward]
    return checked_functions(script_args)


def prompts_of(
    script_args: ExpertIterationArguments, model_args: "ModelConfig", functions: "Sequence[RewardFunction]"
) -> tuple[list[Row], list[Row]]:
    """Return the prompts to sample from and the held-out ones; those without room for a response are left out.

    Raises:
        InputError: when they cannot be read, a reward does not work on them, or none has room.
    """
    from hfllm.models.loading.saved import max_length_of
    from hfllm.runs.models import load_config, load_tokenizer
    from hfllm.stages.rlhf import prompt_data
    from hfllm.trainers.ppo.prompts import check_pictures, unfit_prompts

    train_rows, eval_rows = prompt_data(script_args, script_args.seed, functions, timeout=script_args.reward_timeout)
    for rows in (train_rows, eval_rows):
        check_pictures(rows, None, "hfllm expert_iteration")
    if not (name := model_args.model_name_or_path):
        return train_rows, eval_rows
    tokenizer = load_tokenizer(name, model_args.model_revision)
    context, kept = max_length_of(load_config(name, model_args.model_revision)), []
    for kind, rows in (("prompts", train_rows), ("held-out prompts", eval_rows)):
        unfit = dict(unfit_prompts(rows, tokenizer, script_args.response_length, context))
        room = f"no room for --response_length {script_args.response_length} in the context of {context} tokens"
        if len(unfit) == len(rows):
            raise InputError(f"{kind}: all {len(rows)} leave {room}")
        if unfit:
            say(f"expert_iteration: {len(unfit)} of {len(rows)} {kind} are left out: {room}")
        kept.append([row for place, row in enumerate(rows) if place not in unfit])
    return kept[0], kept[1]


def check_before(script_args: ExpertIterationArguments, model_args: "ModelConfig", rounds: Rounds) -> None:
    """Refuse what a round's fine-tuning would refuse after the sampling, and inputs where the rounds write.

    Raises:
        InputError: naming the flag.
    """
    import torch

    from hfllm.data.sources import PYDOC
    from hfllm.models.devices import forked_random
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import check_trainable, load_config, peft_config, try_adapter
    from hfllm.runs.stage import Stage
    from hfllm.stages.sft import check

    written = Path(script_args.output_dir).resolve()
    places = {"model_name_or_path": model_args.model_name_or_path, "dataset_name": script_args.dataset_name}
    for flag, name in places.items():
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(written):
            raise InputError(f"--{flag} {name} lies in {written}, where the rounds write: choose another --output_dir")
    if model_args.model_name_or_path:
        check_trainable(model_args)
        if model_args.use_peft:
            with forked_random(torch.device("cpu")):
                try_adapter(
                    load_config(model_args.model_name_or_path, model_args.model_revision), peft_config(model_args)
                )
    for flags in rounds.runs.values():
        check(*flags)
        # Its rows are not there yet; a source that is always there stands for their file.
        Stage("sft", changed(flags[0], dataset_name=PYDOC), *flags[1:]).check_flags()
