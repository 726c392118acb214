"""Constitutional AI step by step: the rows of each run are made with the models of those before it.

Only the main process loads models here; the others wait where rows are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.runs.command_line import say
from hfllm.stages.constitution import (
    CRITIQUES,
    LABELS,
    PEOPLE,
    POLITENESS,
    RL,
    ConstitutionArguments,
    has_questions,
)
from hfllm.stages.constitution_data import (
    LABEL_NOISE,
    Pairs,
    Prompts,
    answered,
    by_chance,
    demonstrations,
    human_comparisons,
    learned,
    mixed,
    own_comparisons,
    own_prompts,
    pairs_to_judge,
    prompts_for_ppo,
    up_to_critique,
    world_prompts,
    write_rows,
)
from hfllm.stages.constitution_runs import (
    AI_LABELS,
    HELPFUL,
    LABELS_REWARD,
    PEOPLE_REWARD,
    PRETRAIN,
    REWARD,
    SL,
    Course,
)
from hfllm.stages.course import Row, Speaking, by_main_process, load_speaking

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.rewards.judges import PreferenceJudge
    from hfllm.synthesis.constitution import Constitution
    from hfllm.synthesis.revisions import Revisions

# Pairs by which the judge's position bias is measured.
PAIRS_FOR_BIAS = 200


@dataclass
class Steps:
    """The course of one recipe's run, step by step.

    Args:
        script_args, model_args: its flags.
        constitution: the principles.
        course: the runs of other recipes.

    Attributes:
        metrics: what was measured on the way.
        ai_rows, human_rows: the comparisons that the preference model learns from, in the main process.
        revisions: the rows of the constitution's revisions and their figures, in the main process.
        no_rl: why there are no AI preferences, if there are none.
    """

    script_args: ConstitutionArguments
    model_args: "ModelConfig"
    constitution: "Constitution"
    course: Course
    metrics: dict[str, float] = field(default_factory=dict)
    ai_rows: list[Row] = field(default_factory=list)
    human_rows: list[Row] = field(default_factory=list)
    revisions: "Revisions | None" = None
    no_rl: str = ""
    _models: dict[str, Speaking] = field(default_factory=dict)

    def __post_init__(self):
        script_args = self.script_args
        if script_args.is_world:
            self.prompts: Prompts = world_prompts(script_args)
        else:
            self.prompts = own_prompts(script_args, self.model_args)
            # Read now, so that what is wrong with them is said before anything is trained.
            self.human_rows = own_comparisons(script_args)

    # ---- the course ----

    def helpful_only(self) -> None:
        """Make the model that complies, unless yours is it: a base model that learns from people who only help."""
        if HELPFUL in self.course.runs:
            self.course.run(PRETRAIN)
            write_rows(self.script_args, HELPFUL, lambda: demonstrations(self.script_args))
            self.course.run(HELPFUL)

    def revise(self) -> None:
        """Let the critic revise the model's answers to red-team prompts."""
        self.revisions = by_main_process(lambda: self._revised(self.constitution, "revisions"))

    def supervised(self) -> None:
        """Fine-tune on the last revisions, and on the model's own answers to harmless prompts."""
        write_rows(self.script_args, SL, lambda: self._rows_of(self.revisions))
        self.course.run(SL)

    def reinforced(self) -> None:
        """Let the judge compare answers, train the preference model on that, and align by PPO."""
        if RL not in self.course.runs:
            return
        try:
            by_main_process(self._compare)
        except InputError as error:
            self.no_rl = str(error)
            say(f"constitution: no AI preferences: {error}")
            return
        write_rows(self.script_args, REWARD, lambda: mixed(self.ai_rows, self.human_rows, self.script_args.seed))
        self.metrics |= self.course.run(REWARD)
        write_rows(self.script_args, RL, lambda: prompts_for_ppo(self.script_args, self.prompts))
        self.course.run(RL)

    def controls(self) -> None:
        """Run the arms that must not gain."""
        from hfllm.synthesis.constitution import load_constitution

        script_args = self.script_args
        if POLITENESS in script_args.arms:
            write_rows(
                script_args,
                POLITENESS,
                lambda: self._rows_of(self._revised(load_constitution(POLITENESS), "politeness_revisions")),
            )
            self.course.run(POLITENESS)
        if LABELS in script_args.arms and not self.no_rl:
            seed = script_args.seed
            write_rows(script_args, LABELS_REWARD, lambda: mixed(by_chance(self.ai_rows, seed), self.human_rows, seed))
            self.course.run(LABELS_REWARD)
            self._tuned(AI_LABELS, LABELS)
        if PEOPLE in script_args.arms and not self.no_rl:
            write_rows(script_args, PEOPLE_REWARD, lambda: mixed([], self.human_rows, script_args.seed))
            self.course.run(PEOPLE_REWARD)
            self._tuned(PEOPLE)
        if CRITIQUES in script_args.arms:
            seed = script_args.seed
            write_rows(
                script_args,
                CRITIQUES,
                lambda: learned([*map(up_to_critique, self.revisions.rows), *self._own_answers], seed),
            )
            self.course.run(CRITIQUES)

    def _tuned(self, *arms: str) -> None:
        """Align the helpful-only model by the preference model of each arm."""
        for arm in arms:
            write_rows(self.script_args, arm, lambda: prompts_for_ppo(self.script_args, self.prompts))
            self.course.run(arm)

    def speaking(self, name: str) -> Speaking:
        """Return a run's model, or the one that is asked first under the name `helpful`; the main process's alone."""
        if name not in self._models:
            folder = self.course.helpful if name == HELPFUL else self.course.folder(name)
            revision = self.model_args.model_revision if folder == self.course.named else "main"
            self._models[name] = load_speaking(folder, self.model_args, revision)
        return self._models[name]

    @property
    def models(self) -> list[str]:
        """The models that there are by the end, in order."""
        later = (SL, RL, POLITENESS, CRITIQUES, AI_LABELS, LABELS, PEOPLE)
        return [HELPFUL, *filter(self._is_made, later)]

    @property
    def last(self) -> str:
        """The last model of the course itself, controls apart."""
        return [name for name in self.models if name in (HELPFUL, SL, RL)][-1]

    @property
    def artifacts(self) -> dict[str, str]:
        """What the output folder holds, by path."""
        made = {name: name for name in self.course.runs if self._is_made(name)}
        return {**made, "revision rows": "revisions/revisions.jsonl"}

    def _is_made(self, name: str) -> bool:
        return name in self.course.runs and Path(self.course.folder(name), "report.json").is_file()

    # ---- rows ----

    def _critic(self) -> Speaking:
        named = self.script_args.critic_model_name_or_path
        if not named:
            return self.speaking(HELPFUL)
        if "critic" not in self._models:
            self._models["critic"] = load_speaking(named, self.model_args)
        return self._models["critic"]

    def _revised(self, constitution: "Constitution", folder: str) -> "Revisions":
        from hfllm.synthesis.revisions import critique_and_revise

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
        """Return what SL learns: the last revisions, and the model's own answers to harmless prompts."""
        return learned([*revisions.rows, *self._own_answers], self.script_args.seed)

    @cached_property
    def _own_answers(self) -> list[Row]:
        """The first model's answers to harmless prompts."""
        script_args, harmless = self.script_args, self.prompts.harmless
        settings = {"seed": script_args.seed + 9, "temperature": script_args.temperature}
        return answered(harmless, self.speaking(HELPFUL).answers(harmless, script_args.longest, **settings))

    def _judge(self) -> "PreferenceJudge":
        from hfllm.rewards.judges import PAPER_CLAMP, PreferenceJudge

        if not has_questions(self.constitution):
            raise InputError(f"constitution {self.constitution.name!r} has no preference questions to judge by")
        critic, script_args = self._critic(), self.script_args
        return PreferenceJudge(
            *(critic.model, critic.tokenizer, self.constitution),
            chain_of_thought=script_args.judge_chain_of_thought,
            clamp=PAPER_CLAMP if script_args.judge_clamp else None,
            num_principles=script_args.judge_principles,
            batch_size=script_args.batch_size,
            seed=script_args.seed,
        )

    def _compare(self) -> None:
        self.ai_rows = self._ai_preferences(self._judge())
        self.human_rows = self._people_s_comparisons()

    def _ai_preferences(self, judge: "PreferenceJudge") -> list[Row]:
        """Return pairs with the judge's labels.

        Raises:
            InputError: when the judge is refused for its bias, or no pair has two different answers.
        """
        from hfllm.rewards.judges import check_bias, measure_bias, preference_rows

        pairs = pairs_to_judge(self.script_args, self.prompts, self.speaking(SL), self.speaking(HELPFUL))
        asked = (pairs.prompts, pairs.first, pairs.second)
        fits = judge.has_room(*asked)
        bias = measure_bias(judge, *([*compress(each, fits)][:PAIRS_FOR_BIAS] for each in asked))
        self.metrics |= bias.as_metrics()
        check_bias(bias, allow=self.script_args.allow_biased_judge)
        rows, counts = preference_rows(
            judge, *asked, min_log_odds=self.script_args.judge_margin, seed=self.script_args.seed
        )
        self.metrics |= {"ai_comparisons": len(rows), "judge_ties": counts.ties, "judge_too_long": counts.too_long}
        self._compare_with_gold(rows, pairs)
        return rows

    def _compare_with_gold(self, rows: Sequence[Row], pairs: Pairs) -> None:
        from hfllm.evaluation.constitution_report import label_metrics

        task_of = {task.question: task for task in pairs.tasks}
        if task_of:
            self.metrics |= label_metrics(rows, task_of, LABEL_NOISE, self.script_args.seed)

    def _people_s_comparisons(self) -> list[Row]:
        people = self.human_rows
        if self.script_args.is_world:
            people = human_comparisons(self.script_args, self.speaking(SL), self.prompts)
        self.metrics["human_comparisons"] = len(people)
        return people


def people_s_labels(script_args: ConstitutionArguments) -> str:
    """Return the sentence of the report that says which labels of people were used."""
    from hfllm.data.world.demonstrators import CRITICS_HARMS

    if not script_args.is_world:
        named = script_args.preference_dataset_name
        return f"labels of people: comparisons of {named}" if named else "labels of people: none in these runs"
    shown = f"{script_args.num_demonstrations:,} demonstrations of helping, critique, revision and judging"
    compared = f", {script_args.num_human_pairs:,} comparisons of helpfulness" if script_args.last_stage == RL else ""
    harm = f"(harm on {len(CRITICS_HARMS)} verbs)"
    return f"labels of people: {shown} {harm}{compared}; no label of harm in the model's answers"
