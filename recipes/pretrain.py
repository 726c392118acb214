"""Pretrain a language model from nothing, or go on from one.

    accelerate launch recipes/pretrain.py                                # the embedded world
    accelerate launch recipes/pretrain.py --dataset_name my_texts.jsonl  # a small model on your own text
    accelerate launch recipes/pretrain.py --dataset_name pydoc           # on the documentation of this Python
    accelerate launch recipes/pretrain.py --dataset_mixture wiki.txt:0.7 books/:0.3 --total_tokens chinchilla
    accelerate launch recipes/pretrain.py --model_name_or_path NAME --dataset_name my_texts.jsonl

Without `--model_name_or_path` a new tokenizer and model of the hfllm family are made, with the architecture that the
flags describe; the default settings are recipes/configs/pretrain/world.yaml for the embedded world and text.yaml for
text of your own. The report compares the model with a 5-gram and gzip, in bits per byte of held-out documents.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.loading import DataArguments
from hfllm.data.sources import WORLD
from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.recipes import settings_file
from hfllm.stages.architecture import ARCHITECTURE, ArchitectureArguments
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig


@dataclass(frozen=True)
class PretrainArguments(DataArguments, BatchArguments, ArchitectureArguments):
    """Data, schedule and architecture of the model to pretrain."""

    num_documents: int = field(default=40000, metadata={"help": "Documents of the embedded world to train on."})
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={"help": "Several datasets in place of --dataset_name, each NAME:WEIGHT, their share of the tokens."},
    )
    total_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Tokens to train on, in place of --num_train_epochs; 'chinchilla' is 20 a parameter "
            "(Hoffmann et al. 2022, arXiv:2203.15556)."
        },
    )
    objective: str = field(
        default="causal",
        metadata={
            "help": "'causal' predicts the next token; 'masked' predicts masked ones, in a new bidirectional model; "
            "'infilling' is causal on documents cut in three, Code Llama's format.",
            "choices": ["causal", "masked", "infilling"],
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Fill rows of --max_length with documents that do not see each other; else pad them."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a row; longer documents are cut up."})
    length_curriculum: str | None = field(
        default=None,
        metadata={"help": "Row lengths by share of the run's tokens, such as 0:128,0.2:256,0.5:512; needs packing."},
    )
    batch_ramp: str | None = field(
        default=None,
        metadata={"help": "Tokens of a batch by share of the run's tokens, such as 0:4096,0.3:16384; needs packing."},
    )
    z_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the squared log-partition function (PaLM: 1e-4); needs packing."}
    )
    use_muon: bool = field(
        default=False,
        metadata={"help": "Learn the matrices of the layers by Muon, the rest by AdamW, at one learning rate."},
    )
    loss_spikes: str = field(
        default="stop",
        metadata={
            "help": "What a loss far above its running median does: stop the run, or warn.",
            "choices": ["stop", "warn"],
        },
    )
    sample_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between samples of the model; by default four times a run, 0 is never, as under DeepSpeed."
        },
    )
    peak_flops: float | None = field(
        default=None, metadata={"help": "FLOP/s that one device could do; the share that is reached is logged as mfu."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of the new model; by default one is trained on the texts."}
    )
    config_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Architecture of the new model, in place of the flags below: a preset (gpt2, llama-2-7b, ...), a "
            "config.json, or the folder that holds one. All other defaults are then those of transformers."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose loss an hfllm model computes at a time, so that the logits of a batch never exist; "
            "1024 by default, 0 is all at once."
        },
    )


def parse(argv: Sequence[str]) -> tuple[PretrainArguments, "TrainingArguments", "ModelConfig"]:
    """Read the flags, over the settings of the small model that suits the data."""
    library = ("transformers.TrainingArguments", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, PretrainArguments, library, "outputs/pretrain", default_settings)


def default_settings(given: Mapping[str, object]) -> list[Path]:
    """Return the settings of the small models made here; none for a named model or architecture."""
    if given.get("model_name_or_path") or given.get("config_name_or_path"):
        return []
    if given.get("dataset_name", WORLD) == WORLD and not given.get("dataset_mixture"):
        return [settings_file("pretrain/world.yaml")]
    # DeepSpeed and FSDP cut up the matrices that Muon needs whole.
    engines = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    is_sharded = any(os.environ.get(name, "false").lower() == "true" for name in engines)
    is_sharded = is_sharded or bool(given.get("fsdp") or given.get("deepspeed"))
    return [settings_file("pretrain/text.yaml"), *([settings_file("pretrain/text_sharded.yaml")] * is_sharded)]


def main(script_args: PretrainArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Pretrain, save model and tokenizer, write the report. Returns the metrics."""
    from transformers import set_seed

    from hfllm.data.mixtures import load_sources
    from hfllm.data.prepared import Prepared
    from hfllm.runs.models import fitting_length
    from hfllm.runs.stage import Stage
    from hfllm.stages import pretraining, pretraining_watch
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.interruptions import train
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.sharding import gather_parameters

    check(script_args, training_args, model_args)
    stage = Stage("pretrain", script_args, training_args, model_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    stage.announce()
    training_args, used = scaled_learning_rate(script_args, stage.training_args)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="reading texts"):
        prepared = Prepared(Path(training_args.output_dir) / "prepared", stage.arguments)
        sources, train_texts, test_texts = load_sources(script_args, training_args.seed, prepared)
    model, tokenizer = pretraining.load_or_make_base(script_args, model_args, train_texts, ARCHITECTURE)
    script_args = replace(script_args, max_length=fitting_length(script_args.max_length, model))
    build = pretraining.packed_trainer if script_args.packing else pretraining.padded_trainer
    # The trainer counts the model's parameters and looks whether it keeps packed documents apart.
    with gather_parameters(model):
        trainer, mixed = build(script_args, training_args, model, tokenizer, sources, test_texts, prepared)
    use_plain_lines(trainer)
    samples = pretraining_watch.watch(trainer, script_args, tokenizer, train_texts, test_texts)
    train(trainer, stage.checkpoint)
    pretraining_watch.stop_if_broken(trainer)
    losses = trainer.evaluate()
    trainer.save_model()
    metrics = {
        "train_loss": next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry),
        "eval_loss": losses["eval_loss"],
        **pretraining_watch.held_out_metrics(script_args, trainer.model, tokenizer, train_texts, test_texts),
        "parameters": model.num_parameters(),
        "documents": len(train_texts),
        "tokens_per_second": pretraining_watch.mean_speed(trainer.state.log_history),
        **used,
    }
    summary = f"{metrics['parameters']:,} parameters, held-out loss {metrics['eval_loss']:.3f} nats a token"
    if "bits_per_byte" in metrics:
        summary += f", {metrics['bits_per_byte']:.3f} bits a byte"
    tables = {"Sources": mixed, "Samples": samples() if samples else []}
    metrics = stage.finish(metrics, trainer, summary, tables={title: rows for title, rows in tables.items() if rows})
    if trainer.is_local_process_zero():
        prepared.remove()
    return metrics


