"""Tell the files of an output folder that a run of ours wrote from those of the user or of another program."""

from pathlib import Path

from hfllm.errors import InputError
from hfllm.outputs.card import MARKER
from hfllm.outputs.files import CARD
from hfllm.outputs.report import PLOTTED_BY, REPORT_FILE, read_report

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


def refuse_foreign_files(folder: str | Path, stage: str, writes_card: bool) -> None:
    """Refuse to write over files that no run of ours has written.

    Args:
        stage: the stage that will write there.
        writes_card: whether it writes a model card.

    Raises:
        InputError: naming the first such file.
    """
    folder = Path(folder)
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
    if has_report or has_summary:
        return
    for plot in (path for name in PLOTS for path in sorted(folder.glob(f"{name}.png"))):
        if PLOTTED_BY.encode() not in _beginning(plot):
            _refuse(plot)


def is_own_card(path: Path) -> bool:
    """Return whether a card is one of ours, or a draft that a trainer has left."""
    text = _beginning(path, 1 << 20).decode(errors="replace")
    return MARKER in text or any(sign in text for sign in DRAFTS)


def _begins_with(path: Path, line: str) -> bool:
    return _beginning(path).decode(errors="replace").partition("\n")[0].strip() == line


def _beginning(path: Path, most: int = 4096) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(most)


def _refuse(path: Path, note: str = "") -> None:
    raise InputError(f"{path} is not hfllm's and would be overwritten{note}: move it or choose another --output_dir")
