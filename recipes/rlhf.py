"""Align a language model by PPO against a reward. With no flags: from nothing to an aligned model.

    hfllm rlhf
    hfllm rlhf --model_name_or_path NAME --dataset_name prompts.jsonl --reward_funcs my.py:score
    accelerate launch recipes/rlhf.py --model_name_or_path NAME --dataset_name prompts.jsonl --reward_funcs my.py:score

Without `--model_name_or_path` a model is pretrained and fine-tuned on the embedded world first, and without a reward
a reward model is trained first; both under the output folder, where they are reused when this is run again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.rlhf.flags import RlhfArguments
from hfllm.trainers.ppo.options import PPOOptions

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.trainers.ppo.config import PPOConfig


def parse(argv: Sequence[str]) -> tuple[RlhfArguments, "PPOConfig", "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    library = ("hfllm.trainers.ppo.config.PPOConfig", "trl.ModelConfig")
    settings = world_settings("rlhf")
    return parse_recipe(argv, __doc__, RlhfArguments, library, "outputs/rlhf", settings, shown=(PPOOptions,))


@releases_folders
@trusts_code_if_asked
def main(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, align, compare before and after, save, report. Return the metrics."""
    from transformers import set_seed

    from hfllm.data.loading import world_of
    from hfllm.evaluation import alignment
    from hfllm.multimodal.freezing import freeze
    from hfllm.rewards.models import RewardEnsemble
    from hfllm.runs.models import load_value_model, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.pretrain.flags import config_to_train
    from hfllm.stages.rlhf import build as rlhf
    from hfllm.stages.rlhf import flags as rlhf_flags
    from hfllm.stages.rlhf.build import checked_tools
    from hfllm.stages.shared import load_policy, next_lines
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.engines import gather_parameters
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.ppo.trainer import PPOTrainer

    # Refuse what cannot work before anything is trained.
    rlhf.check(training_args)
    before = rlhf.stages_before(script_args, training_args, model_args)
    files = shared.files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    stage = Stage("rlhf", script_args, training_args, model_args, before=before.parsed, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    functions = rlhf.checked_functions(script_args)
    tools = checked_tools(script_args, training_args, model_args)
    train_rows, eval_rows = rlhf.prompt_data(
        script_args, training_args.seed, functions, tools, training_args.reward_timeout
    )
    rlhf.check_rewards(script_args, training_args, len(functions), tools.has_reward)
    policy_config = config_to_train(model_args, before)
    train_rows, eval_rows = (
        rlhf.fitting_prompts(script_args, training_args, model_args, rows, policy_config, tools)
        for rows in (train_rows, eval_rows)
    )
    rows = [*train_rows, *eval_rows]
    checked = (rows, policy_config, bool(before.runs), tools)
    rlhf.check_models(script_args, training_args, model_args, *checked)
    ptx_dataset = rlhf.ptx_texts(script_args, training_args)

    # The stages before: a policy to start from, and reward models.
    stage.announce()
    metrics_before = before.run()
    policy_args = replace(model_args, model_name_or_path=before.model("sft") or model_args.model_name_or_path)
    reward_models = before.models("reward") or script_args.reward_model_name_or_path or []

    # The weights of an adapter are new, and so is the head of a critic that is a language model.
    set_seed(training_args.seed)
    policy, tokenizer = load_policy(policy_args, policy_config, training_args.output_dir)
    freeze(policy, script_args.freeze_vision, script_args.freeze_text)
    rewards = rlhf.build_rewards(functions, reward_models, script_args, policy_args)
    trainer_args, rewards = rlhf.log_gold_reward(script_args, trainer_args, rewards)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=trainer_args,
        train_dataset=[dict(row) for row in train_rows],
        eval_dataset=[dict(row) for row in eval_rows],
        processing_class=tokenizer,
        value_model=load_value_model(script_args.value_model, policy_args, reward_models),
        peft_config=peft_config(model_args),
        ptx_dataset=ptx_dataset,
        tools=tools.functions,
        environment_factory=tools.environment_factory,
    )
    use_plain_lines(trainer)
    rates = rlhf.rates_used(trainer_args, trainer)
    for reward in rewards:
        if isinstance(reward, RewardEnsemble):
            rlhf.calibrate(reward, trainer, train_rows[: rlhf_flags.CALIBRATION_PROMPTS])

    # Evaluate the policy on held-out prompts, train it by PPO, and evaluate it again.
    held_out = (world_of(script_args), script_args.num_eval_prompts)
    with gather_parameters(trainer.actor):
        unaligned = alignment.evaluate_policy(trainer, *held_out)
    train(trainer, stage.checkpoint, stage.identity)
    with gather_parameters(trainer.actor):
        aligned = alignment.evaluate_policy(trainer, *held_out)
    trainer.save_model()

    metrics = alignment.alignment_metrics(unaligned, aligned)
    reward_metrics = metrics_before.get("reward", {}).items()
    accuracy = {name: value for name, value in reward_metrics if name.startswith("reward_model_accuracy")}
    counts = {"train_prompts": len(train_rows), "eval_prompts": len(eval_rows)}
    return stage.finish(
        {**metrics, "episodes": trainer.episodes, **accuracy, **counts, **scaled, **rates},
        trainer,
        alignment.alignment_summary(metrics),
        tables=alignment.alignment_tables(unaligned, aligned),
        curves=alignment.alignment_plots(trainer.state.log_history),
        next_steps=next_lines(training_args.output_dir, eval_rows[0]["prompt"], policy_config, model_args.use_peft),
        too_wide=(alignment.FAMILIES,),
        models={"model": policy_args.model_name_or_path, "reward model": reward_models},
    )


if __name__ == "__main__":
    run(main, parse)
