"""Pretrain a causal language model from nothing, or go on from one, by next-token loss.

    accelerate launch recipes/pretrain.py                                # the embedded world
    accelerate launch recipes/pretrain.py --dataset_name my_texts.jsonl  # a small model on your own text
    accelerate launch recipes/pretrain.py --model_name_or_path NAME --dataset_name my_texts.jsonl

Without `--model_name_or_path` a new tokenizer and model of the hfllm family are made, with the architecture that the
flags describe; the default settings are recipes/configs/pretrain/world.yaml.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.cli import DataArguments, parse_recipe, run

CONFIG = Path(__file__).parent / "configs" / "pretrain" / "world.yaml"


@dataclass
class PretrainArguments(DataArguments):
    """Data and architecture of the model to pretrain."""

    num_documents: int = field(default=40000, metadata={"help": "Documents of the embedded world to train on."})
    max_length: int = field(default=512, metadata={"help": "Longest document in tokens; longer ones are cut up."})
    vocab_size: int = field(default=8192, metadata={"help": "Upper bound on the new tokenizer's vocabulary."})
    hidden_size: int = field(default=512, metadata={"help": "Width of the new model."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers of the new model."})
    num_attention_heads: int = field(default=8, metadata={"help": "Query heads of the new model."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Key-value heads of the new model."})
    max_position_embeddings: int = field(default=2048, metadata={"help": "Context of the new model."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the new weights."})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "Share embeddings and head."})
    norm_type: str = field(default="rmsnorm", metadata={"help": "rmsnorm or layernorm."})
    norm_placement: str = field(default="pre", metadata={"help": "pre or post."})
    mlp_type: str = field(default="gated", metadata={"help": "gated or plain."})
    hidden_act: str = field(default="silu", metadata={"help": "Activation of the MLP."})
    position_embedding_type: str = field(default="rope", metadata={"help": "rope, learned or none."})
    parallel_block: bool = field(default=False, metadata={"help": "Attention and MLP side by side, as in PaLM."})
    sliding_window: int | None = field(default=None, metadata={"help": "Tokens that each token attends to at most."})
    num_local_experts: int = field(default=0, metadata={"help": "Experts of each layer; 0 is one dense MLP."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts that each token passes through."})
    residual_init: str = field(default="plain", metadata={"help": "plain, gpt2 or depth: scale of the residual init."})
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose loss an hfllm model computes at a time, so that the logits of a batch never exist; "
            "1024 by default, 0 is all at once."
        },
    )


ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("initializer_range", "tie_word_embeddings", "norm_type", "norm_placement", "mlp_type", "hidden_act"),
    *("position_embedding_type", "parallel_block", "sliding_window", "num_local_experts", "num_experts_per_tok"),
    "residual_init",
)


def parse(argv: Sequence[str]) -> tuple:
    from transformers import TrainingArguments
    from trl import ModelConfig

    return parse_recipe(
        (PretrainArguments, TrainingArguments, ModelConfig),
        ["--output_dir", "outputs/pretrain", *argv],
        CONFIG,
        __doc__,
    )


def main(script_args: PretrainArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Pretrain, save model and tokenizer, write the report. Returns the metrics."""
    from datasets import Dataset
    from transformers import Trainer, set_seed

    from hfllm.stages import Stage, fitting_length, load_or_make_base, load_texts, refuse
    from hfllm.trainers.callbacks import use_plain_lines

    refuse(model_args.use_peft, "--use_peft", "pretraining trains all weights")
    strategy = training_args.train_sampling_strategy
    refuse(strategy != "random", "--train_sampling_strategy", "documents are shuffled in batches of like length")
    stage = Stage("pretrain", script_args, training_args, model_args)
    if stage.report is not None:
        return stage.report["metrics"]
    set_seed(training_args.seed)
    train_texts, test_texts = load_texts(script_args, training_args.seed)
    model, tokenizer = load_or_make_base(script_args, model_args, train_texts, ARCHITECTURE)
    script_args.max_length = fitting_length(script_args.max_length, model)
    batch = training_args.per_device_train_batch_size * training_args.world_size
    training_args.train_sampling_strategy = "sequential"
    train_pieces = length_grouped(pieces_of(train_texts, tokenizer, script_args.max_length), batch, training_args.seed)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_dict({"input_ids": train_pieces}),
        eval_dataset=Dataset.from_dict({"input_ids": pieces_of(test_texts, tokenizer, script_args.max_length)}),
        data_collator=collator(model, tokenizer, script_args.loss_chunk_size),
        processing_class=tokenizer,
    )
    use_plain_lines(trainer)
    trainer.train(resume_from_checkpoint=stage.checkpoint)
    losses = trainer.evaluate()
    trainer.save_model()
    metrics = {
        "train_loss": trainer.state.log_history[-2]["train_loss"],
        "eval_loss": losses["eval_loss"],
        "parameters": model.num_parameters(),
        "documents": len(train_texts),
    }
    summary = f"{model.num_parameters():,} parameters, held-out loss {losses['eval_loss']:.3f} nats a token"
    return stage.finish(trainer, metrics, summary)


def collator(model: Any, tokenizer: Any, loss_chunk_size: int | None) -> Callable[[list], dict[str, Any]]:
    """Pads and labels a batch, and asks an hfllm model to compute its loss in chunks.

    By the batch and not by the config, which would go on to every later use of the saved model.

    Raises:
        InputError: for a negative size, or one given for a model of another family.
    """
    from transformers import DataCollatorForLanguageModeling

    from hfllm.stages import refuse

    family = model.config.model_type
    refuse(loss_chunk_size and family != "hfllm", "--loss_chunk_size", f"a model of type {family} has no such loss")
    refuse((loss_chunk_size or 0) < 0, "--loss_chunk_size", f"{loss_chunk_size} is below 0")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    size = 1024 if loss_chunk_size is None and family == "hfllm" else loss_chunk_size
    return (lambda rows: {**collate(rows), "loss_chunk_size": size}) if size else collate


def pieces_of(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids of each document, from the document token on; documents over `max_length` are cut up."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    pieces = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids = start + ids
        pieces += [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return pieces


def length_grouped(pieces: list[list[int]], batch_size: int, seed: int, window: int = 20) -> list[list[int]]:
    """An order in which a batch holds pieces of like length, while lengths come in random order.

    Sorts within windows of `window` batches, then shuffles the batches: transformers' `group_by_length` saves as much
    padding, but runs from long to short for fifty batches at a time, which this small model learns less from.
    """
    rng = random.Random(seed)
    pieces = list(pieces)
    rng.shuffle(pieces)
    batches = []
    for first in range(0, len(pieces), window * batch_size):
        near = sorted(pieces[first : first + window * batch_size], key=len)
        batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return [piece for batch in batches for piece in batch]


if __name__ == "__main__":
    run(main, parse)
