"""Whether an ability appears suddenly: few-shot probes of many runs, by two metrics side by side.

Wei et al. 2022, arXiv:2206.07682, call an ability emergent if smaller models lack it; Schaeffer et al. 2023,
arXiv:2304.15004, show that most such leaps come from a metric counting an answer only if every token is right.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hfllm.data.world.vocabulary import PEOPLE, WELL_SAID
from hfllm.data.world.world import FAMILIES, Task, World
from hfllm.errors import InputError
from hfllm.generation.responses import sample_responses
from hfllm.generation.scoring import batches_of_tokens, evaluating
from hfllm.outputs.report import Plot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- many runs ----


NAMES = {
    "exact_match": "exact match",
    "token_match": "token match",
    "log_likelihood": "log-likelihood, nats per token",
}


@dataclass(frozen=True)
class ProbedRun:
    """A run and its probe results.

    Args:
        name: name of the run.
        parameters, compute, loss: its size, its training FLOPs, and its held-out loss.
        rows: results of `run_probes`.
    """

    name: str
    parameters: float
    compute: float
    loss: float
    rows: Sequence[Mapping[str, Any]]


class Emergence:
    """Probed runs, ordered by compute.

    Args:
        runs: at least one.
    """

    def __init__(self, runs: Sequence[ProbedRun]):
        self.runs = sorted(runs, key=lambda run: run.compute)
        # Answers in no document are left out of the means: the more a model has read, the less likely they become.
        answerable_rows = [[row for row in run.rows if row["family"] not in NEVER_TOLD] for run in self.runs]
        self.by_kind = [mean_scores(rows) for rows in answerable_rows]
        self.by_family = [
            mean_scores([row for row in run.rows if row["kind"] == ZERO_SHOT], by="family") for run in self.runs
        ]

    def metrics(self) -> dict[str, float]:
        """Return the last run's scores, and the share of each metric's total rise in its largest step."""
        result = {}
        for kind in KINDS:
            name = kind.replace("-", "_")
            for metric in METRICS:
                values = [means[kind][metric] for means in self.by_kind]
                result[f"{name}_{metric}"] = values[-1]
                result[f"{name}_{metric}_sharpest_step"] = sharpest_step(values)
        return result

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return tables of the metrics' sharpest steps, and of scores by run, by prompt and (zero-shot) by family."""
        return {
            "Share of a metric's rise in its sharpest step": self._steps(),
            "Probes by prompt": self._rows(self.by_kind, "prompt"),
            "Zero-shot probes by family": self._rows(self.by_family, "family"),
        }

    def plots(self) -> dict[str, Plot]:
        """Return plots of the metrics over compute, by prompt and by family: the best run so far, and all runs."""
        compute, drawn = [run.compute for run in self.runs], {}
        for title, means, stem in (
            ("mean of the families that documents tell of", self.by_kind, "prompt"),
            ("zero-shot", self.by_family, "family"),
        ):
            for metric in METRICS:
                labels = [label for label in means[0] if label not in NEVER_TOLD]
                values = {label: [each[label][metric] for each in means] for label in labels}
                drawn[f"probe_{metric}_by_{stem}"] = Plot(
                    f"{NAMES[metric]} ({title})",
                    "training FLOPs",
                    NAMES[metric],
                    {label: (compute, best_so_far(series)) for label, series in values.items()},
                    points={f"_{label}": (compute, series) for label, series in values.items()},
                    xscale="log",
                )
        return drawn

    def _steps(self) -> list[dict[str, Any]]:
        rows = []
        for title, means in (("", self.by_kind), (f"{ZERO_SHOT}, ", self.by_family)):
            for label in means[0]:
                series = {name: [each[label][name] for each in means] for name in METRICS}
                shares = {name.replace("_", " "): f"{sharpest_step(series[name]):.2f}" for name in METRICS}
                best = f"{max(series['exact_match']):.2f}"
                rows.append({"questions": title + label, "best exact match": best, **shares})
        return rows

    def _rows(self, means: Sequence[Mapping[str, Mapping[str, float]]], column: str) -> list[dict[str, Any]]:
        return [
            {
                "run": run.name,
                "N": f"{run.parameters:,.0f}",
                "FLOPs": f"{run.compute:.3g}",
                "loss": f"{run.loss:.4f}",
                column: label,
                **{name.replace("_", " "): f"{scores[name]:.3f}" for name in METRICS},
            }
            for run, each in zip(self.runs, means, strict=True)
            for label, scores in each.items()
        ]


