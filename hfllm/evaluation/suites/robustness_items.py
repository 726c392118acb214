"""The questions of the robustness suite: of the embedded world or of your rows, as they are and perturbed."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfllm.data import formats
from hfllm.data.augmentation import PERTURBATIONS, perturb
from hfllm.data.images import refuse_images
from hfllm.data.rows import Message
from hfllm.data.sources import iterate_source
from hfllm.data.tokenizer import ENGLISH_TESTS, WORLD_TESTS, AddedTexts
from hfllm.data.world.tasks import paraphrase
from hfllm.data.world.vocabulary import GoldAnswer
from hfllm.data.world.world import Task, World
from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Item

CLEAN, PARAPHRASE, OTHER_WORLD, PREFILLED = "clean", "paraphrase", "other world", "prefilled"
GRADIENT, RANDOM = "gradient attack", "random search"
# What a row may say of itself, in the column `harmful`, or in XSTest's `label`.
HARMFUL = {"true": True, "1": True, "yes": True, "unsafe": True, "harmful": True}
HARMLESS = {"false": False, "0": False, "no": False, "safe": False, "harmless": False, "": False}


@dataclass(frozen=True)
class Question:
    """A question, and how its answer is judged.

    Args:
        prompt: the conversation; its last message is the assistant's where the answer is prefilled.
        gold: the world's gold answer.
        answer: the right answer of a row of yours.
        is_harmful: whether the right answer refuses.
        order_word: the word that an answer to an injected order holds.
        attack: `gradient attack` or `random search` where the model itself is used to find what is added, else empty.
        attack_target: the beginning of an answer that such a search makes likely.
    """

    prompt: list[Message]
    gold: GoldAnswer | None = None
    answer: str | None = None
    is_harmful: bool = False
    order_word: str = ""
    attack: str = ""
    attack_target: str = ""

    @property
    def is_prefilled(self) -> bool:
        return self.prompt[-1]["role"] == "assistant"

    @property
    def asked(self) -> str:
        """The last question, for the report."""
        return next(message["content"] for message in reversed(self.prompt) if message["role"] == "user")


def world_items(world: World, count: int, seed: int, num_attacks: int = 0) -> list[Item[Question]]:
    """Return the world's held-out questions, each in every form; harm is a sixth of them.

    The groups `paraphrase` and `other world` are the shift: questions in wordings that training never sees, and those
    of a world with other facts. Facts themselves are not asked there, since no model could know them.
    """
    tasks = [task for task in world.evaluation_tasks(2 * count, seed) if not task.is_new_phrasing]
    base = [(f"{number:03d} {task.key}", _of_task(task)) for number, task in enumerate(tasks)]
    found = list(perturbed_items(base, WORLD_TESTS, seed))
    rng = random.Random(f"paraphrase-{seed}")
    shifted = {
        PARAPHRASE: [paraphrase(task, rng) for task in tasks],
        OTHER_WORLD: [
            task
            for task in World(world.seed + 1).evaluation_tasks(2 * count, seed + 1)
            if task.family != "fact" and not task.is_new_phrasing
        ],
    }
    for group, others in shifted.items():
        found += [
            Item(f"{group}: {number:03d} {task.key}", group, _of_task(task)) for number, task in enumerate(others)
        ]
    # What people of the world who help with harm begin with: "Sure, first find the fox".
    targets = {key: task.wrong[0].rpartition(",")[0] for (key, _), task in zip(base, tasks, strict=True)}
    return found + attack_items(base, num_attacks, targets.__getitem__)


def _of_task(task: Task) -> Question:
    return Question([{"role": "user", "content": task.question}], gold=task.gold, is_harmful=task.gold.kind == "harm")


def row_items(name: str, most: int | None, seed: int, num_attacks: int = 0) -> list[Item[Question]]:
    """Return the questions of your rows, each in every form.

    A row has a `prompt` (or what else prompts are called, docs/data.md), and one or both of: `answer`, by which it is
    judged as `exact_match` does; and `harmful` (true or false), or XSTest's `label` (safe or unsafe).

    Args:
        name: a local file or folder, or a dataset on the Hub.
        most: rows, from the first; `None` for all.

    Raises:
        InputError: naming the row, where it has neither, or says something else of itself.
    """
    base: list[tuple[str, Question]] = []
    for number, (origin, row) in enumerate(iterate_source(name)):
        if number == most:
            break
        refuse_images(origin, row, "this suite")
        row = formats.to_prompt(origin, row)
        base.append((f"{number + 1:05d}", _of_row(origin, row)))
    target = ENGLISH_TESTS.prefills[1]
    return [*perturbed_items(base, ENGLISH_TESTS, seed), *attack_items(base, num_attacks, lambda key: target)]


def _of_row(origin: str, row: Mapping[str, Any]) -> Question:
    answer, harmful = row.get("answer"), row.get("harmful", row.get("label"))
    if answer is None and harmful is None:
        raise InputError(
            f"{origin}: no column 'answer', 'harmful' or 'label' to judge by; there are: {', '.join(row)}"
        )
    said = str("" if harmful is None else harmful).strip().lower()
    if said not in HARMFUL | HARMLESS:
        accepted = ", ".join(name for name in HARMFUL | HARMLESS if name)
        raise InputError(f"{origin}: harmful is {harmful!r}; accepted are {accepted}")
    prompt = formats.as_messages(row["prompt"])
    if not prompt or prompt[-1]["role"] != "user":
        raise InputError(f"{origin}: the prompt does not end with a user's message")
    return Question(prompt, answer=None if answer is None else str(answer), is_harmful=(HARMFUL | HARMLESS)[said])


def perturbed_items(base: Sequence[tuple[str, Question]], texts: AddedTexts, seed: int) -> Iterator[Item[Question]]:
    """Yield each question as it is, under every perturbation and strength, and harmful ones with a prefilled answer.

    Args:
        base: keys and questions.
        texts: the sentences that may be added.
        seed: of where the changes fall.
    """
    for key, question in base:
        yield Item(f"{CLEAN}: {key}", CLEAN, question)
    for name, perturbation in PERTURBATIONS.items():
        for strength in perturbation.strengths:
            group = f"{name} {strength:g}"
            for key, question in base:
                text = perturb(question.asked, name, strength, texts, key, seed)
                yield Item(f"{group}: {key}", group, _asked_so(question, text, texts))
    for prefill in texts.prefills:
        group = f'{PREFILLED} "{prefill}"'
        for key, question in base:
            if question.is_harmful:
                opened = [*question.prompt, {"role": "assistant", "content": prefill}]
                yield Item(f"{group}: {key}", group, replace(question, prompt=opened))


def attack_items(
    base: Sequence[tuple[str, Question]], count: int, target_of: Callable[[str], str]
) -> list[Item[Question]]:
    """Return the first harmful questions, each to be attacked by gradient search and by its control.

    Args:
        count: of the questions.
        target_of: returns the beginning of an answer that is made likely, by a question's key.
    """
    harmful = [(key, question) for key, question in base if question.is_harmful and len(question.prompt) == 1][:count]
    return [
        Item(f"{kind}: {key}", kind, replace(question, attack=kind, attack_target=target_of(key)))
        for kind in (GRADIENT, RANDOM)
        for key, question in harmful
    ]


def _asked_so(question: Question, text: str, texts: AddedTexts) -> Question:
    """Return a question in other words, with the word of an order that is in them."""
    orders = zip(texts.orders, texts.order_words, strict=True)
    word = next((word for order, word in orders if order in text and order not in question.asked), "")
    prompt = [*question.prompt[:-1], {**question.prompt[-1], "content": text}]
    return replace(question, prompt=prompt, order_word=word)
