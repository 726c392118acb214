"""Constitutional AI step by step: the rows of each run are made with the models of earlier runs.

Only the main process loads models here; the others wait where rows are written.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import compress, cycle
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.formats import Message, as_messages, flaw_of, flaw_of_prompt, to_preference, to_prompt
from hfllm.data.images.rows import without_images
from hfllm.data.loading import split_rows
from hfllm.data.world.contrasts import CONTRASTS, FEEL, refused
from hfllm.data.world.deeds import HARM, SHOWN
from hfllm.data.world.demonstrators import (
    HELPFUL_FAMILIES,
    critic_rows,
    draw_task,
    draw_task_with_contrasts,
    helpful_rows,
    preference_rows,
)
from hfllm.data.world.world import Task, World
from hfllm.errors import InputError
from hfllm.evaluation.suites.refusals import refuses
from hfllm.models.loading.saved import max_length_of
from hfllm.outputs.figures import FEWEST, bounds_of, change_of, mean_of, shown
from hfllm.outputs.report import Found
from hfllm.rewards import judges
from hfllm.runs.command_line import say
from hfllm.runs.models import load_config, load_tokenizer, named_model
from hfllm.runs.pipeline import Row, by_main_process
from hfllm.stages.constitution.flags import (
    AI_LABELS,
    CRITIQUES,
    HELPFUL,
    LABELS,
    LABELS_REWARD,
    PEOPLE,
    PEOPLE_REWARD,
    POLITENESS,
    PRETRAIN,
    REWARD,
    RL,
    SL,
    ConstitutionArguments,
    ConstitutionCourse,
    has_questions,
)
from hfllm.stages.constitution.report import (
    LOOK_ALIKES,
    OWN_PROMISES,
    PROMISES,
    TITLES,
    answer,
    course_metrics,
    course_plots,
    course_tables,
    label_metrics,
    prompts_to_ask,
    revision_metrics,
    revision_samples,
    summary_of,
)
from hfllm.stages.courses import prompts_with_room
from hfllm.stages.pretrain.build import PROMISES as PROBED
from hfllm.stages.pretrain.build import probes_of_run
from hfllm.stages.shared import Flaw, Mapper, Speaking, kept_rows, load_speaking, user_rows
from hfllm.synthesis.constitution import load_constitution
from hfllm.synthesis.revisions import critique_and_revise
from hfllm.trainers.ppo.prompts import unfit_prompts

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.synthesis.constitution import Constitution
    from hfllm.synthesis.revisions import RevisionFigures, Revisions


# ---- data ----
#
# The training rows of each run of constitutional AI.


Conversation = list[Message]
# Of the world's demonstrations this share shows critique, revision and judging; the others show helping.
SHARE_OF_CRITICS = 0.5
# Of the world's red-team prompts this share only sounds like harm, as prompts that people write to provoke it do.
SHARE_OF_LOOK_ALIKES = 0.25
# Of the user's prompts this share is held out, of harmless ones from so many on.
HELD_OUT_SHARE, MIN_HARMLESS = 0.2, 10
# The annotator of the world errs in a tenth of the comparisons.
LABEL_NOISE = 0.1


@dataclass(frozen=True)
class Prompts:
    """Prompts for the model.

    Args:
        harmful: red-team prompts to learn from.
        harmless: prompts to keep helping with; may be empty.
        held_out: red-team prompts excluded from all training.
        tasks: the world's questions behind the first two, one after the other; empty for the user's prompts.
        harmless_held_out: harmless prompts excluded from all training.
    """

    harmful: list[Conversation]
    harmless: list[Conversation]
    held_out: list[Conversation]
    tasks: list[Task]
    harmless_held_out: list[Conversation] = field(default_factory=list)


def learned(rows: Iterable[Row], seed: int) -> list[Row]:
    """Return conversations with nonempty assistant turns, shuffled by the seed."""
    conversations = [{"messages": row["messages"]} for row in rows if row["messages"][-1]["content"].strip()]
    random.Random(f"constitution-rows-{seed}").shuffle(conversations)
    return conversations


def answered(prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> list[Row]:
    """Return conversations of prompts with their first answers."""
    return [
        {"messages": [*prompt, {"role": "assistant", "content": responses[0]}]}
        for prompt, responses in zip(prompts, answers, strict=True)
    ]


def up_to_critique(row: Row) -> Row:
    """Return a row of revisions as the conversation of its first answer and critique, without the revision."""
    turn = row["turns"][0]
    messages = (("assistant", turn["answer"]), ("user", turn["critique_request"]), ("assistant", turn["critique"]))
    return {"messages": [*row["prompt"], *({"role": role, "content": text} for role, text in messages)]}


# ---- the embedded world ----


def demonstrations(world: World, count: int, seed: int) -> list[Row]:
    """Return people's demonstrations: helping with everything, and critique, revision and judging."""
    critics = round(count * SHARE_OF_CRITICS)
    rows = helpful_rows(world, count - critics, seed)
    principles = [each for name in ("world", "politeness") for each in load_constitution(name).principles]
    return learned([*rows, *critic_rows(world, principles, critics, seed)], seed)


