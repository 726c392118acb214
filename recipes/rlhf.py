"""Align a language model by PPO against a reward. With no flags: from nothing to an aligned model.

    accelerate launch recipes/rlhf.py
    accelerate launch recipes/rlhf.py --model_name_or_path NAME --dataset_name prompts.jsonl --reward_funcs my.py:score

Without `--model_name_or_path` a model is pretrained and fine-tuned on the embedded world first, and without a reward
a reward model is trained first; both under the output folder, where they are reused when this is run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from hfllm.cli import DataArguments, parse_recipe, run

CONFIG = Path(__file__).parent / "configs" / "rlhf" / "world.yaml"


@dataclass
class RlhfArguments(DataArguments):
    """Prompts, rewards, and the settings of the stages before."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A sequence-classification model with one label as the reward."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: path/to/file.py:function, or 'gold' (the embedded world's)."},
    )
    value_model: str = field(
        default="head",
        metadata={"help": "'head' on the policy's trunk, 'reward' (starts as the reward model), or a model's name."},
    )
    num_prompts: int = field(default=8192, metadata={"help": "Prompts of the embedded world to sample from."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts, at most this many."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning stage."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the reward-model stage."})


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig

    from hfllm.trainers.ppo_config import PPOConfig

    return parse_recipe(
        (RlhfArguments, PPOConfig, ModelConfig), ["--output_dir", "outputs/rlhf", *argv], CONFIG, __doc__
    )


def main(script_args: RlhfArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Make what is missing, align, compare before and after, save, report. Returns the metrics."""
    from hfllm.evaluation.alignment import alignment_metrics, alignment_plots, alignment_tables, judge_policy
    from hfllm.stages import Stage, load_policy, load_scorer, load_tokenizer, peft_config, world_of
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.ppo_trainer import PPOTrainer

    stage = Stage("rlhf", script_args, training_args, model_args)
    if stage.report is not None:
        return stage.report["metrics"]
    functions = checked_functions(script_args)
    train_rows, eval_rows = prompt_data(script_args, training_args.seed, functions)
    model_args, reward_model, stage_metrics = missing_stages(script_args, training_args, model_args)

    policy, tokenizer = load_policy(model_args)
    rewards, tokenizers = list(functions), [None] * len(functions)
    if reward_model:
        rewards.append(load_scorer(reward_model, model_args))
        tokenizers.append(load_tokenizer(reward_model))
    training_args, rewards, tokenizers = with_gold_beside(script_args, training_args, rewards, tokenizers)
    from datasets import Dataset

    trainer = PPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        reward_processing_classes=tokenizers,
        value_model=value_model(script_args, model_args, reward_model),
        peft_config=peft_config(model_args),
    )
    use_plain_lines(trainer)
    judged_on = ([row["prompt"] for row in eval_rows], world_of(script_args), script_args.num_eval_prompts)
    before = judge_policy(trainer, *judged_on)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = judge_policy(trainer, *judged_on)
    trainer.save_model()
    return stage.finish(
        trainer,
        {**alignment_metrics(before, after), **stage_metrics},
        tables=alignment_tables(before, after),
        curves=alignment_plots(trainer.state.log_history),
        next_steps=next_steps(training_args.output_dir, eval_rows[0]["prompt"]),
    )


def checked_functions(script_args: RlhfArguments) -> list[Callable[..., list[float]]]:
    """The reward functions that `--reward_funcs` names.

    Raises:
        InputError: when one does not exist, or `gold` is asked for on data that has no gold reward.
    """
    from hfllm.data.sources import WORLD
    from hfllm.errors import InputError
    from hfllm.rewards import load_reward_function

    names = script_args.reward_funcs or []
    if "gold" in names and script_args.dataset_name != WORLD:
        raise InputError(f"--reward_funcs gold: only the embedded world has it, not {script_args.dataset_name!r}")
    return [load_reward_function(name) for name in names]


def prompt_data(script_args: RlhfArguments, seed: int, functions: Sequence[Callable]) -> tuple[list[dict], list[dict]]:
    """Training and held-out prompt rows; every reward function is tried on two of them."""
    from hfllm.data import formats
    from hfllm.data.sources import WORLD
    from hfllm.data.world import World
    from hfllm.rewards import checked_rewards
    from hfllm.stages import load_rows, split_rows

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        tasks = islice(world.tasks(seed + 2_000_000), script_args.num_prompts)
        train_rows = [task.prompt_row() for task in tasks]
        eval_rows = [task.prompt_row() for task in world.evaluation_tasks(script_args.num_eval_prompts)]
    else:
        rows = load_rows(script_args, formats.to_prompt)
        train_rows, eval_rows = split_rows(rows, seed, share=0.1, most=script_args.num_eval_prompts)
    trial = train_rows[:2]
    columns = {name: [row[name] for row in trial] for name in trial[0] if name != "prompt"}
    prompts = [row["prompt"] for row in trial]
    text = "This is a trial response."
    trials = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for prompt in prompts]
    for function in functions:
        checked_rewards(function, prompts, trials, **columns)
    return train_rows, eval_rows


def missing_stages(script_args: Any, training_args: Any, model_args: Any) -> tuple[Any, str | None, dict[str, float]]:
    """Run the stages whose results are not named. Returns the policy's arguments, the reward model and metrics."""
    import pretrain
    import reward
    import sft

    from hfllm.stages import run_stage

    root = training_args.output_dir
    folders = {stage: f"{root}/{stage}" for stage in ("pretrain", "sft", "reward")}

    def flags(stage: str, module: Any, *more: str) -> list[str]:
        config = getattr(script_args, f"{stage}_config") or str(module.CONFIG)
        seeds = ["--seed", str(training_args.seed), "--world_seed", str(script_args.world_seed)]
        return ["--config", config, "--output_dir", folders[stage], *seeds, *more]

    metrics: dict[str, float] = {}
    if not model_args.model_name_or_path:
        run_stage(pretrain, flags("pretrain", pretrain), [folders["sft"], folders["reward"]])
        base = ["--model_name_or_path", folders["pretrain"]]
        run_stage(sft, flags("sft", sft, *base), [folders["reward"]])
        model_args = replace(model_args, model_name_or_path=folders["sft"])
    reward_model = script_args.reward_model_name_or_path
    if not reward_model and not script_args.reward_funcs:
        policy = ["--model_name_or_path", model_args.model_name_or_path]
        done = run_stage(reward, flags("reward", reward, *policy))
        reward_model, metrics["reward_model_accuracy"] = folders["reward"], done["reward_model_accuracy"]
    return model_args, reward_model, metrics


def with_gold_beside(script_args: Any, training_args: Any, rewards: list, tokenizers: list) -> tuple[Any, list, list]:
    """Log the world's gold reward beside the rewards: at weight 0, so that the policy never sees it."""
    from hfllm.data.sources import WORLD
    from hfllm.rewards import gold_reward

    if script_args.dataset_name != WORLD or gold_reward in rewards:
        return training_args, rewards, tokenizers
    training_args.reward_weights = [*(training_args.reward_weights or [1.0] * len(rewards)), 0.0]
    return training_args, [*rewards, gold_reward], [*tokenizers, None]


def value_model(script_args: Any, model_args: Any, reward_model: str | None) -> Any:
    """The model that estimates values, or `None` for a head on the policy's trunk."""
    from hfllm.errors import InputError
    from hfllm.stages import load_scorer

    if script_args.value_model == "head":
        return None
    if script_args.value_model == "reward" and not reward_model:
        raise InputError("--value_model reward needs a reward model; with --reward_funcs use 'head' or a model's name")
    return load_scorer(reward_model if script_args.value_model == "reward" else script_args.value_model, model_args)


def next_steps(output_dir: str, prompt: str | list) -> list[str]:
    """The lines that load and try the result."""
    return [
        "import hfllm",
        "from transformers import pipeline",
        f"assistant = pipeline('text-generation', {output_dir!r})",
        f"print(assistant({prompt!r}, max_new_tokens=48)[0]['generated_text'])",
    ]


if __name__ == "__main__":
    run(main, parse)
