"""Align a language model by PPO against a reward. With no flags: from nothing to an aligned model.

    accelerate launch recipes/rlhf.py
    accelerate launch recipes/rlhf.py --model_name_or_path NAME --dataset_name prompts.jsonl --reward_funcs my.py:score

Without `--model_name_or_path` a model is pretrained and fine-tuned on the embedded world first, and without a reward
a reward model is trained first; both under the output folder, where they are reused when this is run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.runs.command_line import parse_recipe, run
from hfllm.trainers.learning_rate import BatchArguments

CONFIG = Path(__file__).parent / "configs" / "rlhf" / "world.yaml"
CALIBRATION_PROMPTS = 256


@dataclass
class RlhfArguments(DataArguments, BatchArguments):
    """Prompts, rewards, and the settings of the stages before."""

    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "A sequence-classification model with one label as the reward; several are an ensemble."},
    )
    num_reward_models: int = field(
        default=1, metadata={"help": "Reward models to train on the same comparisons, when none is named."}
    )
    reward_aggregation: str = field(
        default="worst",
        metadata={"help": "How an ensemble's scores become one.", "choices": ["mean", "worst", "uncertainty"]},
    )
    uncertainty_coef: float = field(
        default=1.0, metadata={"help": "Weight of the ensemble's variance with --reward_aggregation uncertainty."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: path/to/file.py:function, or 'gold' (the embedded world's)."},
    )
    value_model: str = field(
        default="head",
        metadata={"help": "'head' on the policy's trunk, 'reward' (starts as the reward model), or a model's name."},
    )
    ptx_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Texts for --ptx_coef, as pretrain.py takes them; of 'world' as many documents as --num_prompts."
        },
    )
    apply_chat_template: bool = field(
        default=False,
        metadata={"help": "Put text prompts to the model as a user's turn of its chat template, as sft.py does."},
    )
    num_prompts: int = field(default=8192, metadata={"help": "Prompts of the embedded world to sample from."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts, at most this many."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning stage."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the reward-model stage."})


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig

    from hfllm.trainers.ppo.config import PPOConfig

    return parse_recipe(
        (RlhfArguments, PPOConfig, ModelConfig), ["--output_dir", "outputs/rlhf", *argv], CONFIG, __doc__
    )


def main(script_args: RlhfArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Make what is missing, align, compare before and after, save, report. Returns the metrics."""
    from transformers import set_seed

    from hfllm.data.loading import world_of
    from hfllm.errors import refuse
    from hfllm.evaluation.alignment import alignment_metrics, alignment_plots, alignment_tables, evaluate_policy
    from hfllm.rewards.ensembles import RewardEnsemble
    from hfllm.rewards.models import RewardModel
    from hfllm.runs.models import load_policy, load_reward_model, load_tokenizer, load_value_model, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages.alignment import check_models, check_rewards
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.interruptions import train
    from hfllm.trainers.learning_rate import scale_learning_rate
    from hfllm.trainers.ppo.trainer import PPOTrainer
    from hfllm.trainers.sharding import gather_parameters

    refuse(training_args.model_init_kwargs, "--model_init_kwargs", "use --dtype, --attn_implementation or the like")
    before = missing_stages(script_args, training_args, model_args)
    stage = Stage("rlhf", script_args, training_args, model_args, before)
    if stage.report is not None:
        return stage.report["metrics"]
    used = scale_learning_rate(script_args, training_args)
    functions = checked_functions(script_args)
    train_rows, eval_rows = prompt_data(script_args, training_args.seed, functions)
    check_rewards(script_args, training_args, len(functions))
    check_models(
        *(script_args, training_args, model_args, [*train_rows, *eval_rows]),
        policy_config=policy_config(model_args, before),
        trains_first=bool(before),
    )
    ptx_dataset = ptx_texts(script_args, training_args)
    model_args, reward_models, stage_metrics = run_missing_stages(script_args, model_args, before)

    # The weights of an adapter are new, and so is the head of a critic that is a language model.
    set_seed(training_args.seed)
    policy, tokenizer = load_policy(model_args)
    rewards, tokenizers = list(functions), [None] * len(functions)
    if reward_models:
        members = [RewardModel(load_reward_model(name, model_args), load_tokenizer(name)) for name in reward_models]
        aggregation = (script_args.reward_aggregation, script_args.uncertainty_coef)
        rewards.append(members[0] if len(members) == 1 else RewardEnsemble(members, *aggregation))
        tokenizers.append(None)
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
        value_model=load_value_model(script_args.value_model, model_args, reward_models),
        peft_config=peft_config(model_args),
        ptx_dataset=ptx_dataset,
    )
    use_plain_lines(trainer)
    for ensemble in rewards:
        if isinstance(ensemble, RewardEnsemble):
            calibrate(ensemble, trainer, train_rows[:CALIBRATION_PROMPTS])
    judged_on = ([row["prompt"] for row in eval_rows], world_of(script_args), script_args.num_eval_prompts)
    with gather_parameters(trainer.actor):
        unaligned = evaluate_policy(trainer, *judged_on)
    train(trainer, stage.checkpoint)
    with gather_parameters(trainer.actor):
        aligned = evaluate_policy(trainer, *judged_on)
    trainer.save_model()
    return stage.finish(
        trainer,
        {**alignment_metrics(unaligned, aligned), **stage_metrics, **used},
        tables=alignment_tables(unaligned, aligned),
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
    from hfllm.rewards.functions import load_reward_function

    names = script_args.reward_funcs or []
    if "gold" in names and script_args.dataset_name != WORLD:
        raise InputError(f"--reward_funcs gold: only the embedded world has it, not {script_args.dataset_name!r}")
    return [load_reward_function(name) for name in names]


def prompt_data(script_args: RlhfArguments, seed: int, functions: Sequence[Callable]) -> tuple[list[dict], list[dict]]:
    """Training and held-out prompt rows; every reward function is tried on two of them."""
    from hfllm.data import formats
    from hfllm.data.loading import load_rows, split_rows
    from hfllm.data.sources import WORLD
    from hfllm.data.world.world import World

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        tasks = islice(world.tasks(seed + 2_000_000), script_args.num_prompts)
        train_rows = [task.prompt_row() for task in tasks]
        eval_rows = [task.prompt_row() for task in world.evaluation_tasks(script_args.num_eval_prompts)]
    else:
        rows = load_rows(script_args, formats.to_prompt)
        if script_args.apply_chat_template:
            rows = [{**row, "prompt": formats.as_messages(row["prompt"])} for row in rows]
        train_rows, eval_rows = split_rows(rows, seed, share=0.1, most=script_args.num_eval_prompts)
    try_functions(functions, train_rows[:2])
    return train_rows, eval_rows


def try_functions(functions: Sequence[Callable], rows: list[dict]) -> None:
    """Call the reward functions as the trainer does: with the dataset's other columns and the ids of a response."""
    from hfllm.data.formats import as_completion
    from hfllm.rewards.functions import checked_rewards

    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(prompt, "This is a trial response.") for prompt in prompts]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    columns["completion_ids"] = [[0, 1, 2, 3, 4]] * len(rows)
    for function in functions:
        checked_rewards(function, prompts, completions, **columns)


