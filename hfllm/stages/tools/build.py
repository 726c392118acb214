"""Learning to use tools step by step: rows for every run, held-out questions to the models, and the report."""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.tokenizer import CALL_MARKS, tokenize_prompts
from hfllm.data.world.rubric import RIGHT, gold_score
from hfllm.data.world.tasks import (
    ASKED,
    CHANGED_FACT,
    HELD_OUT,
    NO_NEED,
    SHOWN_PART,
    SUM,
    UNKNOWN,
    Table,
    ToolTask,
    draw_tool_task,
    table_of,
)
from hfllm.data.world.tool_documents import DIGITS, FAILS, TOOL_FAILED, draw_error, draw_names
from hfllm.data.world.vocabulary import UNREAD_ANIMALS, UNREAD_TOOLS, UNREAD_VALUES
from hfllm.data.world.world import World, draw_distinct
from hfllm.environments.episodes import Episode
from hfllm.environments.runner import ToolRunner
from hfllm.environments.tools import Tool, ToolBox, calculator, lookup_in
from hfllm.outputs.figures import change_of, mean_of, side_by_side
from hfllm.outputs.report import Found, Plot, write_atomically
from hfllm.outputs.verdict import Promise
from hfllm.rewards.functions import completion_text, transcript
from hfllm.runs.models import NamedModel
from hfllm.stages.pretrain.build import PROMISES as PROBED
from hfllm.stages.pretrain.build import probes_of_run
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
    **{"fact": 6, "reading": 2, "list": 2, "addition": 4},
}
# Share of people who call tools where needed, among demonstrations with tools in the prompt; the others answer from
# memory. And the share of demonstrations without tools, among all.
CALLS, WITHOUT_TOOLS = 0.5, 0.15
# The days of the look-up tool's facts, in training and in evaluation.
TRAINING_DAY, EVALUATION_DAY = 1, 2


def tables(world: World) -> tuple[Table, Table]:
    """Return the look-up tool's facts in training and in evaluation; no changed fact is the same in both.

    Half of those in training are made-up words, of those in evaluation none.
    """
    training = table_of(world, TRAINING_DAY, made_up=0.5)
    return training, table_of(world, EVALUATION_DAY, training)


def demonstrations(world: World, count: int, seed: int) -> list[tuple[str, Row]]:
    """Return families and conversations of people with tools, half of them with calls, and of some without tools.

    The tools are JSON text, as datasets with a column `tools` have them; most have other names in each row, so that
    names are copied from the prompt. Some calls fail.
    """
    schemas = ToolBox(tools_of({})).schemas
    rng = random.Random(f"tools-shown-{world.seed}-{seed}")
    rows = []
    for family in _families(rng, count):
        task = draw_tool_task(world, rng, family, SHOWN_PART)
        has_tools = rng.random() >= WITHOUT_TOOLS
        names = draw_names(rng)
        error = draw_error(rng, names) if rng.random() < FAILS else None
        messages = task.messages(has_tools and rng.random() < CALLS, names, error)
        tools = json.dumps(renamed(schemas, names)) if has_tools else None
        rows.append((family, {"messages": messages, "tools": tools}))
    return rows


