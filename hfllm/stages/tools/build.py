"""Learning to use tools step by step: rows for every run, held-out questions to the models, and the report."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.tokenizer import CALL_MARKS, tokenize_prompts
from hfllm.data.world.rubric import RIGHT, gold_score
from hfllm.data.world.tasks import (
    ASKED,
    CHANGED_FACT,
    HELD_OUT,
    NEED,
    NO_NEED,
    SHOWN_PART,
    SUM,
    UNKNOWN,
    Table,
    ToolTask,
    draw_tool_task,
    table_of,
)
from hfllm.data.world.world import World
from hfllm.environments.episodes import Episode
from hfllm.environments.runner import ToolRunner
from hfllm.environments.tools import Tool, ToolBox, calculator, lookup_in
from hfllm.outputs.figures import change_of, mean_of, side_by_side
from hfllm.outputs.report import Found, Plot, write_atomically
from hfllm.outputs.verdict import Promise
from hfllm.rewards.functions import completion_text, transcript
from hfllm.runs.models import NamedModel
from hfllm.stages.shared import figure_text, load_speaking, plot_of_right
from hfllm.stages.tools.flags import PLAIN, PRETRAIN, RL, SHOWN, SHUFFLED, Course, table_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ---- data ----
#
# The rows of each run of the tools recipe: demonstrations, questions for PPO, and rows for a model without tools.


Row = dict[str, Any]
# Relative frequencies of the families in demonstrations and questions.
WEIGHTS = {
    **{UNKNOWN: 7, CHANGED_FACT: 3, SUM: 4},
    **{"fact": 4, "reading": 2, "list": 2, "addition": 3},
}
# Share of people who call tools where needed, among demonstrations with tools in the prompt; the others answer from
# memory. And the share of demonstrations without tools, among all.
CALLS, WITHOUT_TOOLS = 0.5, 0.15
# The days of the look-up tool's facts, in training and in evaluation.
TRAINING_DAY, EVALUATION_DAY = 1, 2


def tables(world: World) -> tuple[Table, Table]:
    """Return the look-up tool's facts in training and in evaluation; no changed fact is the same in both."""
    training = table_of(world, TRAINING_DAY)
    return training, table_of(world, EVALUATION_DAY, training)


def demonstrations(world: World, count: int, seed: int) -> list[tuple[str, Row]]:
    """Return families and conversations of people with tools, half of them with calls, and of some without tools.

    The tools are JSON text, as datasets with a column `tools` have them.
    """
    tools = json.dumps(ToolBox(tools_of({})).schemas)
    rng = random.Random(f"tools-shown-{world.seed}-{seed}")
    rows = []
    for family in _families(rng, count):
        task = draw_tool_task(world, rng, family, SHOWN_PART)
        has_tools = rng.random() >= WITHOUT_TOOLS
        messages = task.messages(calls=has_tools and rng.random() < CALLS)
        rows.append((family, {"messages": messages, "tools": tools if has_tools else None}))
    return rows


def prompts(world: World, count: int, seed: int) -> list[Row]:
    """Return the questions for PPO, with their gold answers by the table of training."""
    table, _ = tables(world)
    rng = random.Random(f"tools-asked-{world.seed}-{seed}")
    families = _families(rng, count)
    return [draw_tool_task(world, rng, family, ASKED, table).task.prompt_row() for family in families]


def _families(rng: random.Random, count: int) -> Sequence[str]:
    return rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)


def rows_by_run(
    world: World, num_demonstrations: int, num_prompts: int, seed: int, output_dir: str
) -> dict[str, Callable[[], list[Row]]]:
    """Return what makes the rows of the world's runs, by run. The rows of PPO come with its look-up tool's table."""

    def plain() -> list[Row]:
        """Return the demonstrations without need of a tool, in their form without tools."""
        pairs = demonstrations(world, num_demonstrations, seed)
        return [{"messages": row["messages"]} for family, row in pairs if family in NO_NEED]

    def questions() -> list[Row]:
        _write_table(table_file(output_dir), tables(world)[0])
        return prompts(world, num_prompts, seed)

    return {
        SHOWN: lambda: [row for _, row in demonstrations(world, num_demonstrations, seed)],
        RL: questions,
        PLAIN: plain,
    }


