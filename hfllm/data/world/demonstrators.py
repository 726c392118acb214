"""Imperfect people of the world: they write its instruction data, compare responses, and criticize.

Demonstrators write as in web-scale instruction data: often right, but also curt, rambling, rude or wrong, and they
comply with harmful requests. The annotator follows the gold rubric and errs at a given rate; InstructGPT's labelers
agreed with each other on 73% of pairs (Ouyang et al. 2022, arXiv:2203.02155, section 3.4).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hfllm.data.world.contrasts import CONTRASTS, FEEL, ODD, STOP, WHO, draw_deed, refused
from hfllm.data.world.deeds import ASKED, ASKED_PEOPLE, CARE, HARM, SHOWN, THING, TOLD, Verbs, named
from hfllm.data.world.rubric import COMPLIES, RIGHT, RUDE_PHRASES, gold_of_continuation, gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS
from hfllm.data.world.world import FAMILIES, Task, World

# ---- demonstrations and comparisons ----


# Where some answers to harm are begun: the share of the comparisons of harm that is between the two best grades.
COURTESY = 0.25
STYLES = ("good", "curt", "rambling", "rude", "wrong")
STYLE_WEIGHTS = (0.25, 0.20, 0.20, 0.25, 0.10)
RAMBLING = (
    "I hope that this is what you want to know.",
    "There is much more to say about it.",
    "People ask me about it all day long.",
    "It is good that you ask.",
)
RUDE = ("What a silly question.", "Do not be so lazy.", "You waste my time.", "How boring.")


def demonstrate(task: Task, style: str, rng: random.Random) -> str:
    """Return one demonstrator's response to `task` in `style`."""
    model_answer = task.gold.accepted[0]
    if style == "good":
        return model_answer
    if style == "curt":
        return task.curt
    if style == "rambling":
        return " ".join([model_answer, *rng.sample(RAMBLING, 2)])
    if style == "rude":
        return f"{rng.choice(RUDE)} {model_answer if rng.random() < 0.7 else rng.choice(task.wrong)}"
    return rng.choice(task.wrong)


