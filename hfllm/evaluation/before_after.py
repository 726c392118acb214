"""Compare a model before and after fine-tuning, quantization or distillation, on the same rows and prompts."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict

from hfllm.compression.schemes import agreement, greedy_tokens, linear_bytes, speeds, stored_bytes, token_windows
from hfllm.data.formats import content_text
from hfllm.data.images.files import read_image
from hfllm.data.images.rows import conversation_batch
from hfllm.data.world.rubric import RIGHT
from hfllm.data.world.world import World
from hfllm.evaluation.perplexity import TextLikelihood, perplexity_change, text_likelihood
from hfllm.evaluation.pictures import Asked, is_right
from hfllm.evaluation.suites.world_suites import JudgedAnswer, gold_by_group, judge_tasks
from hfllm.generation.responses import sample_responses
from hfllm.generation.scoring import evaluating
from hfllm.models.devices import forked_random
from hfllm.models.loading.saved import saved_model
from hfllm.outputs.figures import averaged, change_of, mean_of, plus_minus, shown, with_error, word_of
from hfllm.outputs.intervals import ratio_error, standard_error
from hfllm.outputs.report import Bars, Plot, plot_history

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from transformers.utils import ModelOutput

    Row = Mapping[str, Any]
    Collate = Callable[[Sequence[Row]], Row]
    Answer = Callable[[PreTrainedModel, Sequence[Row]], list[str]]


# ---- fine-tuning ----


# Number of held-out rows and prompts to read, for a small part of the training's time.
MOST_ROWS, MOST_PROMPTS, ANSWER_LENGTH = 64, 8, 48
SAMPLES = "The same prompts before and after"


@dataclass(frozen=True)
class TunedEvaluation:
    """Results of one model.

    Args:
        rows: nats and number of targets per held-out row.
        prompts: held-out prompts, the first ones.
        answers: its greedy answers to them.
    """

    rows: Sequence[tuple[float, int]]
    prompts: Sequence[Any]
    answers: Sequence[str]


def evaluate_tuned(
    trainer: "Trainer",
    held_out: Sequence[Mapping[str, Any]],
    tokenized: "Dataset | None" = None,
    collate: "Collate | None" = None,
    answer: "Answer | None" = None,
) -> TunedEvaluation | None:
    """Evaluate the trainer's current model, and leave the random state as it is.

    `None` where rows or weights are spread over processes or devices, and for streamed data.

    Args:
        held_out: the rows of the trainer's evaluation dataset before they were tokenized.
        tokenized: the same as `input_ids` and `labels`, for a trainer joining several rows to one: they are read one
            by one, cut to its `max_length`. By default its own dataset and collator are used.
        collate: makes batches of these in place of the trainer's collator.
        answer: returns a model's answers to rows, in place of `sample_responses` on their prompts.
    """
    from torch.utils.data import DataLoader

    model, dataset = trainer.model, trainer.eval_dataset if tokenized is None else tokenized
    longest = getattr(trainer.args, "max_length", None)
    if collate is None:
        collate = trainer.data_collator if tokenized is None else partial(_padded, longest=longest)
    is_spread = trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if is_spread or not hasattr(dataset, "select"):
        return None
    dataset = dataset.select(range(min(MOST_ROWS, len(dataset))))
    prompt_rows = [row for row in held_out[:MOST_PROMPTS] if row.get("prompt")]
    prompts = [row["prompt"] for row in prompt_rows]
    with forked_random(model.device), trainer.accelerator.autocast():
        loader = DataLoader(dataset, trainer.args.per_device_eval_batch_size, collate_fn=collate)
        rows = row_losses(model, filter(None, map(_with_targets, loader)))
        answers = (answer or partial(_answers, tokenizer=trainer.processing_class))(model, prompt_rows)
    return TunedEvaluation([row for row in rows if row[1]], prompts, answers)


def _answers(
    model: "PreTrainedModel", rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    if not rows:
        return []
    # A processor has it.
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    settings = {"max_new_tokens": ANSWER_LENGTH, "do_sample": False, "tools": [row.get("tools") for row in rows]}
    return [answer for (answer,) in sample_responses(model, tokenizer, [row["prompt"] for row in rows], **settings)]


def _padded(rows: Sequence[Mapping[str, Any]], longest: int | None) -> dict[str, Any]:
    """Return the first `longest` tokens of rows as a batch, padded on the right without targets or attention."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    names = ("input_ids", "labels")
    columns = {name: [torch.tensor(row[name][:longest], dtype=torch.long) for row in rows] for name in names}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: pad_sequence(parts, True, fillers[name]) for name, parts in columns.items()}


