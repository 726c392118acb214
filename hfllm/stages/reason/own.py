"""Thoughts of the user's own model: its questions, what each run learns from them, and the report on its answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hfllm.data.formats import BadRow, Message, as_messages, flaw_of_prompt, prompt_of
from hfllm.data.images.rows import without_images
from hfllm.data.thoughts import final_answer, plain_answer
from hfllm.errors import InputError, refuse_if
from hfllm.generation.responses import Response, sample_with_ends
from hfllm.outputs.figures import change_of, mean_of, shown
from hfllm.outputs.report import Found
from hfllm.outputs.verdict import Promise
from hfllm.rewards.functions import exact_match
from hfllm.runs.models import NamedModel
from hfllm.runs.pipeline import Row
from hfllm.stages.courses import longest_of, refuse_own_inputs_in, room_of, say_left_out
from hfllm.stages.reason.build import SAMPLES, TITLES, histories_of, ppo_plots
from hfllm.stages.reason.flags import DIRECT, RL, SHUFFLED, THOUGHTS, Course, ReasonArguments
from hfllm.stages.shared import load_speaking, user_rows

STAGE = "hfllm reason"
# What stands before the final answer, as in gsm8k.
MARK = "####"
# The user's model as it was, and the titles of the others here.
BASE = "base"
OWN_TITLES = {**TITLES, BASE: "your model", THOUGHTS: "tuned on solutions", DIRECT: "tuned on answers alone"}
Rows = list[Row]


# ---- rows ----


@dataclass(frozen=True)
class Problem:
    """A question of the user's.

    Args:
        prompt: the conversation that asks it.
        answer: the final answer.
        thoughts: how one gets there; empty if the row does not say.
    """

    prompt: list[Message]
    answer: str
    thoughts: str = ""

    @property
    def gold(self) -> str:
        """The answer as `exact_match` reads it whole: else the last number of `3:45` would do."""
        return f"{MARK} {self.answer}"

    def conversation(self, has_thoughts: bool) -> Row:
        """Return the conversation to learn: the solution, or its last line alone."""
        lines = [self.thoughts, self.gold] if has_thoughts else [self.gold]
        return {"messages": [*self.prompt, {"role": "assistant", "content": "\n".join(lines)}]}


def problem_of(origin: str, row: Row) -> Row:
    """Return a row's `prompt` and its `problem`.

    Raises:
        BadRow: without an answer, or with a prompt that ends with the assistant's words.
    """
    solution, thoughts = row.get("answer"), row.get("thoughts")
    text = str(solution).strip() if isinstance(solution, str | int | float) else ""
    before, mark, _ = text.rpartition(MARK)
    answer = final_answer(text) if mark else text
    if not plain_answer(answer):
        expected = f"expected the final answer, or a solution that ends in '{MARK} 42'"
        raise BadRow(f"{origin}: answer is {solution!r:.80}; {expected}", "without an answer")
    lines = [thoughts] if isinstance(thoughts, str) else thoughts or []
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise BadRow(
            f"{origin}: thoughts is {thoughts!r:.80}; expected a text, or a list of lines", "with odd thoughts"
        )
    prompt = as_messages(prompt_of(origin, row))
    if prompt[-1]["role"] != "user":
        raise BadRow(f"{origin}: the prompt does not end with a user's message", "without a question at the end")
    return {"prompt": prompt, "problem": Problem(prompt, answer, "\n".join(lines).strip() or before.strip())}


def read_problems(
    script_args: ReasonArguments, course: Course, like: NamedModel
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to learn from and the held-out ones; what the model has no room for is left out.

    Raises:
        InputError: for input in the folder where the runs write; where solutions are to be shown and a row has none.
    """
    refuse_own_inputs_in(script_args.output_dir, like.name, script_args)
    settings = {"share": 0.1, "most": script_args.num_eval_prompts, "flaw_of": flaw_of_prompt}
    mapper, length = without_images(problem_of, STAGE), script_args.response_length
    rows = user_rows(script_args.row_sources, mapper, script_args.seed, **settings)
    learned, held_out = ([row["problem"] for row in part] for part in rows)
    untold = next((problem for problem in learned if not problem.thoughts), None)
    if script_args.show_solutions and untold is not None:
        raise InputError(
            f"{script_args.dataset_name}: a row has no solution before '{MARK}' in its column answer, and no column "
            f"thoughts: {untold.prompt[-1]['content'][:80]!r}; --show_solutions false begins with PPO"
        )
    room = room_of(like)
    refuse_if(
        room.context is not None and length >= room.context,
        f"--response_length {length}: expected less than the context of {like.name}, {room.context} tokens",
    )
    longest = longest_of(course, THOUGHTS) if THOUGHTS in course.runs else None

    def has_room(problem: Problem) -> bool:
        messages = problem.conversation(has_thoughts=True)["messages"]
        return room.holds(problem.prompt, answer=length) and (
            THOUGHTS not in course.runs or room.holds(messages, longest=longest)
        )

    fitting = list(filter(has_room, learned))
    reason = f"no room for the question and {length} tokens, or for the solution, in {room.context} tokens"
    say_left_out(STAGE, "rows", fitting, learned, reason)
    asked = [problem for problem in held_out if room.holds(problem.prompt, answer=length)]
    say_left_out(STAGE, "held-out questions", asked, held_out, reason)
    return fitting, asked


