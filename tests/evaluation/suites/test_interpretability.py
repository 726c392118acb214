"""The suite: items that stay, verdicts by controls, users' files, and reports that are made of records alone."""

import json
import re
from pathlib import Path

import pytest
import torch

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import parts_of
from hfllm.evaluation.interpreting.material import file_material
from hfllm.evaluation.interpreting.planted import Verdict, random_parts
from hfllm.evaluation.suites import interpretability
from hfllm.evaluation.suites.base import Subject
from hfllm.evaluation.suites.interpretability import Interpretability
from hfllm.outputs.report import Heatmap

ROWS = [
    {"subject": name, "question": f"What colour is the {name}?", "beginning": f"The {name} is", "answer": value}
    for name, value in zip(
        ("fox", "bear", "owl", "frog", "duck"), ("red", "blue", "green", "white", "red"), strict=True
    )
]


@pytest.fixture
def subject(make_model, tokenizer):
    return Subject("tiny", make_model(num_hidden_layers=3), tokenizer, uses_chat_template=True)


def rows_file(folder, rows):
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_random_weights_are_shown_nothing_of_a_model_of_random_weights(subject, tmp_path):
    """Every method that is shown by mistake would show here: there is nothing to find."""
    suite = Interpretability(rows_file(tmp_path, ROWS))
    items = suite.items()
    records = list(suite.judge(subject, items))
    assert {record["item"] for record in records} == {item.key for item in items}
    assert len({item.key for item in items}) == len(items)
    methods_shown = {record["group"] for record in records if record["scores"] and "planted" not in record["group"]}
    assert not methods_shown & {
        "patching, last place",
        "patching, subject",
        "patching, MLP or attention",
        "logit lens",
    }
    out = next(record["skipped"] for record in records if record["group"] == "patching, last place")
    assert "on random weights and" in out or "planted edits" in out
    plants = [record for record in records if "planted" in record["group"]]
    assert len(plants) == 6
    for name in ("lens", "restored_stream", "restored_component"):
        assert all(record["scores"][name] == 1 for record in plants if record["scores"])
    # What is left after a stop is judged as before.
    some = [item for item in items if item.group in ("logit lens", "planted edits, mlp")][::2]
    by_key = {record["item"]: record for record in records}
    assert all(record == by_key[record["item"]] for record in suite.judge(subject, some))
    table = suite.extra(records).tables["interpretability: methods and their controls"]
    assert [row["method"] for row in table] == [
        name for name in interpretability.METHODS if name in {i.group for i in items}
    ]


def test_a_method_that_random_weights_pass_as_well_is_left_out(subject, tmp_path, monkeypatch):
    def alike(parts, prompts, batch_size):
        return interpretability.Measured(torch.ones(len(prompts.facts), dtype=torch.double))

    def better(parts, prompts, batch_size):
        score = float(parts.model is subject.model)
        layers = {"": torch.full((3, len(prompts.facts)), score, dtype=torch.double)}
        return interpretability.Measured(torch.full((len(prompts.facts),), score, dtype=torch.double), layers)

    table = {
        "alike": interpretability.Method(alike, "facts", "right"),
        "better": interpretability.Method(better, "facts", "right"),
    }
    monkeypatch.setattr(interpretability, "METHODS", table)
    monkeypatch.setattr(interpretability, "tested_plants", lambda *given: [])
    suite = Interpretability(rows_file(tmp_path, ROWS))
    records = {record["item"]: record for record in suite.judge(subject, suite.items())}
    assert "scores 1.00 on random weights and 1.00 on this model" in records["alike/1 fox"]["skipped"]
    assert records["better/1 fox"]["scores"] == {
        **{"right": 1.0, "right_random_weights": 0.0},
        **{f"layer_{layer}": 1.0 for layer in (1, 2, 3)},
    }
    plots = suite.extra(list(records.values())).plots
    assert plots["interpretability_layers"].values == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (Verdict(1.0, 0.49), ""),
        (Verdict(1.0, 0.5), "0.50 on random weights"),
        (Verdict(0.9, 0.6, chance=0.5), ""),
        (Verdict(0.9, 0.71, chance=0.5), "chance 0.50"),
        (Verdict(0.4, 0.2, chance=0.5), "0.20 on random weights"),
        (Verdict(1.0, 0.0, 0.0, 5, 6), "5 of 6 planted edits"),
        (Verdict(1.0, 0.0, 0.0, 6, 6), ""),
        (Verdict(0.6, 0.1, chance=0.2, error=0.21), "error 0.21"),
    ],
)
def test_verdicts(verdict, reason):
    assert reason in verdict.left_out and bool(verdict.left_out) == bool(reason)


