"""Thoughts of the user's own model: its questions, what each run learns from them, and the report on its answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfllm.data.formats import BadRow, Message, as_messages, flaw_of_prompt, prompt_of
from hfllm.data.images.rows import without_images
from hfllm.data.thoughts import final_answer, plain_answer
from hfllm.errors import refuse_if
from hfllm.generation.responses import Response, sample_with_ends
from hfllm.outputs.figures import change_of, mean_of, shown
from hfllm.outputs.report import Found
from hfllm.outputs.verdict import Promise
from hfllm.rewards.functions import exact_match
from hfllm.runs.models import NamedModel
from hfllm.runs.pipeline import Row
from hfllm.stages.reason.build import SAMPLES, TITLES, histories_of, ppo_plots
from hfllm.stages.reason.flags import DIRECT, RL, SHUFFLED, THOUGHTS, Course, ReasonArguments
from hfllm.stages.shared import load_speaking, user_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def conversation(self, has_thoughts: bool) -> Row:
        """Return the conversation to learn: the solution, or its last line alone."""
        lines = [self.thoughts, f"{MARK} {self.answer}"] if has_thoughts else [f"{MARK} {self.answer}"]
        return {"messages": [*self.prompt, {"role": "assistant", "content": "\n".join(lines)}]}


def problem_of(origin: str, row: Row) -> Row:
    """Return a row's `prompt` and its `problem`.

    Raises:
        BadRow: without an answer.
    """
    solution, thoughts = row.get("answer"), row.get("thoughts")
    text = "" if solution is None else str(solution).strip()
    before, mark, _ = text.rpartition(MARK)
    answer = final_answer(text) if mark else text
    if not plain_answer(answer):
        raise BadRow(
            f"{origin}: answer is {solution!r:.80}; expected the final answer, or a solution that ends in '{MARK} 42'",
            "without an answer",
        )
    told = str(thoughts).strip() if thoughts else before.strip()
    prompt = prompt_of(origin, row)
    return {"prompt": prompt, "problem": Problem(as_messages(prompt), answer, told)}


def read_problems(script_args: ReasonArguments) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to learn from and the held-out ones.

    Raises:
        InputError: where solutions are to be shown and a row has none.
    """
    settings = {"share": 0.1, "most": script_args.num_eval_prompts, "flaw_of": flaw_of_prompt}
    mapper = without_images(problem_of, "hfllm reason")
    learned, held_out = user_rows(script_args.row_sources, mapper, script_args.seed, **settings)
    refuse_if(not learned or not held_out, f"{script_args.dataset_name}: too few rows to learn from and to hold out")
    untold = next((row for row in learned if not row["problem"].thoughts), None)
    refuse_if(
        script_args.show_solutions and untold is not None,
        f"{script_args.dataset_name}: a row has no solution before '{MARK}' in its column answer, and no column "
        f"thoughts: {_shown(untold)}; --show_solutions false begins with PPO",
    )
    return [row["problem"] for row in learned], [row["problem"] for row in held_out]


def _shown(row: Row | None) -> str:
    return repr(row["problem"].prompt[-1]["content"])[:80] if row else ""


def rows_by_run(problems: Sequence[Problem]) -> dict[str, Callable[[], Rows]]:
    """Return what makes the rows of each run; both ways of fine-tuning have as many rows, in the same order."""
    return {
        THOUGHTS: lambda: [problem.conversation(has_thoughts=True) for problem in problems],
        DIRECT: lambda: [problem.conversation(has_thoughts=False) for problem in problems],
        RL: lambda: [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems],
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
        prompts = [_prompt(problem, speaking.tokenizer) for problem in problems]
        responses = sample_with_ends(speaking.model, speaking.tokenizer, prompts, length, do_sample=False)
        answers[name] = [judged(problem, each[0]) for problem, each in zip(problems, responses, strict=True)]
    return answers


def _prompt(problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> str | list[Message]:
    """Return the conversation, or for a model without a chat template its last text."""
    return problem.prompt if tokenizer.chat_template else problem.prompt[-1]["content"]


def judged(problem: Problem, response: Response) -> Answered:
    """Return an answer with its judgment by `exact_match`."""
    (right,) = exact_match([problem.prompt], [response.text], answer=[problem.answer])
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
