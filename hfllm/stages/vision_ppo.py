"""PPO on pictures: sampled answers about drawn pictures, rewarded by their gold."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.sources import DIGITS
from hfllm.data.world.pictures import ABSENT, FAMILIES, QUESTIONS, DrawnWorld, TwoDigits
from hfllm.outputs.report import change_of
from hfllm.stages.vision import VisionArguments
from hfllm.stages.vision_data import Asked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin
    from trl import SFTConfig

    from hfllm.trainers.ppo.trainer import PPOTrainer

# The folder of the model after PPO, below that of the model before.
FOLDER = "rl"
# The longest answer, in tokens: that about a relation takes eight.
RESPONSE_LENGTH = 8
# Other pictures cost little here, and a second pass over an answer as much as a new one.
MINI_BATCHES, EPOCHS = 8, 1
# What is not there is asked for more often than anything else, a third of the time: a model that has hardly been told
# of it learns that here. With a quarter it says so less (.81 against .92, seed 1).
PROMPT_FAMILIES = (*FAMILIES, *FAMILIES, *[ABSENT] * 4)
# Answers of an optimizer step, over all processes: where most are right, few tell what to change.
BATCH_SIZE = 64
# Of so many optimizer steps one teaches the critic alone, and three the rate rises over: without that a family may be
# forgotten in the first steps for good. So it may with a critic that learns faster, whose values are noise at first.
WARMUP = 64
# What a trainer takes over of the flags of fine-tuning: where it runs and what it prints.
SHARED = ("seed", "use_cpu", "bf16", "report_to", "disable_tqdm", "dataloader_pin_memory", "logging_steps")


def prompt_rows(script_args: VisionArguments, seed: int) -> list[dict[str, object]]:
    """Return prompts with a picture each and the columns of the gold reward.

    Fine-tuning has seen none of the drawn pictures, and of the digits other pairs of the same ones.
    """
    count, part = script_args.num_rl_prompts, "prompts"
    rows = (
        TwoDigits(seed + 1, count)
        if script_args.dataset_name == DIGITS
        else DrawnWorld(seed, count, QUESTIONS, part=part, families=PROMPT_FAMILIES)
    )
    return [{"prompt": row.prompt(), "images": [row.picture], **row.gold} for row in rows]


def policy_trainer(
    script_args: VisionArguments, training_args: "SFTConfig", processor: "ProcessorMixin"
) -> "PPOTrainer":
    """Return the trainer of a policy that looks at drawn pictures, each prompt once, against the gold reward.

    It starts from the model that fine-tuning has saved: a model that TRL has trained cannot be copied as a reference.
    """
    from accelerate import PartialState

    from hfllm.rewards.functions import gold_reward
    from hfllm.stages.vision_models import freeze
    from hfllm.trainers.ppo.config import PPOConfig
    from hfllm.trainers.ppo.trainer import PPOTrainer

    state = PartialState()
    # The main process writes the model, which all read.
    state.wait_for_everyone()
    shared = {name: getattr(training_args, name) for name in SHARED}
    answers = min(BATCH_SIZE, script_args.num_rl_prompts // MINI_BATCHES)
    batch_size = max(1, answers // state.num_processes)
    rollouts = math.ceil(script_args.num_rl_prompts / (batch_size * MINI_BATCHES * state.num_processes))
    steps = rollouts * MINI_BATCHES * EPOCHS
    args = PPOConfig(
        output_dir=str(Path(training_args.output_dir, FOLDER)),
        total_episodes=script_args.num_rl_prompts,
        per_device_train_batch_size=batch_size,
        num_mini_batches=MINI_BATCHES,
        num_ppo_epochs=EPOCHS,
        response_length=RESPONSE_LENGTH,
        learning_rate=script_args.rl_learning_rate,
        lr_scheduler_type="linear",
        kl_coef=script_args.kl_coef,
        save_strategy="no",
        critic_warmup_steps=steps // WARMUP,
        warmup_steps=3 * steps // WARMUP,
        **shared,
    )
    rows = prompt_rows(script_args, training_args.seed)
    policy = training_args.output_dir
    trainer = PPOTrainer(
        model=policy, reward_funcs=gold_reward, args=args, train_dataset=rows, processing_class=processor
    )
    freeze(trainer.policy, script_args.freeze_vision, script_args.freeze_text)
    return trainer


def sampled_gold(
    script_args: VisionArguments, model: "PreTrainedModel", processor: "ProcessorMixin", questions: Sequence[Asked]
) -> list[float]:
    """Return the gold reward of one sampled answer to each question."""
    from hfllm.multimodal.answers import answer_pictures
    from hfllm.rewards.functions import gold_reward

    prompts, images = [each.prompt for each in questions], [each.images for each in questions]
    said = answer_pictures(model, processor, prompts, images, script_args.max_new_tokens, do_sample=True)
    columns = {name: [question.gold[name] for question in questions] for name in questions[0].gold}
    return gold_reward(prompts, said, **columns)


def gain(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the metrics of the gold reward of sampled answers, before PPO and after."""
    return change_of("sampled_gold", before, after)
