"""Compare a student, its teacher, and a student without a teacher, on the same held-out rows and prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hfllm.data.world.vocabulary import RIGHT
from hfllm.data.world.world import World
from hfllm.evaluation.responses import JudgedAnswer, gold_by_group, judge_tasks
from hfllm.outputs.report import (
    Bars,
    Plot,
    averaged,
    is_noise,
    mean_of,
    plot_history,
    plus_minus,
    ratio_error,
    standard_error,
    with_error,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

# The logs that `Trainer` keeps.
History = Sequence[Mapping[str, float]]
SHOWN_SAMPLES = 12
# Tokens per chunk of logits.
CHUNK = 256
# What the names of a processor's other outputs begin with, such as `pixel_values` and `image_grid_thw`.
OF_PICTURES = ("pixel_", "image_", "token_type_ids", "mm_token_type_ids")
TEACHER, STUDENT, ALONE = "teacher", "student", "student_alone"


@dataclass(frozen=True)
class GoldEvaluation:
    """Answers of one model to the world's evaluation prompts and to one question per fact, with gold rewards."""

    sampled: list[JudgedAnswer] = field(default_factory=list)
    greedy: list[JudgedAnswer] = field(default_factory=list)
    facts: list[JudgedAnswer] = field(default_factory=list)


def judge_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    world: World,
    num_eval_prompts: int,
    response_length: int,
    seed: int,
    num_samples: int = 1,
) -> GoldEvaluation:
    """Answer the world's held-out prompts and judge the answers by the gold rubric.

    Args:
        num_eval_prompts: number of prompts, answered `num_samples` times at temperature 1, and once greedily.
    """
    tasks = world.evaluation_tasks(num_eval_prompts)
    return GoldEvaluation(
        sampled=judge_tasks(model, tokenizer, tasks, response_length, True, seed, num_samples),
        greedy=judge_tasks(model, tokenizer, tasks, response_length, do_sample=False),
        facts=judge_tasks(model, tokenizer, world.fact_tasks(), response_length, do_sample=False),
    )


def fit_metrics(
    batches: Iterable[Mapping[str, "torch.Tensor"]], models: Mapping[str, "PreTrainedModel"]
) -> dict[str, float]:
    """Return each model's perplexity on the targets of the same batches, and its agreement with the teacher.

    Args:
        batches: with `input_ids`, `attention_mask` and `shift_labels`.
        models: by their names in the report; agreement is measured where one of them is `teacher`.

    Returns:
        `perplexity_NAME`, and `agreement_NAME`: the share of targets where its most likely token is the teacher's;
        each with its standard error over rows and their number, see `hfllm.outputs.report`.
    """
    import torch

    sums: dict[str, list[float]] = {name: [] for name in models}
    agreed: dict[str, list[float]] = {name: [] for name in models}
    counts: list[int] = []
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for batch in batches:
            likeliest = {}
            counts += (batch["shift_labels"] != -100).sum(1).tolist()
            for name, model in models.items():
                losses, likeliest[name] = target_losses(model, batch)
                sums[name] += _by_row(losses, batch)
            for name in models if TEACHER in models else ():
                agreed[name] += _by_row((likeliest[name] == likeliest[TEACHER]).double(), batch)
    for name, model in models.items():
        model.train(modes[name])
    # Without a target there is nothing to divide by; a row without one says nothing.
    count, metrics = max(sum(counts), 1), {}
    rows = [place for place, number in enumerate(counts) if number]
    for name in models:
        perplexity = min(torch.tensor(sum(sums[name]) / count).exp().item(), 1e9)
        error = ratio_error([sums[name][row] for row in rows], [counts[row] for row in rows])
        # The perplexity's error is that of its logarithm, times its slope.
        error = None if error is None else perplexity * error
        metrics |= {f"perplexity_{name}": perplexity, **with_error(f"perplexity_{name}", error, len(rows))}
    if TEACHER in models:
        for name in models:
            if name != TEACHER:
                error = ratio_error([agreed[name][row] for row in rows], [counts[row] for row in rows])
                share = {f"agreement_{name}": sum(agreed[name]) / count}
                metrics |= {**share, **with_error(f"agreement_{name}", error, len(rows))}
    return metrics


