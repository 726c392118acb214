"""What constitutional AI refuses before its first run, since the run that it concerns may come hours later."""

from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse
from hfllm.stages.constitution import REVISIONS, RL, ConstitutionArguments, has_questions
from hfllm.stages.constitution_runs import PRETRAIN, Course
from hfllm.stages.course import check_runs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig

    from hfllm.synthesis.constitution import Constitution

# The fewest demonstrations of which every arm has some, and a held-out one.
FEWEST_DEMONSTRATIONS = 10
OF_JUDGES = ("judge_chain_of_thought", "judge_clamp", "judge_principles")


def check_before(
    script_args: ConstitutionArguments, model_args: "ModelConfig", constitution: "Constitution", course: Course
) -> None:
    """Refuse what would otherwise fail after the first runs.

    Raises:
        InputError: naming the flag, or the file.
    """
    _check_flags(script_args, model_args)
    _check_judge(script_args, constitution)
    _check_inputs(script_args, model_args)
    config = _config_of_first(model_args, course)
    _check_room(script_args, config)
    _check_weights(script_args, model_args, config)
    _check_rewards(course)
    check_runs(course)


def _check_rewards(course: Course) -> None:
    """Refuse rewards by the world's gold answers, which the prompts of these runs do not have."""
    from hfllm.rewards.functions import GOLD_REWARDS

    for name, recipe in course.recipes.items():
        rewards = course.runs[name][0].reward_funcs if recipe == "rlhf" else None
        for reward in GOLD_REWARDS.keys() & set(rewards or ()):
            raise InputError(
                f"--reward_funcs {reward}: only the embedded world has it, not the prompts of this recipe"
            )


def _check_flags(script_args: ConstitutionArguments, model_args: "ModelConfig") -> None:
    for flag in ("num_helpful_prompts", "num_human_pairs"):
        if getattr(script_args, flag) < 0:
            raise InputError(f"--{flag} {getattr(script_args, flag)}: expected at least 0")
    if script_args.is_world and script_args.num_demonstrations < FEWEST_DEMONSTRATIONS:
        raise InputError(
            f"--num_demonstrations {script_args.num_demonstrations}: expected at least {FEWEST_DEMONSTRATIONS}"
        )
    controls = script_args.controls or ()
    if "none" in controls and set(controls) != {"none"}:
        raise InputError(f"--controls {' '.join(controls)}: expected arms, or none alone")
    is_world, reason = script_args.is_world, "the model is the embedded world's"
    refuse(is_world and model_args.model_revision != "main", "--model_revision", reason)
    for flag in ("load_in_8bit", "load_in_4bit"):
        refuse(is_world and getattr(model_args, flag), f"--{flag}", f"{reason}, which is trained whole first")


def _check_judge(script_args: ConstitutionArguments, constitution: "Constitution") -> None:
    last, number, most = script_args.last_stage, script_args.judge_principles, len(constitution.principles)
    for flag in OF_JUDGES:
        refuse(last != RL and bool(getattr(script_args, flag)), f"--{flag}", f"--last_stage {last} needs no judge")
    if number is not None and not 1 <= number <= most and has_questions(constitution):
        raise InputError(f"--judge_principles {number}: expected 1 to {most}, the principles of {constitution.name!r}")


def _check_inputs(script_args: ConstitutionArguments, model_args: "ModelConfig") -> None:
    """Refuse models and rows that lie where the runs write their own."""
    written = Path(script_args.output_dir)
    places = {
        **{"model_name_or_path": written, "critic_model_name_or_path": written},
        **{f"{kind}dataset_name": written / "data" for kind in ("", "eval_", "helpful_", "preference_")},
    }
    for flag, place in places.items():
        name = getattr(model_args if flag == "model_name_or_path" else script_args, flag)
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(place.resolve()):
            raise InputError(f"--{flag} {name} lies in {place}, where the runs write: choose another --output_dir")


def _config_of_first(model_args: "ModelConfig", course: Course) -> "PreTrainedConfig":
    """Return the config of the model that is asked first: the named one, or the one that pretraining will make."""
    from hfllm.runs.chain import Chain
    from hfllm.stages.architecture import config_to_train

    made = {PRETRAIN: course.runs[PRETRAIN]} if PRETRAIN in course.runs else {}
    return config_to_train(model_args, Chain("constitution", made))


def _check_room(script_args: ConstitutionArguments, config: "PreTrainedConfig") -> None:
    """Refuse answers so long that no conversation of answer, critique and revision fits, whatever is asked."""
    from hfllm.models.loading.saved import max_length_of

    context, longest = max_length_of(config), script_args.longest
    if context is not None and 3 * longest >= context:
        raise InputError(
            f"--response_length {longest}: answer, critique and revision may take three times that, and the model's "
            f"context has {context} tokens"
        )


def _check_weights(script_args: ConstitutionArguments, model_args: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Refuse weights that cannot be trained, and an adapter that fits no layer."""
    from hfllm.models.devices import forked_random
    from hfllm.runs.models import check_trainable, peft_config, try_adapter

    if script_args.last_stage == REVISIONS:
        refuse(model_args.use_peft, "--use_peft", f"--last_stage {REVISIONS} trains nothing of yours")
        return
    if model_args.model_name_or_path:
        check_trainable(model_args)
    if model_args.use_peft:
        import torch

        with forked_random(torch.device("cpu")):
            try_adapter(config, peft_config(model_args))