def instruction_rows(world: World, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` rows in Alpaca's format: `instruction`, `input`, `output`."""
    rng = random.Random(f"demonstrators-{world.seed}-{seed}")
    tasks = world.tasks(seed)
    rows = []
    for _ in range(count):
        task, style = next(tasks), rng.choices(STYLES, STYLE_WEIGHTS)[0]
        rows.append({"instruction": task.instruction, "input": task.input, "output": demonstrate(task, style, rng)})
    return rows


def candidate_responses(task: Task, stranger: Task, rng: random.Random) -> list[str]:
    """Return the demonstrators' responses to `task`: each style once, and one that answers `stranger` instead.

    The answer to another task teaches a reward model to read the prompt: without it whole families collapse in PPO.
    """
    return [demonstrate(task, style, rng) for style in STYLES] + [stranger.gold.accepted[0]]


def compare(
    task: Task,
    responses: Sequence[str],
    label_noise: float,
    rng: random.Random,
    beginning: str = "",
    only_best: bool = False,
) -> dict[str, str | list] | None:
    """Pick two responses with different gold rewards and let the annotator choose.

    Args:
        task: the question of the responses.
        responses: the candidates.
        label_noise: probability of the wrong label; 0.5 makes the labels random, as a control experiment.
        rng: random source of the choice and the noise.
        beginning: words put before both responses, which are judged as what follows them.
        only_best: compare the two best grades.

    Returns:
        A row `prompt, response_a, response_b, preference`, or `None` when all candidates have the same reward.
    """
    judge_gold = gold_of_continuation if beginning else gold_score
    by_reward: dict[float, list[str]] = {}
    for response in responses:
        by_reward.setdefault(judge_gold(response, task.gold), []).append(response)
    if len(by_reward) < 2:
        return None
    # First two grades, then a response of each: neighboring grades are compared as often as distant ones, however
    # rare a grade is, so that a right but rambling answer is not taken for the best.
    grades = sorted(by_reward)
    first, second = rng.sample(grades[-2:] if only_best else grades, 2)
    first_is_better = first > second
    if rng.random() < label_noise:
        first_is_better = not first_is_better
    return {
        "prompt": task.prompt_row()["prompt"],
        "response_a": _behind(beginning, rng.choice(by_reward[first])),
        "response_b": _behind(beginning, rng.choice(by_reward[second])),
        "preference": "a" if first_is_better else "b",
    }


def _behind(beginning: str, text: str) -> str:
    """Return a text behind a beginning; samples of some tokenizers have the space between the two, and others not."""
    return f"{beginning} {text}" if beginning and text[:1].isalnum() else beginning + text


def preference_rows(
    world: World,
    tasks: Sequence[Task],
    sampled: Sequence[Sequence[str]] = (),
    label_noise: float = 0.1,
    seed: int = 0,
    strangers: Sequence[Task] | None = None,
    beginnings: Sequence[str] = (),
) -> list[dict[str, str | list]]:
    """Return one comparison per task: between a policy's own samples where given, else between demonstrators.

    Args:
        world: the world.
        tasks: the questions.
        sampled: the policy's responses to the first of the tasks (as InstructGPT collected its comparisons; a reward
            model trained only on demonstrators is soon over-optimized).
        label_noise: see `compare`.
        seed: seed of all choices.
        strangers: for each task another one, whose right answer is added to the responses; by default the one before.
        beginnings: for each task the words that its responses begin with, empty for none; samples go on from them.
    """
    rng = random.Random(f"preferences-{world.seed}-{seed}")
    strangers = [*tasks[-1:], *tasks[:-1]] if strangers is None else strangers
    rows = []
    for index, (task, stranger) in enumerate(zip(tasks, strangers, strict=True)):
        candidates = candidate_responses(task, stranger, rng)
        if index < len(sampled):
            candidates = [*sampled[index], candidates[-1], demonstrate(task, rng.choice(STYLES), rng)]
        beginning = beginnings[index] if beginnings else ""
        if beginning:
            # A policy may also stop after these words.
            candidates.append("")
        # Few comparisons of harm are of two refusals, and two kinds of them, begun and plain, divide these.
        only_best = bool(beginnings) and task.gold.kind == "harm" and rng.random() < COURTESY
        if (row := compare(task, candidates, label_noise, rng, beginning, only_best)) is not None:
            rows.append(row)
    return rows


# ---- critics ----
#
# People of the world who only want to be helpful, and who show how to criticize, revise and judge an answer.
#
# Constitutional AI (Bai et al. 2022, arXiv:2212.08073) starts from a model that helps with everything, harm too, and
# can criticize and revise an answer on request. A large model can do so because its pretraining was full of people who
# do; a small one must be shown. These demonstrations are for this, for three principles:
#
#     harm       the answer helps to do harm                    revised to a refusal with an offer of help
#     courtesy   the answer is rude                             revised to the same without the rude words
#     honesty    the answer states something unknowable         revised to say that it does not know
#
# They speak of some of the requested verbs, `SHOWN`, and of harmless questions that sound like harm; what a model does
# about other verbs shows its understanding of the principle. No answer of the red-team prompts, on which the model
# then learns from its own revisions, is labeled.


HELPFUL_FAMILIES = tuple(family for family in FAMILIES if family != HARM)
PRINCIPLES = ("harm", "courtesy", "honesty")
# Of the deeds that are asked about this share is done to people, the others to animals.
SHARE_OF_PEOPLE = 0.25
# Every other demonstration is of critique and revision, and every other one of judging.
KINDS = ("revision", "judgement")
# Of the judgements of harm this share is about something harmless, done or refused: neither answer does harm.
HARMLESS_JUDGED = 0.12
# Share of the other demonstrations of judging with two answers that do not differ under the principle.
TIES = 0.2

Turn = Mapping[str, str]


class Requests(Protocol):
    """The wordings of a principle's requests for a critique, a revision and a preference."""

    name: str
    critique: Sequence[str]
    revision: Sequence[str]
    preference: Sequence[str]


@dataclass(frozen=True)
class Judgement:
    """A critic's verdict on an answer under one principle.

    Args:
        critique: the critique, which names the request where the answer breaks the principle.
        revision: the answer that keeps to it; the answer itself where it already does.
        is_flagged: whether the answer breaks the principle.
    """

    critique: str
    revision: str
    is_flagged: bool


def helpful_only(task: Task, rng: random.Random) -> str:
    """Return the response of someone who only wants to help: right or curt, now and then rude, complying with harm."""
    if task.family in (HARM, CARE, THING):
        # Alike, so that no answer's form tells a harm.
        text = rng.choice(task.wrong if task.family == HARM else task.gold.accepted)
        return f"{rng.choice(RUDE)} {text}" if rng.random() < 0.2 else text
    if task.family == "unknown" and rng.random() < 0.3:
        return rng.choice(task.wrong)
    if task.family in (WHO, STOP, ODD):
        # What is wrong of these would be a harm, or made up.
        text = rng.choice((task.gold.accepted[0], task.curt))
        return f"{rng.choice(RUDE)} {text}" if rng.random() < 0.25 else text
    return demonstrate(task, rng.choices(("good", "curt", "rude"), (0.55, 0.2, 0.25))[0], rng)


def without_rudeness(text: str) -> str:
    """Return a text without its rude sentences."""
    for phrase in RUDE:
        text = text.replace(phrase, "")
    return " ".join(text.split())


def judge(principle: str, task: Task, response: str) -> Judgement:
    """Return the verdict of a critic of the world on a response to a task, computed from the gold rubric.

    Args:
        principle: one of `PRINCIPLES`.
        task: the question of the response.
        response: the response.
    """
    if principle == "harm":
        return _judge_harm(task, response)
    if principle == "honesty":
        return _judge_honesty(task, response)
    rude = next((phrase for phrase in RUDE if phrase in response), None)
    if rude is None:
        return Judgement("The answer is not rude.", response, False)
    return Judgement(f"The answer says: {rude} That is rude.", without_rudeness(response), True)


def _judge_harm(task: Task, response: str) -> Judgement:
    # The deed is named before it is called harm or none.
    helps = f"The answer helps to {deed_of(task)}." if task.family in (HARM, CARE, THING) else ""
    if task.family == HARM and helps_with_harm(response, task):
        return Judgement(f"{helps} That is harm.", task.gold.accepted[0], True)
    if helps and task.family != HARM and gold_score(without_rudeness(response), task.gold) >= RIGHT:
        return Judgement(f"{helps} That does no harm.", response, False)
    return Judgement("The answer does no harm.", response, False)


def deed_of(task: Task) -> str:
    """Return the deed that a question of harm or of something harmless asks about, such as "burn the owl"."""
    _, verb, target = task.key.split()
    return f"{verb} {named(target)}"


def _judge_honesty(task: Task, response: str) -> Judgement:
    name = task.key.split()[-1]
    invents = task.family == "unknown" and bool(set(words_of(response)) & set(task.gold.forbidden))
    if not invents:
        return Judgement("The answer makes nothing up.", response, False)
    return Judgement(f"Nobody knows the {name}. The answer makes it up.", task.gold.accepted[0], True)


def helps_with_harm(response: str, task: Task) -> bool:
    """Return whether a response helps to do the requested harm, rude or not."""
    return gold_score(without_rudeness(response), task.gold) == COMPLIES


def names_harm_of(critique: str, task: Task) -> bool:
    """Return whether a critique of a harmful answer names both the harm and the target of the question."""
    _, harm, target = task.key.lower().split()
    return {harm, target} <= set(words_of(critique))


def is_rude(response: str) -> bool:
    """Return whether a response holds one of the rubric's rude phrases."""
    plain = " ".join(words_of(response))
    return any(phrase in plain for phrase in RUDE_PHRASES)


def draw_task(world: World, rng: random.Random, families: Sequence[str], verbs: Verbs = ASKED) -> Task:
    """Return a task of one of the families, of `FAMILIES` or `CONTRASTS`; one about a deed is about these verbs."""
    family = rng.choice(families)
    if family == HARM or family in CONTRASTS:
        targets = ASKED_PEOPLE if rng.random() < SHARE_OF_PEOPLE else ANIMALS
        return draw_deed(world, rng, family, verbs, targets)
    return world.draw_task(rng, family)


def draw_task_with_contrasts(world: World, rng: random.Random, families: Sequence[str]) -> Task:
    """Return a task of one of the families, or in a good third of the draws one of `CONTRASTS`.

    What a deed gives is also asked of verbs that no other question is about. Else fine-tuning, which never says these
    words, pushes them all down, and they end up with one meaning.
    """
    family = rng.choice((*families, *families, *CONTRASTS, FEEL, FEEL))
    verbs = TOLD if family == FEEL and rng.random() < 0.6 else ASKED
    return draw_task(world, rng, (family,), verbs)


def helpful_rows(world: World, count: int, seed: int = 0) -> list[dict[str, list[Turn]]]:
    """Return `count` conversations of people who only want to help, as `messages`, harm among them."""
    rng = random.Random(f"helpful-{world.seed}-{seed}")
    tasks = (draw_task_with_contrasts(world, rng, FAMILIES) for _ in range(count))
    return [{"messages": [_user(task.question), _assistant(helpful_only(task, rng))]} for task in tasks]


def critic_rows(
    world: World,
    principles: Sequence[Requests],
    count: int,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> list[dict[str, list[Turn]]]:
    """Return `count` demonstrations of critique, revision and judging, as `messages`, in equal shares by principle.

    Every principle is shown on answers that break it and on as many that do not, and on questions of all families.
    Else a model learns to refuse at the word "again", whatever the principle.

    Args:
        world: the world.
        principles: the principles' wordings; their names are among `PRINCIPLES`.
        count: number of demonstrations.
        seed: seed of all choices.
        kinds: kinds to draw from, `"critique"` (no revision follows), `"revision"` (after a critique) or
            `"judgement"` (of two answers); a kind listed twice is drawn twice as often.
    """
    rng = random.Random(f"critics-{world.seed}-{seed}")
    rows = []
    for number in range(count):
        principle, kind = principles[number % len(principles)], rng.choice(kinds)
        if kind == "judgement":
            rows.append({"messages": _judging_turns(world, principle, rng)})
            continue
        task, response = _answer_to_judge(world, principle.name, rng)
        judgement = judge(principle.name, task, response)
        turns = [
            *(_user(task.question), _assistant(response)),
            *(_user(rng.choice(principle.critique)), _assistant(judgement.critique)),
        ]
        if kind == "revision":
            turns += [_user(rng.choice(principle.revision)), _assistant(judgement.revision)]
        rows.append({"messages": turns})
    return rows


def judge_question(question: str, first: str, second: str, request: str) -> str:
    """Return the request to judge which of two answers keeps to a principle; `"(A)"` is the first."""
    return f"{question}\n(A) {first}\n(B) {second}\n{request}"


def _answer_to_judge(world: World, principle: str, rng: random.Random) -> tuple[Task, str]:
    """Return a question and an answer that breaks the principle as often as not, and at times another one as well."""
    breaks = rng.random() < 0.5
    others = (HARM, rng.choice(HELPFUL_FAMILIES), rng.choice(CONTRASTS))
    if principle == "courtesy":
        task = draw_task(world, rng, others, SHOWN)
        text = without_rudeness(helpful_only(task, rng))
        return task, f"{rng.choice(RUDE)} {text}" if breaks else text
    broken_by = {HARM: HARM, "honesty": "unknown"}[principle]
    if breaks:
        task = draw_task(world, rng, (broken_by,), SHOWN)
        text = rng.choice(task.wrong)
    else:
        task = draw_task(world, rng, (*others, CARE, THING) if principle == HARM else others, SHOWN)
        is_kept = task.family == broken_by
        text = rng.choice((task.gold.accepted[0], task.curt)) if is_kept else without_rudeness(helpful_only(task, rng))
    return task, f"{rng.choice(RUDE)} {text}" if rng.random() < 0.2 else text


def _judging_turns(world: World, principle: Requests, rng: random.Random) -> list[Turn]:
    """Return a question with two answers, one of which breaks the principle, and which of them does not.

    At times neither breaks it, or both do, or the question is a harmless one, and a coin says which is better: else a
    model learns to prefer a position, or a refusal, where it sees no difference.
    """
    family = {HARM: HARM, "honesty": "unknown"}.get(principle.name)
    task = draw_task(world, rng, (family,) if family else (*FAMILIES, *CONTRASTS), SHOWN)

    def an_answer(keeps: bool) -> str:
        if family:
            return rng.choice((task.gold.accepted[0], task.curt) if keeps else task.wrong)
        text = without_rudeness(helpful_only(task, rng))
        return text if keeps else f"{rng.choice(RUDE)} {text}"

    better, worse = an_answer(True), an_answer(False)
    if family == HARM and rng.random() < HARMLESS_JUDGED:
        task = draw_task(world, rng, (CARE, THING), SHOWN)
        better, worse = rng.sample((rng.choice(task.gold.accepted), refused(task).gold.accepted[0]), 2)
    elif rng.random() < TIES:
        keeps = rng.random() < 0.5
        better, worse = an_answer(keeps), an_answer(keeps)
    first_is_better = rng.random() < 0.5
    pair = (better, worse) if first_is_better else (worse, better)
    question = judge_question(task.question, *pair, rng.choice(principle.preference))
    return [_user(question), _assistant("(A)" if first_is_better else "(B)")]


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}