def _by_row(values: "torch.Tensor", batch: Mapping[str, "torch.Tensor"]) -> list[float]:
    """Return the sum for each row of a batch of a value for each of its targets."""
    import torch

    row_of = (batch["shift_labels"] != -100).nonzero()[:, 0].cpu()
    return torch.zeros(len(batch["shift_labels"]), dtype=torch.double).index_add_(0, row_of, values).tolist()


def target_losses(
    model: "PreTrainedModel", batch: Mapping[str, "torch.Tensor"]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the cross-entropy of each target of a batch, and the model's most likely token there."""
    import torch

    losses, likeliest = [], []
    for logits, targets in _target_logits(model, batch):
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu())
        likeliest.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(likeliest)


def row_losses(model: "PreTrainedModel", batches: Iterable[Mapping[str, "torch.Tensor"]]) -> list[tuple[float, int]]:
    """Return nats and number of targets of each row of batches as `fit_metrics` takes them."""
    import torch

    found, was_training = [], model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            counts = (batch["shift_labels"] != -100).sum(1).tolist()
            found += zip(_by_row(target_losses(model, batch)[0], batch), counts, strict=True)
    model.train(was_training)
    return found


def _target_logits(
    model: "PreTrainedModel", batch: Mapping[str, "torch.Tensor"]
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Yield fp32 logits and targets of the positions with a target, `CHUNK` of them at a time.

    The trunk reads the batch once. The model's own forward pass makes the logits, since it may cap or scale them or
    set a precision: a hook passes it the trunk's states, first one position per row, then the chunks. A model that
    does not call its trunk as a whole (OPT) makes all logits of the batch.
    """
    import torch

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = ("input_ids", "attention_mask")
    names = [key for key in batch if key in tokens or key.startswith(OF_PICTURES)]
    read, states = {key: batch[key].to(model.device) for key in names}, []

    def logits_of(
        read: "Mapping[str, torch.Tensor]", substitute: "Callable[[torch.Tensor], torch.Tensor]"
    ) -> "torch.Tensor":
        def hook(module: "torch.nn.Module", args: tuple[object, ...], output: "ModelOutput") -> None:
            if getattr(output, "last_hidden_state", None) is not None:
                output["last_hidden_state"] = substitute(output.last_hidden_state)

        with bare.base_model.register_forward_hook(hook):
            return model(**read, use_cache=False).logits

    def first_places(whole: "torch.Tensor") -> "torch.Tensor":
        states.append(whole)
        return whole[:, :1]

    logits = logits_of(read, first_places)
    found, places = states[0] if states else logits, batch["shift_labels"] != -100
    chunks = found[places.to(found.device)].split(CHUNK)
    # A target stands for no picture, as the first token of a row may.
    target = batch["shift_labels"][places][:1, None].to(model.device)
    one_token = {"input_ids": target, "attention_mask": torch.ones_like(target)}
    for chunk, targets in zip(chunks, batch["shift_labels"][places].split(CHUNK), strict=True):
        logits = logits_of(one_token, lambda _, chunk=chunk: chunk.unsqueeze(0))[0] if states else chunk
        yield logits.float(), targets.to(logits.device)


def gold_metrics(judged: Mapping[str, GoldEvaluation]) -> dict[str, float]:
    """Return the gold metrics of each model by name, and the share of the teacher's reward that the student keeps."""
    metrics: dict[str, float] = {}
    for name, one in judged.items():
        metrics |= mean_of(f"gold_reward_{name}", _per_prompt(one))
        metrics |= mean_of(f"gold_reward_greedy_{name}", [row["gold"] for row in one.greedy])
        metrics |= mean_of(f"fact_accuracy_{name}", [float(row["gold"] >= RIGHT) for row in one.facts])
    # A share of zero or of a negative number has no meaning.
    for kind in ("gold_reward", "gold_reward_greedy"):
        if metrics[f"{kind}_{TEACHER}"] > 0:
            metrics[f"{kind}_kept"] = metrics[f"{kind}_{STUDENT}"] / metrics[f"{kind}_{TEACHER}"]
    return metrics


def _per_prompt(one: GoldEvaluation) -> list[float]:
    """Return the mean gold reward of the sampled answers to each prompt."""
    return averaged([row["gold"] for row in one.sampled], max(len(one.sampled) // max(len(one.greedy), 1), 1))


def distillation_summary(metrics: Mapping[str, float], judged: Mapping[str, GoldEvaluation]) -> str:
    """Return what the student keeps of its teacher, and whether it is better than one that learned alone."""
    if not judged:
        return ""
    scores = {name: _per_prompt(one) for name, one in judged.items()}
    said = [f"{name.replace('_', ' ')} {plus_minus(*_mean_and_error(values))}" for name, values in scores.items()]
    text = f"Gold reward on {len(scores[STUDENT]):,} held-out prompts: {', '.join(said)}."
    for other in (TEACHER, ALONE):
        if other in scores:
            differences = [ours - theirs for ours, theirs in zip(scores[STUDENT], scores[other], strict=True)]
            change, error = _mean_and_error(differences)
            than = {TEACHER: "its teacher", ALONE: "the same student without a teacher"}[other]
            if is_noise(change, error):
                text += f" No difference beyond noise between the student and {than}."
            else:
                kind = "better" if change > 0 else "worse"
                text += f" The student is {kind} than {than} by {plus_minus(abs(change), error)}."
    return text


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    return sum(values) / len(values), standard_error(values)


def gold_tables(judged: Mapping[str, GoldEvaluation]) -> dict[str, list[dict[str, str]]]:
    """Return tables of gold reward by task family for each model, and samples of teacher and student side by side."""
    columns = {}
    for name, one in judged.items():
        title = name.replace("_", " ")
        columns |= {f"{title}, sampled": gold_by_group(one.sampled), f"{title}, greedy": gold_by_group(one.greedy)}
    families = gold_by_group(judged[TEACHER].sampled)
    rows = list(zip(judged[TEACHER].sampled, judged[STUDENT].sampled, strict=True))
    return {
        "Gold reward by task family": [
            {"prompts": group, **{title: f"{means[group]:.3f}" for title, means in columns.items()}}
            for group in families
        ],
        "Samples": [
            {"prompt": theirs["prompt"], "teacher": theirs["response"], "student": ours["response"]}
            for theirs, ours in rows[:: max(1, len(rows) // SHOWN_SAMPLES)]
        ],
    }


def distillation_plots(histories: Mapping[str, History], metrics: Mapping[str, float]) -> dict[str, Plot | Bars]:
    """Return the plots of the loss's parts over steps, with and without a teacher, and of the gold rewards.

    Args:
        histories: logs of the students' training, by name in the report.
        metrics: those of the report.
    """
    parts = plot_history(
        histories[STUDENT],
        {"divergence from the teacher": "soft_loss", "cross-entropy": "hard_loss", "hidden states": "hidden_loss"},
        title="What the student learns from",
        xlabel="optimizer steps",
        ylabel="loss (nats per token)",
    )
    without = [entry for entry in histories.get(ALONE, ()) if "hard_loss" in entry]
    if without:
        line = [entry["step"] for entry in without], [entry["hard_loss"] for entry in without]
        parts = replace(parts, lines={**parts.lines, "cross-entropy, alone": line})
    names = {name: f"gold_reward_{name}" for name in (TEACHER, STUDENT, ALONE)}
    values = {name.replace("_", " "): metrics[key] for name, key in names.items() if key in metrics}
    errors = {name.replace("_", " "): metrics.get(f"{key}_se") for name, key in names.items()}
    notes = {label: plus_minus(value, errors[label]) for label, value in values.items()}
    return {
        "parts": parts,
        "gold": Bars("Gold reward on held-out prompts", "mean gold reward (-1 to 1)", values, notes),
    }
