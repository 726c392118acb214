"""The data, models, trainers and monitors of a pretraining run."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from hfllm.data.loading import WorldTexts
from hfllm.data.packing import (
    Prepared,
    batch_of,
    check_infilling_tokens,
    fill_in_the_middle,
    length_grouped,
    masked_tokens,
    pack,
    packed_tables,
    seeded_generator,
    token_pieces,
    windows,
)
from hfllm.data.world.operations import TITLES, probes_of
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse
from hfllm.evaluation.perplexity import gzip_bits_per_byte, ngram_bits_per_byte, text_likelihood
from hfllm.flags import changed
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM, HfllmForMaskedLM
from hfllm.models.loading.weights import cast_weights
from hfllm.outputs.checkpoints import STATE_FILE
from hfllm.outputs.figures import mean_of
from hfllm.outputs.report import Plot, plot_history, read_report
from hfllm.outputs.verdict import Promise
from hfllm.runs.models import load_policy, load_tokenizer, named_model, new_config
from hfllm.scaling.speed import palm_flops_per_token
from hfllm.stages.pretrain.flags import CHINCHILLA, PretrainArguments
from hfllm.stages.pretrain.tokenizer import make_tokenizer
from hfllm.trainers.callbacks import ProbeCallback, SampleCallback
from hfllm.trainers.learning_rate import global_batch_size
from hfllm.trainers.mixins import TokenMeanEvaluation
from hfllm.trainers.monitors import LossSpikeGuard, ThroughputCallback, add_to_logs
from hfllm.trainers.pretraining.trainer import (
    BatchPlan,
    PretrainTrainer,
    Schedule,
    has_flash_attention,
    loss_settings,
    optimizer_of,
)

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
    from trl import ModelConfig

# Texts of each probed operation.
NUM_PROBES = 40
# The share of right tokens from which an operation counts as learned: below it, the stages that need it fail.
LEARNED = 0.6
PROMISES = tuple(Promise(title, f"probe_{each}", LEARNED, "what counts as learned") for each, title in TITLES.items())
# A model of a language must beat counting its words.
CLAIMS = [
    Promise("bits per byte of held-out text", "bits_per_byte", "bits_per_byte_5gram", "by a 5-gram", is_less=True),
]


# ---- rows ----


Batch = dict[str, torch.Tensor]
Masking = Callable[[Batch, Sequence[int]], Batch]
TOKENS_PER_PARAMETER = 20  # Chinchilla's, Hoffmann et al. 2022, arXiv:2203.15556


def packed_rows(
    sources: Iterable[Dataset],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    prepared: Prepared,
    infilling_seed: int | None = None,
) -> list[Dataset]:
    """Return the packed rows of each source, on disk.

    Args:
        sources: datasets with a `text` column.
        max_length: tokens of a row.
        prepared: the storage of the rows.
        infilling_seed: for documents in the infilling format, see `infilled`; by default they stay as they are.
    """

    def tables(texts: Iterable[str]) -> "Iterator[pyarrow.Table]":
        if infilling_seed is not None:
            texts = infilled(texts, tokenizer, max_length, infilling_seed)
        return packed_tables(texts, tokenizer, max_length)

    return [
        prepared.table(f"rows-{number}", lambda source=source: tables(source["text"]))
        for number, source in enumerate(sources)
    ]


def rows_of_run(
    args: "TrainingArguments", total_tokens: str | None, max_length: int, num_parameters: int, num_rows: int
) -> int:
    """Return the number of rows of the whole run.

    Args:
        args: of the trainer: steps, epochs and batches.
        total_tokens: the flag, if set.
        max_length: tokens of a row.
        num_parameters: of the model.
        num_rows: of the data.
    """
    if total_tokens == CHINCHILLA:
        total = TOKENS_PER_PARAMETER * num_parameters // max_length
    elif total_tokens is not None:
        total = int(total_tokens) // max_length
    elif args.max_steps > 0:
        total = args.max_steps * global_batch_size(args)
    else:
        total = int(args.num_train_epochs * num_rows)
    if total < args.world_size:
        raise InputError(
            f"the run has {total} row(s) of {max_length} tokens, fewer than {args.world_size} process(es): more text, "
            "--total_tokens or --num_train_epochs, or a smaller --max_length"
        )
    return total


def masking(tokenizer: "PreTrainedTokenizerBase", seed: int) -> Masking:
    """Return a function to mask packed rows by row number: the same tokens on any process and at any time."""
    if tokenizer.mask_token_id is None:
        raise InputError(f"--objective masked: the tokenizer {tokenizer.name_or_path!r} has no mask_token")

    settings = tokenizer.all_special_ids, tokenizer.mask_token_id, len(tokenizer)

    def mask(batch: Batch, numbers: Sequence[int]) -> Batch:
        rows = zip(batch["input_ids"].split(1), numbers, strict=True)
        masked = [masked_tokens(row, *settings, seeded_generator(seed, number)) for row, number in rows]
        ids, labels = map(torch.cat, zip(*masked, strict=True))
        return {**batch, "input_ids": ids, "labels": labels}

    return mask


def infilled(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", max_length: int, seed: int) -> Iterator[str]:
    """Yield documents short enough for a row in Code Llama's infilling format, nine of ten; the others unchanged."""
    check_infilling_tokens(tokenizer)
    number = 0
    for window in windows(texts, 1000, 1 << 24):
        # Not verbose, here and below: documents longer than the model's context need no warning.
        tokenized = tokenizer(window, add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(window, tokenized, strict=True):
            # The document token, the four tokens of the format, and possible further ones from splitting words.
            fits = len(ids) + 12 <= max_length
            yield fill_in_the_middle(text, number, seed) if fits else text
            number += 1


# ---- models ----
#
# The model to pretrain: the named one, or a new one with its own tokenizer.


def load_or_make_base(
    script_args: PretrainArguments, model_args: "ModelConfig", texts: Sequence[str]
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model to pretrain and its tokenizer: the named one, or a new one.

    A new one has the architecture of `--config_name_or_path`, or the one of the flags and the tokenizer's size. The
    tokenizer is the named one, or a new one trained on `texts`.
    """
    if model_args.model_name_or_path:
        return load_policy(named_model(model_args))
    fields = script_args.model_fields()
    # A named architecture keeps embedding rows without a token.
    size, context = fields.get("vocab_size"), fields["max_position_embeddings"]
    if script_args.tokenizer_name_or_path:
        tokenizer = load_tokenizer(script_args.tokenizer_name_or_path)
    else:
        most = size or script_args.vocab_size
        tokenizer = make_tokenizer(texts, most, context, script_args.objective, script_args.world_texts)
    if size is not None and len(tokenizer) > size:
        raise InputError(
            f"--config_name_or_path {script_args.config_name_or_path}: vocab_size={size} is less than the "
            f"{len(tokenizer)} tokens of the tokenizer"
        )
    refuse(model_args.load_in_4bit or model_args.load_in_8bit, "--load_in_4bit/8bit", "a new model learns all weights")
    of_the_tokenizer = {
        "vocab_size": size or len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    is_masked, attention = script_args.objective == "masked", model_args.attn_implementation
    return new_model({**fields, **of_the_tokenizer}, is_masked, attention, model_args.dtype), tokenizer


def new_model(
    fields: Mapping[str, object], is_masked: bool, attn_implementation: str | None, dtype: str
) -> "PreTrainedModel":
    """Return a model of the family with new weights.

    Args:
        fields: of its config.
        is_masked: whether it is bidirectional, for masked tokens.
        dtype: of its weights, such as bfloat16; auto is float32.
    """
    config = new_config({**fields, "is_causal": not is_masked, "attn_implementation": attn_implementation})
    try:
        # Not `_from_config`: under ZeRO-3 it partitions the weights before they are initialized.
        model = (HfllmForMaskedLM if is_masked else HfllmForCausalLM)(config)
    except (ImportError, ValueError) as error:
        raise InputError(f"--attn_implementation {attn_implementation}: {str(error).splitlines()[0]}") from None
    return cast_weights(model, getattr(torch, "float32" if dtype == "auto" else dtype))


# ---- trainers ----
#
# The trainers of pretraining: on packed rows in a planned order, and on padded documents.


def trainer_of_rows(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Dataset],
    test_texts: Sequence[str],
) -> PretrainTrainer:
    """Return a trainer on the packed rows of each source, in the order and the batches of a plan."""
    length, batch_tokens = script_args.max_length, global_batch_size(training_args) * script_args.max_length
    mask = masking(tokenizer, training_args.seed) if script_args.objective == "masked" else None
    num_rows, num_parameters = sum(map(len, rows)), model.num_parameters()
    plan = BatchPlan(
        rows,
        length,
        rows_of_run(training_args, script_args.total_tokens, length, num_parameters, num_rows),
        Schedule.parse(script_args.batch_ramp or batch_tokens, "--batch_ramp"),
        Schedule.parse(script_args.length_curriculum or length, "--length_curriculum"),
        pad_token_id=tokenizer.pad_token_id,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        weights=script_args.mixture_weights,
        process=training_args.process_index,
        processes=training_args.world_size,
        transform=mask,
    )
    trainer_args = changed(
        training_args,
        # Each batch of the plan is a whole optimizer step, and the plan covers the whole run.
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_steps=-1,
        # The collator reads `seq_lengths`, not an argument of any model.
        remove_unused_columns=False,
    )
    settings = loss_settings(model, script_args.loss_chunk_size)

    def collate(packed: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
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


def source_table(sources: Mapping[str, Dataset], plan: BatchPlan) -> list[dict[str, str | int]]:
    """Return a table of each source's share of a run."""
    return [
        {"source": name, "documents": len(texts), "rows": len(rows), "tokens of the run": num_rows * plan.row_length}
        for (name, texts), rows, num_rows in zip(sources.items(), plan.sources, plan.rows_by_source(), strict=True)
    ]


def padded_trainer(
    args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    test_texts: Sequence[str],
    max_length: int,
    loss_chunk_size: int | None,
    use_muon: bool,
) -> "Trainer":
    """Return a trainer on single documents, in batches of similar length."""
    trainer_args = changed(
        args,
        train_sampling_strategy="sequential",
        # The logged speed counts only tokens with a loss.
        include_num_input_tokens_seen="non_padding",
    )
    batch_rows = args.per_device_train_batch_size * args.world_size
    train_pieces = length_grouped(token_pieces(texts, tokenizer, max_length), batch_rows, args.seed)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = loss_settings(model, loss_chunk_size)
    return TokenMeanEvaluation(
        model=model,
        args=trainer_args,
        train_dataset=Dataset.from_dict({"input_ids": train_pieces}),
        eval_dataset=Dataset.from_dict({"input_ids": token_pieces(test_texts, tokenizer, max_length)}),
        data_collator=lambda rows: {**collate(rows), **settings},
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(use_muon, trainer_args),
    )


# ---- watch ----
#
# Monitor a pretraining run and evaluate its model: speed, samples, a guard against spikes, held-out metrics.


# Training text of the n-gram model, kept in memory.
MOST_NGRAM_BYTES = 1 << 24


def monitor(
    trainer: "Trainer", max_length: int, loss_spikes: str, peak_flops: float | None, token_size: float | None
) -> ThroughputCallback:
    """Log throughput, and bits per byte where the size of a token is known, and guard against spikes of the loss.

    Args:
        trainer: for packed rows, or the stock one, configured to count tokens
            (`include_num_input_tokens_seen`).
        max_length: tokens of a row.
        loss_spikes: stop or warn.
        peak_flops: of one device, to log the reached share.
        token_size: bytes per token of the training text.
    """
    model, plan = trainer.model, getattr(trainer, "plan", None)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shape = (config.num_hidden_layers, heads, config.hidden_size // heads, max_length)
    throughput = ThroughputCallback(
        tokens_per_step=None if plan is None else lambda step: plan.tokens_at(step) - plan.tokens_at(step - 1),
        flops_per_token=palm_flops_per_token(multiplied_parameters(model), *shape) if peak_flops else None,
        peak_flops=peak_flops,
        **({} if token_size is None else {"bytes_per_token": token_size}),
    )
    add_to_logs(trainer, throughput)
    trainer.add_callback(LossSpikeGuard(action=loss_spikes))
    return throughput


def add_samples(
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    sample_steps: int | None,
    throughput: ThroughputCallback,
) -> Callable[[], list[dict[str, int | str]]]:
    """Sample continuations of texts at intervals; not while the model is split over processes.

    Args:
        texts: the first words of three of them are the prompts.
        sample_steps: steps between samples; by default four times per run, 0 means never.
        throughput: its clock is stopped meanwhile.

    Returns:
        A function to get the samples.
    """
    if sample_steps == 0 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return lambda: []
    plan, args = getattr(trainer, "plan", None), trainer.args
    steps = len(plan) if plan is not None else max(args.max_steps, 0) or len(trainer.get_train_dataloader())
    prompts = [" ".join(text.split()[:8]) for text in texts if len(text.split()) > 12][:3]
    if not prompts:
        return lambda: []
    every, file = sample_steps or max(steps // 4, 1), Path(args.output_dir) / "samples.jsonl"
    callback = SampleCallback(tokenizer, prompts, every, file, max_new_tokens=48, throughput=throughput)
    trainer.add_callback(callback)
    return lambda: callback.samples


def add_probes(
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    texts: WorldTexts | None,
    throughput: ThroughputCallback,
) -> ProbeCallback | None:
    """Log how far the operations that the world's texts need are learned; not while the model is split.

    Args:
        texts: the embedded world's texts; `None` for others, which are not probed.
        throughput: its clock is stopped meanwhile.

    Returns:
        The callback, or `None` where nothing is probed.
    """
    if texts is None or not tokenizer.is_fast or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None
    probes = probes_of(World(texts.world_seed), texts.shares, NUM_PROBES)
    if not probes:
        return None
    callback = ProbeCallback(tokenizer, probes, throughput)
    add_to_logs(trainer, callback)
    return callback


def probe_metrics(callback: ProbeCallback | None, model: "PreTrainedModel") -> dict[str, float]:
    """Return the share of probed tokens that the trained model predicts right, by operation, with errors."""
    shares = callback.shares(model) if callback else {}
    return {name: value for each in shares for name, value in mean_of(f"probe_{each}", shares[each]).items()}


def probe_curves(log_history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> dict[str, Plot]:
    """Return the plot of the probed operations over the steps."""
    names = {title: f"probe_{each}" for each, title in TITLES.items() if f"probe_{each}" in metrics}
    labels = {"title": "What the model has learned to do", "xlabel": "optimizer steps", "ylabel": "right tokens"}
    return {"probes": replace(plot_history(log_history, names, **labels), is_share=True)} if names else {}


def probes_of_run(folder: str | Path) -> tuple[dict[str, float], dict[str, Plot]]:
    """Return the figures of the probed operations of a finished run, and their plot."""
    metrics = {name: value for name, value in read_report(folder)["metrics"].items() if name.startswith("probe_")}
    state = json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
    return metrics, probe_curves(state["log_history"], metrics)


def multiplied_parameters(model: "PreTrainedModel") -> int:
    """Return the number of parameters multiplied with each token, without lookup tables."""
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return model.num_parameters() - (0 if looked_up is head else looked_up.numel())


def bytes_per_token(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", most: int = 2000) -> float:
    """Return the UTF-8 bytes of text per predicted token, over the first `most` texts."""
    sample = list(texts[:most])
    tokens = sum(map(len, tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]))
    return sum(len(text.encode()) for text in sample) / max(tokens, 1)


def stop_if_broken(trainer: "Trainer") -> None:
    """Stop if the loss of the model has diverged."""
    for guard in trainer.callback_handler.callbacks:
        if isinstance(guard, LossSpikeGuard) and guard.action == "stop" and guard.message:
            raise InputError(f"{guard.message}. The model was not saved; --loss_spikes warn continues regardless")


def mean_speed(log_history: Sequence[dict]) -> float:
    """Return the median of the logged tokens per second; 0 when none was logged."""
    speeds = [entry["tokens_per_second"] for entry in log_history if "tokens_per_second" in entry]
    return statistics.median(speeds) if speeds else 0.0


def held_out_metrics(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_texts: Sequence[str],
    test_texts: Sequence[str],
    max_length: int,
) -> dict[str, float]:
    """Return the bits per byte of held-out texts under the model and its baselines.

    The 5-gram model learns from as many of the training texts as fit into `MOST_NGRAM_BYTES`.
    """
    return {
        **text_likelihood(model, tokenizer, test_texts, max_length).metrics(),
        "bits_per_byte_5gram": ngram_bits_per_byte(beginning(train_texts, MOST_NGRAM_BYTES), test_texts, order=5),
        "bits_per_byte_gzip": gzip_bits_per_byte(test_texts),
    }


def beginning(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """Yield the first texts, up to `most_bytes` of UTF-8; the text exceeding the limit is cut."""
    for text in texts:
        encoded = text.encode(errors="replace")[:most_bytes]
        yield encoded.decode(errors="ignore")
        most_bytes -= len(encoded)
        if most_bytes <= 0:
            return
