"""Models of steps: they learn which steps of a solution are right, from labels (Lightman et al. 2023)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.data.labelled import encode_steps, to_steps
from hfllm.errors import refuse_if
from hfllm.outputs.verdict import Promise
from hfllm.rewards.steps import LINE, SENTENCE, STEP_END_FIELD, STEP_ENDS, step_ends, steps_between
from hfllm.runs.command_line import say

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig, RewardConfig

    from hfllm.stages.reward.build import RewardArguments, Rows

TASK_TYPE = "TOKEN_CLS"
CLAIMS = [
    Promise("steps judged right", "step_accuracy", "majority_step_accuracy", "of the more frequent label"),
]
# Solutions with a slip in the report.
SAMPLES = 8


def train_on_steps(
    script_args: "RewardArguments", training_args: "RewardConfig", model_args: "ModelConfig"
) -> dict[str, float]:
    """Train a model of steps, judge it on held-out solutions, save it, write the report. Return the metrics."""
    from transformers import AutoModelForTokenClassification, set_seed

    from hfllm.flags import check_flags
    from hfllm.runs.models import (
        check_trainable,
        fitting_length,
        load_head_to_train,
        load_tokenizer,
        named_model,
    )
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.recipes import settings_file
    from hfllm.runs.stage import Stage
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.engines import disable_dropout
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.monitors import StalledWeights
    from hfllm.trainers.pretraining.muon import check_muon
    from hfllm.trainers.pretraining.trainer import optimizer_of
    from hfllm.trainers.trl_trainers import StepTrainer

    check_flags(script_args, training_args, model_args, sees=False, shows=False)
    why = "PEFT keeps no config, which says where steps end: train all weights"
    refuse_if(model_args.use_peft, f"--use_peft with --task process: {why}")
    check_muon(script_args.use_muon, training_args, model_args.use_peft)
    stage = Stage("reward", script_args, training_args, model_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    seed, output_dir = training_args.seed, training_args.output_dir
    kind = LINE if script_args.world is None else SENTENCE
    train_rows, test_rows = rows_of(script_args, seed)
    # The model that has read of dials and hops.
    base_config = script_args.pretrain_config or str(settings_file("reason/pretrain.yaml"))
    given, configs = {"pretrain": model_args.model_name_or_path}, {"pretrain": base_config}
    before = chain_before("classify", output_dir, seed, script_args.world_seed, given, configs)
    check_adapter(model_args, before, TASK_TYPE)

    stage.announce()
    before.run()
    base = replace(named_model(model_args), name=before.model("pretrain") or model_args.model_name_or_path)
    tokenizer = load_tokenizer(base.name, model_args.model_revision)
    # The head is new, and so are the weights of an adapter.
    set_seed(seed)
    model = load_head_to_train(base, output_dir, AutoModelForTokenClassification, TASK_TYPE, num_labels=1)
    refuse_if(hasattr(model, "peft_config"), f"--model_name_or_path {base.name} is an adapter; {why} (hfllm merge)")
    if training_args.disable_dropout:
        disable_dropout(model)
    model.config.pad_token_id = tokenizer.pad_token_id
    setattr(model.config, STEP_END_FIELD, kind)
    length = fitting_length(training_args.max_length, model)
    data = [tokens_of(rows, tokenizer, kind, length, script_args.dataset_name) for rows in (train_rows, test_rows)]
    trainer = StepTrainer(
        model=model,
        args=trainer_args,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(script_args.use_muon, trainer_args),
    )
    use_plain_lines(trainer)
    trainer.add_callback(StalledWeights())
    train(trainer, stage.checkpoint, stage.identity)
    scores = trainer.predict(data[1]).predictions
    trainer.save_model()
    metrics = {
        **step_metrics(scores, [row["labels"] for row in data[1]]),
        **dict(zip(("train_solutions", "eval_solutions"), map(len, data), strict=True)),
        **scaled,
    }
    tables = {"Samples": samples(scores, data[1], tokenizer)}
    models = {"model": base.name}
    return stage.finish(metrics, trainer, summary_of(metrics), tables, models=models, claims=CLAIMS)


# ---- rows ----


def rows_of(script_args: "RewardArguments", seed: int) -> tuple["Rows", "Rows"]:
    """Return training and held-out solutions with labels for their steps: the user's, or the embedded world's."""
    from hfllm.data.images.rows import without_images
    from hfllm.data.world.reasoning import HELD_OUT, SHOWN, step_rows
    from hfllm.stages.shared import user_rows

    if (world := script_args.world) is None:
        mapper = without_images(to_steps, "the model")
        return user_rows(script_args.row_sources, mapper, seed, flaw_of=lambda row: None)
    told = (world.facts, world.relations)
    train_rng, test_rng = (random.Random(f"steps-{name}-{world.seed}-{seed}") for name in ("train", "test"))
    noise = script_args.label_noise
    return (
        step_rows(*told, train_rng, script_args.num_pairs, SHOWN, label_noise=noise),
        step_rows(*told, test_rng, script_args.num_eval_prompts, HELD_OUT),
    )


def tokens_of(
    rows: "Rows", tokenizer: "PreTrainedTokenizerBase", kind: str, max_length: int | None, dataset_name: str
) -> list[dict[str, list]]:
    """Return solutions as tokens, and print how many are left out."""
    between = steps_between(STEP_ENDS[kind])

    def ends_of(ids: Sequence[int]) -> list[int]:
        return [index for _, index in step_ends(tokenizer, ids, between)]

    encoded, dropped = encode_steps(rows, tokenizer, ends_of, max_length)
    if dropped:
        why = f"longer than {max_length} tokens, or their steps are not found in the tokens"
        say(f"{dropped:,} of {len(rows):,} solutions dropped: {why}")
    refuse_if(not encoded, f"no solution in {dataset_name!r} fits into {max_length} tokens")
    return encoded


# ---- evaluation ----


def step_metrics(scores: "numpy.ndarray", labels: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the shares of steps judged right, and of solutions whose first wrong one is found.

    Args:
        scores: (N, S, 1), the logits of steps being right.
        labels: of each solution, at the tokens that end its steps; -100 elsewhere.
    """
    from hfllm.outputs.figures import share_of
    from hfllm.outputs.statistics import auroc

    chances: list[float] = []
    truths: list[bool] = []
    found = 0
    for row, own in zip(scores, labels, strict=True):
        places = [at for at, label in enumerate(own) if label >= 0]
        judged, right = [float(row[at, 0]) for at in places], [own[at] >= 0.5 for at in places]
        chances += judged
        truths += right
        found += _first_wrong([score >= 0 for score in judged]) == _first_wrong(right)
    count, share = len(truths), sum(truths) / len(truths)
    accuracy = sum((chance >= 0) == truth for chance, truth in zip(chances, truths, strict=True)) / count
    metrics = {
        **share_of("step_accuracy", accuracy, count),
        **share_of("majority_step_accuracy", max(share, 1 - share), count),
        **share_of("first_error_found", found / len(labels), len(labels)),
    }
    if 0 < share < 1:
        metrics["step_auroc"] = auroc(chances, truths)
    return metrics


