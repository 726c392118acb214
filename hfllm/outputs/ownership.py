"""Distinguish the files of our runs in an output folder from the files of the user or of another program.

A folder with a started run has a record, `.hfllm.files`, and after its end the checksums of its files are in it, as
`sha256sum --check .hfllm.files` compares them. A file with the name of an output file that is absent from the
record, or differs from it, belongs to someone else: it is refused before anything is written. Folders of versions
without a record are known by their report, their card or their checkpoints.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from hfllm.errors import InputError
from hfllm.fingerprint import SETTLED
from hfllm.outputs.card import MARKER
from hfllm.outputs.checkpoints import (
    STATE_FILE,
    checkpoints_in,
    checksums_of,
    read_checksums,
    record_of,
    state_of,
    step_of,
    write_lines,
)
from hfllm.outputs.files import CARD, MERGED_FROM, PROCESSOR, SETTINGS, TOKENIZER
from hfllm.outputs.report import PLOTTED_BY, RECEIPT_FILE, REPORT_FILE, read_report, write_atomically

# Text in the cards written by Trainer, TRL and PEFT while they save.
DRAFTS = (
    "generated_from_trainer",
    "generated automatically according to the information the Trainer had access to",
    "[TRL](https://github.com/huggingface/trl)",
    "# Model Card for Model ID",
)
# The plots of all stages.
PLOTS = (
    *("loss", "held_out", "rewards", "kl", "response_length", "clip_fraction", "overoptimization", "parts", "gold"),
    *("funnel", "compression", "speed", "memory", "compliance", "helpfulness", "revisions"),
    *("gold_by_*", "held_out_loss_by_*", "drift"),
    *("sensitivity_*", "probe_*_by_*", "loss_by_compute", "expected_and_measured", "optimal_size", "isoflops"),
)
# The record of a folder, and its first line, skipped by `sha256sum`.
RECORD, HEADER = ".hfllm.files", "# what hfllm wrote here"
# Held by a writing run, and left behind by a killed one: see hfllm/runs/lock.py.
LOCK_FILE, LOCKED_BY = ".hfllm.lock", "process "
# The files of a run that saves a model in its folder, besides its card, report and plots, and also in subfolders not
# owned by another stage.
NAMES = (
    *(*SETTINGS, *TOKENIZER, *PROCESSOR, MERGED_FROM, "training_args.bin", STATE_FILE),
    *("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors", "*.safetensors.index.json"),
    *("*_hfllm.py", "*_hfllm_vision.py", "presets.py", "value_head.safetensors"),
    *("distillation_projection.safetensors", "federation.safetensors", ".federation.safetensors.tmp", "controls.json"),
)
INSIDE = ("value_model", "reference", "rl", "alone")
MODEL_FILES = (*NAMES, *INSIDE, *(f"{folder}/{name}" for folder in INSIDE for name in NAMES))
REPORT_FILES = (
    *("report.md", REPORT_FILE, CARD, "*.png", "samples.jsonl", "samples.jsonl.draft", "samples_of.json"),
    *("completions", RECORD, LOCK_FILE, RECEIPT_FILE),
)
# The files that decide a model's answers: other files, such as its card, are for readers, who may edit them.
DECISIVE = ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors")
# Finished models found whole by this process: for each its folder, its record and the state of its files.
_whole: set[tuple[object, ...]] = set()


def refuse_foreign_files(
    folder: str | Path, stage: str, writes_card: bool, writes_model: bool | None = None, first_step: int = 0
) -> None:
    """Refuse to write over files not written by our runs, or through links.

    Args:
        stage: the stage to write there.
        writes_card: whether it writes a model card.
        writes_model: whether it writes a model or a tokenizer; by default whether it writes a card.
        first_step: of the run, where it resumes; checkpoints before it are not written, and may be links.
    """
    folder = Path(folder)
    writes_model = writes_card if writes_model is None else writes_model
    _refuse_links(folder, writes_model, first_step)
    # Looked for before they are read: meanwhile the first process of a launched run may begin to write there.
    present = {name for name in (REPORT_FILE, "report.md", CARD, RECORD) if (folder / name).exists()}
    has_report, is_recorded = read_report(folder) is not None, _begins_with(folder / RECORD, HEADER)
    # A run killed before report.json has this one and its plots.
    has_summary = _begins_with(folder / "report.md", f"# {stage}")
    for name, is_ours, note in (
        (REPORT_FILE, has_report, " (or it is damaged)"),
        ("report.md", has_report or has_summary, ""),
        (CARD, not writes_card or is_own_card(folder / CARD), ""),
        (RECORD, is_recorded, " (or it is damaged)"),
    ):
        if not is_ours and name in present:
            _refuse(folder / name, note)
    if has_report or has_summary or is_recorded:
        return
    if writes_model and not _is_of_an_earlier_version(folder):
        for path in _present(folder, MODEL_FILES):
            _refuse(path)
    for plot in (path for name in PLOTS for path in sorted(folder.glob(f"{name}.png"))):
        if PLOTTED_BY.encode() not in _beginning(plot):
            _refuse(plot)


def refuse_changed_files(folder: str | Path) -> None:
    """Refuse to write over files new or changed since the finished run there; all of them are read."""
    folder = Path(folder)
    recorded = _recorded(folder)
    if not recorded:
        return
    for path in _present(folder, MODEL_FILES):
        if path.relative_to(folder).as_posix() not in recorded:
            _refuse(path, f": it is not in {RECORD}, which names what was written there")
    if changed := _changed(folder, recorded, tuple(recorded)):
        _refuse(folder / changed, f": it was changed since it was written (its checksum is not that of {RECORD})")


def claim(folder: str | Path, first_step: int = 0) -> None:
    """Note the beginning of a run of ours in a folder: files there from now on are ours.

    Files with another name elsewhere (hard links, such as those of backups) become files of their own, since they may
    be written in place.

    Args:
        first_step: see `refuse_foreign_files`; checkpoints before it stay as they are.
    """
    folder = Path(folder)
    for path in [*_present(folder, (*MODEL_FILES, *REPORT_FILES)), *_in_checkpoints(folder, first_step)]:
        if path.name != LOCK_FILE and path.stat().st_nlink > 1:
            descriptor, own = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            shutil.copy2(path, own)
            os.replace(own, path)
    write_atomically(folder / RECORD, f"{HEADER}\n")


def unclaim_empty(folder: str | Path) -> None:
    """Remove the record of a folder without other contents, as after a refused run."""
    folder = Path(folder)
    if [path.name for path in folder.iterdir()] == [RECORD]:
        (folder / RECORD).unlink()


def write_record(folder: str | Path) -> None:
    """Write the checksums of a finished run's files into its folder, without checkpoints and other stages."""
    folder = Path(folder)
    paths = (path for path in _present(folder, (*MODEL_FILES, *REPORT_FILES)) if path.name not in (RECORD, LOCK_FILE))
    # A card is for readers, who may edit it.
    files = [path for path in paths if path.name != CARD]
    write_lines(folder / RECORD, folder, files, f"{HEADER}\n")