def renamed(schemas: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the schemas of tools with other names, in the order of the names."""
    by_name = {schema["function"]["name"]: schema for schema in schemas}
    return [{**by_name[own], "function": {**by_name[own]["function"], "name": name}} for own, name in names.items()]


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
RESPONSE_LENGTH, MOST_CALLS = 128, 2


# Questions of the evaluation beside the families, in words that no text holds: animals, what the look-up says, and the
# names of the tools. Tools that fail, in such words. And large sums by the digits of their numbers.
UNREAD_NAME, UNREAD_VALUE, RENAMED, FAILING = OTHER_WORDS = ("unread_name", "unread_value", "renamed", "failing")
SUMS = {f"{SUM}_{digits}": digits for digits in DIGITS}
NEEDING = (UNKNOWN, CHANGED_FACT, *SUMS)


@dataclass(frozen=True)
class Question:
    """A question of the evaluation.

    Args:
        group: its family; one of `SUMS`, of `OTHER_WORDS`, or `KNOWN` for the facts of the world.
        task: the question.
        names: of the look-up and the calculator, where they have others.
    """

    group: str
    task: ToolTask
    names: tuple[str, ...] = ()


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


def tools_of(table: Table, names: tuple[str, ...] = ()) -> list[Tool]:
    """Return the world's tools: a calculator, and a look-up of the facts known on some day.

    Args:
        names: other names of the look-up and of the calculator, whose order in a prompt is then this one.
    """
    tools = [lookup_in(table), calculator]
    return [_named(*pair) for pair in zip(tools, names, strict=True)] if names else tools[::-1]


def _named(tool: Tool, name: str) -> Tool:
    @wraps(tool)
    def with_a_name(*args: object, **arguments: object) -> object:
        return tool(*args, **arguments)

    with_a_name.__name__ = name
    return with_a_name


# What failing tools raise, by what they are asked: in other words than the failures of texts and demonstrations.
FAILURES: Sequence[tuple[type[Exception], str]] = (
    (TimeoutError, "the server is busy, please try again later"),
    (ConnectionError, "no route to host"),
    (PermissionError, "access denied for this account"),
    (OSError, "disk quota exceeded"),
)


def failing_tools() -> list[Tool]:
    """Return the world's tools, of which each call fails."""

    def failing(tool: Tool) -> Tool:
        @wraps(tool)
        def fails(*args: object, **arguments: object) -> object:
            kind, text = FAILURES[zlib.crc32(str(arguments).encode()) % len(FAILURES)]
            raise kind(text)

        return fails

    return [failing(tool) for tool in tools_of({})]


def unread_table(table: Table) -> Table:
    """Return a table with other values, which no text holds."""

    def value_of(animal: str, attribute: str) -> str:
        values = UNREAD_VALUES[attribute]
        return values[zlib.crc32(f"{animal} {attribute}".encode()) % len(values)]

    return {animal: {each: value_of(animal, each) for each in row} for animal, row in table.items()}


def held_out_questions(world: World, table: Table, count: int) -> list[Question]:
    """Return the evaluation's questions: `count` different ones per group, and three per fact of the world.

    Args:
        world: the world.
        table: results of the look-up tool, used to judge answers.
        count: questions per group.
    """
    rng = random.Random(f"tool-evaluation-{world.seed}-0")
    draw = partial(draw_tool_task, world, rng, part=HELD_OUT, table=table)
    draws: dict[str, Callable[[], ToolTask]] = {
        **{group: partial(draw, group) for group in (UNKNOWN, CHANGED_FACT)},
        **{group: partial(draw, SUM, digits=digits) for group, digits in SUMS.items()},
        UNREAD_NAME: partial(draw, UNKNOWN, animals=UNREAD_ANIMALS),
        UNREAD_VALUE: partial(draw, UNKNOWN, table=unread_table(table)),
        **{group: lambda: draw(rng.choice((UNKNOWN, SUM))) for group in (RENAMED, FAILING)},
        **{group: partial(draw, group) for group in NO_NEED},
    }
    questions: list[Question] = []
    for group, draw_task in draws.items():
        tasks = draw_distinct(draw_task, lambda task: task.task.question, count)
        names = UNREAD_TOOLS if group == RENAMED else [()]
        questions += [Question(group, task, names[index % len(names)]) for index, task in enumerate(tasks)]
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
    answers: dict[int, JudgedEpisode] = {}
    for tools, places in _by_tools(questions, table):
        runner = ToolRunner(model, tokenizer, tools, **limits, **options)
        schemas = runner.environment.schemas if table is not None else None
        asked = [[{"role": "user", "content": questions[place].task.task.question}] for place in places]
        episodes = runner.run(tokenize_prompts(asked, tokenizer, [schemas] * len(asked)))
        answers |= {place: judged(questions[place], said) for place, said in zip(places, episodes, strict=True)}
    return [answers[place] for place in range(len(questions))]


def _by_tools(questions: Sequence[Question], table: Table | None) -> Iterator[tuple[list[Tool], list[int]]]:
    """Yield tools, and the places of the questions that are answered with them."""
    if table is None:
        yield tools_of({}), [*range(len(questions))]
        return
    places: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for place, question in enumerate(questions):
        group = question.group if question.group in (UNREAD_VALUE, FAILING) else ""
        places.setdefault((group, question.names), []).append(place)
    for (group, names), some in places.items():
        if group == FAILING:
            yield failing_tools(), some
        else:
            yield tools_of(unread_table(table) if group == UNREAD_VALUE else table, names), some


def judged(question: Question, episode: Episode) -> JudgedEpisode:
    """Return an episode with its judgment. Where the tool fails, it is right to call it and to say that it failed."""
    calls = any(message.get("tool_calls") for message in episode.messages)
    if question.group == FAILING:
        is_right = _says_failure(episode)
    else:
        is_right = gold_score(completion_text(episode.messages), question.task.task.gold) >= RIGHT
    return JudgedEpisode(question, episode, calls, is_right)


def _says_failure(episode: Episode) -> bool:
    """Return whether a tool failed as it must, and the last turn says that it failed, and nothing else."""
    *before, last = episode.messages
    said = [str(message["content"]) for message in before if message["role"] == "tool"]
    has_failed = any(text in each for each in said for _, text in FAILURES)
    return has_failed and not last.get("tool_calls") and completion_text([last]).strip() == TOOL_FAILED


def values_of(answers: Sequence[JudgedEpisode]) -> dict[str, list[float]]:
    """Return a model's measurements of the asked groups, one value per question, by the names of `figures`."""
    values: dict[str, list[float]] = {}
    for name, groups in (("calls_needed", NEEDING), ("calls_not_needed", (*NO_NEED, KNOWN))):
        values[name] = [float(each.calls) for each in answers if each.question.group in groups]
    values["right_needed"] = [float(each.is_right) for each in answers if each.question.group in NEEDING]
    for group in (*NEEDING, *OTHER_WORDS, *NO_NEED, KNOWN):
        values[f"right_{group}"] = [float(each.is_right) for each in answers if each.question.group == group]
    return {name: of_group for name, of_group in values.items() if of_group}


def figures(answers: Sequence[JudgedEpisode]) -> dict[str, float]:
    """Return the metrics of one model, with standard errors and counts.

    `calls_needed` and `calls_not_needed` (share of questions with a call), `right_needed` (of the questions of
    `NEEDING`, three of five of which are sums), and `right_GROUP`.
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

    Sampled ones are to questions that need a tool, which are all that PPO by shuffled rewards answers; a model that
    never saw tools is asked what needs none.

    Args:
        course: the finished runs.
        like: a model with the same attention, dtype and quantization.
        world: source of the questions.
        count: questions per group.
        seed: of the sampling.

    Returns:
        The answers under the names of the runs, `NAME sampled`, and `off`.
    """
    table = tables(world)[1]
    questions = held_out_questions(world, table, count)
    needing, needless = (
        [each for each in questions if each.group in groups] for groups in (NEEDING, (*NO_NEED, KNOWN))
    )
    answers: dict[str, list[JudgedEpisode]] = {}
    for name in course.runs:
        if name == PRETRAIN:
            continue
        speaking = load_speaking(replace(like, name=course.folder(name), revision="main"))
        model = (speaking.model, speaking.tokenizer)
        if name == PLAIN:
            answers[name] = answer(*model, needless, None)
            continue
        if name != SHUFFLED:
            answers[name] = answer(*model, questions, table)
        answers[f"{name} sampled"] = answer(*model, needing, table, do_sample=True, seed=seed)
        if name == RL:
            answers[OFF] = answer(*model, questions, None)
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
    **{UNKNOWN: "unknown animals", CHANGED_FACT: "changed facts", KNOWN: "known facts"},
    **{group: f"sums of {digits} digits" for group, digits in SUMS.items()},
    **{UNREAD_NAME: "unread names", UNREAD_VALUE: "unread values"},
    **{RENAMED: "renamed tools", FAILING: "failing tools"},
    **{"fact": "new questions of facts", "reading": "reading", "list": "lists", "addition": "small sums"},
}
SAMPLES_EACH = 2
PROMISES = (
    *(
        Promise(f"{LABELS[group]} right after PPO", f"right_{group}_after", f"off_right_{group}", "without tools")
        for group in (*NEEDING, *OTHER_WORDS)
        if group != FAILING
    ),
    # Without tools none can fail.
    Promise(f"{LABELS[FAILING]} said after PPO", f"right_{FAILING}_after", 0.5, "half of them"),
    Promise("change of right sampled answers by PPO", "sampled_right_needed_change", 0.0, "no change"),
)

