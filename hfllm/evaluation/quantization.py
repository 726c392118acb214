"""Evaluate a model before and after quantization: size, perplexity, gold (exact) reward, greedy tokens, speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from hfllm.compression.schemes import agreement, greedy_tokens, linear_bytes, speeds, stored_bytes, token_windows
from hfllm.data.world.world import World
from hfllm.evaluation.perplexity import TextLikelihood, perplexity_change, text_likelihood
from hfllm.evaluation.responses import judge_tasks
from hfllm.outputs.report import change_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SchemeRow(TypedDict, total=False):
    """Results of one quantized form of a model, or of the original.

    Attributes:
        scheme: its name, or `original`.
        bytes: total bytes of the saved weights.
        share: share of the original's bytes.
        linear_share: the same for only the linear layers.
        left: linear layers that were not quantized.
        perplexity: perplexity on the texts.
        gold_reward: gold reward, if there is a world.
        loss: nats per token of right answers about pictures, of a model that sees.
        right: share of right answers about pictures.
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
        timing: arguments of `measure.speeds`.
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
        """Return the row of the model in full precision, with which the others are compared.

        Args:
            names: the linear layers that schemes quantize.
        """
        # Greedy tokens of the original, with which the quantized forms are compared.
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
        """Return the row of a quantized form that has not run yet; call it after `original`, with the same `names`."""
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
            found = speeds({"original": original, name: model}, **self.timing, rounds=self.rounds)
            row |= found[name]
            row |= {f"{phase}_speedup": found[name][phase] / found["original"][phase] for phase in found[name]}
        return row

    def save_reader(self, folder: str) -> None:
        """Save beside a model what reads for it."""
        self.tokenizer.save_pretrained(folder)

    def loss(self, model: "PreTrainedModel", num_texts: int) -> float:
        """Return nats per token on the first texts."""
        fit = text_likelihood(model, self.tokenizer, self.texts[:num_texts], self.max_length)
        return fit.nats / fit.tokens

    def difference_after_reload(self, model: "PreTrainedModel", folder: str) -> float:
        """Return the largest difference of logits between a model and the one saved in `folder`, on one window."""
        import torch
        from transformers import AutoModelForCausalLM

        from hfllm.models.loading.saved import saved_model

        again = saved_model(AutoModelForCausalLM, folder).eval()
        again = again if again.device == model.device else again.to(model.device)
        with torch.inference_mode():
            ours, theirs = (each(input_ids=self.windows[0].to(each.device)).logits for each in (model, again))
        return (ours - theirs).abs().max().item()

    def changes(self, name: str) -> dict[str, float]:
        """Return perplexity and gold reward of the original and of a quantized form, with the errors of the change."""
        (fit, golds), (other_fit, other_golds) = self._measured["original"], self._measured[name]
        return perplexity_change(fit, other_fit) | (change_of("gold_reward", golds, other_golds) if golds else {})

    def _greedy(self, model: "PreTrainedModel") -> "torch.Tensor":
        """Return the most likely tokens, (N,) on the CPU, on which the forms are compared."""
        return greedy_tokens(model, self.windows)

    def _quality(self, name: str, model: "PreTrainedModel") -> dict[str, float]:
        fit, golds = text_likelihood(model, self.tokenizer, self.texts, self.max_length), []
        if self.world is not None:
            tasks = self.world.evaluation_tasks(self.num_eval_prompts)
            judged = judge_tasks(model, self.tokenizer, tasks, self.response_length, do_sample=False)
            golds = [row["gold"] for row in judged]
        self._measured[name] = fit, golds
        return {"perplexity": fit.perplexity, **({"gold_reward": sum(golds) / len(golds)} if golds else {})}
