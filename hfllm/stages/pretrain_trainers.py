"""The trainers of pretraining: on packed rows in a planned order, and on padded documents."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hfllm.data.prepared import Prepared
from hfllm.errors import refuse
from hfllm.runs.arguments import changed
from hfllm.stages.pretrain import PretrainArguments
from hfllm.stages.pretrain_data import masking, packed_rows, plan_of_run

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

    from hfllm.trainers.pretraining.trainer import PretrainTrainer


def packed_trainer(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sources: Mapping[str, "Dataset"],
    test_texts: Sequence[str],
    prepared: Prepared,
) -> "tuple[PretrainTrainer, list[dict[str, str | int]]]":
    """Return a trainer on packed rows in a planned order, and a table of each source's share of the run."""
    rows = packed_rows(script_args, training_args, tokenizer, sources, prepared)
    trainer = trainer_of_rows(script_args, training_args, model, tokenizer, rows, test_texts)
    table = [
        {
            "source": name,
            "documents": len(texts),
            "rows": len(packed),
            "tokens of the run": given * script_args.max_length,
        }
        for (name, texts), packed, given in zip(sources.items(), rows, trainer.plan.rows_by_source(), strict=True)
    ]
    return trainer, table


def trainer_of_rows(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Sequence[Dataset]",
    test_texts: Sequence[str],
) -> "PretrainTrainer":
    """Return a trainer on the packed rows of each source, in the order and the batches of a plan."""
    from hfllm.data.packing import batch_of, pack
    from hfllm.trainers.pretraining.trainer import PretrainTrainer, has_flash_attention

    length = script_args.max_length
    mask = masking(tokenizer, training_args.seed) if script_args.objective == "masked" else None
    plan = plan_of_run(script_args, training_args, model, tokenizer, rows, mask)
    trainer_args = changed(
        training_args,
        # Each batch of the plan is a whole optimizer step, and the plan covers the whole run.
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_steps=-1,
        # The collator reads `seq_lengths`, which is no argument of any model.
        remove_unused_columns=False,
    )
    settings = loss_settings(model, script_args.loss_chunk_size)

    def collate(packed: list[dict[str, list[int]]]) -> dict[str, "torch.Tensor | int"]:
        batch = batch_of(packed, length, tokenizer.pad_token_id)
        if mask is not None:
            # Held-out rows are masked at the same positions in every evaluation.
            batch = mask(batch, batch["input_ids"].sum(1).tolist())
        if has_flash_attention(model):
            batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        return {**batch, **settings}

    return PretrainTrainer(
        plan=plan,
        settings=settings,
        z_loss_coef=script_args.z_loss_coef,
        model=model,
        args=trainer_args,
        eval_dataset=pack(test_texts, tokenizer, length),
        data_collator=collate,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(script_args.use_muon, trainer_args),
    )


# ---- padded documents ----


def padded_trainer(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sources: Mapping[str, "Dataset"],
    test_texts: Sequence[str],
    prepared: Prepared,
) -> "tuple[Trainer, list[dict[str, str | int]]]":
    """Return a trainer on single documents, in batches of similar length; no table for its one source."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling

    from hfllm.data.packing import length_grouped, token_pieces
    from hfllm.trainers.mixins import TokenMeanEvaluation

    (source,) = sources.values()
    texts = source["text"][:]
    batch = training_args.per_device_train_batch_size * training_args.world_size
    trainer_args = changed(
        training_args,
        train_sampling_strategy="sequential",
        # The logged speed counts only tokens with a loss.
        include_num_input_tokens_seen="non_padding",
    )
    train_pieces = length_grouped(token_pieces(texts, tokenizer, script_args.max_length), batch, training_args.seed)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = loss_settings(model, script_args.loss_chunk_size)
    trainer = TokenMeanEvaluation(
        model=model,
        args=trainer_args,
        train_dataset=Dataset.from_dict({"input_ids": train_pieces}),
        eval_dataset=Dataset.from_dict({"input_ids": token_pieces(test_texts, tokenizer, script_args.max_length)}),
        data_collator=lambda rows: {**collate(rows), **settings},
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(script_args.use_muon, trainer_args),
    )
    return trainer, []


# ---- both ----


def loss_settings(model: "PreTrainedModel", loss_chunk_size: int | None) -> dict[str, int]:
    """Return the batch entries that make an hfllm model compute its loss in chunks.

    In the batch and not in the config, which is saved and would affect every later use. Not in ZeRO-3, whose
    processes gather the head together: they may differ in their number of chunks.

    Raises:
        InputError: for a negative size, or one given for a model of another family.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    family = model.config.model_type
    refuse(loss_chunk_size and family != "hfllm", "--loss_chunk_size", f"a model of type {family} has no such loss")
    refuse((loss_chunk_size or 0) < 0, "--loss_chunk_size", f"{loss_chunk_size} is below 0")
    is_split = is_deepspeed_zero3_enabled()
    refuse(loss_chunk_size and is_split, "--loss_chunk_size", "ZeRO-3 needs the loss of a batch in one piece")
    size = 1024 if loss_chunk_size is None and family == "hfllm" and not is_split else loss_chunk_size
    return {"loss_chunk_size": size} if size else {}


def optimizer_of(
    use_muon: bool, training_args: "TrainingArguments"
) -> tuple[Callable[[], object], dict[str, object]] | None:
    """Return the class and arguments from which `Trainer` builds Muon; `None` for the optimizer of `--optim`."""
    if not use_muon:
        return None
    from hfllm.trainers.pretraining.muon import muon_factory

    return muon_factory, {
        "lr": training_args.learning_rate,
        "weight_decay": training_args.weight_decay,
        "betas": (training_args.adam_beta1, training_args.adam_beta2),
        "eps": training_args.adam_epsilon,
    }