def shards_parameters(training_args: Any) -> bool:
    """Whether the launch has each process hold a part of each weight, or of its optimiser's state."""
    is_fsdp = bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_fsdp or training_args.deepspeed_plugin is not None


def check(script_args: PretrainArguments, training_args: Any, model_args: Any) -> None:
    """Refuse what would have no effect, or could only fail later.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.loading import check_source
    from hfllm.errors import InputError, refuse
    from hfllm.runs.models import check_trainable, named_fields, new_config
    from hfllm.stages.pretraining import CHINCHILLA, OBJECTIVES

    check_source(script_args)

    refuse(model_args.use_peft, "--use_peft", "pretraining trains all weights")
    strategy = training_args.train_sampling_strategy
    refuse(strategy != "random", "--train_sampling_strategy", "the order of documents is this recipe's own")
    is_scaled = script_args.lr_scaling_rule != "none"
    refuse(is_scaled and script_args.batch_ramp is not None, "--lr_scaling_rule", "--batch_ramp changes the batch")
    for flag in ("length_curriculum", "batch_ramp", "z_loss_coef", "total_tokens", "dataset_mixture"):
        refuse(not script_args.packing and bool(getattr(script_args, flag)), f"--{flag}", "it needs --packing true")
    own, named = model_args.model_name_or_path, script_args.config_name_or_path
    is_masked = script_args.objective == "masked"
    refuse(is_masked and bool(own), "--objective masked", "it makes a new model, without --model_name_or_path")
    for flag in (*ARCHITECTURE, "vocab_size"):
        is_default = getattr(script_args, flag) == PretrainArguments.__dataclass_fields__[flag].default
        refuse(bool(own) and not is_default, f"--{flag}", "it is for a new model, without --model_name_or_path")
        refuse(bool(named) and not is_default, f"--{flag}", "--config_name_or_path has it")
    refuse(bool(own and named), "--config_name_or_path", "it is for a new model, without --model_name_or_path")
    if not own:
        fields = named_fields(named) if named else {flag: getattr(script_args, flag) for flag in ARCHITECTURE}
        new_config({**fields, "is_causal": not is_masked})
    refuse(not script_args.packing and script_args.objective != "causal", "--objective", "it needs --packing true")
    if script_args.objective not in OBJECTIVES:
        raise InputError(f"--objective {script_args.objective!r} is not one of {', '.join(OBJECTIVES)}")
    cuts = script_args.objective == "infilling" and script_args.length_curriculum is not None
    refuse(cuts, "--length_curriculum", "it would cut documents in the middle of the infilling format")
    refuse(bool(own and script_args.tokenizer_name_or_path), "--tokenizer_name_or_path", "the model brings its own")
    refuse(
        training_args.max_steps > 0 and bool(script_args.batch_ramp or script_args.total_tokens),
        "--max_steps",
        "the run's length is --total_tokens or --num_train_epochs",
    )
    is_split = shards_parameters(training_args)
    refuse(
        script_args.use_muon and is_split, "--use_muon", "DeepSpeed and FSDP cut up the matrices that it needs whole"
    )
    is_default = training_args.optim == type(training_args).__dataclass_fields__["optim"].default
    refuse(
        script_args.use_muon and not is_default, "--use_muon", f"--optim {training_args.optim.value} is asked for too"
    )
    tokens = script_args.total_tokens
    if tokens not in (None, CHINCHILLA) and not (tokens.isdecimal() and int(tokens) > 0):
        raise InputError(f"--total_tokens {tokens!r}: expected a number of tokens, or {CHINCHILLA!r}")
    check_trainable(model_args, adapters=False)


if __name__ == "__main__":
    run(main, parse)