def damage_of_finished(folder: str | Path) -> str | None:
    """Return the file of a finished model changed since its run, as a line; `None` if unchanged or unknown.

    Removed files are not damaged. Within a process whole files are read again only when their state has changed: the
    stages of a chain ask one by one.
    """
    folder = Path(folder)
    try:
        recorded = _recorded(folder)
    except InputError as error:
        return str(error)
    began, states = time.time(), [(name, _state(folder / name)) for name in _comparable(folder, recorded, DECISIVE)]
    key = (str(folder.resolve()), *recorded.items(), *states)
    if key in _whole:
        return None
    changed = _changed(folder, recorded, DECISIVE)
    if changed is None:
        if all(max(state[-2:]) < (began - SETTLED) * 1e9 for _, state in states):
            _whole.add(key)
        return None
    return (
        f"{folder / changed} is damaged, or was changed since its run finished (its checksum is not that of "
        f"{RECORD}): remove {folder} to make it again, or only {folder / RECORD} to use it as it is"
    )


def is_own_card(path: Path) -> bool:
    """Return whether a card is one of ours, or a trainer's draft: empty if the trainer was killed meanwhile."""
    text = _beginning(path, 1 << 20).decode(errors="replace")
    return not text or MARKER in text or any(sign in text for sign in DRAFTS)


