"""Reports are whole or not there, and plots are pictures."""

import json

import pytest

from hfllm.outputs.report import Bars, Plot, Report, plot_history, read_report, write_atomically


def make(**overrides):
    values = {"stage": "demo", "arguments": {"seed": 0}, "metrics": {"loss": 1.5}, "wall_seconds": 2.0}
    return Report(**{**values, **overrides})


def test_report_files(tmp_path):
    plot = Plot("title", "x", "y", {"one": ([1, 2], [3.0, 4.0]), "none": ([], [])})
    rows = [{"prompt": "a | b\nc", "after": 0.5}]
    bars = Bars("title", "x", {"one": 3, "two": 1.5}, {"one": "three"})
    make(
        curves={
            "loss": plot,
            "bars": bars,
            "no_bars": Bars("t", "x", {}),
            "empty": Plot("t", "x", "y", {"none": ([], [])}),
        },
        tables={"Samples": rows},
    ).write(tmp_path)
    report = read_report(tmp_path)
    assert report["metrics"] == {"loss": 1.5}
    assert report["artifacts"] == {"loss": "loss.png", "bars": "bars.png"}
    assert report["environment"]["torch"]
    for name in ("loss.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| a \\| b / c | 0.5   |" in (tmp_path / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "loss.png", "bars.png"}


def test_points_and_logarithmic_axes(tmp_path):
    from matplotlib import pyplot

    drawn = {}
    plot = Plot("t", "x", "y", {"law": ([1, 10], [2.0, 1.0])}, points={"runs": ([1, 10], [2.1, 0.9])}, xscale="log")
    close = pyplot.close
    try:
        pyplot.close = lambda figure: drawn.update(axes=figure.axes[0])
        assert plot.draw(tmp_path / "plot.png")
    finally:
        pyplot.close = close
    line, points = drawn["axes"].lines
    assert drawn["axes"].get_xscale() == "log" and drawn["axes"].get_yscale() == "linear"
    assert points.get_linewidth() == 0 and line.get_linewidth() > 0 and line.get_color() == points.get_color()
    pyplot.close(drawn["axes"].figure)
    assert Plot("t", "x", "y", {}, points={"runs": ([1], [2])}).draw(tmp_path / "points.png")
    assert not Plot("t", "x", "y", {}, points={"runs": ([], [])}).draw(tmp_path / "none.png")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, json.dumps({"old": 1}))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "half")
    assert json.loads(path.read_text()) == {"old": 1}


def test_no_report_is_none(tmp_path):
    assert read_report(tmp_path) is None


def nested(depth):
    return f'{{"stage": "a", "arguments": {{"b": {"[" * depth + "]" * depth}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "not JSON", "{}", '{"stage": "a"}', '{"stage": "a", "arguments": []}'),
        pytest.param(nested(100_000), id="deep"),
        # Python can read this, and not write it again.
        pytest.param(nested(400), id="less deep"),
        pytest.param(f'{{"stage": "a", "arguments": {{"b": {"9" * 5000}}}}}', id="digits"),
    ],
)
def test_the_report_of_another_program_is_none(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    assert read_report(tmp_path) is None


def test_a_step_that_is_evaluated_twice_is_one_point():
    """As at the start of a resumed run."""
    history = [{"step": 2, "eval_loss": 2.5}, {"step": 4, "eval_loss": 2.0}, {"step": 4, "eval_loss": 2.1}]
    plot = plot_history(history, {"eval": "eval_loss"}, title="t", xlabel="x", ylabel="y")
    assert plot.lines == {"eval": ([2, 4], [2.5, 2.1])}


def test_history_becomes_lines():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}, {"step": 3, "loss": 2.0}]
    plot = plot_history(history, {"train": "loss", "eval": "eval_loss"}, title="t", xlabel="x", ylabel="y")
    assert plot.lines == {"train": ([1, 3], [3.0, 2.0]), "eval": ([2], [2.5])}


def test_what_changed_comes_first_and_the_loss_last(tmp_path):
    from hfllm.outputs.figures import change_of

    plot = Plot("Reward of it", "x", "y", {"one": ([1, 2], [3.0, 4.0])})
    samples = [
        {"prompt": f"p{place}", "before": "<b>bad", "after": "g" * 900, "gold after": "1"} for place in range(5)
    ]
    report = make(
        metrics=change_of("score", [0.0, 0.1, 0.2], [1.0, 1.1, 1.3]),
        tables={"The same prompts": samples, "Wide": [{"a": 1}]},
        curves={"rewards": plot, "loss": Plot("Loss", "x", "y", {"one": ([1], [2.0])})},
        summary="It rose.",
        next_steps=["load()"],
        given={"seed": 0},
    )
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    parts = [
        "It rose.",
        "| score ",
        "Noise:",
        "<details>",
        "Reward of it",
        "## The same prompts",
        "## Wide",
        "![Loss]",
    ]
    places = [text.index(part) for part in [*parts, "## Next", "Given:", "<details><summary>0"]]
    assert places == sorted(places)
    assert "&lt;b>bad" in text and "g" * 499 + "…" in text and "g" * 500 not in text


def test_the_end_of_a_run_is_short(tmp_path, capsys):
    said = {"before": "no", "after": "yes", "gold after": "1"}
    samples = [{"prompt": f"p{place}\nsecond line", **said} for place in range(5)]
    report = make(tables={"Samples": samples, "Wide": [{"a": 1}]}, summary="It rose.", artifacts={"model": "."})
    report.write(tmp_path)
    report.print(without=["Wide"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["demo: done in 2 s", "It rose."]
    shown = [line for line in lines if line.startswith("  prompt")]
    assert shown == [f"  prompt  p{place} / second line" for place in range(3)]
    assert "  after   yes  [1]" in lines and "  before  no" in lines
    assert lines[-1] == f"In {tmp_path}: the model, README.md (its card), report.md, report.json"
    assert "Wide" not in lines
