"""The table of suites: what each name of `--suites` stands for. A new suite is a function and a line."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from hfllm.evaluation.suites.base import Suite
from hfllm.stages.evaluate import NUM_WORLD_ITEMS, EvaluateArguments

if TYPE_CHECKING:
    from hfllm.evaluation.suites.base import Subject

Build = Callable[["EvaluateArguments", "Subject | None"], Suite]


def suites_of(script_args: EvaluateArguments, judge: "Subject | None") -> list[Suite]:
    """Return the suites that the flags name.

    Args:
        judge: a model that judges written answers, if there is one.
    """
    return [SUITES[name](script_args, judge) for name in script_args.suites]


def _world_options(script_args: EvaluateArguments) -> dict:
    from hfllm.data.world.world import World

    count = NUM_WORLD_ITEMS if script_args.num_items is None else script_args.num_items
    return {"world": World(script_args.world_seed), "num_items": count}


def _truthfulness(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.truthfulqa_file:
        from hfllm.evaluation.suites.truthfulness import TruthfulQA

        return TruthfulQA(script_args.truthfulqa_file, script_args.num_items, script_args.write_answers, judge)
    from hfllm.evaluation.suites.world_suites import WorldTruthfulness

    return WorldTruthfulness(**_world_options(script_args))


def _hhh(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.preference_files:
        from hfllm.evaluation.suites.preferences import Preferences

        return Preferences(script_args.preference_files, script_args.num_items)
    from hfllm.evaluation.suites.world_suites import WorldPreferences

    return WorldPreferences(**_world_options(script_args))


def _refusals(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.xstest_file:
        from hfllm.evaluation.suites.refusals import XSTest

        return XSTest(script_args.xstest_file, script_args.num_items, judge, script_args.max_new_tokens)
    from hfllm.evaluation.suites.world_suites import WorldRefusals

    return WorldRefusals(**_world_options(script_args))


def _calibration(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    from hfllm.evaluation.suites.calibration import ChoiceCalibration, WorldCalibration

    if script_args.few_shot_files:
        return ChoiceCalibration(script_args.few_shot_files, script_args.num_items)
    return WorldCalibration(**_world_options(script_args))


def _few_shot(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.few_shot_files:
        from hfllm.evaluation.suites.few_shot import FewShot

        files, count = script_args.few_shot_files, script_args.num_items
        return FewShot(files, count, script_args.num_shots, script_args.max_new_tokens)
    from hfllm.evaluation.suites.world_suites import WorldFewShot

    return WorldFewShot(**_world_options(script_args))


def _interpretability(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    from hfllm.evaluation.suites.interpretability import Interpretability

    return Interpretability(script_args.facts_file, script_args.world_seed)


def _lm_eval(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    from hfllm.stages.evaluate_lm_eval import suite_of

    return suite_of(script_args, script_args.num_items)


def _robustness(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    from hfllm.data.world.world import World
    from hfllm.evaluation.suites.robustness import Robustness

    count, attacks = script_args.num_items, script_args.num_attacks
    if script_args.robustness_file:
        return Robustness(None, script_args.robustness_file, count, script_args.max_new_tokens, attacks)
    return Robustness(World(script_args.world_seed), num_prompts=count, num_attacks=attacks)


def _pictures(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    from hfllm.evaluation.pictures import Pictures
    from hfllm.stages.evaluate_pictures import parts_of

    return Pictures(partial(parts_of, script_args), script_args.max_new_tokens)


SUITES: Mapping[str, Build] = {
    "truthfulness": _truthfulness,
    "hhh": _hhh,
    "refusals": _refusals,
    "calibration": _calibration,
    "few_shot": _few_shot,
    "interpretability": _interpretability,
    "lm_eval": _lm_eval,
    "robustness": _robustness,
    "pictures": _pictures,
}