def _recorded(folder: Path) -> dict[str, str]:
    """Return the checksums of a folder's record by name; none without a record or an end of the run."""
    try:
        return read_checksums(folder / RECORD, HEADER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        advice = "remove it if the files beside it are of a run of yours"
        raise InputError(f"{folder / RECORD} is damaged: {advice}") from None


def _changed(folder: Path, recorded: dict[str, str], patterns: tuple[str, ...]) -> str | None:
    """Return the first existing file of a record that matches a pattern and has changed."""
    names = _comparable(folder, recorded, patterns)
    result = checksums_of(folder / name for name in names)
    return next((name for name, checksum in zip(names, result, strict=True) if recorded[name] != checksum), None)


def _comparable(folder: Path, recorded: dict[str, str], patterns: tuple[str, ...]) -> list[str]:
    """Return the names of existing files in a record that match a pattern."""
    return [
        name for name in recorded if any(fnmatchcase(name, each) for each in patterns) and (folder / name).is_file()
    ]


def _state(path: Path) -> tuple[int, ...]:
    """Return the attributes that change when a file is written or replaced; the last two are times in nanoseconds."""
    result = path.stat()
    return result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns, result.st_ctime_ns


def _is_of_an_earlier_version(folder: Path) -> bool:
    """Return whether a folder without a record belongs to a run of ours: by its card, its lock or its checkpoints."""
    if MARKER in _beginning(folder / CARD, 1 << 20).decode(errors="replace"):
        return True
    if _beginning(folder / LOCK_FILE).decode(errors="replace").startswith(LOCKED_BY):
        return True
    for checkpoint in reversed(checkpoints_in(folder)):
        try:
            if record_of(state_of(checkpoint)):
                return True
        except (OSError, ValueError):
            continue
    return False


def _refuse_links(folder: Path, writes_model: bool, first_step: int) -> None:
    """Refuse links under a run's file names to files elsewhere, which would be overwritten."""
    names = (*REPORT_FILES, *(MODEL_FILES if writes_model else ()))
    inside = _in_checkpoints(folder, first_step) if writes_model else ()
    for path in (*_present(folder, names), *inside):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link, and its target would be overwritten: remove it first")
    lock = folder / LOCK_FILE
    # Empty while its process writes its name.
    text = _beginning(lock)
    is_ours = not text or text.startswith(LOCKED_BY.encode())
    if lock.is_file() and (lock.stat().st_nlink > 1 or not is_ours):
        _refuse(lock)


def _present(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder with such names, and links, also broken ones."""
    inside = {pattern.partition("/")[0] for pattern in patterns if "/" in pattern}
    indices = [index for index in (folder, *(folder / name for name in inside)) if index.is_dir()]
    # `glob` omits broken links.
    names = {path.relative_to(folder).as_posix(): path for index in indices for path in index.iterdir()}
    named = [path for name, path in sorted(names.items()) if any(fnmatchcase(name, each) for each in patterns)]
    return [path for path in named if path.is_symlink() or path.is_file()]


def _in_checkpoints(folder: Path, first_step: int) -> Iterator[Path]:
    """Yield linked checkpoints from a step on, and the files in the others."""
    # No run writes one without a step, such as a link to the best.
    for checkpoint in (each for each in checkpoints_in(folder) if step_of(each) >= first_step):
        if checkpoint.is_symlink():
            yield checkpoint
        else:
            yield from (path for path in checkpoint.rglob("*") if path.is_symlink() or path.is_file())


def _begins_with(path: Path, line: str) -> bool:
    return _beginning(path).decode(errors="replace").partition("\n")[0].strip() == line


def _beginning(path: Path, most: int = 4096) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(most)


def _refuse(path: Path, note: str = "") -> None:
    raise InputError(f"{path} is not hfllm's and would be overwritten{note}: move it or choose another --output_dir")