def rows_by_run(problems: Sequence[Problem]) -> dict[str, Callable[[], Rows]]:
    """Return what makes the rows of each run; both ways of fine-tuning have as many rows, in the same order."""
    return {
        THOUGHTS: lambda: [problem.conversation(has_thoughts=True) for problem in problems],
        DIRECT: lambda: [problem.conversation(has_thoughts=False) for problem in problems],
        RL: lambda: [{"prompt": problem.prompt, "answer": problem.gold} for problem in problems],
    }


# ---- answers ----


@dataclass(frozen=True)
class Answered:
    """A model's greedy answer to a question.

    Args:
        problem: the question.
        response: the answer, and whether it has ended.
        is_right: whether its final answer is that of the row.
    """

    problem: Problem
    response: Response
    is_right: bool


def ask(course: Course, like: NamedModel, problems: Sequence[Problem], length: int) -> dict[str, list[Answered]]:
    """Return the greedy answers of the user's model and of all runs, by run.

    Args:
        like: the user's model, with the attention, dtype and quantization of all.
        length: the longest answer in tokens.
    """
    answers = {}
    models = {BASE: like} | {name: replace(like, name=course.folder(name), revision="main") for name in course.runs}
    for name, model in models.items():
        speaking = load_speaking(replace(model, trains_adapter=False))
        prompts = [problem.prompt for problem in problems]
        responses = sample_with_ends(speaking.model, speaking.tokenizer, prompts, length, do_sample=False)
        answers[name] = [judged(problem, each[0]) for problem, each in zip(problems, responses, strict=True)]
    return answers


def judged(problem: Problem, response: Response) -> Answered:
    """Return an answer with its judgment by `exact_match`."""
    (right,) = exact_match([problem.prompt], [response.text], answer=[problem.gold])
    return Answered(problem, response, bool(right))


# ---- report ----


def report(course: Course, answers: Mapping[str, Sequence[Answered]]) -> Found:
    """Return the report on held-out questions.

    Returns:
        Metrics `MODEL_right` and `MODEL_unfinished` of the user's model (`base`) and of each run; `right_before`,
        `right_after` and `right_change` around PPO, with `shuffled_right_...` of its control; `thoughts_right_...`,
        the change from answers alone to solutions.
    """
    right = {name: [float(each.is_right) for each in of_model] for name, of_model in answers.items()}
    cut = {name: [float(not each.response.has_ended) for each in of_model] for name, of_model in answers.items()}
    metrics: dict[str, float] = {}
    for name in answers:
        metrics |= mean_of(f"{name}_right", right[name]) | mean_of(f"{name}_unfinished", cut[name])
    before = THOUGHTS if THOUGHTS in answers else BASE
    metrics |= change_of("right", right[before], right[RL]) | change_of("unfinished", cut[before], cut[RL])
    if SHUFFLED in answers:
        metrics |= change_of("shuffled_right", right[before], right[SHUFFLED])
    if DIRECT in answers:
        metrics |= change_of("solutions_right", right[DIRECT], right[THOUGHTS])
    curves = ppo_plots(histories_of(course))
    return Found(metrics, _summary(metrics, answers), _tables(metrics, answers), curves, claims_of(metrics))


def claims_of(metrics: Mapping[str, float]) -> tuple[Promise, ...]:
    """Return what the run claims: PPO gains, and, where both were trained, solutions teach more than answers."""
    claims = [Promise("held-out questions right by PPO", "right_change", 0.0, "no change")]
    if "solutions_right_change" in metrics:
        what = "right by solutions over answers alone"
        claims.append(Promise(what, "solutions_right_change", 0.0, "no change"))
    return tuple(claims)


def _summary(metrics: Mapping[str, float], answers: Mapping[str, Sequence[Answered]]) -> str:
    shares = ", ".join(f"{OWN_TITLES[name]} {shown(metrics, f'{name}_right')}" for name in answers)
    return f"{len(answers[RL])} held-out questions right: {shares}"


def _tables(
    metrics: Mapping[str, float], answers: Mapping[str, Sequence[Answered]]
) -> dict[str, list[dict[str, str]]]:
    first = answers[RL]
    step = max(1, len(first) // SAMPLES)
    return {
        "Held-out questions, greedy answers": [
            {
                "model": OWN_TITLES[name],
                "right": shown(metrics, f"{name}_right"),
                "cut off": shown(metrics, f"{name}_unfinished"),
                "n": f"{len(of_model):,}",
            }
            for name, of_model in answers.items()
        ],
        "Answers": [
            {
                "prompt": first[index].problem.prompt[-1]["content"],
                "answer": first[index].problem.answer,
                **{OWN_TITLES[name]: of_model[index].response.text for name, of_model in answers.items()},
            }
            for index in range(0, len(first), step)
        ],
    }