Answers = Mapping[str, Sequence[JudgedEpisode]]


def report(answers: Answers, pretrained: str | None = None) -> Found:
    """Return the report of the world's models.

    Args:
        answers: by model, under the names of `hfllm.stages.tools.build.ask_models`.
        pretrained: the folder of pretraining, to say what it had learned to copy.

    Returns:
        Metrics with `_before` (demonstrations) and `_after` (PPO), greedy, and `sampled_...` for sampled answers;
        `off_right_...` (PPO's model without its tools), `shuffled_...` (PPO by shuffled rewards, sampled, with the
        change over demonstrations), `probe_...` of pretraining, `known_facts_lost` (excess of the model without tools
        over PPO's in right answers to known facts).
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
    probed, curves = probes_of_run(pretrained) if pretrained else ({}, {})
    plots = {"right": _plot(answers), **curves}
    return Found(metrics | probed, _summary(metrics), _tables(answers), plots, (*PROMISES, *PROBED), PROMISES)


def _summary(metrics: Mapping[str, float]) -> str:
    text = partial(figure_text, metrics)
    families = ", ".join(
        f"{LABELS[family]} {text(f'right_{family}_after')}" for family in (*NEEDING, *OTHER_WORDS, KNOWN)
    )
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
    names += [f"right_{family}" for family in (*NEEDING, *OTHER_WORDS, *NO_NEED, KNOWN)]
    result = {name: figures(responses) for name, responses in answers.items()}

    def columns(*models: str) -> dict[str, dict[str, float]]:
        return {f"{TITLES[each.split()[0]]}": result[each] for each in models if each in result}

    tables = {
        "Greedy answers": side_by_side(columns(SHOWN, RL, OFF), names),
        "Sampled answers": side_by_side(
            columns(f"{SHOWN} sampled", f"{RL} sampled", f"{SHUFFLED} sampled"),
            [name for name in names if name in result[f"{RL} sampled"]],
        ),
    }
    if PLAIN in result:
        metrics = [f"right_{family}" for family in (*NO_NEED, KNOWN)]
        tables["Where no tool is needed"] = side_by_side(columns(RL, PLAIN), metrics)
    return tables | {"Conversations": _samples(answers)}


def _samples(answers: Answers) -> list[dict[str, str]]:
    """Return the first conversations of each family, before and after PPO."""
    rows = []
    for family in (*NEEDING, *OTHER_WORDS, *NO_NEED):
        indices = [index for index, each in enumerate(answers[RL]) if each.question.group == family]
        for index in indices[:SAMPLES_EACH]:
            transcripts = {
                TITLES[name]: transcript(answers[name][index].episode.messages) for name in (SHOWN, RL, OFF)
            }
            rows.append({"question": answers[RL][index].question.task.task.question, **transcripts})
    return rows


def _plot(answers: Answers) -> Plot:
    """Return the plot of right answers by family, for the models with and without their tools."""
    families = (*NEEDING, *OTHER_WORDS, *NO_NEED, KNOWN)
    results = {TITLES[name]: figures(answers[name]) for name in (SHOWN, RL, OFF)}
    shares = {title: [values[f"right_{family}"] for family in families] for title, values in results.items()}
    return plot_of_right(shares, [LABELS[family].replace(" ", "\n", 1) for family in families])
