"""`hfllm evaluate` on questions about pictures: figures by hand, other pictures, resuming, and what is refused."""

import json

import evaluate
import pytest
from seeing_rows import WORDS, halves, make_processor, write_rows

import hfllm
from hfllm.data.images.rows import has_images
from hfllm.errors import InputError
from hfllm.evaluation.pictures import Asked, Part, Pictures, other_places
from hfllm.evaluation.suites.base import Subject
from hfllm.stages.evaluate import build


def run(output, *flags):
    return evaluate.main(*evaluate.parse(["--output_dir", str(output), "--max_new_tokens", "3", *map(str, flags)]))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twenty rows, and one without an answer."""
    path = write_rows(tmp_path_factory.mktemp("questions"), halves(20))
    with path.open("a", encoding="utf-8") as stream:
        stream.write('\n{"prompt": "which side", "completion": "", "image": "0.png"}')
    return path


def test_a_model_that_looks_is_told_from_one_that_guesses(monkeypatch):
    """One that says the bright side is always right, with other pictures by chance; scores by hand."""
    drawn = halves(40)
    questions = [
        Asked([{"role": "user", "content": [{"type": "image"}]}], [row["image"]], row["side"]) for row in drawn
    ]

    def looks(model, processor, prompts, images, max_new_tokens):
        lights = [(shown[0].getpixel((0, 0))[0], shown[0].getpixel((7, 0))[0]) for shown in images]
        return ["Left." if left > right else "right" for left, right in lights]

    monkeypatch.setattr("hfllm.evaluation.pictures.answer_pictures", looks)
    monkeypatch.setattr("hfllm.evaluation.pictures.check_template", lambda processor, name: None)
    monkeypatch.setattr(Subject, "__post_init__", lambda subject: None)
    monkeypatch.setattr(Subject, "check_numbers", lambda subject, text: None)
    suite = Pictures(lambda: [Part("", questions)])
    records = list(suite.judge(Subject("m", None, None, processor="any"), suite.items()))
    assert [record["scores"]["right"] for record in records] == [1.0] * 40
    others = other_places([asked.images for asked in questions])
    assert sorted(others) == list(range(40)) and all(other != place for place, other in enumerate(others))
    expected = [float(drawn[place]["side"] == drawn[other]["side"]) for place, other in enumerate(others)]
    assert [record["scores"]["right_other_pictures"] for record in records] == expected
    most = max(("left", "right"), key=[row["side"] for row in drawn].count)
    assert [record["scores"]["best_guess"] for record in records] == [float(row["side"] == most) for row in drawn]


@pytest.mark.parametrize(
    ("images", "moved"),
    [("aabbc", 5), ("aaab", 2), ("aaaa", 0), ("ab", 2), ("abcabcab", 8), ("", 0)],
)
def test_the_control_shows_other_pictures_and_no_own_one(images, moved):
    """Rows of one conversation have the same picture; two with none are no others of each other."""
    rows = [[name] for name in images] + [[], []]
    others = other_places(rows)
    assert sum(rows[other] != rows[place] for place, other in enumerate(others)) == moved
    assert all(rows[other] != rows[place] or other == place for place, other in enumerate(others))
    assert all(len(rows[other]) == len(rows[place]) for place, other in enumerate(others))


def test_a_text_row_in_a_table_of_pictures_has_an_empty_list():
    assert not has_images({"prompt": "a", "images": []}) and not has_images({"prompt": "a", "image": None})
    assert has_images({"prompt": "a", "images": ["b.png"]}) and has_images({"prompt": "a", "image": "b.png"})


@pytest.mark.slow
def test_rows_of_your_own_are_asked_and_resumed(seeing_folder, rows, tmp_path, capsys):
    flags = ["--model_name_or_path", seeing_folder / "model", "--dataset_name", rows, "--batch_size", "8"]
    metrics = run(tmp_path / "out", *flags)
    assert capsys.readouterr().out.count("1 of 21 rows dropped") == 1
    assert metrics["pictures/all/right/model_items"] == 20
    assert {"pictures/all/right_other_pictures/model", "pictures/all/best_guess/model"} <= metrics.keys()
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    # A run that was killed: its records are there but for the last, and it has no report.
    (tmp_path / "out" / "samples.jsonl").write_text("\n".join(lines[:11]) + "\n" + lines[11][:20])
    (tmp_path / "out" / "report.json").unlink()
    assert run(tmp_path / "out", *flags) == pytest.approx(metrics)
    again = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert sorted(again) == sorted(lines) and json.loads(lines[0])["suite"] == "pictures"


def test_left_out_rows_are_reported_once(rows, capsys):
    suites = build.suites_of(*evaluate.parse(["--dataset_name", str(rows)]))
    build.check_items(suites, writes_answers=False)
    assert [len(suite.items()) for suite in suites] == [20]
    assert capsys.readouterr().out.count("1 of 21 rows dropped") == 1


def test_a_judge_reads_the_written_answers():
    files = ["--truthfulqa_file", "a.csv", "--xstest_file", "b.csv"]
    suites = build.suites_of(*evaluate.parse(["--suites", "truthfulness", "refusals", "hhh", *files]))
    build.add_judge(suites, "judge")
    assert [getattr(suite, "judge_model", None) for suite in suites] == ["judge", "judge", None]


@pytest.mark.slow
def test_pictures_that_were_replaced_are_asked_about_anew(seeing_folder, tmp_path, capsys):
    path = write_rows(tmp_path / "data", halves(4))
    flags = ["--model_name_or_path", seeing_folder / "model", "--dataset_name", path]
    run(tmp_path / "out", *flags)
    halves(1, seed=99)[0]["image"].save(tmp_path / "data" / "3.png")
    with pytest.raises(InputError, match="finished run with pictures of dataset_name contents='"):
        run(tmp_path / "out", *flags)
    (tmp_path / "out" / "report.json").unlink()
    run(tmp_path / "out", *flags)
    assert "is of other flags, and is written again" in capsys.readouterr().out


@pytest.mark.slow
def test_the_drawn_world_is_asked_by_family(seeing_folder, tmp_path):
    metrics = run(
        tmp_path, "--model_name_or_path", seeing_folder / "model", "--dataset_name", "pictures", "--num_items", 30
    )
    names = {name.split("/")[1] for name in metrics if name.endswith("/right/model")}
    assert {"color_seen", "color_held_out", "place_seen"} <= names
    assert sum(metrics[name] for name in metrics if name.endswith("/right/model_items")) == 60


def test_what_cannot_be_asked_is_refused(seeing_folder, rows, tmp_path):
    model = ["--model_name_or_path", seeing_folder / "model"]
    config = hfllm.HfllmConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    hfllm.HfllmForCausalLM(config).save_pretrained(tmp_path / "text")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    bad = tmp_path / "bad" / "rows.jsonl"
    bad.parent.mkdir()
    bad.write_text('{"prompt": "which", "completion": "left", "image": "none.png"}')
    for flags, words in (
        (
            ["--model_name_or_path", tmp_path / "text", "--dataset_name", rows],
            "reads text alone: name a model that sees",
        ),
        ([*model, "--suites", "pictures"], "--suites pictures needs --dataset_name"),
        ([*model, "--suites", "hhh", "--dataset_name", rows], "--dataset_name cannot be used here"),
        (["--dataset_name", rows], "needs --model_name_or_path"),
        ([*model, "--bad_images", "drop"], "--bad_images cannot be used here"),
        (
            [*model, "--dataset_name", "pictures", "--bad_images", "drop"],
            "--bad_images cannot be used here: it is for rows of your own, and these are drawn",
        ),
        ([*model, "--dataset_name", "digits", "--max_pixels", "9"], "--max_pixels cannot be used here"),
        ([*model, "--dataset_name", bad], r"line 1: picture .*none.png: no such file; --bad_images drop"),
    ):
        with pytest.raises(InputError, match=words) as error:
            run(tmp_path / "out", *flags)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
