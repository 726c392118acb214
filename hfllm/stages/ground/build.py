"""The recipe on passages: rows of each run, questions to its models, confidence, verification, and the report."""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, permutations
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForSequenceClassification

from hfllm.data.formats import Message, to_sft
from hfllm.data.passages import citations_of, without_citations
from hfllm.data.world.demonstrators import instruction_rows
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
    UNREAD_WORDS,
    WRONG,
    PassageTask,
    Told,
    conversation,
    draw_passages,
    passage_tasks,
    stored_tasks,
    tell,
    with_found,
)
from hfllm.data.world.rubric import RIGHT, UNKNOWN_PHRASES, gold_meaning, gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES
from hfllm.data.world.world import Task, World
from hfllm.evaluation.suites.world_suites import JudgedAnswer, gold_by_group, judge_tasks
from hfllm.generation.responses import sample_responses
from hfllm.grounding.abstention import control_risk, over_splits
from hfllm.grounding.answers import UNION, passage_weights, rag_sequence_answers_by, union_of, without_instructions
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import BM25Retriever, Gated
from hfllm.grounding.uncertainty import (
    CONFIDENCE,
    Answered,
    answer_with_samples,
    sample_with_scores,
    uncertainties,
)
from hfllm.grounding.verification import (
    best_rewarded,
    claims_of,
    compare_choices,
    first_supported,
    has_words,
    majority_of_meaning,
)
from hfllm.models.loading.saved import saved_model, saved_tokenizer
from hfllm.outputs.figures import mean_of
from hfllm.outputs.report import Found, Plot
from hfllm.outputs.statistics import reliability_plot, risk_coverage_plot, uncertainty_metrics
from hfllm.outputs.verdict import Promise
from hfllm.rewards.models import RewardModel
from hfllm.runs.models import NamedModel
from hfllm.runs.pipeline import Row
from hfllm.stages.ground.flags import GROUNDED, MODELS, PRETRAIN, REWARD, SFT, TOP_K, Course, GroundArguments
from hfllm.stages.pretrain.build import PROMISES as PROBED
from hfllm.stages.pretrain.build import probes_of_run
from hfllm.stages.shared import Speaking, figure_text, load_speaking, plot_of_right

if TYPE_CHECKING:
    import numpy as np

# ---- rows ----


# Number of questions about the same passages, and the share of conversations without any.
TURNS, WITHOUT_PASSAGES = 3, 0.15


def rows_by_run(script_args: GroundArguments, world: World) -> dict[str, Callable[[], list[Row]]]:
    """Return what makes the rows of the world's runs, by run."""
    size = script_args.num_examples, script_args.grounded_fraction, script_args.seed
    return {name: partial(rows_of, world, *size, has_passages=name == GROUNDED) for name in MODELS}


def rows_of(world: World, count: int, grounded_fraction: float, seed: int, has_passages: bool) -> list[Row]:
    """Return the rows of a run: people's answers without passages, some wrong, and conversations about passages.

    Args:
        world: source of the facts.
        count: rows.
        grounded_fraction: the share of conversations about passages.
        seed: of the rows.
        has_passages: whether these conversations have their passages. The control has the same rows without them: it
            does not know their content.
    """
    num_grounded = round(grounded_fraction * count)
    plain = [to_sft("world", row) for row in instruction_rows(world, count - num_grounded, seed)]
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in plain]
    rng = random.Random(f"ground-{world.seed}-{seed}")
    return rows + [_conversation(world, rng, has_passages) for _ in range(num_grounded)]


def example_prompt(world: World) -> list[Message]:
    """Return a held-out question with its passage."""
    return passage_tasks(world.facts, ONE, 1)[0].prompt


def _conversation(world: World, rng: random.Random, has_passages: bool) -> Row:
    passages = [] if rng.random() < WITHOUT_PASSAGES else draw_passages(world.facts, rng)
    messages = []
    for question, response in conversation(world.facts, rng, passages, TURNS, has_passages):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {"messages": messages}


# ---- judged answers ----


