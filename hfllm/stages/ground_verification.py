"""What checking sampled answers against passages is worth, beside a reward model, a majority and greedy decoding."""

import random
from collections.abc import Callable, Sequence

from hfllm.data.world.passages import tell
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, RIGHT, gold_meaning, gold_score, words_of
from hfllm.data.world.world import Task, World
from hfllm.evaluation.grounding import RESPONSE_LENGTH
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import BM25Retriever
from hfllm.grounding.uncertainty import Answered, answer_with_samples
from hfllm.grounding.verification import (
    best_rewarded,
    claims_of,
    compare_choices,
    first_supported,
    has_words,
    majority_of_meaning,
)
from hfllm.outputs.report import Found
from hfllm.stages.course import Speaking

# Texts about each animal to check against, how many texts are found for a question, and wordings of each question.
TEXTS_EACH, TOP_K, WORDINGS = 5, 3, 3
VALUES = frozenset(value for values in ATTRIBUTES.values() for value in values)

Reward = Callable[..., Sequence[float]]


def verify(world: World, speaking: Speaking, reward: Reward | None, num_samples: int, seed: int) -> Found:
    """Return how many facts of the world are right by each way to choose one of a model's sampled answers.

    The first answer is kept that texts about the animal support: they are found by BM25, and one of them has all
    animals and values that a sentence of the answer names. Where none is supported, nothing is said.

    Args:
        world: whose facts are asked.
        speaking: the model.
        reward: scores answers, such as a reward model; left out where there is none.
        num_samples: answers of a question that are sampled.
        seed: of the samples, and of the texts.

    Returns:
        Metrics of `compare_choices`, with `verification_gain`, and its table.
    """
    tasks = world.fact_tasks(WORDINGS)
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    rows = answer_with_samples(speaking.model, speaking.tokenizer, prompts, num_samples, RESPONSE_LENGTH, seed)
    samples = [[each.text for each in row.samples] for row in rows]
    right = [[_is_right(task, text) for text in said] for task, said in zip(tasks, samples, strict=True)]
    claims = [[claims_in(task, text) for text in said] for task, said in zip(tasks, samples, strict=True)]
    meanings = [[gold_meaning(text, task.gold) for text in said] for task, said in zip(tasks, samples, strict=True)]
    choices = {
        "first_supported": first_supported(claims, passages_for(world, tasks, seed), has_words, threshold=1.0),
        "majority_of_meaning": majority_of_meaning(samples, meanings),
    }
    if reward is not None:
        said = [[[{"role": "assistant", "content": text}] for text in texts] for texts in samples]
        choices["best_rewarded"] = best_rewarded(prompts, said, reward)
    metrics, table = compare_choices(right, choices, [_is_right(*each) for each in _given(tasks, rows)])
    shares = ", ".join(
        f"{name.replace('_', ' ')} {metrics[f'{name}_right']:.3f}" for name in ("one_sample", "greedy", *choices)
    )
    gain = metrics["first_supported_right"] - metrics["one_sample_right"]
    tables = {f"Facts, one of {num_samples} sampled answers kept": table}
    return Found(metrics | {"verification_gain": gain}, f"facts of the world right: {shares}", tables, {})


def claims_in(task: Task, answer: str) -> str:
    """Return what an answer claims, a sentence each, for `has_words`.

    Of one that states values it is the animal that was asked about, and each animal and value that it names. Others,
    such as rude ones, stay as they are: no text supports them.
    """
    animal, claims = task.key.split()[1], []
    for sentence in claims_of(answer):
        named = [word for word in words_of(sentence) if word in VALUES or word in ANIMALS]
        claims.append(" ".join(dict.fromkeys([animal, *named])) if VALUES & {*named} else sentence)
    return "\n".join(claims)


def passages_for(world: World, tasks: Sequence[Task], seed: int) -> list[list[str]]:
    """Return the texts that BM25 finds for each question, among those that tell of the world's animals."""
    rng = random.Random(f"texts-{world.seed}-{seed}")
    texts = [tell(rng, animal, world.facts[animal]).text for animal in ANIMALS for _ in range(TEXTS_EACH)]
    found = BM25Retriever(Passages.from_texts(texts)).retrieve([task.question for task in tasks], TOP_K)
    return [[each.passage.text for each in passages] for passages in found]


def _given(tasks: Sequence[Task], rows: Sequence[Answered]) -> list[tuple[Task, str]]:
    return [(task, row.given.text) for task, row in zip(tasks, rows, strict=True)]


def _is_right(task: Task, answer: str) -> float:
    return float(gold_score(answer, task.gold) >= RIGHT)