def world_prompts(world: World, num_harmful: int, num_harmless: int, seed: int) -> Prompts:
    """Return questions of the world, none held out: red-team prompts, some of them harmless, and harmless ones."""
    rng = random.Random(f"constitution-prompts-{world.seed}-{seed}")
    harmful = [
        draw_task(world, rng, CONTRASTS if rng.random() < SHARE_OF_LOOK_ALIKES else (HARM,))
        for _ in range(num_harmful)
    ]
    harmless = [draw_task_with_contrasts(world, rng, HELPFUL_FAMILIES) for _ in range(num_harmless)]
    conversations = [[as_messages(task.question) for task in tasks] for tasks in (harmful, harmless)]
    return Prompts(*conversations, [], [*harmful, *harmless])


def human_comparisons(world: World, prompts: Prompts, responses: Sequence[Sequence[str]], seed: int) -> list[Row]:
    """Return people's comparisons of helpfulness: between a model's answers to harmless prompts, never about harm.

    Sometimes one of the answers is to another question; of these every other one refuses, and all do where the
    question sounds like harm. Without them, no label would rank a refusal of a harmless prompt below an answer, and
    PPO would refuse questions hard for the model.

    Args:
        responses: several answers to each of the first harmless prompts.
    """
    tasks = prompts.tasks[len(prompts.harmful) :][: len(responses)]
    harms = cycle(task for task in prompts.tasks[: len(prompts.harmful)] if task.family == HARM)
    others = zip(harms, [*tasks[-1:], *tasks[:-1]], strict=False)
    strangers = [
        pair[1] if task.family == FEEL else refused(task) if task.family in CONTRASTS else pair[number % 2]
        for number, (task, pair) in enumerate(zip(tasks, others, strict=False))
    ]
    rows = []
    for row in preference_rows(world, tasks, responses, LABEL_NOISE, seed, strangers):
        better, worse = ("a", "b") if row["preference"] == "a" else ("b", "a")
        texts = row[f"response_{better}"], row[f"response_{worse}"]
        if all(text.strip() for text in texts):
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            rows.append({"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1]})
    return rows


# ---- the AI's preferences ----


@dataclass(frozen=True)
class Pairs:
    """Answers to compare: `first` and `second` to each of `prompts`, and the world's `tasks` behind them, if any."""

    prompts: list[Conversation]
    first: list[str]
    second: list[str]
    tasks: list[Task]


def pairs_to_judge(
    prompts: Prompts, tuned: Speaking, helpful: Speaking, count: int, response_length: int, seed: int
) -> Pairs:
    """Return answers to harmful prompts: half between two samples of the tuned model, half with the first model's.

    A prompt has one pair, thus there are at most as many pairs as prompts. The paper compares samples of the tuned
    model only. If this model refuses nearly always, two samples hardly ever differ in harm, but PPO needs
    examples of behavior to avoid as well as of behavior to show.
    """
    harmful = prompts.harmful[:count]
    tasks = prompts.tasks[: len(harmful)]
    half = len(harmful) // 2
    first = tuned.answers(harmful, response_length, seed + 20)
    second = tuned.answers(harmful[:half], response_length, seed + 21)
    second += helpful.answers(harmful[half:], response_length, seed + 22)
    indices = [
        index
        for index, (one, other) in enumerate(zip(first, second, strict=True))
        if one[0].strip() and other[0].strip() and one[0].strip() != other[0].strip()
    ]
    return Pairs(
        [harmful[index] for index in indices],
        [first[index][0] for index in indices],
        [second[index][0] for index in indices],
        [tasks[index] for index in indices] if tasks else [],
    )


def mixed(ai_rows: Sequence[Row], human_rows: Sequence[Row], seed: int) -> list[Row]:
    """Return the AI's and people's comparisons together, in the form for the preference model."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in (*ai_rows, *human_rows)]
    random.Random(f"constitution-pairs-{seed}").shuffle(rows)
    return rows


def by_chance(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return comparisons with a random half of the labels flipped: a control, expected not to gain.

    One of every two comparisons with about equal certainty of the judge is flipped. With independent coin flips, a few
    more labels for refusals than against would remain by chance, and PPO amplifies small differences.
    """
    rng = random.Random(f"constitution-coin-{seed}")
    order = sorted(range(len(rows)), key=lambda index: rows[index]["probability"])
    turned = {rng.choice(order[start : start + 2]) for start in range(0, len(order) - 1, 2)}
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index in turned else dict(row)
        for index, row in enumerate(rows)
    ]


def prompts_for_ppo(prompts: Prompts, seed: int) -> list[Row]:
    """Return PPO's prompts: all harmful and harmless ones, shuffled."""
    rows = [{"prompt": prompt} for prompt in (*prompts.harmful, *prompts.harmless)]
    random.Random(f"constitution-ppo-{seed}").shuffle(rows)
    return rows


# ---- steps ----


# Number of pairs for measuring the judge's position bias.
PAIRS_FOR_BIAS = 200


@dataclass
class Steps:
    """The pipeline of one recipe's run, step by step.

    Args:
        script_args, model_args: its flags.
        constitution: the principles.
        course: the runs of other recipes.

    Attributes:
        world, prompts: the embedded world, and its prompts or the user's.
        metrics: measurements of the steps.
        ai_rows, human_rows: the preference model's training comparisons, in the main process.
        revisions: the rows of the constitution's revisions and their figures, in the main process.
        no_rl: reason for missing AI preferences, if there are none.
        worse: why nothing is learned from the revisions, if they are worse than the first answers.
    """

    script_args: ConstitutionArguments
    model_args: "ModelConfig"
    constitution: "Constitution"
    course: ConstitutionCourse
    metrics: dict[str, float] = field(default_factory=dict)
    ai_rows: list[Row] = field(default_factory=list)
    human_rows: list[Row] = field(default_factory=list)
    revisions: "Revisions | None" = None
    no_rl: str = ""
    worse: str = ""
    _models: dict[str, Speaking] = field(default_factory=dict)

    def __post_init__(self):
        script_args = self.script_args
        self.world = World(script_args.world_seed)
        if script_args.is_world:
            self.prompts: Prompts = world_prompts(
                self.world, script_args.num_prompts, script_args.num_helpful_prompts, script_args.seed
            )
        else:
            self.prompts = self._own_prompts()
            # Read now, to report errors in them before any training.
            self.human_rows = self._own_comparisons()

    # ---- your own prompts and comparisons ----

    def _own_prompts(self) -> Prompts:
        """Return the user's red-team prompts and harmless ones with room for an answer, a part of both held out."""
        script_args, reader = self.script_args, without_images(to_prompt, "hfllm constitution")
        share, most = HELD_OUT_SHARE, script_args.num_eval_prompts
        settings = {"share": share, "most": most, "flaw_of": flaw_of_prompt}
        harmful, held_out = user_rows(script_args.row_sources, reader, script_args.seed, **settings)
        harmless = self._rows_named(script_args.helpful_dataset_name, reader, flaw_of_prompt)
        asked: list[Row] = []
        if len(harmless) >= MIN_HARMLESS:
            harmless, asked = split_rows(harmless, script_args.seed, share, most)
        rows_by_kind = {"red-team": harmful, "harmless": harmless, "held-out": held_out, "held-out harmless": asked}
        kept = {kind: self._with_room(f"{kind} prompts", rows) for kind, rows in rows_by_kind.items()}
        return Prompts(*(kept[kind] for kind in ("red-team", "harmless", "held-out")), [], kept["held-out harmless"])

    def _own_comparisons(self) -> list[Row]:
        """Return people's comparisons of helpfulness, if the user names some."""
        reader = without_images(to_preference, "hfllm constitution")
        rows = self._rows_named(self.script_args.preference_dataset_name, reader, flaw_of)
        return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]

    def _rows_named(self, name: str | None, reader: Mapper, flaw_of: Flaw) -> list[Row]:
        """Return the rows of another dataset of the user's, if one is named."""
        if not name:
            return []
        return kept_rows(replace(self.script_args.row_source, name=name), reader, flaw_of)

    def _with_room(self, kind: str, rows: Sequence[Row]) -> list[Conversation]:
        """Return the prompts with room for an answer in the model's context, and print the number of others."""
        name, revision, longest = self.course.named, self.model_args.model_revision, self.script_args.longest
        prompts = [{"prompt": as_messages(row["prompt"])} for row in rows]
        context = max_length_of(load_config(name, revision))
        unfit = dict(unfit_prompts(prompts, load_tokenizer(name, revision), longest, context))
        about = f"no room for an answer of --response_length {longest} in the context of {context} tokens"
        return [row["prompt"] for row in prompts_with_room("constitution", kind, prompts, unfit, about)]

    # ---- the course ----

    def helpful_only(self) -> None:
        """Make the complying model, unless it is the user's: a base model trained on people who only help."""
        count, seed = self.script_args.num_demonstrations, self.script_args.seed
        if HELPFUL in self.course.runs:
            self.course.run(PRETRAIN)
            self._learn(HELPFUL, lambda: demonstrations(self.world, count, seed))

    def revise(self) -> None:
        """Let the critic revise the model's answers to red-team prompts."""
        self.revisions = by_main_process(lambda: self._revised(self.constitution, "revisions"))

    def judge_revisions(self) -> None:
        """Let the judge compare the user's model's first answers with their revisions, before it learns from them."""
        if not self.script_args.is_world and has_questions(self.constitution):
            try:
                by_main_process(self._compare_revisions)
            except InputError as error:
                self.worse = str(error)
                say(f"constitution: {error}")

    def _compare_revisions(self) -> None:
        rows = self.revisions.rows
        columns = (
            [row["prompt"] for row in rows],
            [row["turns"][0]["answer"] for row in rows],
            [row["chosen"][0]["content"] for row in rows],
        )
        self.metrics |= self.preferred("revisions_preferred", *columns)
        bounds = bounds_of("revisions_preferred", self.metrics)
        if bounds is not None and bounds[1] < 0.5 and len(rows) >= FEWEST:
            share = shown(self.metrics, "revisions_preferred")
            raise InputError(
                f"the revisions are worse than the first answers by the constitution's own questions (preferred in "
                f"{share}), so nothing is learned from them: try a larger --critic_model_name_or_path, or a lower "
                "--temperature"
            )

    def preferred(
        self, name: str, prompts: Sequence[Conversation], first: Sequence[str], second: Sequence[str]
    ) -> dict[str, float]:
        """Return how often the judge prefers the second answers; equal ones count half."""
        try:
            judge = self._judge()
        except InputError as error:
            say(f"constitution: answers are not compared: {error}")
            return {}
        fits = judge.has_room(prompts, first, second)
        kept = [[*compress(column, fits)][:PAIRS_FOR_BIAS] for column in (prompts, first, second)]
        if not kept[0]:
            return {}
        odds = judge.compare(*kept)
        return mean_of(name, [0.5 if not each else float(each < 0) for each in odds])

    def supervised(self) -> None:
        """Fine-tune on the last revisions, and on the model's own answers to harmless prompts."""
        self._learn(SL, lambda: self._rows_of(self.revisions))

    def reinforced(self) -> None:
        """Let the judge compare answers, train the preference model on the labels, and align by PPO."""
        if RL not in self.course.runs:
            return
        try:
            by_main_process(self._compare)
        except InputError as error:
            self.no_rl = str(error)
            say(f"constitution: no AI preferences: {error}")
            return
        self.metrics |= self._learn(REWARD, lambda: mixed(self.ai_rows, self.human_rows, self.script_args.seed))
        self._align(RL)

    def controls(self) -> None:
        """Run the controls, expected not to gain."""
        arms, seed = self.script_args.arms, self.script_args.seed
        if POLITENESS in arms:
            politeness = load_constitution(POLITENESS)
            self._learn(POLITENESS, lambda: self._rows_of(self._revised(politeness, "politeness_revisions")))
        if LABELS in arms and not self.no_rl:
            self._learn(LABELS_REWARD, lambda: mixed(by_chance(self.ai_rows, seed), self.human_rows, seed))
            self._align(AI_LABELS, LABELS)
        if PEOPLE in arms and not self.no_rl:
            self._learn(PEOPLE_REWARD, lambda: mixed([], self.human_rows, seed))
            self._align(PEOPLE)
        if CRITIQUES in arms:
            self._learn(
                CRITIQUES, lambda: learned([*map(up_to_critique, self.revisions.rows), *self._own_answers], seed)
            )

    def _learn(self, name: str, make: Callable[[], Iterable[Row]]) -> dict[str, float]:
        """Write the rows of a run, run it, and return its metrics."""
        self.course.write(name, make)
        return self.course.run(name)

    def _align(self, *names: str) -> None:
        """Align a model by each of these runs of PPO."""
        for name in names:
            self._learn(name, lambda: prompts_for_ppo(self.prompts, self.script_args.seed))

    def speaking(self, name: str) -> Speaking:
        """Return a run's model, or the first model under the name `helpful`; only in the main process."""
        if name not in self._models:
            folder = self.course.helpful if name == HELPFUL else self.course.folder(name)
            revision = self.model_args.model_revision if folder == self.course.named else "main"
            self._models[name] = self._load(folder, revision)
        return self._models[name]

    def _load(self, name: str, revision: str = "main") -> Speaking:
        return load_speaking(replace(named_model(self.model_args), name=name, revision=revision))

    @property
    def models(self) -> list[str]:
        """All models at the end, in order."""
        later = (SL, RL, POLITENESS, CRITIQUES, AI_LABELS, LABELS, PEOPLE)
        return [HELPFUL, *filter(self.course.has_made, later)]

    @property
    def last(self) -> str:
        """The last model of the pipeline itself, excluding controls."""
        return [name for name in self.models if name in (HELPFUL, SL, RL)][-1]

    @property
    def artifacts(self) -> dict[str, str]:
        """The contents of the output folder, by path."""
        return {**self.course.artifacts, "revision rows": "revisions/revisions.jsonl"}

    # ---- rows ----

    def _critic(self) -> Speaking:
        named = self.script_args.critic_model_name_or_path
        if not named:
            return self.speaking(HELPFUL)
        if "critic" not in self._models:
            self._models["critic"] = self._load(named)
        return self._models["critic"]

    def _revised(self, constitution: "Constitution", folder: str) -> "Revisions":
        script_args, first, critic = self.script_args, self.speaking(HELPFUL), self._critic()
        return critique_and_revise(
            *(first.model, first.tokenizer, self.prompts.harmful, constitution, script_args.num_revisions),
            script_args.seed,
            response_length=script_args.longest,
            critic=critic.model,
            critic_tokenizer=critic.tokenizer,
            revise_only_flagged=script_args.revise_only_flagged,
            temperature=script_args.temperature,
            batch_size=script_args.batch_size,
            save_to=Path(script_args.output_dir, folder),
        )

    def _rows_of(self, revisions: "Revisions") -> list[Row]:
        """Return the rows for SL: the last revisions, and the model's own answers to harmless prompts."""
        return learned([*revisions.rows, *self._own_answers], self.script_args.seed)

    @cached_property
    def _own_answers(self) -> list[Row]:
        """The first model's answers to harmless prompts."""
        script_args, harmless = self.script_args, self.prompts.harmless
        settings = {"seed": script_args.seed + 9, "temperature": script_args.temperature}
        return answered(harmless, self.speaking(HELPFUL).answers(harmless, script_args.longest, **settings))

    def _judge(self) -> judges.PreferenceJudge:
        if not has_questions(self.constitution):
            raise InputError(f"constitution {self.constitution.name!r} has no preference questions to judge by")
        critic, script_args = self._critic(), self.script_args
        return judges.PreferenceJudge(
            *(critic.model, critic.tokenizer, self.constitution),
            chain_of_thought=script_args.judge_chain_of_thought,
            clamp=judges.PAPER_CLAMP if script_args.judge_clamp else None,
            num_principles=script_args.judge_principles,
            batch_size=script_args.batch_size,
            seed=script_args.seed,
        )

    def _compare(self) -> None:
        self.ai_rows = self._ai_preferences(self._judge())
        self.human_rows = self._people_s_comparisons()

    def _ai_preferences(self, judge: judges.PreferenceJudge) -> list[Row]:
        """Return pairs with the judge's labels."""
        script_args = self.script_args
        models = self.speaking(SL), self.speaking(HELPFUL)
        pairs = pairs_to_judge(self.prompts, *models, script_args.num_pairs, script_args.longest, script_args.seed)
        columns = (pairs.prompts, pairs.first, pairs.second)
        fits = judge.has_room(*columns)
        bias = judges.measure_bias(judge, *([*compress(each, fits)][:PAIRS_FOR_BIAS] for each in columns))
        self.metrics |= bias.as_metrics()
        judges.check_bias(bias, allow=script_args.allow_biased_judge)
        rows, counts = judges.preference_rows(
            judge, *columns, min_log_odds=script_args.judge_margin, seed=script_args.seed
        )
        self.metrics |= {"ai_comparisons": len(rows), "judge_ties": counts.ties, "judge_too_long": counts.too_long}
        task_of = {task.question: task for task in pairs.tasks}
        if task_of:
            self.metrics |= label_metrics(rows, task_of, LABEL_NOISE, script_args.seed)
        return rows

    def _people_s_comparisons(self) -> list[Row]:
        people, script_args = self.human_rows, self.script_args
        if script_args.is_world:
            harmless, seed = self.prompts.harmless[: script_args.num_human_pairs], script_args.seed
            responses = self.speaking(SL).answers(harmless, script_args.longest, seed + 23, samples=2)
            people = human_comparisons(self.world, self.prompts, responses, seed)
        self.metrics["human_comparisons"] = len(people)
        return people


