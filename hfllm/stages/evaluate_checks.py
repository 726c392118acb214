"""What an evaluation refuses before anything is trained or loaded."""

import difflib
from pathlib import Path

from hfllm.errors import InputError, refuse
from hfllm.evaluation.suites.base import missing_overlaps
from hfllm.fingerprint import file_fingerprint
from hfllm.outputs.report import CHANGED, CONTENTS
from hfllm.runs.command_line import say
from hfllm.stages import evaluate_lm_eval, evaluate_pictures
from hfllm.stages.evaluate import CONFIGS, FILES, EvaluateArguments, processor_of
from hfllm.stages.evaluate_report import refuse_foreign_changes
from hfllm.stages.evaluate_suites import SUITES, suites_of
from hfllm.stages.own_pictures import files_changed


def check(script_args: EvaluateArguments) -> None:
    """Refuse flags that would fail later or have no effect, and read all files.

    Raises:
        InputError: naming the flag, or the file and the row.
    """
    for name in script_args.suites:
        if name not in SUITES:
            nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise InputError(f"--suites {name!r}: no such suite; did you mean {nearest!r}? All: {', '.join(SUITES)}")
    if not script_args.suites or len(set(script_args.suites)) < len(script_args.suites):
        raise InputError(f"--suites {' '.join(script_args.suites)}: expected one or more, each once")
    for flag, least in (
        ("batch_size", 1),
        ("max_new_tokens", 1),
        ("num_items", 1),
        ("num_shots", 0),
        ("num_attacks", 0),
    ):
        value = getattr(script_args, flag)
        if value is not None and value < least:
            raise InputError(f"--{flag} {value}: expected at least {least}")
    for name in CONFIGS:
        is_idle = bool(script_args.model_name_or_path and getattr(script_args, f"{name}_config"))
        refuse(is_idle, f"--{name}_config", "the models are named")
    wanted = {
        "truthfulqa_file": ("truthfulness",),
        "preference_files": ("hhh",),
        "xstest_file": ("refusals",),
        "few_shot_files": ("few_shot", "calibration"),
        "facts_file": ("interpretability",),
        "robustness_file": ("robustness",),
    }
    for flag, suites in wanted.items():
        is_idle = bool(getattr(script_args, flag)) and not {*suites} & {*script_args.suites}
        refuse(is_idle, f"--{flag}", f"it is for --suites {' or '.join(suites)}")
    refuse(script_args.write_answers and not script_args.truthfulqa_file, "--write_answers", "no --truthfulqa_file")
    is_idle = script_args.num_attacks is not None and "robustness" not in script_args.suites
    refuse(is_idle, "--num_attacks", "it is for --suites robustness")
    is_idle = script_args.num_shots > 0 and not script_args.few_shot_files
    refuse(is_idle, "--num_shots", "no --few_shot_files")
    if script_args.write_answers and (missing := missing_overlaps()):
        say(f"evaluate: {missing}")
    is_single = len(script_args.model_name_or_path or ()) == 1
    refuse(
        script_args.fail_on_regression and is_single, "--fail_on_regression", "one model has no other to be worse than"
    )
    if not is_single:
        refuse_foreign_changes(script_args.output_dir)
    evaluate_lm_eval.check(script_args, script_args.suites)
    evaluate_pictures.check(script_args)
    for suite in suites_of(script_args, None):
        suite.items()


def check_models(script_args: EvaluateArguments) -> None:
    """Refuse models that cannot be loaded, and a chat template that is asked for and not there.

    Raises:
        InputError: naming the model.
    """
    from hfllm.models.loading.adapters import find_adapter
    from hfllm.models.loading.weights import check_weight_files
    from hfllm.runs.models import load_config, load_tokenizer, saved_tokenizer

    judge = script_args.judge_model_name_or_path
    for name in [*(script_args.model_name_or_path or ()), *([judge] if judge else ())]:
        try:
            load_config(name)
            if find_adapter(name) is None:
                check_weight_files(name)
            template = saved_tokenizer(name).chat_template
            load_tokenizer(name)
            if processor_of(name) is None and "pictures" in script_args.suites and name != judge:
                raise InputError(f"--suites pictures: {name!r} reads text alone: name a model that sees")
        except InputError as error:
            raise InputError(f"--judge_model_name_or_path: {error}" if name == judge else str(error)) from None
        if script_args.apply_chat_template and template is None and name != judge:
            raise InputError(
                f"--apply_chat_template true: the tokenizer of {name!r} has no chat template; leave the flag out, or "
                "save a template with the tokenizer"
            )


def changed_files(script_args: EvaluateArguments) -> dict[str, int | str]:
    """Return when the files that flags and rows name were last changed, and hashes of their contents, by name."""
    named = [getattr(script_args, flag) or [] for flag in FILES]
    paths = [path for each in named for path in ([each] if isinstance(each, str) else each)]
    paths += evaluate_lm_eval.files_of(script_args)
    changed = {f"{path}{CHANGED}": Path(path).stat().st_mtime_ns for path in paths}
    contents = {f"{path}{CONTENTS}": file_fingerprint([("", Path(path))], True) for path in paths}
    return {**changed, **contents, **files_changed(script_args, script_args.model_name_or_path or ())}
