"""Monitor a pretraining run and evaluate its model: speed, samples, a guard against spikes, held-out metrics."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from hfllm.stages.pretrain import PretrainArguments

# Training text of the n-gram model, which is kept in memory.
MOST_NGRAM_BYTES = 1 << 24


def watch(
    trainer: "Trainer",
    script_args: "PretrainArguments",
    tokenizer: "PreTrainedTokenizerBase",
    train_texts: Sequence[str],
    test_texts: Sequence[str],
) -> Callable[[], list[dict[str, int | str]]]:
    """Log throughput and bits per byte, guard against spikes, and sample at intervals.

    Args:
        trainer: that of packed rows, or the stock one, which must count tokens
            (`include_num_input_tokens_seen`).

    Returns:
        A function that returns the samples.
    """
    from pathlib import Path

    from hfllm.scaling.speed import palm_flops_per_token
    from hfllm.trainers.callbacks import SampleCallback
    from hfllm.trainers.monitors import LossSpikeGuard, ThroughputCallback, add_to_logs

    model, args = trainer.model, trainer.args
    plan = getattr(trainer, "plan", None)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shape = (config.num_hidden_layers, heads, config.hidden_size // heads, script_args.max_length)
    flops = palm_flops_per_token(multiplied_parameters(model), *shape) if script_args.peak_flops else None
    throughput = ThroughputCallback(
        tokens_per_step=None if plan is None else lambda step: plan.tokens_at(step) - plan.tokens_at(step - 1),
        flops_per_token=flops,
        peak_flops=script_args.peak_flops,
        **({} if script_args.objective == "masked" else {"bytes_per_token": bytes_per_token(train_texts, tokenizer)}),
    )
    add_to_logs(trainer, throughput)
    trainer.add_callback(LossSpikeGuard(action=script_args.loss_spikes))
    is_split = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if script_args.objective == "masked" or script_args.sample_steps == 0 or is_split:
        return lambda: []
    steps = len(plan) if plan is not None else max(args.max_steps, 0) or len(trainer.get_train_dataloader())
    prompts = [" ".join(text.split()[:8]) for text in test_texts if len(text.split()) > 12][:3]
    if not prompts:
        return lambda: []
    every = script_args.sample_steps or max(steps // 4, 1)
    file = Path(args.output_dir) / "samples.jsonl"
    callback = SampleCallback(tokenizer, prompts, every, file, max_new_tokens=48, throughput=throughput)
    trainer.add_callback(callback)
    return lambda: callback.samples


def multiplied_parameters(model: "PreTrainedModel") -> int:
    """Return the number of parameters that each token is multiplied with, without tables that are only looked up."""
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return model.num_parameters() - (0 if looked_up is head else looked_up.numel())


def bytes_per_token(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", most: int = 2000) -> float:
    """Return the UTF-8 bytes of text per predicted token, over the first `most` texts."""
    sample = list(texts[:most])
    tokens = sum(map(len, tokenizer(sample, add_special_tokens=False)["input_ids"]))
    return sum(len(text.encode()) for text in sample) / max(tokens, 1)


def stop_if_broken(trainer: "Trainer") -> None:
    """Stop if the loss of the model has diverged.

    Raises:
        InputError: with what the guard found.
    """
    from hfllm.trainers.monitors import LossSpikeGuard

    for guard in trainer.callback_handler.callbacks:
        if isinstance(guard, LossSpikeGuard) and guard.action == "stop" and guard.message:
            raise InputError(f"{guard.message}. The model was not saved; --loss_spikes warn continues regardless")


def mean_speed(log_history: Sequence[dict]) -> float:
    """Return the median of the logged tokens per second; 0 when none was logged."""
    speeds = [entry["tokens_per_second"] for entry in log_history if "tokens_per_second" in entry]
    return statistics.median(speeds) if speeds else 0.0


def held_out_metrics(
    script_args: "PretrainArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_texts: Sequence[str],
    test_texts: Sequence[str],
) -> dict[str, float]:
    """Return the bits per byte of held-out texts under the model and its baselines; nothing for a masked model.

    The 5-gram model learns from as many of the training texts as fit into `MOST_NGRAM_BYTES`.
    """
    if script_args.objective == "masked":
        return {}
    from hfllm.evaluation.baselines import gzip_bits_per_byte, ngram_bits_per_byte
    from hfllm.evaluation.perplexity import text_likelihood

    fit = text_likelihood(model, tokenizer, test_texts, script_args.max_length)
    return {
        **fit.metrics(),
        "bits_per_byte_5gram": ngram_bits_per_byte(beginning(train_texts, MOST_NGRAM_BYTES), test_texts, order=5),
        "bits_per_byte_gzip": gzip_bits_per_byte(test_texts),
    }


def beginning(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """Yield the first texts, up to `most_bytes` of UTF-8; the text that exceeds the limit is cut."""
    for text in texts:
        kept = text.encode(errors="replace")[:most_bytes]
        yield kept.decode(errors="ignore")
        most_bytes -= len(kept)
        if most_bytes <= 0:
            return