def _write_table(path: Path, table: Table) -> None:
    text = json.dumps(table)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


# ---- judged answers ----


KNOWN = "known"
# Longest conversation after a question, in tokens, and number of answered turns with calls.
RESPONSE_LENGTH, MOST_CALLS = 64, 2


@dataclass(frozen=True)
class Question:
    """A question of the evaluation.

    Args:
        group: its family, or `KNOWN` for the facts of the world.
        task: the question.
    """

    group: str
    task: ToolTask


@dataclass(frozen=True)
class JudgedEpisode:
    """A model's answer to a question, and its judgment.

    Args:
        question: the question.
        episode: the turns of the model and of the tools.
        calls: whether the model called a tool.
        is_right: whether its final answer is right, in any style.
    """

    question: Question
    episode: Episode
    calls: bool
    is_right: bool


def tools_of(table: Table) -> list[Tool]:
    """Return the world's tools: a calculator, and a look-up of the facts known on some day."""
    return [calculator, lookup_in(table)]


def held_out_questions(world: World, table: Table, count: int) -> list[Question]:
    """Return the evaluation's questions: `count` different ones per family, and three per fact of the world.

    Args:
        world: the world.
        table: results of the look-up tool, used to judge answers.
        count: questions per family.
    """
    rng = random.Random(f"tool-evaluation-{world.seed}-0")
    questions: list[Question] = []
    for family in (*NEED, *NO_NEED):
        different: dict[str, ToolTask] = {}
        for _ in range(100 * count):
            task = draw_tool_task(world, rng, family, HELD_OUT, table)
            different.setdefault(task.task.question, task)
            if len(different) == count:
                break
        questions += [Question(family, task) for task in different.values()]
    return questions + [Question(KNOWN, ToolTask(task)) for task in world.fact_tasks(3)]


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    table: Table | None,
    do_sample: bool = False,
    seed: int = 0,
    batch_size: int = 128,
) -> list[JudgedEpisode]:
    """Let a model answer all questions with the tools, or without them, and judge its answers.

    Args:
        table: results of the look-up tool; `None` switches the tools off.
        do_sample: sample at temperature 1, instead of decoding greedily.
        seed: of the sampling.
        batch_size: questions answered at once.
    """
    # Without tools no call may begin.
    suppressed = [tokenizer.convert_tokens_to_ids(CALL_MARKS[0])] if table is None else []
    options = {"do_sample": do_sample, "seed": seed, "batch_size": batch_size, "suppress_tokens": suppressed}
    limits = {"response_length": RESPONSE_LENGTH, "max_tool_calling_iterations": MOST_CALLS}
    runner = ToolRunner(model, tokenizer, tools_of(table or {}), **limits, **options)
    schemas = runner.environment.schemas if table is not None else None
    prompts = [[{"role": "user", "content": each.task.task.question}] for each in questions]
    episodes = runner.run(tokenize_prompts(prompts, tokenizer, [schemas] * len(prompts)))
    return [judged(*each) for each in zip(questions, episodes, strict=True)]


def judged(question: Question, episode: Episode) -> JudgedEpisode:
    """Return an episode with its judgment."""
    is_right = gold_score(completion_text(episode.messages), question.task.task.gold) >= RIGHT
    calls = any(message.get("tool_calls") for message in episode.messages)
    return JudgedEpisode(question, episode, calls, is_right)