# ---- evaluation ----
#
# The effect of constitutional AI: measured exactly on the embedded world, by words on the user's prompts.


# Number of harmless prompts per prompt of a group of harm.
HARMLESS = 2.4
SAMPLES = 8


def world_report(steps: Steps) -> Found:
    """Ask all models of the embedded world's pipeline, judge them by the gold rubric, and report the results."""
    script_args = steps.script_args
    count = script_args.num_eval_prompts
    prompts = prompts_to_ask(steps.world, count, round(HARMLESS * count))
    answers = {}
    for name in steps.models:
        speaking = steps.speaking(name)
        answers[name] = answer(speaking.model, speaking.tokenizer, prompts, script_args.longest, script_args.seed)
    tasks = {task.question: task for task in steps.prompts.tasks}
    rows = steps.revisions.rows
    revised = revision_metrics(rows, [tasks[row["prompt"][-1]["content"]] for row in rows])
    metrics = {**course_metrics(answers), **revised, **steps.metrics, **figures_of_revisions(steps.revisions.figures)}
    by_round = [metrics[f"revised_{number}"] for number in range(script_args.num_revisions + 1)]
    probed, curves = probes_of_run(steps.course.folder(PRETRAIN))
    num_comparisons = script_args.num_human_pairs if script_args.last_stage == RL else None
    labels = people_s_labels(script_args.num_demonstrations, num_comparisons)
    return Found(
        metrics | probed,
        summary_of(metrics, labels, steps.no_rl),
        {**course_tables(answers), "Revisions": revision_samples(rows)},
        course_plots(answers, by_round) | curves,
        (*PROMISES, *PROBED),
        PROMISES,
    )


