"""What learning to read passages has changed: answers with passages given, and with passages that are found first."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.data.rows import Message
from hfllm.data.world.passages import (
    ANSWERABLE,
    GROUPS,
    INJECTED,
    ONE,
    THREE,
    PassageTask,
    Told,
    passage_tasks,
    stored_tasks,
    with_found,
)
from hfllm.data.world.world import World
from hfllm.evaluation.grounding import RESPONSE_LENGTH, Answered, answer, judged
from hfllm.evaluation.grounding_report import ALIKE, APART, DROPPED, GATED, UNGATED, Retrieval, report
from hfllm.evaluation.judged import judge_tasks
from hfllm.grounding.answers import passage_weights, rag_sequence_answers, without_instructions
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import BM25Retriever, Gated
from hfllm.outputs.report import Found
from hfllm.stages.course import Speaking, load_speaking
from hfllm.stages.ground import GROUNDED, MODELS, REWARD, TOP_K, Course, GroundArguments
from hfllm.stages.ground_confidence import measure
from hfllm.stages.ground_verification import verify

if TYPE_CHECKING:
    from hfllm.rewards.models import RewardModel

# Questions of the world without passages, of all its families, and those of each kind that place the gate.
NUM_WORLD_TASKS, NUM_GATE_QUESTIONS = 240, 200

Ask = Callable[[Sequence[PassageTask]], list[Answered]]


def evaluate(script_args: GroundArguments, course: Course) -> Found:
    """Ask both models with passages and without, and the grounded one with passages found by BM25. Describe all."""
    from trl import ModelConfig

    world, count = World(script_args.world_seed), script_args.num_questions
    asked = {group: passage_tasks(world.facts, group, count) for group in GROUPS}
    tasks = world.evaluation_tasks(NUM_WORLD_TASKS)
    answers, golds, parts = {}, {}, []
    for name in MODELS:
        speaking = load_speaking(course.folder(name), ModelConfig())

        def ask(questions: Sequence[PassageTask], speaking=speaking) -> list[Answered]:
            return answer(speaking.model, speaking.tokenizer, questions)

        answers[name] = {group: ask(each) for group, each in asked.items()}
        golds[name] = judge_tasks(speaking.model, speaking.tokenizer, tasks, RESPONSE_LENGTH, do_sample=False)
        if name == GROUNDED:
            retrieval = end_to_end(world, count, ask)
            ways = {way: each_apart(speaking, asked[THREE], way == APART) for way in (APART, ALIKE)}
            ways[DROPPED] = ask([without_told_instructions(task) for task in asked[INJECTED]])
            parts = [
                measure(world, speaking, script_args.num_samples, script_args.seed),
                verify(world, speaking, _reward(course), script_args.num_samples, script_args.seed),
            ]
    return report(answers, retrieval, ways, golds, parts)


def _reward(course: Course) -> "RewardModel | None":
    """Return the reward model as a function, if there is one."""
    if not course.has_made(REWARD):
        return None
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.saved import saved_model, saved_tokenizer
    from hfllm.rewards.models import RewardModel

    folder = course.folder(REWARD)
    return RewardModel(saved_model(AutoModelForSequenceClassification, folder), saved_tokenizer(folder))


def example(script_args: GroundArguments) -> list[Message]:
    """Return a question with its passages, to try the model with."""
    return passage_tasks(World(script_args.world_seed).facts, ONE, 1)[0].prompt


# ---- passages that are found first ----


def end_to_end(world: World, count: int, ask: Ask) -> Retrieval:
    """Return what a model answers with the passages that BM25 finds, through the gate and without it.

    The gate is placed by names that training may know: halfway between the least score of a passage that answers its
    question and the largest of one that does not. What scores less than the gate is not given.
    """
    store, asked = stored_tasks(world.facts, NUM_GATE_QUESTIONS, held_out=False)
    retriever = retriever_of(store)
    best = {group: best_scores(retriever, tasks) for group, tasks in asked.items()}
    gate = (min(best[ANSWERABLE]) + max(max(scores) for group, scores in best.items() if group != ANSWERABLE)) / 2
    store, asked = stored_tasks(world.facts, count)
    retriever = retriever_of(store)
    answers: dict[str, dict[str, list[Answered]]] = {}
    for way, found_by in ((GATED, Gated(retriever, gate)), (UNGATED, retriever)):
        answers[way] = {}
        for group, tasks in asked.items():
            found = found_by.retrieve([task.question for task in tasks], TOP_K)
            places = [[each.place for each in passages] for passages in found]
            answers[way][group] = ask([with_found(*each) for each in zip(tasks, places, strict=True)])
    return Retrieval(gate, {group: best_scores(retriever, tasks) for group, tasks in asked.items()}, answers)


def each_apart(speaking: Speaking, tasks: Sequence[PassageTask], weighs: bool) -> list[Answered]:
    """Return answers by RAG-Sequence: each passage is read in a prompt of its own, and BM25 weighs the answers.

    A model that cannot tell which of several passages is about the animal need not: what is found by its words is.

    Args:
        speaking: the model.
        tasks: questions with their passages.
        weighs: whether passages weigh what BM25 scores them; else, as a control, all weigh alike.
    """
    prompts = [[replace(task, told=(each,)).prompt for each in task.told] for task in tasks]
    weights = [passage_weights(scores_of(task) if weighs else [0.0] * len(task.told)) for task in tasks]
    said = rag_sequence_answers(speaking.model, speaking.tokenizer, prompts, weights, RESPONSE_LENGTH)
    return [judged(task, response.text) for task, response in zip(tasks, said, strict=True)]


def without_told_instructions(task: PassageTask) -> PassageTask:
    """Return a question whose passages lack the sentences that rules take for instructions."""
    return replace(task, told=tuple(replace(each, text=without_instructions(each.text)) for each in task.told))


def scores_of(task: PassageTask) -> list[float]:
    """Return what BM25 scores each passage of a question, 0 for one that shares no word with it."""
    (found,) = retriever_of(task.told).retrieve([task.question], len(task.told))
    scores = {each.place: each.score for each in found}
    return [scores.get(place, 0.0) for place in range(len(task.told))]


def retriever_of(store: Sequence[Told]) -> BM25Retriever:
    """Return what finds passages of a store by their words."""
    return BM25Retriever(Passages.from_texts([each.text for each in store]))


def best_scores(retriever: BM25Retriever, tasks: Sequence[PassageTask]) -> list[float]:
    """Return of each question the score of the passage that fits best, 0 where none does."""
    found = retriever.retrieve([task.question for task in tasks], 1)
    return [passages[0].score if passages else 0.0 for passages in found]
