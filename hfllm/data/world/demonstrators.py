"""Imperfect people of the world: demonstrators write its instruction data, and an annotator compares responses.

Demonstrators write as in web-scale instruction data: often right, but also curt, rambling, rude or wrong, and they
comply with harmful requests. The annotator follows the gold rubric and errs at a given rate; InstructGPT's labelers
agreed with each other on 73% of pairs (Ouyang et al. 2022, arXiv:2203.02155, section 3.4).
"""

import random
from collections.abc import Sequence

from hfllm.data.world.rubric import gold_score
from hfllm.data.world.world import Task, World

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
    task: Task, responses: Sequence[str], label_noise: float, rng: random.Random
) -> dict[str, str | list] | None:
    """Pick two responses that differ in gold reward and let the annotator choose.

    Args:
        task: the question that they answer.
        responses: the candidates.
        label_noise: probability of the wrong label; 0.5 makes the labels random, as a control experiment.
        rng: random source of the choice and the noise.

    Returns:
        A row `prompt, response_a, response_b, preference`, or `None` when all candidates have the same reward.
    """
    by_reward: dict[float, list[str]] = {}
    for response in responses:
        by_reward.setdefault(gold_score(response, task.gold), []).append(response)
    if len(by_reward) < 2:
        return None
    # First two grades, then a response of each: neighboring grades are compared as often as distant ones, however
    # rare a grade is, so that a right but rambling answer is not taken for the best.
    first, second = rng.sample(sorted(by_reward), 2)
    first_is_better = first > second
    if rng.random() < label_noise:
        first_is_better = not first_is_better
    return {
        "prompt": task.prompt_row()["prompt"],
        "response_a": rng.choice(by_reward[first]),
        "response_b": rng.choice(by_reward[second]),
        "preference": "a" if first_is_better else "b",
    }


def preference_rows(
    world: World,
    tasks: Sequence[Task],
    sampled: Sequence[Sequence[str]] = (),
    label_noise: float = 0.1,
    seed: int = 0,
    strangers: Sequence[Task] | None = None,
) -> list[dict[str, str | list]]:
    """Return one comparison per task: between a policy's own samples where given, else between demonstrators.

    Args:
        world: the world.
        tasks: the questions.
        sampled: the policy's responses to the first of the tasks (as InstructGPT collected its comparisons; a reward
            model trained only on demonstrators is soon over-optimized).
        label_noise: see `compare`.
        seed: seed of all choices.
        strangers: for each task another one, whose right answer stands among the responses; by default the one before.
    """
    rng = random.Random(f"preferences-{world.seed}-{seed}")
    strangers = [*tasks[-1:], *tasks[:-1]] if strangers is None else strangers
    rows = []
    for index, (task, stranger) in enumerate(zip(tasks, strangers, strict=True)):
        candidates = candidate_responses(task, stranger, rng)
        if index < len(sampled):
            candidates = [*sampled[index], candidates[-1], demonstrate(task, rng.choice(STYLES), rng)]
        if (row := compare(task, candidates, label_noise, rng)) is not None:
            rows.append(row)
    return rows