# The longest answer in tokens, and prompts answered together.
RESPONSE_LENGTH, BATCH_SIZE = 40, 128
# Whose fact is claimed, or not known, in the words of passages and of answers.
_CLAIM = re.compile(rf"\bthe (?!(?:{'|'.join(ATTRIBUTES)})\b)(\w+) (?:is|lives|eats|likes|has|i do not|in)\b")
# A value with its number, where two are said.
_CITED = re.compile(r"(\w+) \[(\d)\]")
# What is said of which attribute: values, or none.
_SAID = re.compile(rf"\bthe ({'|'.join(ATTRIBUTES)}) of the \w+ (?:is (?:the )?([^.]+)\.|i do not know)")


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


class Asked:
    """Asks a model greedily and judges its answers; a prompt that it has answered is not asked again.

    Args:
        speaking: the model.
    """

    def __init__(self, speaking: Speaking):
        self.speaking = speaking
        self._texts: dict[str, str] = {}

    def __call__(self, tasks: Sequence[PassageTask]) -> list[JudgedResponse]:
        """Return the judged answers to questions."""
        self.read(tasks)
        return [judged(task, self._texts[_asked(task)]) for task in tasks]

    def apart(self, tasks: Sequence[PassageTask]) -> list[JudgedResponse]:
        """Return the judged answers to questions, each the union of the answers from its passages one by one."""
        parts = [[replace(task, told=(each,)) for each in task.told] for task in tasks]
        self.read(chain.from_iterable(parts))
        texts = ([self._texts[_asked(part)] for part in of_task] for of_task in parts)
        return [judged(task, union_of(task.question, each)) for task, each in zip(tasks, texts, strict=True)]

    def read(self, tasks: Iterable[PassageTask]) -> None:
        """Let the model answer the questions that are new to it, all together."""
        new = {_asked(task): task.prompt for task in tasks if _asked(task) not in self._texts}
        model = self.speaking.model, self.speaking.tokenizer
        responses = sample_responses(*model, [*new.values()], RESPONSE_LENGTH, do_sample=False)
        self._texts |= {asked: texts[0] for asked, texts in zip(new, responses, strict=True)}


def _asked(task: PassageTask) -> str:
    """Return what the model reads of a question."""
    return task.prompt[0]["content"]


