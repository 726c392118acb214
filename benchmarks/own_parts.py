"""What the benchmarks on a model of one's own share: rows that stay, recipes by name, and tables with seeds beside."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hfllm.errors import InputError, refuse_if
from hfllm.outputs.figures import shown
from hfllm.outputs.report import write_atomically
from hfllm.runs.recipes import load_recipe

# They change no row: seeds have folders of their own, and each run checks its settings itself.
OF_NO_ROW = ("seeds", "output_dir")


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that all of them have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, takes_others: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and with `takes_others` those of recipes."""
    args, others = parser.parse_known_args(argv)
    if others and not takes_others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if own := [word for word in others if word.partition("=")[0] in ("--seed", "--dataset_name")]:
        parser.error(f"{own[0]}: set by the benchmark for each of --seeds")
    return args, others


def claim(args: argparse.Namespace) -> None:
    """Write the flags of all rows into the output folder, or refuse it when its rows are of others."""
    # YAML files are settings of runs, which know their own.
    named = {name: value for name, value in vars(args).items() if name not in OF_NO_ROW and "config" not in name}
    folder, text = Path(args.output_dir), json.dumps(named, indent=1) + "\n"
    file = folder / "settings.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else named
    for name, value in named.items():
        reason = f"--output_dir {folder} holds rows of --{name} {before.get(name)}, not {value}: name another folder"
        refuse_if(before.get(name) != value, reason)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows, one a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def columns_of(row: Mapping[str, object], path: str, *names: str) -> list[str]:
    """Return columns of a row, or say which one its file lacks."""
    if missing := [name for name in names if name not in row]:
        raise InputError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(map(str, row))}")
    return [str(row[name]) for name in names]


def run_recipe(name: str, *words: object) -> dict[str, float]:
    """Run a recipe with these words as its command line, and return its metrics."""
    module = load_recipe(name)
    return module.main(*module.parse([str(word) for word in words]))


def with_config(path: str | None, flag: str = "--config") -> list[str]:
    """Return the words that name a YAML file, none without one."""
    return [flag, path] if path else []


def table_of(
    titles: Sequence[str],
    lines: Iterable[tuple[Sequence[str], str]],
    results: Mapping[int, Mapping[str, float]],
) -> str:
    """Return a table with a column for each seed.

    Args:
        titles: of the first columns.
        lines: the first cells of each line, and its metric; a metric of no seed is left out.
        results: the metrics of each seed.
    """
    rows = [[*titles, *(f"seed {seed}" for seed in results)], ["-"] * (len(titles) + len(results))]
    for cells, name in lines:
        if any(name in metrics for metrics in results.values()):
            rows.append([*cells, *(shown(each, name) if name in each else "-" for each in results.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