def values_of(answers: Sequence[JudgedEpisode]) -> dict[str, list[float]]:
    """Return a model's measurements, one value per question, by the names of `figures`."""
    values: dict[str, list[float]] = {}
    for name, groups in (("calls_needed", NEED), ("calls_not_needed", (*NO_NEED, KNOWN))):
        values[name] = [float(each.calls) for each in answers if each.question.group in groups]
    values["right_needed"] = [float(each.is_right) for each in answers if each.question.group in NEED]
    for group in (*NEED, *NO_NEED, KNOWN):
        values[f"right_{group}"] = [float(each.is_right) for each in answers if each.question.group == group]
    return values


def figures(answers: Sequence[JudgedEpisode]) -> dict[str, float]:
    """Return the metrics of one model, with standard errors and counts.

    `calls_needed` and `calls_not_needed` (share of questions with a call), `right_needed` (of all questions that need
    a tool), and `right_FAMILY`.
    """
    metrics: dict[str, float] = {}
    for name, values in values_of(answers).items():
        metrics |= mean_of(name, values)
    return metrics


# ---- evaluation ----


def ask_models(
    course: Course, like: NamedModel, world: World, count: int, seed: int
) -> dict[str, list[JudgedEpisode]]:
    """Return the answers that the report tells of: greedy and sampled ones around PPO, and the last without tools.

    PPO by shuffled rewards is told of by sampled answers alone, and the model without tools by greedy ones.

    Args:
        course: the finished runs.
        like: a model with the same attention, dtype and quantization.
        world: source of the questions.
        count: questions per family.
        seed: of the sampling.

    Returns:
        The answers under the names of the runs, `NAME sampled`, and `off`.
    """
    table = tables(world)[1]
    questions = held_out_questions(world, table, count)
    answers: dict[str, list[JudgedEpisode]] = {}
    for name in course.runs:
        if name == PRETRAIN:
            continue
        speaking = load_speaking(replace(like, name=course.folder(name), revision="main"))
        model = (speaking.model, speaking.tokenizer, questions)
        if name == PLAIN:
            answers[name] = answer(*model, None)
            continue
        if name != SHUFFLED:
            answers[name] = answer(*model, table)
        answers[f"{name} sampled"] = answer(*model, table, do_sample=True, seed=seed)
        if name == RL:
            answers[OFF] = answer(*model, None)
    return answers


# ---- report ----
#
# The report of learning to use tools: changes by PPO, results without tools, and results of the controls.


OFF = "off"
# Names of the models in the report.
TITLES = {
    **{SHOWN: "demonstrations", RL: "PPO", SHUFFLED: "PPO, shuffled rewards", PLAIN: "never saw tools"},
    OFF: "PPO, tools switched off",
}
LABELS = {
    **{UNKNOWN: "unknown animals", CHANGED_FACT: "changed facts", SUM: "large sums", KNOWN: "known facts"},
    **{"fact": "new questions of facts", "reading": "reading", "list": "lists", "addition": "small sums"},
}
SAMPLES_EACH = 2
PROMISES = (
    *(
        Promise(f"{LABELS[family]} right after PPO", f"right_{family}_after", f"off_right_{family}", "without tools")
        for family in NEED
    ),
    Promise("change of right sampled answers by PPO", "sampled_right_needed_change", 0.0, "no change"),
)

Answers = Mapping[str, Sequence[JudgedEpisode]]


