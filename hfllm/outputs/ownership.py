"""Tell the files of an output folder that a run of ours wrote from those of the user or of another program.

A folder in which a run has begun has a record, `.hfllm.files`, and once it has finished the checksums of what it wrote
are in it, as `sha256sum --check .hfllm.files` compares them. What has the name of a file that a run writes and is not
in the record, or is no longer what the record says, is someone else's: it is refused before anything is written.
Folders of versions that wrote no record are known by their report, their card or their checkpoints.
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
from hfllm.outputs.checkpoints import STATE_FILE, checkpoints_in, record_of, state_of, step_of
from hfllm.outputs.checksums import checksums_of, read_checksums, write_lines
from hfllm.outputs.files import CARD, MERGED_FROM, PROCESSOR, SETTINGS, TOKENIZER
from hfllm.outputs.report import PLOTTED_BY, REPORT_FILE, read_report, write_atomically

# What the cards contain that Trainer, TRL and PEFT write while they save.
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
    *("gold_by_*", "drift"),
    *("sensitivity_*", "probe_*_by_*", "loss_by_compute", "expected_and_measured", "optimal_size", "isoflops"),
)
# The record of a folder, and its first line, which `sha256sum` passes over.
RECORD, HEADER = ".hfllm.files", "# what hfllm wrote here"
# Held by a run that is writing, and left behind by one that was killed: see hfllm/runs/lock.py.
LOCK_FILE, LOCKED_BY = ".hfllm.lock", "process "
# What a run that saves a model writes into its folder, besides its card, report and plots, and also into those folders
# in it that no other stage owns.
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
    *("completions", RECORD, LOCK_FILE),
)
# What decides a model's answers: other files, such as its card, are for readers, who may edit them.
DECISIVE = ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors")
# Finished models that this process has found whole: of each its folder, its record and the state of its files.
_whole: set[tuple[object, ...]] = set()


def refuse_foreign_files(
    folder: str | Path, stage: str, writes_card: bool, writes_model: bool | None = None, first_step: int = 0
) -> None:
    """Refuse to write over files that no run of ours has written, or through links.

    Args:
        stage: the stage that will write there.
        writes_card: whether it writes a model card.
        writes_model: whether it writes a model or a tokenizer; by default whether it writes a card.
        first_step: of the run, where it resumes; checkpoints before it are not written, and may be links.

    Raises:
        InputError: naming the first such file.
    """
    folder = Path(folder)
    writes_model = writes_card if writes_model is None else writes_model
    _refuse_links(folder, writes_model, first_step)
    has_report = read_report(folder) is not None
    if not has_report and (folder / REPORT_FILE).exists():
        _refuse(folder / REPORT_FILE, " (or it is damaged)")
    summary = folder / "report.md"
    # A run that was killed before report.json has this one and its plots.
    has_summary = _begins_with(summary, f"# {stage}")
    if not has_report and not has_summary and summary.exists():
        _refuse(summary)
    if writes_card and (folder / CARD).exists() and not is_own_card(folder / CARD):
        _refuse(folder / CARD)
    is_recorded = _begins_with(folder / RECORD, HEADER)
    if not is_recorded and (folder / RECORD).exists():
        _refuse(folder / RECORD, " (or it is damaged)")
    if writes_model and not (is_recorded or has_report or has_summary or _is_of_an_earlier_version(folder)):
        for path in _present(folder, MODEL_FILES):
            _refuse(path)
    if has_report or has_summary or is_recorded:
        return
    for plot in (path for name in PLOTS for path in sorted(folder.glob(f"{name}.png"))):
        if PLOTTED_BY.encode() not in _beginning(plot):
            _refuse(plot)


def refuse_changed_files(folder: str | Path) -> None:
    """Refuse to write over files that came or changed after the run that finished there; all of them are read.

    Raises:
        InputError: naming the first such file.
    """
    folder = Path(folder)
    recorded = _recorded(folder)
    if not recorded:
        return
    present = {path.relative_to(folder).as_posix(): path for path in _present(folder, MODEL_FILES)}
    for name, path in present.items():
        if name not in recorded:
            _refuse(path, f": it is not in {RECORD}, which names what was written there")
    if changed := _changed(folder, recorded, tuple(recorded)):
        _refuse(folder / changed, f": it was changed since it was written (its checksum is not that of {RECORD})")


def claim(folder: str | Path, first_step: int = 0) -> None:
    """Note that a run of ours begins in a folder, so that what is there from now on is ours.

    Files that have another name elsewhere (hard links, as backups make them) become files of their own, since they may
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
    """Remove the record of a folder that holds nothing else, as after a run that was refused."""
    folder = Path(folder)
    if [path.name for path in folder.iterdir()] == [RECORD]:
        (folder / RECORD).unlink()