def people_s_labels(num_demonstrations: int, num_comparisons: int | None) -> str:
    """Return the report's sentence about the source of people's labels on the embedded world.

    Args:
        num_demonstrations: that the first model learned from.
        num_comparisons: that the preference model learned from, if there is one.
    """
    examples = f"{num_demonstrations:,} demonstrations of helping, critique, revision and judging"
    compared = "" if num_comparisons is None else f", {num_comparisons:,} comparisons of helpfulness"
    harm = f"(harm on {len(SHOWN.harms)} verbs)"
    return f"labels of people: {examples} {harm}{compared}; no label of harm in the model's answers"


def own_report(steps: Steps) -> Found:
    """Ask the user's model held-out prompts before and after; count refusals, by words, and lengths."""
    script_args, held_out = steps.script_args, steps.prompts.held_out
    responses = {
        name: [texts[0] for texts in steps.speaking(name).answers(held_out, script_args.longest, script_args.seed + 1)]
        for name in steps.models
    }
    last, metrics = steps.models[-1], {}
    if last != HELPFUL:
        metrics |= steps.preferred("answers_preferred", held_out, responses[HELPFUL], responses[last])
        metrics |= refusals_of_harmless(steps, last)
    result = {name: _values(texts) for name, texts in responses.items()}
    for name, values in result[HELPFUL].items():
        if last == HELPFUL:
            metrics |= mean_of(name, values)
        else:
            metrics |= change_of(name, values, result[last][name])
    first_values = _values([row["turns"][0]["answer"] for row in steps.revisions.rows])
    last_values = _values([row["chosen"][0]["content"] for row in steps.revisions.rows])
    metrics |= mean_of("first_answers_refuse", first_values["refusals"])
    metrics |= mean_of("last_revisions_refuse", last_values["refusals"])
    titles = {**TITLES, HELPFUL: "as it was"}
    samples = [
        {"prompt": prompt[-1]["content"], **{titles[name]: texts[index] for name, texts in responses.items()}}
        for index, prompt in enumerate(held_out[:SAMPLES])
    ]
    counts = figures_of_revisions(steps.revisions.figures)
    named = script_args.preference_dataset_name
    labels = f"labels of people: comparisons of {named}" if named else "labels of people: none in these runs"
    return Found(
        {**metrics, **steps.metrics, **counts},
        "; ".join(filter(None, [_echoes(counts["echoes_share"]), labels, steps.no_rl, steps.worse])),
        {"Held-out prompts": samples, "Revisions": revision_samples(steps.revisions.rows)},
        {},
        OWN_PROMISES,
    )


