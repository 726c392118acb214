"""Whether a run may resume from a checkpoint, and what a run does about the checkpoints that it finds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfllm.errors import InputError
from hfllm.fingerprint import FORM
from hfllm.outputs.checkpoints import checkpoints_in, is_complete, missing_for_resuming, record_of, state_of
from hfllm.runs.identity import difference

AUTOMATIC = ("true", "auto")


def is_named(wanted: object) -> bool:
    """Return whether `--resume_from_checkpoint` names a folder."""
    return str(wanted).lower() not in AUTOMATIC


def check_resumable(checkpoint: str, wanted: object, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run, one that does not say whose it is, and one without its optimizer.

    Args:
        wanted: the value of `--resume_from_checkpoint`; a folder that it names need not say whose it is.
        identity: this run's.

    Raises:
        InputError: naming the first difference, or the file that is missing.
    """
    state = _state(checkpoint)
    refuse_without_state(checkpoint)
    run = record_of(state).get("run")
    if run is None and not is_named(wanted):
        raise InputError(
            f"{_shown(checkpoint)} does not say which run made it, so it may be another one's: to resume from it all "
            f"the same name it, --resume_from_checkpoint {checkpoint}; to start anew choose another --output_dir"
        )
    if run is not None and (differs := difference(run, identity)):
        raise InputError(made_with(checkpoint, differs))


def refuse_without_state(checkpoint: str, engine: str | None = None) -> None:
    """Refuse a checkpoint without optimizer or schedule, as `--save_only_model` leaves it.

    Raises:
        InputError: naming the file that is missing.
    """
    if missing := missing_for_resuming(checkpoint, engine):
        raise InputError(
            f"{_shown(checkpoint)} holds no {missing}, as after --save_only_model, and cannot be resumed: start anew "
            f"in another --output_dir, from its weights by --model_name_or_path {checkpoint}"
        )


def made_with(checkpoint: str, differs: str) -> str:
    """Return the line that refuses a checkpoint of another run.

    Args:
        differs: the first difference, as `difference` returns it.
    """
    return (
        f"{_shown(checkpoint)} was made with {differs}: resume it with its own flags and files, or start anew in "
        "another --output_dir"
    )


def described(checkpoint: str) -> str:
    """Return where a run resumes, as a line."""
    state = _state(checkpoint)
    line = f"resuming from {Path(checkpoint).name} (step {state.get('global_step')} of {state.get('max_steps')})"
    if record_of(state).get("run") is None:
        line += "; it does not say which run made it, so its flags are not compared"
    elif (rows := record_of(state)["run"].get("rows")) and rows.get("form") != FORM:
        line += "; an earlier version made it, so of its rows the number is compared and not what they hold"
    return line


def about_old_checkpoints(output_dir: str, identity: Mapping[str, Any], can_resume: bool) -> str | None:
    """Return the line about checkpoints that a run finds and does not resume from; `None` where there are none.

    Args:
        can_resume: whether `--resume_from_checkpoint` would reach this run, and not only the one that it belongs to.
    """
    found = [path for path in checkpoints_in(output_dir) if is_complete(path)]
    if not found:
        return None
    last, state = found[-1], _state(str(found[-1]))
    line = f"starting from the beginning; the checkpoints there, up to {last.name}, will be overwritten"
    run = record_of(state).get("run")
    if run is not None and (differs := difference(run, identity)):
        return f"{line} (they were made with {differs})"
    if run is None or not can_resume or missing_for_resuming(last):
        return line
    step = f"step {state.get('global_step')} of {state.get('max_steps')}"
    return f"{line}; --resume_from_checkpoint auto would continue from {last.name} ({step})"


def _state(checkpoint: str) -> dict[str, Any]:
    try:
        return state_of(checkpoint)
    except (OSError, ValueError):
        raise InputError(f"{_shown(checkpoint)}: its trainer_state.json cannot be read") from None


def _shown(checkpoint: str) -> str:
    return f"{Path(checkpoint).name} in {Path(checkpoint).parent}"