def judged(task: PassageTask, response: str) -> JudgedResponse:
    """Return a response with its judgment."""
    text = without_citations(response)
    claimed, said = {*_CLAIM.findall(text.lower())}, _SAID.findall(text.lower())
    # Values that disagree are right in any order, in one sentence or one each, and nothing else is said beside them.
    orders = (replace(task.gold, needed=each) for each in permutations(task.answer.values))
    is_right = any(gold_score(text, gold) >= RIGHT for gold in orders) and claimed <= {task.animal}
    values = [re.split(" or (?:the )?", each) for _, each in said]
    is_right = is_right and all(attribute == task.attribute for attribute, _ in said)
    is_right = is_right and all(len({*each}) == len(each) for each in values)
    is_right = is_right and (not said or {*chain.from_iterable(values)} == {*(task.answer.values or ("",))})
    cites_right = sorted(citations_of(response)) == sorted(task.answer.cites)
    if len(task.answer.values) > 1:
        pairs = [(value, int(number)) for value, number in _CITED.findall(response)]
        cites_right = sorted(pairs) == sorted(zip(task.answer.values, task.answer.cites, strict=True))
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
    **{
        ONE: "unknown animals, one passage",
        UNREAD_WORDS: "words of no text, one passage",
        THREE: "unknown animals, three passages",
        CHANGED: "changed facts",
    },
    **{CONTRADICTING: "two passages disagree", INJECTED: "a passage holds an instruction"},
    **{WRONG: "unknown animals, another's passage", KEPT: "known facts, another animal's passage"},
    **{SILENT: "the passage does not tell", CLOSED: "unknown animals, no passage", KNOWN: "known facts, no passage"},
    **{ANSWERABLE: "a passage tells", UNANSWERABLE: "none does: refused"},
}
SAMPLES_EACH = 2
# The control has read passages in pretraining too, so that what both can do is compared with a guess: one of eight
# values, or of three passages.
GUESSES = {ONE: 1 / 8, THREE: 1 / 3}
PROMISES = (
    *(Promise(f"{LABELS[group]}: right", f"{GROUNDED}_{group}_right", GUESSES[group], "a guess") for group in GUESSES),
    *(
        Promise(f"{LABELS[group]}: right", f"{GROUNDED}_{group}_right", f"{SFT}_{group}_right", "one " + TITLES[SFT])
        for group in (UNREAD_WORDS, CHANGED, WRONG, SILENT)
    ),
    Promise(
        f"{LABELS[CONTRADICTING]}: both said, from a prompt each",
        f"{GROUNDED}_{CONTRADICTING}_{UNION}_right",
        f"{SFT}_{CONTRADICTING}_{UNION}_right",
        "one " + TITLES[SFT],
    ),
)
# The beginnings of the metrics of answers by RAG-Sequence, whose numbers do not distinguish passages.
MIXTURES = (f"{THREE}_{APART}", f"{THREE}_{ALIKE}")
WAYS = {
    "three in one prompt": f"{GROUNDED}_{THREE}",
    "each in a prompt of its own, all that they say": f"{GROUNDED}_{THREE}_{UNION}",
    f"the same, of one {TITLES[SFT]}": f"{SFT}_{THREE}_{UNION}",
    "RAG-Sequence, weighed by BM25": MIXTURES[0],
    "RAG-Sequence, weighed alike": MIXTURES[1],
    "two that disagree, in one prompt": f"{GROUNDED}_{CONTRADICTING}",
    "each in a prompt of its own, both said": f"{GROUNDED}_{CONTRADICTING}_{UNION}",
    f"both said, of one {TITLES[SFT]}": f"{SFT}_{CONTRADICTING}_{UNION}",
    "found by BM25, one tells, each in a prompt of its own": f"{GROUNDED}_{ANSWERABLE}_{UNION}",
    "found by BM25, none tells, each in a prompt of its own: refused": f"{GROUNDED}_{UNANSWERABLE}_{UNION}",
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
        ways: by the beginning of their metrics: with passages in separate prompts, by `UNION`, `APART` and `ALIKE`,
            and, by `DROPPED`, with passages after removal of an instruction.
        golds: of answers to the world's questions without passages.
        parts: other measurements; their figures, tables and plots follow.

    Returns:
        Metrics `MODEL_GROUP_right`, `MODEL_one_passage_right_ATTRIBUTE`, `MODEL_GROUP_cites` (of right answers from
        passages), `MODEL_injected_follows`; with every passage in its own prompt, `MODEL_GROUP_union_right` and
        `MODEL_GROUP_union_cites` of three passages and of two that disagree, and `grounded_KIND_union_right` of
        passages found by BM25 without the gate; `three_passages_apart_right`, and `three_passages_alike_right` as its
        control, with all passages weighted equally; `injected_dropped_right` and `injected_dropped_follows`;
        `gated_KIND_right` and `ungated_KIND_right` end to end, and the `gate`; `MODEL_world_gold`, and
        `world_gold_kept`, the ratio of both.
    """
    metrics: dict[str, float] = {}
    for model, of_model in answers.items():
        for group, responses in of_model.items():
            metrics |= group_metrics(f"{model}_{group}", responses)
    for name, responses in ways.items():
        found = group_metrics(name, responses)
        cites = f"{name}_cites" if name in MIXTURES else None
        metrics |= {key: value for key, value in found.items() if not cites or not key.startswith(cites)}
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
    return Found(metrics, summary, {**tables, "Answers": samples(answers)}, plots, (*PROMISES, *PROBED), PROMISES)


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
        "Several passages, and passages with an instruction": [
            {
                "passages": title,
                "right": text(f"{name}_right"),
                "right ones that cite rightly": text(f"{name}_cites"),
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


# ---- evaluation ----
#
# The effect of learning to read passages: answers with given passages, and with retrieved passages.


# Questions of the world without passages, of all its families, and per kind the questions to set the gate.
NUM_WORLD_TASKS, NUM_GATE_QUESTIONS = 240, 200

Ask = Callable[[Sequence[PassageTask]], list[JudgedResponse]]


def compare_models(course: Course, world: World, num_questions: int, num_samples: int, seed: int) -> Found:
    """Ask both models with passages and without, and the grounded one with passages found by BM25; report all.

    Args:
        course: the finished runs.
        world: source of the questions.
        num_questions: of each group.
        num_samples: sampled answers per question, for uncertainty and verification.
        seed: of the samples.
    """
    tasks_by_group = {group: passage_tasks(world.facts, group, num_questions) for group in GROUPS}
    tasks = world.evaluation_tasks(NUM_WORLD_TASKS)
    answers, ways, golds, parts = {}, {}, {}, []
    for name in MODELS:
        speaking = load_speaking(NamedModel(course.folder(name), settings={"dtype": "float32"}))
        ask = Asked(speaking)
        ask.read(chain.from_iterable(tasks_by_group.values()))
        answers[name] = {group: ask(each) for group, each in tasks_by_group.items()}
        ways |= {f"{name}_{group}_{UNION}": ask.apart(tasks_by_group[group]) for group in (THREE, CONTRADICTING)}
        golds[name] = judge_tasks(speaking.model, speaking.tokenizer, tasks, RESPONSE_LENGTH, do_sample=False)
        if name == GROUNDED:
            retrieval = end_to_end(world, num_questions, ask)
            for kind in (ANSWERABLE, UNANSWERABLE):
                found = [each.task for each in retrieval.answers[UNGATED][kind]]
                ways[f"{name}_{kind}_{UNION}"] = ask.apart(found)
            ways |= zip(MIXTURES, each_apart(speaking, tasks_by_group[THREE]), strict=True)
            ways[f"{INJECTED}_{DROPPED}"] = ask([without_told_instructions(task) for task in tasks_by_group[INJECTED]])
            parts.append(measure_confidence(world, speaking, num_samples, seed))
            parts.append(calibrate(world, speaking, course.folder(GROUNDED), seed))
            folder = course.folder(REWARD)
            reward = RewardModel(saved_model(AutoModelForSequenceClassification, folder), saved_tokenizer(folder))
            parts.append(measure_verification(world, speaking, reward, num_samples, seed))
    probed, curves = probes_of_run(course.folder(PRETRAIN))
    # Probes have no part in the summary.
    found = report(answers, retrieval, ways, golds, parts)
    return replace(found, metrics=found.metrics | probed, plots={**found.plots, **curves})


# ---- passages that are found first ----


def end_to_end(world: World, count: int, ask: Ask) -> Retrieval:
    """Return a model's answers with the passages found by BM25, through the gate and without it.

    The gate is set with names that training may know: halfway between the least score of a passage with the answer to
    its question and the largest of a passage without it. Passages with scores below the gate are not given.
    """
    store, tasks_by_group = stored_tasks(world.facts, NUM_GATE_QUESTIONS, held_out=False)
    retriever = retriever_of(store)
    best = {group: best_scores(retriever, tasks) for group, tasks in tasks_by_group.items()}
    gate = (min(best[ANSWERABLE]) + max(max(scores) for group, scores in best.items() if group != ANSWERABLE)) / 2
    store, tasks_by_group = stored_tasks(world.facts, count)
    retriever = retriever_of(store)
    answers: dict[str, dict[str, list[JudgedResponse]]] = {}
    for way, searcher in ((GATED, Gated(retriever, gate)), (UNGATED, retriever)):
        answers[way] = {}
        for group, tasks in tasks_by_group.items():
            result = searcher.retrieve([task.question for task in tasks], TOP_K)
            indices = [[each.place for each in passages] for passages in result]
            answers[way][group] = ask([with_found(*each) for each in zip(tasks, indices, strict=True)])
    return Retrieval(gate, {group: best_scores(retriever, tasks) for group, tasks in tasks_by_group.items()}, answers)


def each_apart(speaking: Speaking, tasks: Sequence[PassageTask]) -> list[list[JudgedResponse]]:
    """Return answers by RAG-Sequence, by BM25's weights and alike: every passage is read in its own prompt.

    A model may be unable to choose the passage about the animal among several; here it need not: BM25 finds it by
    its words. As a control, all passages have equal weight.

    Args:
        speaking: the model.
        tasks: questions with their passages.
    """
    prompts = [[replace(task, told=(each,)).prompt for each in task.told] for task in tasks]
    weightings = [
        [passage_weights(scores_of(task)) for task in tasks],
        [passage_weights([0.0] * len(task.told)) for task in tasks],
    ]
    answers = rag_sequence_answers_by(
        speaking.model, speaking.tokenizer, prompts, weightings, RESPONSE_LENGTH, batch_size=BATCH_SIZE
    )
    return [
        [judged(task, response.text) for task, response in zip(tasks, responses, strict=True)] for responses in answers
    ]


def without_told_instructions(task: PassageTask) -> PassageTask:
    """Return a question without the instruction sentences of its passages, as classified by rules."""
    return replace(task, told=tuple(replace(each, text=without_instructions(each.text)) for each in task.told))


def scores_of(task: PassageTask) -> list[float]:
    """Return the BM25 scores of the passages of a question, 0 for a passage without a shared word."""
    (result,) = retriever_of(task.told).retrieve([task.question], len(task.told))
    scores = {each.place: each.score for each in result}
    return [scores.get(index, 0.0) for index in range(len(task.told))]


def retriever_of(store: Sequence[Told]) -> BM25Retriever:
    """Return a retriever of passages of a store by their words."""
    return BM25Retriever(Passages.from_texts([each.text for each in store]))


def best_scores(retriever: BM25Retriever, tasks: Sequence[PassageTask]) -> list[float]:
    """Return by question the score of the best passage, 0 where no passage fits."""
    result = retriever.retrieve([task.question for task in tasks], 1)
    return [passages[0].score if passages else 0.0 for passages in result]


# ---- confidence ----
#
# The grounded model's certainty of its answers, and when to abstain: without passages by several measures, and with
# passages and without by the abstainers that are saved beside the model.


# Questions, of all families; requested risks, and random halves.
NUM_TASKS, ALPHAS, NUM_SPLITS = 360, (0.02, 0.05, 0.1), 200
# The saved abstainers: their files beside the model, by the kind of questions, and their risk.
ABSTAINERS = {"without": "abstainer_without_passages.json", "with": "abstainer_with_passages.json"}
SAVED_ALPHA = 0.05
# Groups of questions with passages, and questions of each, to calibrate them.
TOLD_OR_NOT, NUM_EACH = (*TOLD, WRONG, KEPT, SILENT), 40
# The measures for abstention in the report and in the plots.
ABSTAINS_BY = ("sequence_probability", "semantic_entropy")


def measure_confidence(world: World, speaking: Speaking, num_samples: int, seed: int) -> Found:
    """Return how well a model's uncertainty identifies wrong answers, and the coverage of abstention by it.

    Args:
        world: source of the held-out questions, of all families.
        speaking: the model.
        num_samples: sampled answers per question.
        seed: of the samples.

    Returns:
        Metrics `MEASURE_auroc` (of being wrong) and the like, see `uncertainty_metrics`; `risk_ALPHA_MEASURE` (given,
        wrong) and `coverage_ALPHA_MEASURE` of conformal risk control over random halves, alpha in percent.
    """
    tasks = world.evaluation_tasks(NUM_TASKS, seed=1)
    rows = _answered(speaking, tasks, num_samples, seed)
    wrong = [gold_score(row.given.text, task.gold) < RIGHT for task, row in zip(tasks, rows, strict=True)]
    meanings = [
        [gold_meaning(each.text, task.gold) for each in (row.given, *row.samples)]
        for task, row in zip(tasks, rows, strict=True)
    ]
    result = uncertainties(rows, meanings)
    metrics = uncertainty_metrics(result, wrong)
    metrics |= _abstention(result, wrong)
    sure = {name: CONFIDENCE[name](numbers) for name, numbers in result.items() if name in CONFIDENCE}
    plots = {
        "risk_coverage": risk_coverage_plot(result, wrong, "Wrong answers among the surest"),
        "reliability": reliability_plot(sure, [not each for each in wrong], "Confidence and accuracy"),
    }
    best = max(ABSTAINS_BY, key=lambda name: metrics.get(f"{name}_auroc", 0.0))
    coverages = ", ".join(f"{metrics[f'coverage_{percent(alpha)}_{best}']:.3f} at {alpha:g}" for alpha in ALPHAS)
    auroc = metrics.get(f"{best}_auroc", 0.5)
    summary = (
        f"wrong answers are told by {best.replace('_', ' ')} with an AUROC of {auroc:.3f}, which keeps {coverages}"
    )
    return Found(metrics, summary, _confidence_tables(metrics, list(result)), plots)


def calibrate(world: World, speaking: Speaking, folder: str, seed: int) -> Found:
    """Calibrate when to abstain on questions as they will be asked, with passages and without, and save both.

    Each kind has an abstainer of its own: one threshold for both would let the sure answers from passages pay for
    those from memory. It comes from one half of the questions, the figures from the other. Of the questions with
    passages all groups have as many, so that in some the passages do not tell.

    Args:
        world: source of the held-out questions.
        speaking: the model.
        folder: of the model; the abstainers are saved there, as `ABSTAINERS`.
        seed: of the halves.

    Returns:
        Metrics `abstainer_risk_KIND` (given and wrong, share of all) and `abstainer_coverage_KIND`, for `with` and
        `without` passages.
    """
    metrics: dict[str, float] = {}
    for kind, rows in _surprises(world, speaking).items():
        random.Random(f"calibrate-{seed}").shuffle(rows)
        half = len(rows) // 2
        abstainer = control_risk(*zip(*rows[:half], strict=True), SAVED_ALPHA, "sequence_probability")
        abstainer.save(Path(folder, ABSTAINERS[kind]))
        surprise, wrong = zip(*rows[half:], strict=True)
        is_given = abstainer.answers(surprise)
        are_both = [float(given and bad) for given, bad in zip(is_given, wrong, strict=True)]
        metrics |= mean_of(f"abstainer_risk_{kind}", are_both)
        metrics |= mean_of(f"abstainer_coverage_{kind}", [float(given) for given in is_given])
    text = partial(figure_text, metrics)
    table = [
        {"asked": f"{kind} passages", "saved as": name}
        | {figure: text(f"abstainer_{figure}_{kind}") for figure in ("risk", "coverage")}
        for kind, name in ABSTAINERS.items()
    ]
    shown = ", ".join(f"{text(f'abstainer_risk_{kind}')} {kind} passages" for kind in ABSTAINERS)
    title = f"Abstainers beside the model, calibrated to a risk of {SAVED_ALPHA:g}"
    return Found(metrics, f"given and wrong behind the saved abstainers: {shown}", {title: table}, {})


def _surprises(world: World, speaking: Speaking) -> dict[str, list[tuple[float, bool]]]:
    """Return for each kind of questions the surprise of greedy answers, in nats, and whether they are wrong."""
    alone = world.evaluation_tasks(NUM_TASKS, seed=2)
    told = [task for group in TOLD_OR_NOT for task in passage_tasks(world.facts, group, NUM_EACH, seed=1)]
    prompts = [task.prompt_row()["prompt"] for task in alone] + [task.prompt for task in told]
    model = speaking.model, speaking.tokenizer
    answers = sample_with_scores(*model, prompts, 1, RESPONSE_LENGTH, do_sample=False, batch_size=BATCH_SIZE)
    given = [answer for (answer,) in answers]
    wrong = [gold_score(each.text, task.gold) < RIGHT for task, each in zip(alone, given, strict=False)]
    wrong += [not judged(task, each.text).is_right for task, each in zip(told, given[len(alone) :], strict=True)]
    rows = [(-each.logprob, is_wrong) for each, is_wrong in zip(given, wrong, strict=True)]
    return {"without": rows[: len(alone)], "with": rows[len(alone) :]}


def _answered(speaking: Speaking, tasks: Sequence[Task], num_samples: int, seed: int) -> list[Answered]:
    """Return a model's greedy and sampled answers to questions of the world."""
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    lengths = RESPONSE_LENGTH, seed, BATCH_SIZE
    return answer_with_samples(speaking.model, speaking.tokenizer, prompts, num_samples, *lengths)


def percent(alpha: float) -> int:
    """Return a risk as written in names of metrics."""
    return round(100 * alpha)


def _abstention(uncertainty: "Mapping[str, np.ndarray]", wrong: list[bool]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in ABSTAINS_BY:
        for alpha in ALPHAS:
            split = over_splits(uncertainty[name], wrong, partial(control_risk, alpha=alpha), NUM_SPLITS)
            for figure in ("risk", "coverage"):
                key = f"{figure}_{percent(alpha)}_{name}"
                metrics |= {key: split[figure], f"{key}_se": split[f"{figure}_se"], f"{key}_n": NUM_SPLITS}
    return metrics


def _confidence_tables(metrics: Mapping[str, float], measures: list[str]) -> dict[str, list[dict[str, str]]]:
    text = partial(figure_text, metrics)
    return {
        "Uncertainty and being wrong": [
            {
                "measure": name.replace("_", " "),
                "AUROC": text(f"{name}_auroc"),
                "labels shuffled": text(f"{name}_auroc_shuffled"),
                "AURC": text(f"{name}_aurc"),
            }
            for name in measures
        ],
        f"Conformal risk control over {NUM_SPLITS} random halves": [
            {
                "measure": name.replace("_", " "),
                "alpha": f"{alpha:g}",
                "given and wrong": text(f"risk_{percent(alpha)}_{name}"),
                "answered": text(f"coverage_{percent(alpha)}_{name}"),
            }
            for name in ABSTAINS_BY
            for alpha in ALPHAS
        ],
    }


# ---- verification ----
#
# The benefit of checking sampled answers against passages, compared with a reward model, a majority and greedy
# decoding.


# Numbers of texts per animal to check against, of texts found per question, and of wordings per question.
TEXTS_EACH, PASSAGES_READ, WORDINGS = 5, 3, 3
VALUES = frozenset(value for values in ATTRIBUTES.values() for value in values)


def measure_verification(world: World, speaking: Speaking, reward: RewardModel, num_samples: int, seed: int) -> Found:
    """Return the share of right facts of the world by every way to choose one of a model's sampled answers.

    The first answer supported by texts about the animal is kept: BM25 finds the texts, and one of them has all
    animals and values named by a sentence of the answer. Where no answer is supported, nothing is said.

    Args:
        world: source of the facts.
        speaking: the model.
        reward: scores answers.
        num_samples: sampled answers per question.
        seed: of the samples, and of the texts.

    Returns:
        Metrics of `compare_choices`, with `verification_gain`, and its table.
    """
    tasks = world.fact_tasks(WORDINGS)
    rows = _answered(speaking, tasks, num_samples, seed)
    samples = [[each.text for each in row.samples] for row in rows]
    right = [[_is_right(task, text) for text in responses] for task, responses in zip(tasks, samples, strict=True)]
    claims = [[claims_in(task, text) for text in responses] for task, responses in zip(tasks, samples, strict=True)]
    meanings = [
        [gold_meaning(text, task.gold) for text in responses] for task, responses in zip(tasks, samples, strict=True)
    ]
    completions = [[[{"role": "assistant", "content": text}] for text in texts] for texts in samples]
    choices = {
        "first_supported": first_supported(claims, passages_for(world, tasks, seed), has_words, threshold=1.0),
        "majority_of_meaning": majority_of_meaning(samples, meanings),
        "best_rewarded": best_rewarded([row.prompt for row in rows], completions, reward),
    }
    greedy = [_is_right(task, row.given.text) for task, row in zip(tasks, rows, strict=True)]
    metrics, table = compare_choices(right, choices, greedy)
    shares = ", ".join(
        f"{name.replace('_', ' ')} {metrics[f'{name}_right']:.3f}" for name in ("one_sample", "greedy", *choices)
    )
    gain = metrics["first_supported_right"] - metrics["one_sample_right"]
    tables = {f"Facts, one of {num_samples} sampled answers kept": table}
    return Found(metrics | {"verification_gain": gain}, f"facts of the world right: {shares}", tables, {})


def claims_in(task: Task, answer: str) -> str:
    """Return the claims of an answer, one sentence per claim, for `has_words`.

    The claims of an answer with values are the animal of the question, and all animals and values named in the answer.
    Others, such as rude ones, stay as they are: no text supports them.
    """
    animal, claims = task.key.split()[1], []
    for sentence in claims_of(answer):
        named = [word for word in words_of(sentence) if word in VALUES or word in ANIMALS]
        claims.append(" ".join(dict.fromkeys([animal, *named])) if VALUES & {*named} else sentence)
    return "\n".join(claims)


def passages_for(world: World, tasks: Sequence[Task], seed: int) -> list[list[str]]:
    """Return the texts found by BM25 by question, among texts about the world's animals."""
    rng = random.Random(f"texts-{world.seed}-{seed}")
    texts = [tell(rng, animal, world.facts[animal]).text for animal in ANIMALS for _ in range(TEXTS_EACH)]
    result = BM25Retriever(Passages.from_texts(texts)).retrieve([task.question for task in tasks], PASSAGES_READ)
    return [[each.passage.text for each in passages] for passages in result]


def _is_right(task: Task, answer: str) -> float:
    return float(gold_score(answer, task.gold) >= RIGHT)
