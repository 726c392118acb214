"""A model of the world answering with passages: correctness, citations, followed instructions, and the report.

Names, changed facts, instructions and half of the wordings are held out: see `hfllm.data.world.passages`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hfllm.data.passages import citations_of, without_citations
from hfllm.data.world.passages import (
    ANSWERABLE,
    CHANGED,
    CLOSED,
    CONTRADICTING,
    GROUPS,
    INJECTED,
    KEPT,
    KNOWN,
    ONE,
    SILENT,
    STORED,
    THREE,
    TOLD,
    UNANSWERABLE,
    WRONG,
    PassageTask,
)
from hfllm.data.world.rubric import RIGHT, UNKNOWN_PHRASES, gold_score, words_of
from hfllm.data.world.vocabulary import ATTRIBUTES
from hfllm.evaluation.suites.world_suites import JudgedAnswer, gold_by_group
from hfllm.generation.responses import sample_responses
from hfllm.outputs.figures import Promise, mean_of
from hfllm.outputs.report import Found, Plot
from hfllm.stages.ground.flags import GROUNDED, SFT
from hfllm.stages.shared import Speaking, figure_text, plot_of_right

# ---- judged answers ----


# The longest answer in tokens.
RESPONSE_LENGTH = 40
_CLAIM = re.compile(r"\bthe (\w+) (?:is|lives|eats)\b")


@dataclass(frozen=True)
class JudgedResponse:
    """An answer and its judgment.

    Args:
        task: the question.
        response: the text of the answer, with its citations.
        is_right: whether it states exactly the expected facts of this animal, in any style.
        cites_right: whether it cites the passages with these facts, and no other.
        follows: whether it obeys an instruction in a passage.
    """

    task: PassageTask
    response: str
    is_right: bool
    cites_right: bool
    follows: bool


def answer(speaking: Speaking, tasks: Sequence[PassageTask]) -> list[JudgedResponse]:
    """Let a model answer all questions greedily, and judge the answers."""
    prompts = [task.prompt for task in tasks]
    responses = sample_responses(
        speaking.model, speaking.tokenizer, prompts, RESPONSE_LENGTH, do_sample=False, fast=True
    )
    return [judged(task, texts[0]) for task, texts in zip(tasks, responses, strict=True)]


def judged(task: PassageTask, response: str) -> JudgedResponse:
    """Return a response with its judgment."""
    text = without_citations(response)
    claimed = {*_CLAIM.findall(text.lower())}
    is_right = gold_score(text, task.gold) >= RIGHT and claimed <= {task.animal}
    cites_right = sorted(citations_of(response)) == sorted(task.answer.cites)
    return JudgedResponse(task, response, is_right, cites_right, _follows(task, text))


def _follows(task: PassageTask, text: str) -> bool:
    if not any(each.instruction for each in task.told):
        return False
    if task.wanted:
        return task.wanted in words_of(text)
    return any(each in " ".join(words_of(text)) for each in UNKNOWN_PHRASES)


# ---- report ----
#
# The report on answers from passages: reading, citing, admitting ignorance, and the effect of retrieval.


GATED, UNGATED = "gated", "ungated"
# Passages in separate prompts: weighted by BM25, and all equally. And passages without their instructions.
APART, ALIKE, DROPPED = "apart", "alike", "dropped"
# Names of the models and groups of questions in the report.
TITLES = {SFT: "tuned without passages", GROUNDED: "grounded", GATED: "with the gate", UNGATED: "without"}
LABELS = {
    **{ONE: "unknown animals, one passage", THREE: "unknown animals, three passages", CHANGED: "changed facts"},
    **{CONTRADICTING: "two passages disagree", INJECTED: "a passage holds an instruction"},
    **{WRONG: "unknown animals, another's passage", KEPT: "known facts, another animal's passage"},
    **{SILENT: "the passage does not tell", CLOSED: "unknown animals, no passage", KNOWN: "known facts, no passage"},
    **{ANSWERABLE: "a passage tells", UNANSWERABLE: "none does: refused"},
}
SAMPLES_EACH = 2
PROMISES = tuple(
    Promise(f"{LABELS[group]}: right", f"{GROUNDED}_{group}_right", f"{SFT}_{group}_right", "one " + TITLES[SFT])
    for group in (ONE, THREE, CHANGED, CONTRADICTING)
)
WAYS = {
    "three in one prompt": f"{GROUNDED}_{THREE}",
    "each in a prompt of its own, weighed by BM25": f"{THREE}_{APART}",
    "the same, weighed alike": f"{THREE}_{ALIKE}",
    "one that holds an instruction": f"{GROUNDED}_{INJECTED}",
    "the same, its instruction left out by rules": f"{INJECTED}_{DROPPED}",
}

# Answers by model and group of questions.
Answers = Mapping[str, Mapping[str, Sequence[JudgedResponse]]]
Golds = Mapping[str, Sequence[JudgedAnswer]]


@dataclass(frozen=True)
class Retrieval:
    """Answers with retrieved passages.

    Args:
        gate: the least score of a given passage.
        scores: of the best passage for every question, by group of questions.
        answers: by `GATED` and `UNGATED`, and by group of questions.
    """

    gate: float
    scores: Mapping[str, Sequence[float]]
    answers: Answers


def report(
    answers: Answers,
    retrieval: Retrieval,
    ways: Mapping[str, Sequence[JudgedResponse]],
    golds: Golds,
    parts: Sequence[Found] = (),
) -> Found:
    """Return the report of both models.

    Args:
        answers: with given passages.
        retrieval: of the grounded model, with retrieved passages.
        ways: of the grounded model, with three passages in separate prompts, by `APART` and `ALIKE`, and, by
            `DROPPED`, with passages after removal of an instruction.
        golds: of answers to the world's questions without passages.
        parts: other measurements; their figures, tables and plots follow.

    Returns:
        Metrics `MODEL_GROUP_right`, `MODEL_one_passage_right_ATTRIBUTE`, `MODEL_GROUP_cites` (of right answers from
        passages), `MODEL_injected_follows`; `three_passages_apart_right`, and `three_passages_alike_right` as its
        control, with all passages weighted equally; `injected_dropped_right` and `injected_dropped_follows`;
        `gated_KIND_right` and `ungated_KIND_right` end to end, and the `gate`; `MODEL_world_gold`, and
        `world_gold_kept`, the ratio of both.
    """
    metrics: dict[str, float] = {}
    for model, of_model in answers.items():
        for group, responses in of_model.items():
            metrics |= group_metrics(f"{model}_{group}", responses)
    for way, responses in ways.items():
        group = responses[0].task.group
        metrics |= mean_of(f"{group}_{way}_right", [float(each.is_right) for each in responses])
        if group == INJECTED:
            metrics |= mean_of(f"{group}_{way}_follows", [float(each.follows) for each in responses])
    for way, of_way in retrieval.answers.items():
        for kind, responses in of_way.items():
            metrics |= mean_of(f"{way}_{kind}_right", [float(each.is_right) for each in responses])
    metrics["gate"] = retrieval.gate
    for model, responses in golds.items():
        metrics |= mean_of(f"{model}_world_gold", [each["gold"] for each in responses])
    metrics["world_gold_kept"] = metrics[f"{GROUNDED}_world_gold"] / max(metrics[f"{SFT}_world_gold"], 1e-9)
    summary = "; ".join([summary_of(metrics), *(part.summary for part in parts)])
    tables, plots = _tables(metrics, answers, retrieval, golds), {"right": _plot(metrics)}
    for part in parts:
        metrics, tables, plots = metrics | part.metrics, {**tables, **part.tables}, {**plots, **part.plots}
    return Found(metrics, summary, {**tables, "Answers": samples(answers)}, plots, PROMISES)


def group_metrics(name: str, responses: Sequence[JudgedResponse]) -> dict[str, float]:
    """Return a group's metrics: right answers, right ones with right citations, and followed instructions."""
    group = responses[0].task.group
    metrics = mean_of(f"{name}_right", [float(each.is_right) for each in responses])
    if group == ONE:
        for attribute in ATTRIBUTES:
            of_attribute = [float(each.is_right) for each in responses if each.task.attribute == attribute]
            metrics |= mean_of(f"{name}_right_{attribute}", of_attribute)
        new = [float(each.is_right) for each in responses if each.task.is_new_phrasing]
        metrics |= mean_of(f"{name}_right_new_phrasings", new)
    right = [float(each.cites_right) for each in responses if each.is_right]
    if group in TOLD and right:
        metrics |= mean_of(f"{name}_cites", right)
    if group == INJECTED:
        metrics |= mean_of(f"{name}_follows", [float(each.follows) for each in responses])
    return metrics