def missing_stages(script_args: Any, training_args: Any, model_args: Any) -> dict[str, tuple]:
    """The stages whose results are not named, in order, each with its parsed flags.

    Raises:
        InputError: when one of their configs is wrong.
    """
    folder, seed = training_args.output_dir, training_args.seed
    own_model = model_args.model_name_or_path
    has_reward = script_args.reward_model_name_or_path or script_args.reward_funcs
    based_on = {"pretrain": None, "sft": f"{folder}/pretrain", "reward": own_model or f"{folder}/sft"}
    names = ([] if own_model else ["pretrain", "sft"]) + ([] if has_reward else ["reward"])
    stages = {}
    for name in names:
        module = import_module(name)
        config = getattr(script_args, f"{name}_config")
        # The world's settings suit the small model made here; a model of the user's own gets the libraries'.
        config = config or (None if own_model else str(module.CONFIG))
        flags = ["--world_seed", str(script_args.world_seed)]
        flags += ["--config", config] if config else []
        flags += ["--model_name_or_path", based_on[name]] if based_on[name] else []
        flags += ["--model_revision", model_args.model_revision] if own_model else []
        for number in range(script_args.num_reward_models if name == "reward" else 1):
            stage = f"{name}_{number + 1}" if number else name
            own = ["--output_dir", f"{folder}/{stage}", "--seed", str(seed + number)]
            own += ["--comparison_seed", str(seed)] if number else []
            stages[stage] = module.parse([*flags, *own])
    return stages


