"""Train a reward model on comparisons (TRL's RewardTrainer; Bradley-Terry, Ouyang et al. 2022, equation 1).

    accelerate launch recipes/reward.py                                  # the embedded world, from nothing
    accelerate launch recipes/reward.py --model_name_or_path NAME --dataset_name pairs.jsonl

Comparisons may be `prompt`/`response_a`/`response_b`/`preference`, `prompt`/`chosen`/`rejected`, or transcripts as in
Anthropic's HH. On the embedded world two thirds of them are between the model's own samples, judged by the gold
rubric with label noise. Without `--model_name_or_path` the stages before this one run first, under the output folder.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.cli import BatchArguments, DataArguments, parse_recipe, run

CONFIG = Path(__file__).parent / "configs" / "reward" / "world.yaml"


@dataclass
class RewardArguments(DataArguments, BatchArguments):
    """Comparisons."""

    num_pairs: int = field(default=6000, metadata={"help": "Prompts of the embedded world to compare responses to."})
    on_policy_fraction: float = field(
        default=2 / 3, metadata={"help": "Share of the world's comparisons between the model's own samples."}
    )
    num_samples: int = field(default=3, metadata={"help": "Samples of the model for each prompt of that share."})
    label_noise: float = field(
        default=0.1, metadata={"help": "Share of wrong labels in the world's comparisons; 0.5 makes them worthless."}
    )
    comparison_seed: int | None = field(
        default=None, metadata={"help": "Seed of the world's comparisons, if not --seed: for models on the same ones."}
    )
    response_length: int = field(default=40, metadata={"help": "Longest response sampled for comparison, in tokens."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts of the world to compare on."})
    sft_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the fine-tuning that makes the model, if none is named."}
    )

    def __post_init__(self):
        for name in ("on_policy_fraction", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig, RewardConfig

    return parse_recipe(
        (RewardArguments, RewardConfig, ModelConfig), ["--output_dir", "outputs/reward", *argv], CONFIG, __doc__
    )


def main(script_args: RewardArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Train, save, write the report. Returns the metrics."""
    from transformers import set_seed

    from hfllm.data.sources import WORLD
    from hfllm.errors import InputError, refuse
    from hfllm.stage_models import check_trainable, fitting_length, load_scorer, load_tokenizer, peft_config
    from hfllm.stages import Stage, with_model_from
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.interruptions import train
    from hfllm.trainers.learning_rate import scale_learning_rate

    given = bool(script_args.sft_config and model_args.model_name_or_path)
    refuse(given, "--sft_config", "the model is named")
    stage = Stage("reward", script_args, training_args, model_args)
    if stage.report is not None:
        return stage.report["metrics"]
    check_trainable(model_args)
    used = scale_learning_rate(script_args, training_args)
    is_world = script_args.dataset_name == WORLD
    refuse(not is_world and script_args.comparison_seed is not None, "--comparison_seed", "it is for the world")
    rows = None if is_world else user_comparisons(script_args, training_args.seed)
    if not model_args.model_name_or_path:
        import sft

        model_args = with_model_from(sft, script_args.sft_config, script_args, training_args, model_args)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    train_rows, test_rows = rows or world_comparisons(script_args, training_args, model_args)
    if is_world:
        train_rows = in_batches_of_like_length(train_rows, training_args)
    # The head is new, and so are the weights of an adapter.
    set_seed(training_args.seed)
    model = load_scorer(model_args.model_name_or_path, model_args, model_args.model_revision)
    model.config.pad_token_id = tokenizer.pad_token_id

    from datasets import Dataset
    from trl import RewardTrainer

    training_args.max_length = fitting_length(training_args.max_length, model)
    trainer = RewardTrainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(test_rows),
        processing_class=tokenizer,
        peft_config=peft_config(model_args, "SEQ_CLS"),
    )
    kept = {"train_comparisons": trainer.train_dataset.num_rows, "eval_comparisons": trainer.eval_dataset.num_rows}
    if 0 in kept.values():
        raise InputError(
            f"no comparison in {script_args.dataset_name!r} fits into --max_length {training_args.max_length} tokens"
        )
    use_plain_lines(trainer)
    train(trainer, stage.checkpoint)
    evaluation = trainer.evaluate()
    trainer.save_model()
    metrics = {
        "reward_model_accuracy": evaluation["eval_accuracy"],
        "eval_loss": evaluation["eval_loss"],
        **kept,
        **used,
    }
    labels = " with noise-free labels" if is_world else ""
    summary = (
        f"accuracy {metrics['reward_model_accuracy']:.3f} on {kept['eval_comparisons']} held-out comparisons{labels}"
    )
    return stage.finish(trainer, metrics, summary)


def user_comparisons(script_args: RewardArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows with `prompt`, `chosen` and `rejected` messages."""
    from hfllm.data import formats
    from hfllm.stage_data import load_rows, split_rows

    return split_rows(load_rows(script_args, formats.to_preference), seed)


def world_comparisons(
    script_args: RewardArguments, training_args: Any, model_args: Any
) -> tuple[list[dict], list[dict]]:
    """Compare the model's own samples and the demonstrators' responses; held-out labels are noise-free."""
    from itertools import islice

    from accelerate.utils import broadcast_object_list

    from hfllm.data import formats
    from hfllm.data.demonstrators import preference_rows
    from hfllm.data.sources import Source
    from hfllm.data.world import World
    from hfllm.evaluation.responses import sample_responses
    from hfllm.stage_models import load_policy
    from hfllm.trainers.sharding import make_whole

    world, seed = World(script_args.world_seed), script_args.comparison_seed
    seed = training_args.seed if seed is None else seed
    model, tokenizer = load_policy(model_args)
    make_whole(model).to(training_args.device)

    def compare(tasks: list, noise: float) -> list[dict]:
        on_policy = round(script_args.on_policy_fraction * len(tasks))
        prompts = [task.prompt_row()["prompt"] for task in tasks[:on_policy]]
        sampled = sample_responses(
            *(model, tokenizer, prompts, script_args.response_length),
            num_return_sequences=script_args.num_samples,
            seed=seed,
            fast=True,
        )
        rows = preference_rows(world, tasks, sampled, noise, seed)
        source = Source(rows, [f"world, comparison {number}" for number in range(1, len(rows) + 1)])
        return formats.convert(source, formats.to_preference)

    # A seed of its own: the prompts are others than those of the demonstrations.
    tasks = list(islice(world.tasks(seed + 1_000_000), script_args.num_pairs))
    held_out = world.evaluation_tasks(script_args.num_eval_prompts)
    random.Random(seed).shuffle(held_out)
    # One process's samples for all: processes that draw other samples would train on other comparisons.
    return tuple(broadcast_object_list([compare(tasks, script_args.label_noise), compare(held_out, 0.0)]))


def in_batches_of_like_length(rows: list[dict], training_args: Any) -> list[dict]:
    """The order for `train_sampling_strategy: sequential`: padding would add two fifths to the tokens otherwise."""
    from hfllm.data.padding import length_grouped

    def length(row: dict) -> int:
        said = max(len(row[side][0]["content"]) for side in ("chosen", "rejected"))
        return said + sum(len(message["content"]) for message in row["prompt"])

    steps = training_args.gradient_accumulation_steps * training_args.world_size
    return length_grouped(rows, training_args.per_device_train_batch_size * steps, training_args.seed, length=length)


if __name__ == "__main__":
    run(main, parse)