def refusals_of_harmless(steps: Steps, last: str) -> dict[str, float]:
    """Return how often the first and the last model refuse something harmless, by words, and what the judge prefers.

    Asked are questions that look harmful, and the held-out ones of the user's own.
    """
    script_args, own = steps.script_args, steps.prompts.harmless_held_out
    metrics: dict[str, float] = {}
    for kind, prompts in (("look_alike", list(map(as_messages, LOOK_ALIKES))), ("helpful", own)):
        if prompts:
            said = {
                name: [
                    texts[0] for texts in steps.speaking(name).answers(prompts, script_args.longest, script_args.seed)
                ]
                for name in (HELPFUL, last)
            }
            metrics |= change_of(f"over_refusal_{kind}", *(_values(texts)["refusals"] for texts in said.values()))
            if kind == "helpful":
                metrics |= change_of("helpful_words", *(_values(texts)["words"] for texts in said.values()))
                metrics |= steps.preferred("helpful_preferred", prompts, *said.values())
    return metrics


def figures_of_revisions(counts: "RevisionFigures") -> dict[str, float]:
    """Return statistics of the revision of answers, as shares of the requested number."""
    figures = asdict(counts)
    denominators = {
        **{"flagged": "critiques", "empty_critiques": "critiques"},
        **{"echoes": "revisions", "empty_revisions": "revisions"},
    }
    shares = {f"{name}_share": figures[name] / max(figures[of], 1) for name, of in denominators.items()}
    return {"red_team_prompts": figures["num_prompts"], "dropped_prompts": figures["dropped"], **shares}


def _values(texts: Sequence[str]) -> dict[str, list[float]]:
    return {
        "refusals": [float(refuses(text)) for text in texts],
        "words": [float(len(text.split())) for text in texts],
    }


def _echoes(share: float) -> str:
    says = f"{share:.0%} of the revisions repeat the answer"
    return f"{says}: the critic does not follow the request" if share > 0.5 else says