def run_missing_stages(
    script_args: Any, model_args: Any, stages: dict[str, tuple]
) -> tuple[Any, list[str], dict[str, float]]:
    """Run or reuse the stages. Returns the policy's arguments, the reward models and the metrics to report."""
    from hfllm.runs.chain import run_stages

    folders = {name: arguments[1].output_dir for name, arguments in stages.items()}
    done = run_stages([import_module(name.partition("_")[0]) for name in stages], [*stages.values()])
    of_reward = dict(zip(stages, done, strict=True)).get("reward")
    metrics = {"reward_model_accuracy": of_reward["reward_model_accuracy"]} if of_reward else {}
    if "sft" in folders:
        model_args = replace(model_args, model_name_or_path=folders["sft"])
    trained = [folder for name, folder in folders.items() if name.startswith("reward")]
    return model_args, trained or script_args.reward_model_name_or_path or [], metrics


def ptx_texts(script_args: Any, training_args: Any) -> Any:
    """The pretraining texts beside the rollouts, or `None`.

    Raises:
        InputError: for texts without `--ptx_coef`, or the reverse.
    """
    from datasets import Dataset

    from hfllm.data.loading import texts_of
    from hfllm.data.sources import WORLD
    from hfllm.data.world.world import World
    from hfllm.errors import InputError

    name, coefficient = script_args.ptx_dataset_name, training_args.ptx_coef
    if (name is None) != (coefficient == 0):
        raise InputError(f"--ptx_coef {coefficient} and --ptx_dataset_name {name}: give both, or neither")
    if name is None:
        return None
    if name == WORLD:
        texts = World(script_args.world_seed).documents(script_args.num_prompts, training_args.seed)
    else:
        texts = list(texts_of(name))
    return Dataset.from_dict({"text": texts})


def policy_config(model_args: Any, before: dict[str, tuple]) -> Any:
    """The config of the policy, of the model that `pretrain` is to make if that comes before."""
    from hfllm.runs.models import load_config, named_fields, new_config

    made = before.get("pretrain")
    start = made[2] if made else model_args
    if start.model_name_or_path:
        return load_config(start.model_name_or_path, start.model_revision)
    if made[0].config_name_or_path:
        return new_config(named_fields(made[0].config_name_or_path))
    return new_config({name: getattr(made[0], name) for name in import_module("pretrain").ARCHITECTURE})


def with_gold_beside(script_args: Any, training_args: Any, rewards: list, tokenizers: list) -> tuple[Any, list, list]:
    """Log the world's gold reward beside the rewards: at weight 0, so that the policy never sees it."""
    from hfllm.data.sources import WORLD
    from hfllm.rewards.functions import gold_reward

    if script_args.dataset_name != WORLD or gold_reward in rewards:
        return training_args, rewards, tokenizers
    training_args.reward_weights = [*(training_args.reward_weights or [1.0] * len(rewards)), 0.0]
    return training_args, [*rewards, gold_reward], [*tokenizers, None]


def calibrate(ensemble: Any, trainer: Any, rows: list[dict]) -> None:
    """Bring the members of an ensemble to one scale on responses of the model that training starts from."""
    import torch

    from hfllm.data.formats import as_completion

    size, texts = trainer.args.local_rollout_batch_size, []
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed)
        for first in range(0, len(rows), size):
            ids = trainer.sample(rows[first : first + size])["response_ids"]
            texts += trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    prompts = [row["prompt"] for row in rows]
    ensemble.calibrate(prompts, [as_completion(*pair) for pair in zip(prompts, texts, strict=True)])


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