def best_so_far(values: Sequence[float]) -> list[float]:
    """Return the running maximum."""
    best = []
    for value in values:
        best.append(max(value, best[-1]) if best else value)
    return best


def sharpest_step(values: Sequence[float]) -> float:
    """Return the largest step of the running maximum as a share of its total rise; 0 if there is no rise.

    1 is a single leap, 1 / (runs - 1) a straight line.
    """
    best = best_so_far(values)
    rise = best[-1] - best[0]
    steps = [after - before for before, after in pairwise(best)]
    return max(steps) / rise if values[-1] > values[0] else 0.0


# ---- few shot ----
#
# Probe a base model without training to answer, by one metric with jumps and two without.
#
# Questions of the embedded world are written as in its documents (`Mia asks: ...`, `Tom says: ...`), so a model
# trained only on text can continue them. They are scored in three ways on the tokens of the true answer:
#
#     exact match      1 if greedy decoding gives all of them
#     token match      the share of them equal to the most likely token given the earlier ones
#     log-likelihood   their mean log probability, in nats
#
# The first multiplies the probabilities of all tokens, and may seem to leap while others rise evenly (Schaeffer et al.
# 2023, arXiv:2304.15004, section 2).


ZERO_SHOT, FEW_SHOT, CHAIN = "zero-shot", "few-shot", "chain-of-thought"
KINDS = (ZERO_SHOT, FEW_SHOT, CHAIN)
METRICS = ("exact_match", "token_match", "log_likelihood")
# Families whose answers (saying "I do not know", refusing) no document contains; they also have no steps.
NEVER_TOLD = ("unknown", "harm")


@dataclass(frozen=True)
class Probe:
    """A question as text to continue.

    Args:
        family: family of the world's task.
        kind: one of `KINDS`.
        prompt: text ending before the answer (or before the thought).
        answer: the model answer.
        thought: a solver's reasoning before the answer, for a chain of thought; only its number of sentences is used.
    """

    family: str
    kind: str
    prompt: str
    answer: str
    thought: str = ""


def thought_of(task: Task, world: World) -> str:
    """Return the steps to the answer, in sentences as in the world's documents.

    Raises:
        InputError: for a family without steps.
    """
    words = task.key.split()
    if task.family == "fact":
        animal, attribute = words[1:]
        facts = world.facts[animal]
        return " ".join(WELL_SAID[each].format(x=animal, value=facts[each]) for each in facts if each != attribute)
    if task.family == "reading":
        return task.input
    if task.family == "list":
        items = task.input.split(", ")
        return f"The first item is {items[0]}. The last item is {items[-1]}."
    if task.family == "addition":
        total, *others = (int(word) for word in words[1::2])
        steps = []
        for term in others:
            steps.append(f"{total} plus {term} is {total + term}.")
            total += term
        return " ".join(steps)
    raise InputError(f"family {task.family!r} has no chain of thought; those that have: fact, reading, list, addition")


def make_probes(world: World, count: int, shots: int, seed: int = 0) -> list[Probe]:
    """Return `count` different questions per family, all zero-shot, few-shot and (if there are steps) with a thought.

    The questions are held-out instances in phrasings of the documents; the solved examples before them are
    others of the same family.

    Args:
        shots: solved examples before a few-shot or chain-of-thought question.

    Raises:
        InputError: when the world has fewer different questions of a family.
    """
    rng, probes = random.Random(f"probes-{world.seed}-{seed}"), []
    for family in FAMILIES:
        for task in _different(world, family, count, rng):
            examples = [world.draw_task(rng, family) for _ in range(shots)]
            answer, question = task.gold.accepted[0], _asked(task, rng)
            solved = "".join(f"{_asked(each, rng)} {each.gold.accepted[0]}\n" for each in examples)
            probes.append(Probe(family, ZERO_SHOT, question, answer))
            probes.append(Probe(family, FEW_SHOT, solved + question, answer))
            if family not in NEVER_TOLD:
                solutions = (f"{thought_of(each, world)} {each.gold.accepted[0]}\n" for each in examples)
                prompt = "".join(f"{_asked(each, rng)} {text}" for each, text in zip(examples, solutions, strict=True))
                probes.append(Probe(family, CHAIN, prompt + question, answer, thought_of(task, world)))
    return probes


