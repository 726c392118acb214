"""The recipe on passages: the rows of each run, the questions to its models, confidence and verification."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from transformers import AutoModelForSequenceClassification

from hfllm.data.formats import to_sft
from hfllm.data.world.demonstrators import instruction_rows
from hfllm.data.world.passages import (
    ANSWERABLE,
    GROUPS,
    INJECTED,
    THREE,
    PassageTask,
    Told,
    conversation,
    draw_passages,
    passage_tasks,
    stored_tasks,
    tell,
    with_found,
)
from hfllm.data.world.rubric import RIGHT, gold_meaning, gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES
from hfllm.data.world.world import Task, World
from hfllm.evaluation.suites.world_suites import judge_tasks
from hfllm.grounding.abstention import control_risk, over_splits
from hfllm.grounding.answers import passage_weights, rag_sequence_answers, without_instructions
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import BM25Retriever, Gated
from hfllm.grounding.uncertainty import CONFIDENCE, Answered, answer_with_samples, uncertainties
from hfllm.grounding.verification import (
    best_rewarded,
    claims_of,
    compare_choices,
    first_supported,
    has_words,
    majority_of_meaning,
)
from hfllm.models.loading.saved import saved_model, saved_tokenizer
from hfllm.outputs.report import Found
from hfllm.outputs.statistics import reliability_plot, risk_coverage_plot, uncertainty_metrics
from hfllm.rewards.models import RewardModel
from hfllm.runs.models import NamedModel
from hfllm.runs.pipeline import Row
from hfllm.stages.ground.flags import GROUNDED, MODELS, REWARD, TOP_K, Course
from hfllm.stages.ground.report import (
    ALIKE,
    APART,
    DROPPED,
    GATED,
    RESPONSE_LENGTH,
    UNGATED,
    JudgedResponse,
    Retrieval,
    answer,
    judged,
    report,
)
from hfllm.stages.shared import Speaking, figure_text, load_speaking

if TYPE_CHECKING:
    import numpy as np


# ---- rows ----


# Number of questions about the same passages, and the share of conversations without any.
TURNS, WITHOUT_PASSAGES = 3, 0.15


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


def _conversation(world: World, rng: random.Random, has_passages: bool) -> Row:
    passages = [] if rng.random() < WITHOUT_PASSAGES else draw_passages(world.facts, rng)
    messages = []
    for question, response in conversation(world.facts, rng, passages, TURNS, has_passages):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {"messages": messages}


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
    answers, golds, parts = {}, {}, []
    for name in MODELS:
        speaking = load_speaking(NamedModel(course.folder(name), settings={"dtype": "float32"}))
        ask = partial(answer, speaking)
        answers[name] = {group: ask(each) for group, each in tasks_by_group.items()}
        golds[name] = judge_tasks(speaking.model, speaking.tokenizer, tasks, RESPONSE_LENGTH, do_sample=False)
        if name == GROUNDED:
            retrieval = end_to_end(world, num_questions, ask)
            ways = {way: each_apart(speaking, tasks_by_group[THREE], way == APART) for way in (APART, ALIKE)}
            ways[DROPPED] = ask([without_told_instructions(task) for task in tasks_by_group[INJECTED]])
            parts.append(measure_confidence(world, speaking, num_samples, seed))
            folder = course.folder(REWARD)
            reward = RewardModel(saved_model(AutoModelForSequenceClassification, folder), saved_tokenizer(folder))
            parts.append(measure_verification(world, speaking, reward, num_samples, seed))
    return report(answers, retrieval, ways, golds, parts)


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


def each_apart(speaking: Speaking, tasks: Sequence[PassageTask], weighs: bool) -> list[JudgedResponse]:
    """Return answers by RAG-Sequence: every passage is read in its own prompt, and BM25 weighs the answers.

    A model may be unable to choose the passage about the animal among several; here it need not: BM25 finds it by
    its words.

    Args:
        speaking: the model.
        tasks: questions with their passages.
        weighs: whether passages are weighted by BM25; else, as a control, all have equal weight.
    """
    prompts = [[replace(task, told=(each,)).prompt for each in task.told] for task in tasks]
    weights = [passage_weights(scores_of(task) if weighs else [0.0] * len(task.told)) for task in tasks]
    responses = rag_sequence_answers(speaking.model, speaking.tokenizer, prompts, weights, RESPONSE_LENGTH)
    return [judged(task, response.text) for task, response in zip(tasks, responses, strict=True)]


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
# The grounded model's certainty of its answers without passages, and when to abstain.


# Questions, of all families; requested risks, and random halves.
NUM_TASKS, ALPHAS, NUM_SPLITS = 360, (0.02, 0.05, 0.1), 200
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
    return Found(metrics, summary, _tables(metrics, list(result)), plots)


def _answered(speaking: Speaking, tasks: Sequence[Task], num_samples: int, seed: int) -> list[Answered]:
    """Return a model's greedy and sampled answers to questions of the world."""
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    return answer_with_samples(speaking.model, speaking.tokenizer, prompts, num_samples, RESPONSE_LENGTH, seed)


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


def _tables(metrics: Mapping[str, float], measures: list[str]) -> dict[str, list[dict[str, str]]]:
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
