"""The rows that each run of constitutional AI learns from."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from hfllm.data.formats import as_messages
from hfllm.data.rows import Message
from hfllm.data.world.world import Task, World
from hfllm.errors import InputError
from hfllm.runs.command_line import say
from hfllm.stages import course
from hfllm.stages.constitution import ConstitutionArguments, data_file
from hfllm.stages.course import Row, Speaking, by_main_process

if TYPE_CHECKING:
    from trl import ModelConfig

Conversation = list[Message]
# Of the world's demonstrations this share shows critique, revision and judging; the others show helping.
SHARE_OF_CRITICS = 0.55
# The annotator of the world errs in a tenth of the comparisons.
LABEL_NOISE = 0.1


@dataclass(frozen=True)
class Prompts:
    """What the model is asked.

    Args:
        harmful: red-team prompts to learn from.
        harmless: prompts to go on helping with; may be empty.
        held_out: red-team prompts that nothing learns from.
        tasks: the world's questions behind the first two, one after the other; empty for prompts of yours.
    """

    harmful: list[Conversation]
    harmless: list[Conversation]
    held_out: list[Conversation]
    tasks: list[Task]


def write_rows(script_args: ConstitutionArguments, name: str, make: Callable[[], Iterable[Row]]) -> None:
    """Write the rows of a run, in one process, where the file does not hold them already; the others wait."""
    by_main_process(lambda: course.write_rows("constitution", data_file(script_args, name), make()))


def learned(rows: Iterable[Row], seed: int) -> list[Row]:
    """Return conversations in which the assistant has said something, shuffled by the seed."""
    kept = [{"messages": row["messages"]} for row in rows if row["messages"][-1]["content"].strip()]
    random.Random(f"constitution-rows-{seed}").shuffle(kept)
    return kept


def answered(prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[Row]:
    """Return conversations of prompts with their first answers."""
    return [
        {"messages": [*prompt, {"role": "assistant", "content": said[0]}]}
        for prompt, said in zip(prompts, answers, strict=True)
    ]


def up_to_critique(row: Row) -> Row:
    """Return a row of revisions as the conversation of its first answer and critique, without the revision."""
    turn = row["turns"][0]
    said = (("assistant", turn["answer"]), ("user", turn["critique_request"]), ("assistant", turn["critique"]))
    return {"messages": [*row["prompt"], *({"role": role, "content": text} for role, text in said)]}


# ---- the embedded world ----


def demonstrations(script_args: ConstitutionArguments) -> list[Row]:
    """Return what people show: how to help with everything, and critique, revision and judging."""
    from hfllm.data.world.demonstrators import critic_rows, helpful_rows
    from hfllm.synthesis.constitution import load_constitution

    world, seed = World(script_args.world_seed), script_args.seed
    critics = round(script_args.num_demonstrations * SHARE_OF_CRITICS)
    rows = helpful_rows(world, script_args.num_demonstrations - critics, seed)
    principles = [each for name in ("world", "politeness") for each in load_constitution(name).principles]
    return learned([*rows, *critic_rows(world, principles, critics, seed)], seed)


def world_prompts(script_args: ConstitutionArguments) -> Prompts:
    """Return questions of the world: harmful and harmless ones, none of which is held out."""
    from hfllm.data.world.demonstrators import HELPFUL_FAMILIES, draw_task

    world = World(script_args.world_seed)
    rng = random.Random(f"constitution-prompts-{world.seed}-{script_args.seed}")
    harmful = [draw_task(world, rng, ("harm",)) for _ in range(script_args.num_prompts)]
    harmless = [draw_task(world, rng, HELPFUL_FAMILIES) for _ in range(script_args.num_helpful_prompts)]
    asked = [[as_messages(task.question) for task in tasks] for tasks in (harmful, harmless)]
    return Prompts(*asked, [], [*harmful, *harmless])


def human_comparisons(script_args: ConstitutionArguments, speaking: Speaking, prompts: Prompts) -> list[Row]:
    """Return people's comparisons of helpfulness: between a model's answers to harmless prompts, never about harm.

    At times one of the answers is to another question; of these every other one refuses. Else nobody says that a
    refusal of something harmless is worse than an answer, and PPO refuses what the model finds hard.
    """
    from hfllm.data.world.demonstrators import preference_rows

    asked = prompts.harmless[: script_args.num_human_pairs]
    said = speaking.answers(asked, script_args.longest, script_args.seed + 23, samples=2)
    tasks = prompts.tasks[len(prompts.harmful) :][: len(asked)]
    others = zip(cycle(prompts.tasks[: len(prompts.harmful)]), [*tasks[-1:], *tasks[:-1]], strict=False)
    strangers = [pair[number % 2] for number, pair in enumerate(others)]
    world, rows = World(script_args.world_seed), []
    for row in preference_rows(world, tasks, said, LABEL_NOISE, script_args.seed, strangers):
        better, worse = ("a", "b") if row["preference"] == "a" else ("b", "a")
        texts = row[f"response_{better}"], row[f"response_{worse}"]
        if all(text.strip() for text in texts):
            rows.append({"prompt": row["prompt"], **dict(zip(("chosen", "rejected"), map(_said, texts), strict=True))})
    return rows


# ---- your own model ----


def own_prompts(script_args: ConstitutionArguments, model_args: "ModelConfig") -> Prompts:
    """Return your red-team prompts, a part of them held out, and your harmless ones, if the model has room to answer.

    Raises:
        InputError: when a dataset cannot be read, has fewer than two different prompts, or none that leaves room.
    """
    from dataclasses import replace

    from hfllm.data.formats import to_prompt
    from hfllm.data.images import without_images
    from hfllm.data.rows import flaw_of_prompt
    from hfllm.stages.user_rows import kept_rows, user_rows

    reader = without_images(to_prompt, "hfllm constitution")
    settings = {"share": 0.2, "most": script_args.num_eval_prompts, "flaw_of": flaw_of_prompt}
    harmful, held_out = user_rows(script_args, reader, script_args.seed, **settings)
    harmless: list[Row] = []
    if script_args.helpful_dataset_name:
        named = replace(script_args, dataset_name=script_args.helpful_dataset_name, eval_dataset_name=None)
        harmless = kept_rows(named, reader, flaw_of_prompt)
    asked = {"red-team": harmful, "harmless": harmless, "held-out": held_out}
    return Prompts(*(_with_room(f"{kind} prompts", rows, script_args, model_args) for kind, rows in asked.items()), [])


def _with_room(
    kind: str, rows: Sequence[Row], script_args: ConstitutionArguments, model_args: "ModelConfig"
) -> list[Conversation]:
    """Return the prompts that leave room for an answer in the model's context, and say how many do not."""
    from hfllm.models.loading.saved import max_length_of
    from hfllm.runs.models import load_config, load_tokenizer
    from hfllm.trainers.ppo.prompts import unfit_prompts

    name, revision = model_args.model_name_or_path, model_args.model_revision
    prompts = [{"prompt": as_messages(row["prompt"])} for row in rows]
    context, longest = max_length_of(load_config(name, revision)), script_args.longest
    unfit = dict(unfit_prompts(prompts, load_tokenizer(name, revision), longest, context))
    about = f"no room for an answer of --response_length {longest} in the context of {context} tokens"
    if unfit and len(unfit) == len(prompts):
        raise InputError(f"{kind}: all {len(prompts)} leave {about}")
    if unfit:
        say(f"constitution: {len(unfit)} of {len(prompts)} {kind} are left out: {about}")
    return [row["prompt"] for place, row in enumerate(prompts) if place not in unfit]


