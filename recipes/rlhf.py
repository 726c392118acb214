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
from hfllm.runs.recipes import Recipe
from hfllm.stages.rlhf.flags import RlhfArguments
from hfllm.trainers.ppo.options import PPOOptions

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.trainers.ppo.config import PPOConfig

RECIPE = Recipe(
    makes="an aligned model",
    needs={"model_name_or_path": "sft", "reward_model_name_or_path": "reward"},
    runs_own_chain=True,
    minutes=0.8,
)


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

    from hfllm.evaluation import alignment
    from hfllm.runs.models import named_model, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.pretrain.flags import config_to_train
    from hfllm.stages.rlhf import build as rlhf
    from hfllm.stages.rlhf import flags as rlhf_flags
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.engines import gather_parameters
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.ppo.trainer import PPOTrainer
    from hfllm.trainers.precision import with_fast_products

    # Refuse what cannot work before anything is trained.
    rlhf_flags.check(script_args, training_args, model_args)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    before = rlhf_flags.stages_before(script_args, training_args, model_args)
    files = shared.files_changed(script_args, [name], revision)
    stage = Stage("rlhf", script_args, training_args, model_args, before=before.parsed, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    functions = rlhf.checked_functions(script_args.reward_funcs)
    has_reward = bool(functions or script_args.reward_model_name_or_path)
    tools = rlhf.checked_tools(script_args, name, revision, has_reward)
    trial = (functions, tools, training_args.reward_timeout)
    train_rows, eval_rows = rlhf.prompt_data(script_args, training_args.seed, *trial)
    rlhf_flags.check_rewards(script_args, training_args)
    policy_config = config_to_train(name, revision, before)
    rlhf.check_rows([*train_rows, *eval_rows], policy_config)
    fit = (policy_config, training_args.response_length, tools, script_args.chat_template_path)
    room = rlhf.room_of(name, revision, *fit) if name else None
    if script_args.filter_prompts:
        train_rows, eval_rows = (
            rlhf.fitting_prompts(rows, room, script_args.dataset_name) for rows in (train_rows, eval_rows)
        )
    rows = [*train_rows, *eval_rows]
    rlhf.check_models(script_args, training_args, model_args, rows, policy_config, trains_first=bool(before.runs))
    if room is not None and not script_args.filter_prompts:
        rlhf.check_fit(rows, room)
    documents = (script_args.num_prompts, training_args.seed, script_args.world_seed)
    ptx_dataset = rlhf.ptx_texts(script_args.ptx_dataset_name, *documents, script_args.max_row_bytes)

    # The stages before: a policy to start from, and reward models.
    stage.announce()
    metrics_before = before.run()
    start = replace(named_model(model_args), name=before.model("sft") or name)
    reward_models = before.models("reward") or script_args.reward_model_name_or_path or []

    # The weights of an adapter are new, and so is the head of a critic that is a language model.
    set_seed(training_args.seed)
    policy, tokenizer = rlhf.load_policy(start, policy_config, script_args, training_args.output_dir)
    shares = training_args.shared_base
    members = [rlhf.load_reward(each, start, shares) for each in reward_models]
    rewards = rlhf.build_rewards(functions, members, script_args.reward_aggregation, script_args.uncertainty_coef)
    trainer_args, rewards = rlhf.log_gold_reward(trainer_args, rewards, script_args.dataset_name)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=with_fast_products(trainer_args, policy, stage.checkpoint),
        train_dataset=[dict(row) for row in train_rows],
        eval_dataset=[dict(row) for row in eval_rows],
        processing_class=tokenizer,
        value_model=rlhf.load_critic(script_args.value_model, start, reward_models, shares),
        peft_config=peft_config(model_args),
        ptx_dataset=ptx_dataset,
        tools=tools.functions,
        environment_factory=tools.environment_factory,
    )
    use_plain_lines(trainer)
    rates = rlhf.learning_rates(trainer, trainer_args.learning_rate, trainer_args.value_learning_rate)
    rlhf.calibrate(rewards, trainer, train_rows[: rlhf_flags.CALIBRATION_PROMPTS])

    # Evaluate the policy on held-out prompts, train it by PPO, and evaluate it again.
    held_out = (script_args.world, script_args.num_eval_prompts)
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
    question = (eval_rows[0]["prompt"], policy_config)
    return stage.finish(
        {**metrics, "episodes": trainer.episodes, **accuracy, **counts, **scaled, **rates},
        trainer,
        alignment.alignment_summary(metrics),
        tables=alignment.alignment_tables(unaligned, aligned),
        curves=alignment.alignment_plots(trainer.state.log_history),
        next_steps=shared.next_lines(training_args.output_dir, *question, model_args.use_peft),
        too_wide=(alignment.FAMILIES,),
        models={"model": start.name, "reward model": reward_models},
    )


if __name__ == "__main__":
    run(main, parse)