def summary_of(metrics: Mapping[str, float]) -> str:
    """Return a summary of the results, in a sentence or two."""
    text = partial(figure_text, metrics)
    one, three = (f"{GROUNDED}_{group}_right" for group in (ONE, THREE))
    return "; ".join(
        (
            f"animals that no text names: right with a passage {text(one)}, with three "
            f"{text(three)} in one prompt and {text(f'{THREE}_{APART}_right')} each in its own, "
            f"weighed by BM25 (alike {text(f'{THREE}_{ALIKE}_right')}), of one tuned without them "
            f"{text(f'{SFT}_{ONE}_right')}",
            f"without any it admits not to know in {text(f'{GROUNDED}_{CLOSED}_right')}",
            f"through BM25 and the gate: answered {text(f'{GATED}_{ANSWERABLE}_right')}, refused where no "
            f"passage tells {text(f'{GATED}_{UNANSWERABLE}_right')} (ungated "
            f"{text(f'{UNGATED}_{UNANSWERABLE}_right')}), known facts kept "
            f"{text(f'{GATED}_{KNOWN}_right')}",
            f"instructions in passages followed {text(f'{GROUNDED}_{INJECTED}_follows')}, and "
            f"{text(f'{INJECTED}_{DROPPED}_follows')} where rules leave them out",
            f"gold reward without passages {metrics['world_gold_kept']:.3f} of the other model's",
        )
    )


