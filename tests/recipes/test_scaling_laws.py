"""recipes/scaling_laws.py: a table of runs to a report, and a grid that is trained once, predicted and probed."""

import csv
import json

import numpy
import pytest
import scaling_laws
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfllm.errors import InputError
from hfllm.runs.recipes import settings_file
from hfllm.scaling.laws import EPOCH
from hfllm.stages.scaling_laws.build import COLUMNS, Grid, GridRun, embedding_parameters

METRICS = {
    *("E", "A", "B", "alpha", "beta", "objective", "runs", "fit_error", "parameters_exponent"),
    *("tokens_per_parameter", "held_out_runs", "held_out_error", "held_out_error_max", "held_out_compute_factor"),
    *("held_out_error_chinchilla", "held_out_error_kaplan"),
    *("objective_without_held_out_chinchilla", "objective_without_held_out_kaplan"),
}


def run(*argv):
    return scaling_laws.main(*scaling_laws.parse([str(word) for word in argv]))


@pytest.fixture
def table(tmp_path):
    """Forty runs of five budgets that follow Epoch's law with a thousandth of noise."""
    rng, path = numpy.random.default_rng(0), tmp_path / "runs.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["N", "D", "loss"])
        for compute in numpy.logspace(18, 21, 5):
            for factor in numpy.logspace(-0.6, 0.6, 8):
                size = EPOCH.optimal(compute).parameters * factor
                tokens = compute / 6 / size
                writer.writerow([size, tokens, EPOCH.loss(size, tokens) * numpy.exp(1e-3 * rng.standard_normal())])
    return path