def run_probes(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    probes: Sequence[Probe],
    batch_tokens: int = 4096,
) -> list[dict[str, Any]]:
    """Return the model's scores as rows with `family`, `kind`, and each of `METRICS`.

    In a chain of thought the model first writes as many sentences as a solver would, greedily; the answer is
    scored after them.
    """
    chained = [at for at, probe in enumerate(probes) if probe.kind == CHAIN]
    ready = list(probes)
    for at, thought in zip(chained, _think(model, tokenizer, [probes[at] for at in chained]), strict=True):
        ready[at] = replace(probes[at], prompt=probes[at].prompt + thought)
    scores = answer_scores(
        model, tokenizer, [probe.prompt for probe in ready], [f" {probe.answer}" for probe in ready], batch_tokens
    )
    return [{"family": probe.family, "kind": probe.kind, **score} for probe, score in zip(ready, scores, strict=True)]


def answer_scores(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_tokens: int = 4096,
) -> list[dict[str, float]]:
    """Return exact match, token match and mean log-likelihood of each answer after its prompt, in one pass.

    Greedy decoding gives an answer if and only if all of its tokens are the most likely ones after the tokens before
    them, so nothing has to be generated.

    Raises:
        InputError: for an answer without a token.
    """
    import torch

    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    before = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    after = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    if [] in after:
        raise InputError(f"answer {after.index([]) + 1} has no token")
    texts = [[*start, *prompt, *answer] for prompt, answer in zip(before, after, strict=True)]
    scores: list[dict[str, float]] = [{} for _ in prompts]
    with evaluating(model), torch.inference_mode():
        for rows in batches_of_tokens(model, list(map(len, texts)), batch_tokens):
            # A causal model does not see padding on the right.
            pieces = [torch.tensor(texts[row]) for row in rows]
            ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits.float()
            for index, row in enumerate(rows):
                end, size = len(texts[row]), len(after[row])
                predicted, target = logits[index, end - size - 1 : end - 1], ids[index, end - size : end]
                hits = (predicted.argmax(-1) == target).float()
                likelihood = predicted.log_softmax(-1).gather(-1, target[:, None]).mean()
                scores[row] = {
                    "exact_match": float(hits.min()),
                    "token_match": float(hits.mean()),
                    "log_likelihood": float(likelihood),
                }
    return scores


def mean_scores(rows: Sequence[dict[str, Any]], by: str = "kind") -> dict[str, dict[str, float]]:
    """Return the means of all metrics for each value of the column `by`, with equal weight per family (or kind)."""
    other = "family" if by == "kind" else "kind"
    cells: dict[str, dict[str, list]] = {}
    for row in rows:
        cells.setdefault(row[by], {}).setdefault(row[other], []).append(row)
    means = {}
    for value, groups in cells.items():
        each = [{name: sum(row[name] for row in group) / len(group) for name in METRICS} for group in groups.values()]
        means[value] = {name: sum(group[name] for group in each) / len(each) for name in METRICS}
    return means


def _asked(task: Task, rng: random.Random) -> str:
    person, other = rng.sample(PEOPLE, 2)
    return f"{person} asks: {task.question}\n{other} says:"


def _different(world: World, family: str, count: int, rng: random.Random) -> Iterator[Task]:
    """Yield `count` held-out tasks of a family, no question twice."""
    questions: set[str] = set()
    for _ in range(20 * count + 1000):
        task = world.draw_task(rng, family, held_out=True)
        if task.question not in questions:
            questions.add(task.question)
            yield task
            if len(questions) == count:
                return
    few = len(questions)
    raise InputError(f"the world has {few} different questions of the family {family!r}, fewer than {count}")


def _think(model: Any, tokenizer: Any, probes: Sequence[Probe]) -> list[str]:
    """Return the model's continuations of the prompts, with as many sentences as the thought has."""
    if not probes:
        return []
    adds_start = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    start = "" if adds_start or tokenizer.bos_token is None else tokenizer.bos_token
    longest = max(len(ids) for ids in tokenizer([f" {probe.thought}" for probe in probes])["input_ids"])
    prompts = [start + probe.prompt for probe in probes]
    responses = sample_responses(model, tokenizer, prompts, longest + 8, do_sample=False, batch_size=64)
    return [_sentences(text, probe.thought.count(".")) for (text,), probe in zip(responses, probes, strict=True)]


def _sentences(text: str, count: int) -> str:
    """Return the first `count` sentences of the first line of `text`."""
    line = text.split("\n")[0]
    ends = [match.end() for match in re.finditer(r"\.(?=\s|$)", line)]
    return line[: ends[count - 1]] if len(ends) >= count else line.rstrip()