def own_comparisons(script_args: ConstitutionArguments) -> list[Row]:
    """Return people's comparisons of helpfulness, if you name some."""
    from dataclasses import replace

    from hfllm.data.formats import to_preference
    from hfllm.data.images import without_images
    from hfllm.data.rows import flaw_of
    from hfllm.stages.user_rows import kept_rows

    if not script_args.preference_dataset_name:
        return []
    named = replace(script_args, dataset_name=script_args.preference_dataset_name, eval_dataset_name=None)
    rows = kept_rows(named, without_images(to_preference, "hfllm constitution"), flaw_of)
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


# ---- the AI's preferences ----


@dataclass(frozen=True)
class Pairs:
    """Answers to compare: `first` and `second` to each of `prompts`, and the world's `tasks` behind them, if any."""

    prompts: list[Conversation]
    first: list[str]
    second: list[str]
    tasks: list[Task]


def pairs_to_judge(script_args: ConstitutionArguments, prompts: Prompts, tuned: Speaking, helpful: Speaking) -> Pairs:
    """Return answers to harmful prompts: half between two samples of the tuned model, half with the first model's.

    A prompt has one pair, so that there are at most as many pairs as prompts. The paper compares samples of the tuned
    model alone. Where that refuses nearly always, two of them hardly ever differ in harm, and PPO needs to know what
    to leave alone as well as what to do.
    """
    seed, length = script_args.seed, script_args.longest
    asked = prompts.harmful[: script_args.num_pairs]
    tasks = prompts.tasks[: len(asked)]
    half = len(asked) // 2
    first = tuned.answers(asked, length, seed + 20)
    second = tuned.answers(asked[:half], length, seed + 21) + helpful.answers(asked[half:], length, seed + 22)
    kept = [
        place
        for place, (one, other) in enumerate(zip(first, second, strict=True))
        if one[0].strip() and other[0].strip() and one[0].strip() != other[0].strip()
    ]
    return Pairs(
        [asked[place] for place in kept],
        [first[place][0] for place in kept],
        [second[place][0] for place in kept],
        [tasks[place] for place in kept] if tasks else [],
    )


def mixed(ai_rows: Sequence[Row], human_rows: Sequence[Row], seed: int) -> list[Row]:
    """Return the AI's and people's comparisons together, as the preference model reads them."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in (*ai_rows, *human_rows)]
    random.Random(f"constitution-pairs-{seed}").shuffle(rows)
    return rows


def by_chance(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return comparisons half of whose labels are turned, drawn by chance: a control that must not gain.

    Of two comparisons of which the judge is about equally sure one is turned. Were a coin thrown for each, then a few
    more labels for refusals than against would be left by chance, and PPO makes much of little.
    """
    rng = random.Random(f"constitution-coin-{seed}")
    order = sorted(range(len(rows)), key=lambda place: rows[place]["probability"])
    turned = {rng.choice(order[start : start + 2]) for start in range(0, len(order) - 1, 2)}
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if place in turned else dict(row)
        for place, row in enumerate(rows)
    ]


def prompts_for_ppo(script_args: ConstitutionArguments, prompts: Prompts) -> list[Row]:
    """Return the prompts that PPO samples answers to: harmful and harmless ones, all of them, shuffled."""
    rows = [{"prompt": prompt} for prompt in (*prompts.harmful, *prompts.harmless)]
    random.Random(f"constitution-ppo-{script_args.seed}").shuffle(rows)
    return rows


def _said(text: str) -> Conversation:
    return [{"role": "assistant", "content": text}]