@pytest.mark.slow
def test_a_table_becomes_a_report(table, tmp_path, capsys):
    flags = ["--runs", table, "--resamples", 30, "--held_out_share", 0.2, "--budgets", 5.76e23, "--output_dir"]
    metrics = run(*flags, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(metrics) >= METRICS and report["metrics"] == metrics and report["stage"] == "scaling_laws"
    assert metrics["runs"] == 40 and metrics["held_out_runs"] == 8
    assert metrics["held_out_error"] < 0.005 and metrics["parameters_exponent"] == pytest.approx(0.513, abs=0.03)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "2, 5 IsoFLOP parabolas" in text and "Kaplan et al. 2020" in text and "5.76e+23" in text
    for name in ("loss_by_compute", "expected_and_measured", "optimal_size", "isoflops"):
        assert (tmp_path / "out" / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run(*flags, tmp_path / "out") == metrics
    assert "already done" in (printed := capsys.readouterr().out) and "remove report.json there" in printed
    with pytest.raises(InputError, match=r"finished run with resamples=30, this one has resamples=20"):
        run(*flags, tmp_path / "out", "--resamples", 20)


@pytest.mark.slow
def test_rows_far_off_the_law_are_named_and_left_out_on_request(table, tmp_path, capsys):
    """Two losses a fifth too high: they move the fit, and a warning says which they are and how far."""
    flags = ["--resamples", 10, "--held_out_share", 0.2, "--runs", table, "--output_dir"]
    clean = run(*flags, tmp_path / "clean")
    assert clean["outliers"] == 0 and "robust" not in capsys.readouterr().out
    rows = list(csv.reader(table.open()))
    for line in (2, 5):
        rows[line - 1][2] = float(rows[line - 1][2]) * 1.2
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    kept = run(*flags, tmp_path / "kept")
    printed = capsys.readouterr().out
    warning = (
        f"scaling_laws: {table}: 2 of 40 runs (lines 2, 5) are more than 6 robust standard deviations off the law"
    )
    assert warning in printed and "They are kept: --outliers drop does not." in printed
    assert kept["outliers"] == 2 and kept["runs"] == 40
    dropped = run(*flags, tmp_path / "dropped", "--outliers", "drop")
    assert "They are left out." in capsys.readouterr().out
    assert dropped["outliers"] == 2 and dropped["runs"] == 38
    assert "Runs far from the law of the others" in (tmp_path / "dropped" / "report.md").read_text()
    # Without them the law is nearly that of the clean table.
    for name in ("E", "alpha", "beta"):
        assert abs(dropped[name] / clean[name] - 1) <= abs(kept[name] / clean[name] - 1) + 0.02, name
    with pytest.raises(InputError, match="--outliers cannot be used here: it is for --runs"):
        run("--outliers", "drop", "--output_dir", tmp_path / "x")


@pytest.mark.slow
def test_held_out_runs_do_not_enter_the_law_that_predicts_them(table, tmp_path):
    flags = ["--runs", table, "--resamples", 10, "--held_out_share", 0.2, "--output_dir"]
    honest = run(*flags, tmp_path / "one")
    rows = list(csv.reader(table.open()))
    order = sorted(range(1, 41), key=lambda row: float(rows[row][0]) * float(rows[row][1]))
    for row in order[-8:]:
        rows[row][2] = float(rows[row][2]) * 1.1
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    shifted = run(*flags, tmp_path / "two")
    for form in ("chinchilla", "kaplan"):
        name = f"objective_without_held_out_{form}"
        assert shifted[name] == honest[name]
    # What is expected stays the same: the error is that of losses a tenth higher.
    assert shifted["held_out_error"] == pytest.approx(1 - (1 + 0) / 1.1, abs=honest["held_out_error"] + 1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "32x1:1000"], "--grid cannot be used here: it is for the grid, which --runs replaces"),
        (["--probe", "true"], "--probe cannot be used here: it is for the grid"),
        (["--dataset_name", "texts.jsonl"], "--dataset_name cannot be used here"),
        (["--held_out_share", "1.5"], "--held_out_share 1.5: expected a share between 0 and 1"),
        (["--resamples", "2"], "--resamples 2: expected at least 10"),
        (["--huber_delta", "0"], "--huber_delta 0.0: expected a number above 0"),
        (["--held_out_share", "nan"], "--held_out_share nan: expected a share"),
        (["--huber_delta", "inf"], "--huber_delta inf: expected a number"),
        (["--isoflop_tolerance", "nan"], "--isoflop_tolerance nan: expected a number"),
        (["--budgets", "-1"], "--budgets -1.0: FLOPs must be above 0 and finite"),
        (["--budgets", "1e20", "nan"], "--budgets nan: FLOPs must be above 0 and finite"),
        (["--budgets", "inf"], "--budgets inf: FLOPs must be above 0 and finite"),
        (["--seed", "-1"], "--seed -1: expected a whole number from 0 to 4294967295"),
        (["--loss_column", "final"], "no column 'final' for losses; it has 'N', 'D', 'loss'"),
        (["--run", "x"], "unknown flag 'run'; did you mean 'runs'"),
    ],
)
def test_what_cannot_work_with_a_table_is_refused(table, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("hfllm.stages.scaling_laws.report.fit_law", lambda *args: pytest.fail("fitted first"))
    with pytest.raises(InputError, match=message):
        run("--runs", table, "--output_dir", tmp_path / "out", *flags)


def test_bad_tables_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("N,D,loss\n" + "".join(f"{n}e6,{n}e8,{4 - n / 10}\n" for n in range(1, 7)))
    with pytest.raises(InputError, match=r"bad\.csv, without its 1 largest run\(s\): 5 run\(s\): a law of 5 coeff"):
        run("--runs", path, "--output_dir", tmp_path / "out")
    path.write_text("N,D,loss,loss\n1e6,1e8,3,2\n")
    with pytest.raises(InputError, match=r"bad\.csv: several columns for losses: 'loss', 'loss'; keep one"):
        run("--runs", path, "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match=r"bad\.csv: column 'loss' for losses comes 2 times"):
        run("--runs", path, "--output_dir", tmp_path / "out", "--loss_column", "loss")
    path.write_text("N,d,loss,D\n1e6,1e8,3,2\n")
    with pytest.raises(InputError, match=r"bad\.csv: several columns for tokens: 'd', 'D'"):
        run("--runs", path, "--output_dir", tmp_path / "out")
    path.write_text("N,D,loss\n1e6,1e8,3.5,\n1e6,1e8,3,21\n")
    with pytest.raises(InputError, match=r"bad\.csv, line 3: 4 cells under 3 columns; decimals need a point"):
        run("--runs", path, "--output_dir", tmp_path / "out")
    path.write_text("N,D,loss\n1e6,1e8,-3\n")
    with pytest.raises(InputError, match=r"bad\.csv, line 2, column 'loss': '-3'"):
        run("--runs", path, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_a_fit_to_all_runs_that_is_refused_names_the_file(table, tmp_path, monkeypatch):
    from hfllm.stages.scaling_laws import report

    fit_law, fits = report.fit_law, []

    def refused(runs, delta):
        fits.append(len(runs))
        if len(fits) == 2:
            raise InputError("no law")
        return fit_law(runs, delta)

    monkeypatch.setattr(report, "fit_law", refused)
    with pytest.raises(InputError, match=r"runs\.csv: no law"):
        run("--runs", table, "--resamples", 10, "--output_dir", tmp_path / "out")
    assert fits == [36, 40]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held_out_share", "0.2"], "--held_out_share cannot be used here: it is for --runs"),
        (["--probe_shots", "2"], "--probe_shots cannot be used here: it needs --probe"),
        (
            ["--grid", "32x1:1000,2000,3000", "32x2:1000,2000,3000"],
            r"2 size\(s\), 3 length\(s\) and 6 run",
        ),
        (["--grid", "32x1:1000,2000,3000", "32x2:1000", "48x1:1000"], r"3 length\(s\) and 5 run\(s\)"),
        (["--grid", "32"], "--grid '32': expected WIDTHxLAYERS:TOKENS,... as in 64x3:250000,500000"),
        (["--grid", "32x1:many"], "--grid '32x1:many': expected WIDTHxLAYERS:TOKENS"),
        (["--grid", "33x1:1000"], "a width must be a multiple of 32, or even and below 64"),
        (["--grid", "72x1:1000"], "a width must be a multiple of 32, or even and below 64"),
        (["--grid", "32x1:1000,1000"], "a run comes twice"),
        (["--held_out_run", "48x2:1600000"], "a run comes twice"),
        (["--held_out_run", "64x2:1,2"], "--held_out_run '64x2:1,2': expected a single number of tokens"),
        (
            [
                "--grid",
                *(f"{size}:1000,2000,4000" for size in ("32x1", "32x2", "48x2")),
                *("--held_out_run", "32x1:3000", "--dataset_name", "world"),
            ],
            r"--held_out_run 32x1:3000 takes \S+ FLOPs, no more than the grid's 48x2-4000 with",
        ),
        (["--max_samples", "10", "--dataset_name", "world"], "--max_samples cannot be used here"),
        (["--world_seed", "3"], "--world_seed cannot be used here: it is for --dataset_name world"),
        (["--probe", "true"], "--probe cannot be used here: its questions need --dataset_name world"),
    ],
)
def test_what_cannot_work_with_a_grid_is_refused_before_training(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("training started"))
    with pytest.raises(InputError, match=message):
        run("--output_dir", tmp_path / "out", *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A grid of nine tiny runs and a larger one, from nothing."""
    folder = tmp_path_factory.mktemp("grid")
    flags = ["--grid", *(f"{size}:6000,9000,13000" for size in ("32x1", "32x2", "48x2"))]
    flags += ["--held_out_run", "64x2:18000", "--dataset_name", "world", "--resamples", 10, "--output_dir", folder]
    return folder, flags, run(*flags)


@pytest.mark.slow
def test_a_grid_is_trained_fitted_and_tested_on_a_larger_run(trained):
    folder, _, metrics = trained
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 10 and rows[-1]["name"] == "64x2-18000"
    assert set(metrics) >= METRICS and metrics["runs"] == 10 and metrics["held_out_runs"] == 1
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / row["name"])
        assert int(row["parameters"]) == sum(weight.numel() for weight in model.parameters())
        embeddings = model.get_input_embeddings().weight.numel()
        assert int(row["parameters_non_embedding"]) == int(row["parameters"]) - embeddings
        # Whole rows of 256 tokens, nearly full.
        assert 0.9 * (int(row["name"].split("-")[1]) - 256) < int(row["tokens"]) <= int(row["name"].split("-")[1])
        assert float(row["epochs"]) <= 1
    by_tokens = [[float(row["loss"]) for row in rows if row["name"].startswith(size)] for size in ("32x1-", "48x2-")]
    assert all(losses == sorted(losses, reverse=True) for losses in by_tokens)


@pytest.mark.slow
def test_a_probe_comes_on_top_without_training(trained, monkeypatch, tmp_path):
    folder, flags, _ = trained
    run(*flags)
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("training started"))
    probe = ["--probe", "true", "--probe_questions", 2, "--probe_shots", 2]
    metrics = run(*flags, *probe)
    for kind in ("zero_shot", "few_shot", "chain_of_thought"):
        assert 0 <= metrics[f"{kind}_exact_match"] <= metrics[f"{kind}_token_match"] <= 1
        assert metrics[f"{kind}_log_likelihood"] < 0 <= metrics[f"{kind}_log_likelihood_sharpest_step"] <= 1
    report = json.loads((folder / "report.json").read_text())
    assert {"probe_exact_match_by_prompt", "probe_log_likelihood_by_family"} <= set(report["artifacts"])
    assert run(*flags, *probe) == run(*flags) == metrics


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(trained, capsys):
    folder, flags, metrics = trained
    (folder / "report.json").unlink()
    lines = (folder / "runs.csv").read_text().splitlines()
    (folder / "runs.csv").write_text("\n".join(line for line in lines if not line.startswith("32x2-9000")) + "\n")
    again = run(*flags)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert [line.split(":")[0] for line in printed] == ["run 32x2-9000", "run 64x2-18000"]
    assert "are expected (95% interval" in printed[1]
    better = min("chinchilla", "kaplan", key=lambda form: metrics[f"objective_without_held_out_{form}"])
    assert metrics["held_out_error"] == metrics[f"held_out_error_{better}"]
    assert again == pytest.approx(metrics, rel=1e-6)
    with pytest.raises(InputError, match="holds runs with"):
        (folder / "report.json").unlink()
        run(*flags, "--world_seed", 1)


@pytest.mark.slow
def test_your_own_text_is_repeated_when_it_is_short(tmp_path):
    texts = tmp_path / "texts.jsonl"
    words = ["the", "old", "owl", "walks", "by", "a", "red", "house", "and", "the", "small", "fox", "sings"]
    rng = numpy.random.default_rng(0)
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 30))}) + "\n" for _ in range(80)))
    flags = ["--config", str(settings_file("pretrain/grid.yaml")), "--dataset_name", str(texts), "--vocab_size", "320"]
    grid = Grid(tmp_path / "out", flags, longest=8192)
    row = grid.train(GridRun(32, 1, 8192))
    packed = grid._prepared()[1]
    assert row["epochs"] == pytest.approx(32 / len(packed), abs=1e-3) and row["epochs"] > 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "models" / "32x1-8192").vocab_size <= 320


@pytest.mark.slow
def test_what_other_flags_left_before_the_first_run_is_made_anew(tmp_path):
    flags = ["--config", str(settings_file("pretrain/grid.yaml")), "--dataset_name", "world"]

    def prepared(longest, *more):
        return Grid(tmp_path / "out", [*flags, *more], longest)._prepared()

    small, rows, _ = prepared(2048, "--vocab_size", "400")
    larger, _, _ = prepared(2048, "--vocab_size", "500")
    assert len(small) == 400 and len(larger) == 500
    _, more, _ = prepared(8192, "--vocab_size", "400")
    assert len(rows) >= 8 and len(more) >= 32


def test_embedding_parameters_are_the_tables_and_an_untied_head(make_model):
    tied, untied = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    table = tied.get_input_embeddings().weight.numel()
    assert embedding_parameters(tied) == table and embedding_parameters(untied) == 2 * table
    learned = make_model(tie_word_embeddings=True, position_embedding_type="learned")
    assert embedding_parameters(learned) > table
