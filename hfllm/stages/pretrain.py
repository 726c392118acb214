"""Pretraining: its flags, its default settings, and what it refuses."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.loading import TextArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file
from hfllm.stages.architecture import ARCHITECTURE, ArchitectureArguments, architecture_of
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig

# The libraries' dataclasses of flags that pretraining takes besides its own.
LIBRARY = ("transformers.TrainingArguments", "trl.ModelConfig")
OBJECTIVES = ("causal", "masked", "infilling")
CHINCHILLA = "chinchilla"
NEED_PACKING = ("length_curriculum", "batch_ramp", "z_loss_coef", "total_tokens", "dataset_mixture")


@dataclass(frozen=True)
class PretrainArguments(TextArguments, BatchArguments, ArchitectureArguments, RemoteCodeArguments):
    """Objective, length and schedule of the run, and where a new model comes from."""

    total_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Tokens to train on, in place of --num_train_epochs; 'chinchilla' means 20 per parameter "
            "(Hoffmann et al. 2022, arXiv:2203.15556)."
        },
    )
    objective: str = field(
        default="causal",
        metadata={
            "help": "'causal' predicts the next token; 'masked' predicts masked ones, in a new bidirectional model; "
            "'infilling' is causal on documents cut in three, Code Llama's format.",
            "choices": [*OBJECTIVES],
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Fill rows of --max_length with documents that do not attend to each other; else pad."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens per row; longer documents are split."})
    length_curriculum: str | None = field(
        default=None,
        metadata={"help": "Row lengths by share of the run's tokens, such as 0:128,0.2:256,0.5:512; needs packing."},
    )
    batch_ramp: str | None = field(
        default=None,
        metadata={"help": "Tokens per batch by share of the run's tokens, such as 0:4096,0.3:16384; needs packing."},
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
            "help": "What to do at a loss far above its running median: stop the run, or warn.",
            "choices": ["stop", "warn"],
        },
    )
    sample_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between samples; by default four times per run, 0 means never, as under DeepSpeed."},
    )
    peak_flops: float | None = field(
        default=None, metadata={"help": "Peak FLOP/s of one device; the share that is reached is logged as mfu."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of the new model; by default one is trained on the texts."}
    )
    config_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Architecture of the new model, in place of its flags: a preset (gpt2, llama-2-7b, ...), a "
            "config.json, or the folder that holds one. All other defaults are then those of transformers."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per chunk of an hfllm model's loss, so that a batch's logits are never all in memory; "
            "1024 by default, 0 means all at once."
        },
    )


def default_settings(given: Mapping[str, object]) -> list[Path]:
    """Return the default settings of the small models; none for a named model or architecture."""
    if given.get("model_name_or_path") or given.get("config_name_or_path"):
        return []
    if given.get("dataset_name", WORLD) == WORLD and not given.get("dataset_mixture"):
        return [settings_file("pretrain/world.yaml")]
    # DeepSpeed and FSDP split the matrices that Muon needs whole.
    engines = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    is_sharded = any(os.environ.get(name, "false").lower() == "true" for name in engines)
    is_sharded = is_sharded or bool(given.get("fsdp") or given.get("deepspeed"))
    return [settings_file("pretrain/text.yaml"), *([settings_file("pretrain/text_sharded.yaml")] * is_sharded)]


# ---- what is refused ----


def check(script_args: PretrainArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> None:
    """Refuse flags that would have no effect or would fail later.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.runs.models import check_attention, check_trainable, load_config, named_fields, new_config

    own, named = model_args.model_name_or_path, script_args.config_name_or_path
    for is_refused, flag, reason in (
        *refusals_of_the_run(script_args, training_args, model_args),
        *refusals_of_the_model(script_args, is_named=bool(own)),
    ):
        refuse(is_refused, flag, reason)
    if script_args.objective not in OBJECTIVES:
        raise InputError(f"--objective {script_args.objective!r} is not one of {', '.join(OBJECTIVES)}")
    tokens = script_args.total_tokens
    if tokens not in (None, CHINCHILLA) and not (tokens.isdecimal() and int(tokens) > 0):
        raise InputError(f"--total_tokens {tokens!r}: expected a number of tokens, or {CHINCHILLA!r}")
    if not own:
        fields = named_fields(named) if named else architecture_of(script_args)
        config = new_config({**fields, "is_causal": script_args.objective != "masked"})
    is_sparse = model_args.attn_implementation == "sparse"
    refuse(
        bool(script_args.sparse_block_size) and not is_sparse,
        "--sparse_block_size",
        "it needs --attn_implementation sparse",
    )
    is_masked = script_args.objective == "masked"
    refuse(is_sparse and is_masked, "--attn_implementation sparse", "--objective masked sees later tokens")
    if is_sparse and not (own or named or script_args.sparse_block_size):
        raise InputError("--attn_implementation sparse needs --sparse_block_size and --sparse_num_blocks")
    check_trainable(model_args, adapters=False)
    check_attention(model_args.attn_implementation, load_config(own, model_args.model_revision) if own else config)