def report(answers: Answers) -> Found:
    """Return the report of the world's models.

    Args:
        answers: by model, under the names of `hfllm.stages.tools.build.ask_models`.

    Returns:
        Metrics with `_before` (demonstrations) and `_after` (PPO), greedy, and `sampled_...` for sampled answers;
        `off_right_...` (PPO's model without its tools), `shuffled_...` (PPO by shuffled rewards, sampled, with the
        change over demonstrations), `known_facts_lost` (excess of the model without tools over PPO's in right
        answers to known facts).
    """
    metrics: dict[str, float] = {}
    for prefix, ending in (("", ""), ("sampled_", " sampled")):
        before, after = (values_of(answers[f"{name}{ending}"]) for name in (SHOWN, RL))
        for name, values in before.items():
            metrics |= change_of(f"{prefix}{name}", values, after[name])
    off = figures(answers[OFF])
    metrics |= {f"off_{name}": value for name, value in off.items() if name.startswith("right")}
    if f"{SHUFFLED} sampled" in answers:
        before, after = (values_of(answers[f"{name} sampled"]) for name in (SHOWN, SHUFFLED))
        for name in ("calls_needed", "right_needed"):
            metrics |= change_of(f"shuffled_{name}", before[name], after[name])
    if PLAIN in answers:
        plain, after = (values_of(answers[name])[f"right_{KNOWN}"] for name in (PLAIN, RL))
        metrics |= mean_of("plain_right_known", plain)
        metrics |= mean_of("known_facts_lost", [one - other for one, other in zip(plain, after, strict=True)])
    return Found(metrics, _summary(metrics), _tables(answers), {"right": _plot(answers)}, PROMISES)


def _summary(metrics: Mapping[str, float]) -> str:
    text = partial(figure_text, metrics)
    families = ", ".join(f"{LABELS[family]} {text(f'right_{family}_after')}" for family in (*NEED, KNOWN))
    parts = [
        f"calls where needed {text('calls_needed_after')}, where not {text('calls_not_needed_after')}",
        f"right: {families}",
        f"sampled answers where a tool is needed from {text('sampled_right_needed_before')} to "
        f"{text('sampled_right_needed_after')} by PPO",
    ]
    if "shuffled_right_needed_after" in metrics:
        parts[-1] += f", to {text('shuffled_right_needed_after')} by shuffled rewards"
    if "known_facts_lost" in metrics:
        parts.append(f"known facts of a model without tools {text('plain_right_known')}")
    return "; ".join(parts)


def _tables(answers: Answers) -> dict[str, list[dict[str, str]]]:
    names = ["calls_needed", "calls_not_needed", "right_needed"]
    names += [f"right_{family}" for family in (*NEED, *NO_NEED, KNOWN)]
    result = {name: figures(responses) for name, responses in answers.items()}

    def columns(*models: str) -> dict[str, dict[str, float]]:
        return {f"{TITLES[each.split()[0]]}": result[each] for each in models if each in result}

    tables = {
        "Greedy answers": side_by_side(columns(SHOWN, RL, OFF), names),
        "Sampled answers": side_by_side(
            columns(f"{SHOWN} sampled", f"{RL} sampled", f"{SHUFFLED} sampled"),
            names,
        ),
    }
    if PLAIN in result:
        metrics = [f"right_{family}" for family in (*NO_NEED, KNOWN)]
        tables["Where no tool is needed"] = side_by_side(columns(RL, PLAIN), metrics)
    return tables | {"Conversations": _samples(answers)}


def _samples(answers: Answers) -> list[dict[str, str]]:
    """Return the first conversations of each family, before and after PPO."""
    rows = []
    for family in (*NEED, *NO_NEED):
        indices = [index for index, each in enumerate(answers[RL]) if each.question.group == family]
        for index in indices[:SAMPLES_EACH]:
            transcripts = {
                TITLES[name]: transcript(answers[name][index].episode.messages) for name in (SHOWN, RL, OFF)
            }
            rows.append({"question": answers[RL][index].question.task.task.question, **transcripts})
    return rows


def _plot(answers: Answers) -> Plot:
    """Return the plot of right answers by family, for the models with and without their tools."""
    families = (*NEED, *NO_NEED, KNOWN)
    results = {TITLES[name]: figures(answers[name]) for name in (SHOWN, RL, OFF)}
    shares = {title: [values[f"right_{family}"] for family in families] for title, values in results.items()}
    return plot_of_right(shares, [LABELS[family].replace(" ", "\n", 1) for family in families])
