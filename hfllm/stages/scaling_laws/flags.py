"""Scaling laws: the flags and their checks."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from hfllm.data.loading import ON_WORLD, DataArguments
from hfllm.data.sources import PYDOC
from hfllm.errors import refuse_if
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import POSITIVE, SEED, Fact, Range, Refused, at_least, check_flags, flag
from hfllm.outputs.report import CHANGED, CONTENTS
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file

GRID = tuple(f"{width}x2:400000,800000,1600000" for width in (16, 24, 32, 48))
COUNTS = {"total": "parameters", "non_embedding": "parameters_non_embedding"}
PROBE_FLAGS = ("probe", "probe_questions", "probe_shots")
NO_TABLE = Fact(lambda flags: not flags.runs, "it is for --runs")
FROM_TABLE = NO_TABLE.absent("it is for the grid, which --runs replaces")
NO_PROBE = Fact(lambda flags: not flags.probe, "it needs --probe")


@dataclass(frozen=True)
class ScalingArguments(DataArguments, RemoteCodeArguments):
    """Runs to fit, or a grid of runs to train."""

    dataset_name: str = flag(
        PYDOC,
        "Texts of the grid: 'pydoc', the documentation of this Python, 'world' (embedded), a local file "
        "or folder, or a dataset id on the Hub.",
    )
    runs: str | None = flag(None, "CSV file of finished runs; without it a grid is trained.")
    parameters_column: str | None = flag(None, "Its column of N, if not a common name.", never=NO_TABLE)
    tokens_column: str | None = flag(None, "Its column of D, if not a common name.", never=NO_TABLE)
    loss_column: str | None = flag(None, "Its column of losses, if not a common name.", never=NO_TABLE)
    held_out_share: float = flag(
        0.1,
        "Share of the file's runs, those with the most compute, to predict.",
        takes=Range("a share between 0 and 1", lambda value: 0 < value < 1),
        never=NO_TABLE,
    )
    outliers: str = flag(
        "keep",
        "What to do with the file's runs that are far from the law of the others: 'keep' and name them, "
        "or 'drop' them.",
        choices=["keep", "drop"],
        never=NO_TABLE,
    )
    resamples: int = flag(1000, "Bootstrap resamples behind the 95%% intervals.", takes=at_least(10))
    huber_delta: float = flag(1e-3, "Error in log loss above which the Huber loss is linear.", takes=POSITIVE)
    isoflop_tolerance: float = flag(
        0.05, "How far the compute of runs may lie above or below their IsoFLOP budget, as a share.", takes=POSITIVE
    )
    budgets: list[float] | None = flag(
        None, "FLOPs to divide between N and D in the report; by default ten times the largest run's."
    )
    grid: list[str] = flag(
        GRID, "Models and their training tokens: WIDTHxLAYERS:TOKENS,... once per model.", never=FROM_TABLE
    )
    held_out_run: str = flag(
        "64x3:2400000",
        "The run to predict, WIDTHxLAYERS:TOKENS, with more compute than any of the grid.",
        never=FROM_TABLE,
    )
    count_parameters: str = flag(
        "total",
        "N of the grid: 'total', Chinchilla's, or 'non_embedding', Kaplan's. runs.csv has both.",
        choices=list(COUNTS),
        never=FROM_TABLE,
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of `hfllm pretrain` for all runs of the grid.", never=FROM_TABLE
    )
    probe: bool = flag(
        False,
        "Ask each size the world's questions, and plot exact match beside log-likelihood.",
        never=(FROM_TABLE, ON_WORLD.absent("its questions need --dataset_name world")),
    )
    probe_questions: int = flag(50, "Questions of each task family.", takes=at_least(1), never=NO_PROBE)
    probe_shots: int = flag(1, "Solved examples before a few-shot question.", takes=at_least(1), never=NO_PROBE)
    seed: int = flag(42, "Seed of the grid's data and weights, and of the bootstrap.", takes=SEED)
    output_dir: str = flag("outputs/scaling_laws", "Where runs, models and report go.")

    refused: ClassVar[Refused] = {
        **dict.fromkeys([item.name for item in fields(DataArguments)], FROM_TABLE),
        "world_seed": (FROM_TABLE, ON_WORLD.absent("it is for --dataset_name world")),
        "max_samples": (FROM_TABLE, ON_WORLD.because("the world is as large as the runs need")),
    }

    def pretrain_flags(self) -> list[str]:
        """Return the flags of `hfllm pretrain` for all runs of the grid."""
        flags = ["--config", str(settings_file("pretrain/grid.yaml"))]
        flags += ["--config", self.pretrain_config] if self.pretrain_config else []
        flags += ["--seed", str(self.seed)]
        of_data = ("dataset_name", "dataset_train_split", "dataset_config", "dataset_revision", "max_samples")
        for name in (*of_data, "world_seed", "dataset_streaming"):
            if (value := getattr(self, name)) is not None:
                flags += [f"--{name}", str(value)]
        return flags + (["--column_mapping", *self.column_mapping] if self.column_mapping else [])

    def table_files(self) -> dict[str, Any]:
        """Return the times and contents of the files of runs and flags, for `Stage`."""
        files = {name: Path(getattr(self, name) or "") for name in ("runs", "pretrain_config")}
        files = {name: path for name, path in files.items() if path.is_file()}
        times = {f"{name}{CHANGED}": path.stat().st_mtime_ns for name, path in files.items()}
        return times | {f"{name}{CONTENTS}": file_fingerprint([("", path)], True) for name, path in files.items()}


def check(script_args: ScalingArguments) -> None:
    """Refuse flags without effect, and numbers out of range."""
    check_flags(script_args)
    for budget in script_args.budgets or []:
        refuse_if(not 0 < budget < float("inf"), f"--budgets {budget}: FLOPs must be above 0 and finite")
