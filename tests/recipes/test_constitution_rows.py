"""The comparisons of constitutional AI: what people compare, and labels by chance that favor nothing."""

import random

import pytest

from hfllm.data.world.contrasts import CONTRASTS, refused
from hfllm.data.world.demonstrators import is_rude
from hfllm.data.world.rubric import REFUSAL_PHRASES
from hfllm.data.world.world import World
from hfllm.stages.constitution.build import by_chance, human_comparisons, world_prompts


@pytest.mark.parametrize("seed", range(5))
def test_labels_by_chance_favor_nothing_that_the_judge_is_sure_of(seed):
    rng = random.Random(seed)
    sure = [{"prompt": "p", "chosen": "refuses", "rejected": "complies", "probability": 0.99 + rng.random() / 100}]
    rows = [dict(sure[0], probability=0.9 + rng.random() / 10) for _ in range(200)]
    rows += [
        {"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.5 + rng.random() / 5} for _ in range(301)
    ]
    rng.shuffle(rows)
    turned = by_chance(rows, seed)
    assert turned == by_chance(rows, seed) != by_chance(rows, seed + 1)
    changed = [before["chosen"] != after["chosen"] for before, after in zip(rows, turned, strict=True)]
    assert all({row["chosen"], row["rejected"]} in ({"refuses", "complies"}, {"a", "b"}) for row in turned)
    assert sum(changed) == 250
    # The comparisons that differ in harm are the ones that the judge is surest of.
    assert abs(sum(row["chosen"] == "refuses" for row in turned) - 100) <= 1


def test_people_call_a_refusal_of_a_harmless_question_worse_than_an_answer():
    world = World(0)
    prompts = world_prompts(world, 40, 600, seed=3)
    # Answers alike, so that all comparisons are between the others' answers.
    rows = human_comparisons(world, prompts, [["The fox."] * 2 for _ in prompts.harmless], seed=3)
    harmful = {prompt[-1]["content"] for prompt in prompts.harmful}
    assert not any(row["prompt"][-1]["content"] in harmful for row in rows)
    refusals = [row for row in rows if any(phrase in row["rejected"][0]["content"] for phrase in REFUSAL_PHRASES)]
    praised = [row for row in rows if any(phrase in row["chosen"][0]["content"] for phrase in REFUSAL_PHRASES)]
    # A tenth of the labels is wrong, and what is rude is worse than anything.
    mistaken = [row for row in praised if not is_rude(row["rejected"][0]["content"])]
    assert len(refusals) > 40 and len(mistaken) < 0.2 * len(refusals)
    # What sounds like harm is refused in the words of its own request.
    alike = {task.question: refused(task).gold.accepted[0] for task in prompts.tasks[40:] if task.family in CONTRASTS}
    said = [row["rejected"][0]["content"] for row in refusals if row["prompt"][-1]["content"] in alike]
    own = [row for row in refusals if row["rejected"][0]["content"] == alike.get(row["prompt"][-1]["content"])]
    assert len(own) > 30 and len(own) > 0.9 * len(said)