def refusals_of_the_run(
    script_args: PretrainArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> list[tuple[bool, str, str]]:
    """Return the refusals that concern the run: whether each applies, the flag, and the reason."""
    ramp, curriculum, tokens = script_args.batch_ramp, script_args.length_curriculum, script_args.total_tokens
    is_packed = script_args.packing
    is_scaled, is_timed = script_args.lr_scaling_rule != "none", training_args.max_steps > 0
    is_ordered = training_args.train_sampling_strategy != "random"
    is_infilling = script_args.objective == "infilling"
    return [
        (model_args.use_peft, "--use_peft", "pretraining trains all weights"),
        (is_ordered, "--train_sampling_strategy", "the order of documents is this recipe's own"),
        (is_scaled and ramp is not None, "--lr_scaling_rule", "--batch_ramp changes the batch"),
        *(
            (not is_packed and bool(getattr(script_args, flag)), f"--{flag}", "it needs --packing true")
            for flag in NEED_PACKING
        ),
        (not is_packed and script_args.objective != "causal", "--objective", "it needs --packing true"),
        (
            is_infilling and curriculum is not None,
            "--length_curriculum",
            "it would cut documents in the middle of the infilling format",
        ),
        (
            is_timed and bool(ramp or tokens),
            "--max_steps",
            "the run's length is --total_tokens or --num_train_epochs",
        ),
        *refusals_of_muon(script_args.use_muon, training_args),
    ]


def refusals_of_muon(uses_muon: bool, training_args: "TrainingArguments") -> list[tuple[bool, str, str]]:
    """Return the refusals of Muon: whether each applies, the flag, and the reason."""
    optimizer, default_optimizer = training_args.optim, type(training_args).__dataclass_fields__["optim"].default
    is_sharded = shards_parameters(training_args)
    return [
        (uses_muon and is_sharded, "--use_muon", "DeepSpeed and FSDP split the matrices that it needs whole"),
        (uses_muon and optimizer != default_optimizer, "--use_muon", f"--optim {optimizer.value} is asked for too"),
    ]


def refusals_of_the_model(script_args: PretrainArguments, is_named: bool) -> list[tuple[bool, str, str]]:
    """Return the refusals that concern the model: whether each applies, the flag, and the reason.

    Args:
        is_named: whether training starts from an existing model.
    """
    has_config = bool(script_args.config_name_or_path)
    for_a_new_one = "it is for a new model, without --model_name_or_path"
    given = [
        f"--{flag}"
        for flag in (*ARCHITECTURE, "vocab_size")
        if getattr(script_args, flag) != PretrainArguments.__dataclass_fields__[flag].default
    ]
    is_masked = script_args.objective == "masked"
    has_tokenizer = bool(script_args.tokenizer_name_or_path)
    return [
        (is_named and is_masked, "--objective masked", "it makes a new model, without --model_name_or_path"),
        *((is_named, flag, for_a_new_one) for flag in given),
        *((has_config, flag, "--config_name_or_path has it") for flag in given),
        (is_named and has_config, "--config_name_or_path", for_a_new_one),
        (is_named and has_tokenizer, "--tokenizer_name_or_path", "the model brings its own"),
    ]


def shards_parameters(training_args: "TrainingArguments") -> bool:
    """Return whether each process holds only a part of each weight or of its optimizer state."""
    is_fsdp = bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_fsdp or training_args.deepspeed_plugin is not None