def write_record(folder: str | Path) -> None:
    """Write the checksums of what a finished run has written into its folder, without checkpoints and other stages."""
    folder = Path(folder)
    kept = (path for path in _present(folder, (*MODEL_FILES, *REPORT_FILES)) if path.name not in (RECORD, LOCK_FILE))
    # A card is for readers, who may edit it.
    files = [path for path in kept if path.name != CARD]
    write_lines(folder / RECORD, folder, files, f"{HEADER}\n")


def damage_of_finished(folder: str | Path) -> str | None:
    """Return which file of a finished model is not what its run wrote, in a line; `None` if all are, or nothing tells.

    What was removed is not damaged. Within a process files that were whole are read again only when their state has
    changed: the stages of a chain ask one by one.
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
    """Return whether a card is one of ours, or a draft that a trainer has left."""
    text = _beginning(path, 1 << 20).decode(errors="replace")
    return MARKER in text or any(sign in text for sign in DRAFTS)


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
    """Return the first file of a record that is there, matches a pattern and is another one now."""
    names = _comparable(folder, recorded, patterns)
    found = checksums_of(folder / name for name in names)
    return next((name for name, checksum in zip(names, found, strict=True) if recorded[name] != checksum), None)


def _comparable(folder: Path, recorded: dict[str, str], patterns: tuple[str, ...]) -> list[str]:
    """Return the names in a record that match a pattern and whose files are there."""
    return [
        name for name in recorded if any(fnmatchcase(name, each) for each in patterns) and (folder / name).is_file()
    ]


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced; the last two are times in nanoseconds."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_of_an_earlier_version(folder: Path) -> bool:
    """Return whether a folder without a record is that of a run of ours: by its card, its lock or its checkpoints."""
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
    """Refuse names that a run writes and that are links to files elsewhere, which would be overwritten."""
    names = (*REPORT_FILES, *(MODEL_FILES if writes_model else ()))
    inside = _in_checkpoints(folder, first_step) if writes_model else ()
    for path in (*_present(folder, names), *inside):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link, and its target would be overwritten: remove it first")
    lock = folder / LOCK_FILE
    is_ours = _beginning(lock) == b"" or _beginning(lock).startswith(LOCKED_BY.encode())
    if lock.is_file() and (lock.stat().st_nlink > 1 or not is_ours):
        _refuse(lock)


def _present(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder with such names, and links, also those that lead nowhere."""
    inside = {pattern.partition("/")[0] for pattern in patterns if "/" in pattern}
    places = [place for place in (folder, *(folder / name for name in inside)) if place.is_dir()]
    # `glob` leaves out links that lead nowhere.
    names = {path.relative_to(folder).as_posix(): path for place in places for path in place.iterdir()}
    named = [path for name, path in sorted(names.items()) if any(fnmatchcase(name, each) for each in patterns)]
    return [path for path in named if path.is_symlink() or path.is_file()]


def _in_checkpoints(folder: Path, first_step: int) -> Iterator[Path]:
    """Yield those checkpoints from a step on that are links, and the files in the others."""
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