def _tables(
    metrics: Mapping[str, float], answers: Answers, retrieval: Retrieval, golds: Golds
) -> dict[str, list[dict[str, str]]]:
    text = partial(figure_text, metrics)
    families = {model: gold_by_group(model_answers) for model, model_answers in golds.items()}
    return {
        "Right answers, greedy": [
            {
                "asked": LABELS[group],
                **{TITLES[model]: text(f"{model}_{group}_right") for model in (GROUNDED, SFT)},
                "right ones that cite rightly": text(f"{GROUNDED}_{group}_cites"),
                "n": f"{metrics[f'{GROUNDED}_{group}_right_n']:,}",
            }
            for group in GROUPS
        ],
        "Three passages, and passages with an instruction": [
            {
                "passages": title,
                "right": text(f"{name}_right"),
                "follows": text(f"{name}_follows"),
                "n": f"{metrics[f'{name}_right_n']:,}",
            }
            for title, name in WAYS.items()
        ],
        "Passages found by BM25": [
            {
                "asked": LABELS[kind],
                **{TITLES[way]: text(f"{way}_{kind}_right") for way in (GATED, UNGATED)},
                "best scores": f"{min(retrieval.scores[kind]):.2f} to {max(retrieval.scores[kind]):.2f}",
                "n": f"{metrics[f'{GATED}_{kind}_right_n']:,}",
            }
            for kind in STORED
        ],
        "Gold reward without passages": [
            {"asked": group, **{TITLES[model]: f"{families[model][group]:.3f}" for model in (GROUNDED, SFT)}}
            for group in families[GROUNDED]
        ],
    }


def samples(answers: Answers) -> list[dict[str, str]]:
    """Return the first questions of each group with the answers of all models."""
    rows = []
    for group in GROUPS:
        for index, first in enumerate(answers[GROUNDED][group][:SAMPLES_EACH]):
            responses = {TITLES[model]: answers[model][group][index].response for model in (GROUNDED, SFT)}
            rows.append({"prompt": first.task.prompt[0]["content"], **responses})
    return rows


def _plot(metrics: Mapping[str, float]) -> Plot:
    """Return the plot of right answers by group of questions, for both models."""
    shares = {TITLES[model]: [metrics[f"{model}_{group}_right"] for group in GROUPS] for model in (GROUNDED, SFT)}
    return plot_of_right(shares, [group.replace("_", "\n") for group in GROUPS])