def test_random_weights_are_others_and_the_same_each_time(make_model):
    parts = parts_of(make_model(dtype="float32").to(torch.bfloat16))
    state = torch.get_rng_state()
    one, again, other = (random_parts(parts, seed).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and one.dtype == torch.bfloat16
    head = one.lm_head.weight
    assert torch.equal(head, again.lm_head.weight) and not torch.equal(head, other.lm_head.weight)
    assert not torch.equal(head, parts.model.lm_head.weight)


def test_items_of_the_world_are_the_same_each_time():
    first, second = Interpretability().items(), Interpretability().items()
    assert [item.key for item in first] == [item.key for item in second]
    assert {item.group for item in first} == {
        *interpretability.METHODS,
        "planted edits, mlp",
        "planted edits, attention",
    }
    assert Interpretability(world_seed=1).items() != first


def test_an_item_longer_than_the_context_is_counted(make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(interpretability, "tested_plants", lambda *given: [])

    def measure(parts, prompts, batch_size):
        return interpretability.Measured(
            torch.full((len(prompts.facts),), float(parts.model is model), dtype=torch.double)
        )

    monkeypatch.setattr(interpretability, "METHODS", {"right": interpretability.Method(measure, "facts", "right")})
    model = make_model()
    long = {**ROWS[0], "question": f"{'Please ' * 250}What colour is the fox?"}
    suite = Interpretability(rows_file(tmp_path, [long, *ROWS[1:]]))
    items = [item for item in suite.items() if item.group == "right"]
    records = list(suite.judge(Subject("tiny", model, tokenizer, True), items))
    assert [record["skipped"] for record in records] == ["longer than the model's context", "", "", "", ""]


def test_a_users_file(tmp_path):
    unknown = [{"subject": f"a{number}", "question": f"Who is a{number}?", "answer": ""} for number in range(5)]
    told = {**ROWS[0], "passage": "The fox is red."}
    material = file_material(rows_file(tmp_path, [*ROWS, *unknown, told]))
    assert [fact.value for fact in material.facts] == [row["answer"] for row in ROWS]
    assert sorted(material.facts[0].others) == ["blue", "green", "white"]
    assert [label for _, label in material.subjects] == [1] * 5 + [0] * 5
    assert material.passage_facts[0].question == "The fox is red [1].\nWhat colour is the fox?"
    assert not file_material(rows_file(tmp_path, ROWS)).subjects


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "answer": "a"}, "line 1: needs a text as subject, got None; columns: question, answer"),
        ({"subject": "fox", "question": "What is the fox?"}, "needs answer, empty for a subject"),
        ({**ROWS[0], "subject": "wolf"}, "subject 'wolf' is not in its question"),
        ({**ROWS[0], "passage": "The fox is old."}, "the answer 'red' is not in its passage"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        Interpretability(rows_file(tmp_path, [row])).items()


def test_the_code_of_the_page_runs(subject):
    page = Path(__file__).parents[3] / "docs" / "reference" / "evaluation.md"
    code = next(
        each for each in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "make_plant" in each
    )
    names = {"model": subject.model, "tokenizer": subject.tokenizer}
    exec(code, names)
    assert names["plant"].has_taken and names["ranks"].shape == (3, 1) and names["edited"][-1, 0] > 0


def test_layers_that_are_shown():
    assert interpretability.shown_layers(4) == [0, 1, 2, 3]
    assert interpretability.shown_layers(30) == [0, 4, 8, 12, 17, 21, 25, 29]


def test_heat_maps_are_drawn_and_empty_ones_are_not(tmp_path):
    values = [[0.0, float("nan")], [1.0, 0.5]]
    assert Heatmap("title", "x", "y", ["a", "b"], ["1", "longer"], values).draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not Heatmap("title", "x", "y", [], [], []).draw(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
