"""What constitutional AI has changed: on the embedded world exactly, on your prompts as far as words tell."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from hfllm.data.world.world import World
from hfllm.evaluation.constitution_report import (
    PROMISES,
    TITLES,
    course_metrics,
    course_plots,
    course_tables,
    revision_metrics,
    revision_samples,
    summary_of,
)
from hfllm.outputs.report import Found, change_of, mean_of
from hfllm.stages.constitution_runs import HELPFUL
from hfllm.stages.constitution_steps import Steps, people_s_labels

# Harmless prompts for each prompt of a group of harm.
HARMLESS = 2.4
SAMPLES = 8


def evaluate(steps: Steps) -> Found:
    """Ask all models of the embedded world's course, judge them by the gold rubric, and describe what came out."""
    from hfllm.evaluation.constitution import answer, prompts_to_ask

    script_args = steps.script_args
    count = script_args.num_eval_prompts
    asked = prompts_to_ask(World(script_args.world_seed), count, round(HARMLESS * count))
    answers = {}
    for name in steps.models:
        speaking = steps.speaking(name)
        answers[name] = answer(speaking.model, speaking.tokenizer, asked, script_args.longest, script_args.seed)
    tasks = {task.question: task for task in steps.prompts.tasks}
    rows = steps.revisions.rows
    revised = revision_metrics(rows, [tasks[row["prompt"][-1]["content"]] for row in rows])
    metrics = {**course_metrics(answers), **revised, **steps.metrics, **figures_of_revisions(steps)}
    by_round = [metrics[f"revised_{number}"] for number in range(script_args.num_revisions + 1)]
    return Found(
        metrics,
        summary_of(metrics, people_s_labels(script_args), steps.no_rl),
        {**course_tables(answers), "Revisions": revision_samples(rows)},
        course_plots(answers, by_round),
        PROMISES,
    )


def evaluate_own(steps: Steps) -> Found:
    """Ask your model held-out red-team prompts before and after, and count what words tell: refusals and lengths."""
    script_args, held_out = steps.script_args, steps.prompts.held_out
    said = {
        name: [texts[0] for texts in steps.speaking(name).answers(held_out, script_args.longest, script_args.seed + 1)]
        for name in steps.models
    }
    last, metrics = steps.models[-1], {}
    found = {name: _values(texts) for name, texts in said.items()}
    for name, values in found[HELPFUL].items():
        if last == HELPFUL:
            metrics |= mean_of(name, values)
        else:
            metrics |= change_of(name, values, found[last][name])
    first_values = _values([row["turns"][0]["answer"] for row in steps.revisions.rows])
    last_values = _values([row["chosen"][0]["content"] for row in steps.revisions.rows])
    metrics |= mean_of("first_answers_refuse", first_values["refusals"])
    metrics |= mean_of("last_revisions_refuse", last_values["refusals"])
    titles = {**TITLES, HELPFUL: "as it was"}
    samples = [
        {"prompt": prompt[-1]["content"], **{titles[name]: texts[place] for name, texts in said.items()}}
        for place, prompt in enumerate(held_out[:SAMPLES])
    ]
    counts = figures_of_revisions(steps)
    return Found(
        {**metrics, **steps.metrics, **counts},
        "; ".join(filter(None, [_echoes(counts), people_s_labels(script_args), steps.no_rl])),
        {"Held-out prompts": samples, "Revisions": revision_samples(steps.revisions.rows)},
        {},
    )


def figures_of_revisions(steps: Steps) -> dict[str, float]:
    """Return what happened while answers were revised, in shares of what was asked for."""
    figures = asdict(steps.revisions.figures)
    asked = {
        **{"flagged": "critiques", "empty_critiques": "critiques"},
        **{"echoes": "revisions", "empty_revisions": "revisions"},
    }
    shares = {f"{name}_share": figures[name] / max(figures[of], 1) for name, of in asked.items()}
    return {"red_team_prompts": figures["num_prompts"], "dropped_prompts": figures["dropped"], **shares}


def _values(texts: Sequence[str]) -> dict[str, list[float]]:
    from hfllm.evaluation.suites.refusals import refuses

    return {
        "refusals": [float(refuses(text)) for text in texts],
        "words": [float(len(text.split())) for text in texts],
    }


def _echoes(counts: Mapping[str, float]) -> str:
    share = counts["echoes_share"]
    says = f"{share:.0%} of the revisions repeat the answer"
    return f"{says}: the critic does not follow the request" if share > 0.5 else says