def _first_wrong(right: Sequence[bool]) -> int:
    return next((at for at, each in enumerate(right) if not each), -1)


def summary_of(metrics: Mapping[str, float]) -> str:
    """Return the result in a sentence."""
    from hfllm.outputs.figures import shown

    told = {name: shown(metrics, name) for name in ("step_accuracy", "majority_step_accuracy", "first_error_found")}
    return (
        f"{told['step_accuracy']} of {metrics['step_accuracy_n']:,} held-out steps judged right (the more "
        f"frequent label {told['majority_step_accuracy']}); the first wrong step, or that there is none, found in "
        f"{told['first_error_found']} of {metrics['eval_solutions']:,} solutions"
    )


def samples(
    scores: "numpy.ndarray", rows: Sequence[Mapping[str, list]], tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, object]]:
    """Return the steps of the first solutions with a wrong one, with the model's probability for each."""
    import math

    table: list[dict[str, object]] = []
    shown = 0
    for row, own in zip(scores, rows, strict=True):
        places = [at for at, label in enumerate(own["labels"]) if label >= 0]
        if shown == SAMPLES or all(own["labels"][at] >= 0.5 for at in places):
            continue
        shown, begin = shown + 1, 0
        for at in places:
            step = tokenizer.decode(own["input_ids"][begin : at + 1], skip_special_tokens=True).strip()
            chance = 1 / (1 + math.exp(-float(row[at, 0])))
            is_right = "yes" if own["labels"][at] >= 0.5 else "no"
            said = {"said to be right": round(chance, 3), "right": is_right}
            table.append({"solution": shown, "step": step, **said})
            begin = at + 1
    return table
