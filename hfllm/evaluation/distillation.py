"""Compare a student, its teacher, and a student without a teacher, on the same held-out rows and prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hfllm.data.world.world import World
from hfllm.evaluation.responses import JudgedAnswer, gold_by_group, judge_tasks, mean_gold, right_share
from hfllm.outputs.report import Bars, Plot, plot_history

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

# The logs that `Trainer` keeps.
History = Sequence[Mapping[str, float]]
SHOWN_SAMPLES = 12
# Tokens per chunk of logits.
CHUNK = 256
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
        `perplexity_NAME`, and `agreement_NAME`: the share of targets where its most likely token is the teacher's.
    """
    import torch

    sums, agreed, count = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0), 0
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for batch in batches:
            likeliest = {}
            count += (batch["shift_labels"] != -100).sum().item()
            for name, model in models.items():
                chosen = []
                for logits, targets in _target_logits(model, batch):
                    sums[name] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                    chosen.append(logits.argmax(-1).cpu())
                likeliest[name] = torch.cat(chosen)
            for name in models if TEACHER in models else ():
                agreed[name] += (likeliest[name] == likeliest[TEACHER]).sum().item()
    for name, model in models.items():
        model.train(modes[name])
    count = max(count, 1)
    metrics = {f"perplexity_{name}": min(torch.tensor(sums[name] / count).exp().item(), 1e9) for name in models}
    if TEACHER in models:
        metrics |= {f"agreement_{name}": agreed[name] / count for name in models if name != TEACHER}
    return metrics


def _target_logits(
    model: "PreTrainedModel", batch: Mapping[str, "torch.Tensor"]
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Yield fp32 logits and targets of the positions with a target, `CHUNK` of them at a time.

    The trunk reads the batch once. The model's own forward pass makes the logits, since it may cap or scale them or
    set a precision: a hook passes it the trunk's states, first one position per row, then the chunks. A model that
    does not call its trunk as a whole (OPT) makes all logits of the batch.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    read, states = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}, []

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
    one_token = {key: value[:1, :1] for key, value in read.items()}
    for chunk, targets in zip(chunks, batch["shift_labels"][places].split(CHUNK), strict=True):
        logits = logits_of(one_token, lambda _, chunk=chunk: chunk.unsqueeze(0))[0] if states else chunk
        yield logits.float(), targets.to(logits.device)


def gold_metrics(judged: Mapping[str, GoldEvaluation]) -> dict[str, float]:
    """Return the gold metrics of each model by name, and the share of the teacher's reward that the student keeps."""
    metrics = {}
    for name, one in judged.items():
        metrics |= {
            f"gold_reward_{name}": mean_gold(one.sampled),
            f"gold_reward_greedy_{name}": mean_gold(one.greedy),
            f"fact_accuracy_{name}": right_share(one.facts),
        }
    # A share of zero or of a negative number has no meaning.
    for kind in ("gold_reward", "gold_reward_greedy"):
        if metrics[f"{kind}_{TEACHER}"] > 0:
            metrics[f"{kind}_kept"] = metrics[f"{kind}_{STUDENT}"] / metrics[f"{kind}_{TEACHER}"]
    return metrics


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
        xlabel="step",
        ylabel="nats per token",
    )
    without = [entry for entry in histories.get(ALONE, ()) if "hard_loss" in entry]
    if without:
        line = [entry["step"] for entry in without], [entry["hard_loss"] for entry in without]
        parts = replace(parts, lines={**parts.lines, "cross-entropy, alone": line})
    names = {name: f"gold_reward_{name}" for name in (TEACHER, STUDENT, ALONE)}
    values = {name.replace("_", " "): metrics[key] for name, key in names.items() if key in metrics}
    notes = {label: f"{value:.3f}" for label, value in values.items()}
    return {"parts": parts, "gold": Bars("Gold reward on held-out prompts", "mean gold reward", values, notes)}