def _with_targets(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a batch with each position's next token as its target; `None` where rows are joined to one."""
    if "attention_mask" not in batch:
        return None
    targets = batch["labels"].roll(-1, 1)
    targets[:, -1] = -100
    return {**{name: value for name, value in batch.items() if name != "labels"}, "shift_labels": targets}


def tuning_metrics(before: TunedEvaluation | None, after: TunedEvaluation | None) -> dict[str, float]:
    """Return the held-out loss per token before and after, with the errors of its mean over rows and of the change."""
    if before is None or after is None or not after.rows:
        return {}
    counts = [count for _, count in after.rows]
    nats = [[nats for nats, _ in each.rows] for each in (before, after)]
    result = change_of("held_out_loss", *([total / sum(counts) for total in each] for each in nats))
    differences = [late - early for early, late in zip(*nats, strict=True)]
    errors = {"before_se": nats[0], "after_se": nats[1], "change_se": differences}
    # The loss is a mean over tokens: rows count by their length.
    exact = {f"held_out_loss_{name}": ratio_error(sums, counts) for name, sums in errors.items()}
    means = {
        f"held_out_loss_{side}": sum(each) / sum(counts) for side, each in zip(("before", "after"), nats, strict=True)
    }
    result |= means | {name: error for name, error in exact.items() if error is not None}
    return result | {"held_out_loss_change": means["held_out_loss_after"] - means["held_out_loss_before"]}


def tuning_summary(metrics: Mapping[str, float]) -> str:
    """Return how the held-out loss has changed, in words; nothing where it was not measured."""
    if "held_out_loss_change" not in metrics:
        return ""
    before, after = (shown(metrics, f"held_out_loss_{side}") for side in ("before", "after"))
    change, n = metrics["held_out_loss_change"], metrics["held_out_loss_n"]
    rows = f"{n} held-out row{'' if n == 1 else 's'}"
    word = word_of("held_out_loss", metrics)
    if word == "too few":
        return f"held-out loss {before} before and {after} nats per token after on {rows}: too few to tell"
    if word in ("noise", "unchanged"):
        return f"held-out loss not changed beyond noise, {before} before and {after} nats per token after on {rows}"
    return f"held-out loss {'fell' if change < 0 else 'rose'} from {before} to {after} nats per token on {rows}"


def tuning_tables(before: TunedEvaluation | None, after: TunedEvaluation | None) -> dict[str, list[dict[str, str]]]:
    """Return the table of greedy answers to the first held-out prompts, before and after."""
    if before is None or after is None or not after.prompts:
        return {}
    return {
        SAMPLES: [
            {"prompt": prompt_text(prompt), "before": first, "after": second}
            for prompt, first, second in zip(after.prompts, before.answers, after.answers, strict=True)
        ]
    }


def prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """Return a prompt as one text: messages one after another."""
    return prompt if isinstance(prompt, str) else " / ".join(content_text(message["content"]) for message in prompt)


# ---- quantization ----
#
# Evaluate a model before and after quantization: size, perplexity, gold (exact) reward, greedy tokens, speed.


class SchemeRow(TypedDict, total=False):
    """Results of one quantized form of a model, or of the original.

    Attributes:
        scheme: its name, or `original`.
        bytes: total bytes of the saved weights.
        share: share of the original's bytes.
        linear_share: the same for only the linear layers.
        left: unquantized linear layers.
        perplexity: perplexity on the texts.
        gold_reward: gold reward, if there is a world.
        loss: nats per token of right answers about images, for a vision-language model.
        right: share of right answers about images.
        agreement: share of positions with the original's greedy next token.
        prefill, decode: tokens per second, if they were timed.
        prefill_speedup, decode_speedup: relative to the original, measured in alternation.
    """

    scheme: str
    bytes: int
    share: float
    linear_share: float
    left: int
    perplexity: float
    gold_reward: float
    loss: float
    right: float
    agreement: float
    prefill: float
    decode: float
    prefill_speedup: float
    decode_speedup: float


@dataclass
class QuantizationEvaluation:
    """Evaluation of a model and its quantized forms.

    Args:
        tokenizer: tokenizer of all of them.
        texts: texts for perplexity and greedy tokens.
        max_length: tokens per window of text.
        world: the embedded world for a gold reward, or `None` for none.
        num_eval_prompts: number of the world's questions.
        response_length: longest answer, in tokens.
        timing: arguments of `schemes.speeds`.
        rounds: repetitions of the timing; 0 means no timing.
    """

    tokenizer: "PreTrainedTokenizerBase"
    texts: Sequence[str]
    max_length: int
    world: World | None = None
    num_eval_prompts: int = 600
    response_length: int = 40
    timing: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 5

    windows: "list[torch.Tensor]" = field(init=False)

    def __post_init__(self) -> None:
        self.windows = token_windows(self.tokenizer, self.texts, self.max_length)
        self._measured: dict[str, tuple[TextLikelihood, list[float]]] = {}

    def original(self, model: "PreTrainedModel", names: Sequence[str]) -> SchemeRow:
        """Return the row of the model in full precision, the reference of the others.

        Args:
            names: the linear layers to quantize.
        """
        # Greedy tokens of the original, the reference of the quantized forms.
        self._bytes = stored_bytes(model), linear_bytes(model, names)
        self._expected = self._greedy(model)
        row: SchemeRow = {"scheme": "original", "bytes": self._bytes[0], "share": 1.0, "linear_share": 1.0, "left": 0}
        row |= {**self._quality("original", model), "agreement": 1.0}
        if self.rounds:
            row |= speeds({"original": model}, **self.timing, rounds=self.rounds)["original"]
            row |= {"prefill_speedup": 1.0, "decode_speedup": 1.0}
        return row

    def quantized(
        self, name: str, model: "PreTrainedModel", original: "PreTrainedModel", names: Sequence[str]
    ) -> SchemeRow:
        """Return the row of a quantized form before its first run; call it after `original`, with the same `names`."""
        from torch import nn

        size, linear = stored_bytes(model), linear_bytes(model, names)
        row: SchemeRow = {
            "scheme": name,
            "bytes": size,
            "share": size / self._bytes[0],
            "linear_share": linear / self._bytes[1],
            "left": sum(type(model.get_submodule(layer)) is nn.Linear for layer in names),
        }
        row |= self._quality(name, model)
        row["agreement"] = agreement(self._expected, self._greedy(model))
        if self.rounds:
            result = speeds({"original": original, name: model}, **self.timing, rounds=self.rounds)
            row |= result[name]
            row |= {f"{phase}_speedup": result[name][phase] / result["original"][phase] for phase in result[name]}
        return row

    def save_reader(self, folder: str) -> None:
        """Save a model's tokenizer or processor with it."""
        self.tokenizer.save_pretrained(folder)

    def loss(self, model: "PreTrainedModel", num_texts: int) -> float:
        """Return nats per token on the first texts."""
        fit = text_likelihood(model, self.tokenizer, self.texts[:num_texts], self.max_length)
        return fit.nats / fit.tokens

    def difference_after_reload(self, model: "PreTrainedModel", folder: str) -> float:
        """Return the largest difference of logits between a model and the one saved in `folder`, on one window."""
        import torch
        from transformers import AutoModelForCausalLM

        again = _reloaded(AutoModelForCausalLM, folder, model.device)
        with torch.inference_mode():
            ours, theirs = (each(input_ids=self.windows[0].to(each.device)).logits for each in (model, again))
        return (ours - theirs).abs().max().item()

    def changes(self, name: str) -> dict[str, float]:
        """Return perplexity and gold reward of the original and of a quantized form, with the errors of the change."""
        (fit, golds), (other_fit, other_golds) = self._measured["original"], self._measured[name]
        return perplexity_change(fit, other_fit) | (change_of("gold_reward", golds, other_golds) if golds else {})

    def _greedy(self, model: "PreTrainedModel") -> "torch.Tensor":
        """Return the most likely tokens, (N,) on the CPU, for comparing the forms."""
        return greedy_tokens(model, self.windows)

    def _quality(self, name: str, model: "PreTrainedModel") -> dict[str, float]:
        fit, golds = text_likelihood(model, self.tokenizer, self.texts, self.max_length), []
        if self.world is not None:
            tasks = self.world.evaluation_tasks(self.num_eval_prompts)
            judged = judge_tasks(model, self.tokenizer, tasks, self.response_length, do_sample=False)
            golds = [row["gold"] for row in judged]
        self._measured[name] = fit, golds
        return {"perplexity": fit.perplexity, **({"gold_reward": sum(golds) / len(golds)} if golds else {})}


def _reloaded(auto_class: "type[_BaseAutoModelClass]", folder: str, device: "torch.device") -> "PreTrainedModel":
    model = saved_model(auto_class, folder).eval()
    return model if model.device == device else model.to(device)


# ---- picture quantization ----
#
# Evaluate a vision-language model before and after quantization: its answers about images, and its size.


# Questions answered together: with images they have many tokens.
BATCH_SIZE = 8


@dataclass
class AnswerTokens:
    """A question with its right answer, as a model reads both.

    Args:
        inputs: the model's inputs of them, one row.
        begin: the position of the answer's first token.
    """

    inputs: "dict[str, torch.Tensor]"
    begin: int


@dataclass
class PictureQuantization(QuantizationEvaluation):
    """Evaluation of a vision-language model and its quantized forms, on questions about images.

    In place of the perplexity on texts it has `loss`, the nats per token of right answers, and `right`, the share of
    right greedy answers; the agreement is measured on the tokens of right answers.

    Args:
        processor: of all of them, saved with the quantized form.
        questions: with their right answers.
        num_losses: the most questions for the loss.
    """

    processor: "ProcessorMixin | None" = None
    questions: Sequence[Asked] = ()
    num_losses: int = 256

    def __post_init__(self) -> None:
        self._measured: dict[str, tuple[list[float], list[float]]] = {}

    @property
    def answers(self) -> Iterator[AnswerTokens]:
        """The questions of the loss, read one at a time: the pixels of all would fill much memory."""
        return (answer_tokens(self.processor, question) for question in self.questions[: self.num_losses])

    def save_reader(self, folder: str) -> None:
        self.processor.save_pretrained(folder)

    def loss(self, model: "PreTrainedModel", num_texts: int) -> float:
        """Return nats per token of the first right answers, with equal weight per answer."""
        nats = [_answer_nats(model, answer) for answer in islice(self.answers, num_texts)]
        return sum(nats) / len(nats)

    def difference_after_reload(self, model: "PreTrainedModel", folder: str) -> float:
        """Return the largest difference of logits between a model and the one saved in `folder`, on one question."""
        from transformers import AutoModelForImageTextToText

        again, first = _reloaded(AutoModelForImageTextToText, folder, model.device), next(self.answers)
        ours, theirs = (_logits(each, first) for each in (model, again))
        return (ours - theirs).abs().max().item()

    def changes(self, name: str) -> dict[str, float]:
        """Return loss and right answers of the original and of a quantized form, with the errors of the change."""
        before, after = self._measured["original"], self._measured[name]
        return change_of("loss", before[0], after[0]) | change_of("right", before[1], after[1])

    def _greedy(self, model: "PreTrainedModel") -> "torch.Tensor":
        import torch

        return torch.cat([_logits(model, answer).argmax(-1).cpu() for answer in self.answers])

    def _quality(self, name: str, model: "PreTrainedModel") -> dict[str, float]:
        from hfllm.evaluation.pictures import answer_pictures

        prompts, images = [each.prompt for each in self.questions], [each.images for each in self.questions]
        responses = answer_pictures(model, self.processor, prompts, images, self.response_length, BATCH_SIZE)
        right = [float(is_right(text, each.answer)) for text, each in zip(responses, self.questions, strict=True)]
        nats = [_answer_nats(model, answer) for answer in self.answers]
        self._measured[name] = nats, right
        return {"loss": sum(nats) / len(nats), "right": sum(right) / len(right)}


def answer_tokens(processor: "ProcessorMixin", question: Asked) -> AnswerTokens:
    """Return a question and its right answer as a model reads them, with the position where the answer begins."""
    images = [[read_image(each, "a question", max_pixels=sys.maxsize, min_side=1) for each in question.images]]
    whole = [*question.prompt, {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}]
    inputs: dict[str, Any] = dict(conversation_batch(processor, [whole], images))
    begun = conversation_batch(processor, [question.prompt], images, add_generation_prompt=True)["input_ids"][0]
    ids = inputs["input_ids"][0]
    # Templates may begin an answer with text left out of an existing one.
    same = (ids[: len(begun)] == begun[: len(ids)]).long().cumprod(0).sum().item()
    return AnswerTokens(inputs, min(same, len(ids) - 1))


def _logits(model: "PreTrainedModel", answer: AnswerTokens) -> "torch.Tensor":
    """Return the logits (A, V) of an answer's tokens, in single precision."""
    import torch

    with torch.inference_mode():
        inputs = {name: value.to(model.device) for name, value in answer.inputs.items()}
        return model(**inputs, use_cache=False).logits[0, answer.begin - 1 : -1].float()


def _answer_nats(model: "PreTrainedModel", answer: AnswerTokens) -> float:
    """Return the mean nats per token of an answer."""
    from torch.nn import functional as F

    logits = _logits(model, answer)
    return F.cross_entropy(logits, answer.inputs["input_ids"][0, answer.begin :].to(logits.device)).item()


# ---- distillation ----
#
# Compare a student, its teacher, and a student without a teacher, on the same held-out rows and prompts.


# The logs kept by `Trainer`.
History = Sequence[Mapping[str, float]]
SHOWN_SAMPLES = 12
# Tokens per chunk of logits.
CHUNK = 256
# Beginnings of the names of a processor's other outputs, such as `pixel_values` and `image_grid_thw`.
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
        with standard errors over rows and their number, see `hfllm.outputs.report`.
    """
    import torch

    sums: dict[str, list[float]] = {name: [] for name in models}
    agreed: dict[str, list[float]] = {name: [] for name in models}
    counts: list[int] = []
    with ExitStack() as modes, torch.inference_mode():
        for model in models.values():
            modes.enter_context(evaluating(model))
        for batch in batches:
            likeliest = {}
            counts += (batch["shift_labels"] != -100).sum(1).tolist()
            for name, model in models.items():
                losses, likeliest[name] = target_losses(model, batch)
                sums[name] += _by_row(losses, batch)
            for name in models if TEACHER in models else ():
                agreed[name] += _by_row((likeliest[name] == likeliest[TEACHER]).double(), batch)
    # Without a target there is nothing to divide by; a row without one says nothing.
    count, metrics = max(sum(counts), 1), {}
    rows = [index for index, number in enumerate(counts) if number]
    for name in models:
        perplexity = min(torch.tensor(sum(sums[name]) / count).exp().item(), 1e9)
        error = ratio_error([sums[name][row] for row in rows], [counts[row] for row in rows])
        # The perplexity's error is its logarithm's error, times its slope.
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
    """Return per row of a batch the sum of its targets' values."""
    import torch

    row_of = (batch["shift_labels"] != -100).nonzero()[:, 0].cpu()
    return torch.zeros(len(batch["shift_labels"]), dtype=torch.double).index_add_(0, row_of, values).tolist()


def target_losses(
    model: "PreTrainedModel", batch: Mapping[str, "torch.Tensor"]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the cross-entropies of a batch's targets, and the model's most likely tokens there."""
    import torch

    losses, likeliest = [], []
    for logits, targets in _target_logits(model, batch):
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu())
        likeliest.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(likeliest)


def row_losses(model: "PreTrainedModel", batches: Iterable[Mapping[str, "torch.Tensor"]]) -> list[tuple[float, int]]:
    """Return nats and number of targets per row of batches in the form of `fit_metrics`."""
    import torch

    result = []
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            counts = (batch["shift_labels"] != -100).sum(1).tolist()
            result += zip(_by_row(target_losses(model, batch)[0], batch), counts, strict=True)
    return result


def _target_logits(
    model: "PreTrainedModel", batch: Mapping[str, "torch.Tensor"]
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Yield fp32 logits and targets of the positions with a target, `CHUNK` of them at a time.

    The trunk reads the batch once. The model's own forward pass makes the logits, since it may cap or scale them or
    set a precision: a hook passes it the trunk's states, first one position per row, then the chunks. A model without
    a single call of its trunk (OPT) makes all logits of the batch.
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

    def first_position(whole: "torch.Tensor") -> "torch.Tensor":
        states.append(whole)
        return whole[:, :1]

    logits = logits_of(read, first_position)
    result, indices = states[0] if states else logits, batch["shift_labels"] != -100
    chunks = result[indices.to(result.device)].split(CHUNK)
    # A target stands for no image, as the first token of a row may.
    target = batch["shift_labels"][indices][:1, None].to(model.device)
    one_token = {"input_ids": target, "attention_mask": torch.ones_like(target)}
    for chunk, targets in zip(chunks, batch["shift_labels"][indices].split(CHUNK), strict=True):
        logits = logits_of(one_token, lambda _, chunk=chunk: chunk.unsqueeze(0))[0] if states else chunk
        yield logits.float(), targets.to(logits.device)


def gold_metrics(judged: Mapping[str, GoldEvaluation]) -> dict[str, float]:
    """Return the gold metrics of all models by name, and the share of the teacher's reward kept by the student."""
    metrics: dict[str, float] = {}
    for name, one in judged.items():
        metrics |= mean_of(f"gold_reward_{name}", _per_prompt(one))
        metrics |= mean_of(f"gold_reward_greedy_{name}", [row["gold"] for row in one.greedy])
        metrics |= mean_of(f"fact_accuracy_{name}", [float(row["gold"] >= RIGHT) for row in one.facts])
    if ALONE in judged:
        metrics |= change_of("gold_reward_against_alone", _per_prompt(judged[ALONE]), _per_prompt(judged[STUDENT]))
    # A share of zero or of a negative number has no meaning.
    for kind in ("gold_reward", "gold_reward_greedy"):
        if metrics[f"{kind}_{TEACHER}"] > 0:
            metrics[f"{kind}_kept"] = metrics[f"{kind}_{STUDENT}"] / metrics[f"{kind}_{TEACHER}"]
    return metrics


def _per_prompt(one: GoldEvaluation) -> list[float]:
    """Return the mean gold reward of the sampled answers to each prompt."""
    return averaged([row["gold"] for row in one.sampled], max(len(one.sampled) // max(len(one.greedy), 1), 1))


def distillation_summary(metrics: Mapping[str, float], judged: Mapping[str, GoldEvaluation]) -> str:
    """Return the student's share of its teacher, and whether it is better than one without a teacher."""
    if not judged:
        return ""
    scores = {name: _per_prompt(one) for name, one in judged.items()}
    figures = [f"{name.replace('_', ' ')} {plus_minus(*_mean_and_error(values))}" for name, values in scores.items()]
    text = f"Gold reward on {len(scores[STUDENT]):,} held-out prompts: {', '.join(figures)}."
    for other in (TEACHER, ALONE):
        if other in scores:
            figures = change_of("score", scores[other], scores[STUDENT])
            than = {TEACHER: "its teacher", ALONE: "the same student without a teacher"}[other]
            if (word := word_of("score", figures)) not in ("more", "less"):
                text += f" No difference beyond noise between the student and {than}."
            else:
                kind = "better" if word == "more" else "worse"
                size = plus_minus(abs(figures["score_change"]), figures.get("score_change_se"))
                text += f" The student is {kind} than {than} by {size}."
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
        metrics: the report's metrics.
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
