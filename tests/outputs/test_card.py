"""A card names what a reader asks for: the base model, the stages, the reward, the data, what was given."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hfllm.errors import InputError
from hfllm.outputs.card import check_base, check_publishable, lineage, model_card, public_value
from hfllm.outputs.figures import change_of, mean_of
from hfllm.outputs.hub import upload_list
from hfllm.outputs.report import Report, flag_sections, given_flags, read_report, split_flags

FROM = {
    "sft": {"stage": "sft", "data": "org/rows", "rows": 1200, "kind": "demonstrations"},
    "reward": {"stage": "reward", "data": "world", "rows": 300, "kind": "comparisons"},
}


def finished(folder, stage, metrics=None, models=None, given=None, **arguments):
    """Write the report of a run that read these models."""
    arguments = {"dataset_name": "world", "seed": 1, **arguments}
    Report(stage, arguments, metrics or {}, given=given, parents=lineage(models or {})).write(folder)
    return str(folder)


@pytest.fixture
def chain(tmp_path):
    """The folders of three stages: from a model of the Hub, one fine-tuned, and a reward model from that."""
    tuned = finished(tmp_path / "sft", "sft", {"examples": 1200}, {"model": "org/base"}, dataset_name="org/rows")
    reward = finished(tmp_path / "reward", "reward", {"train_comparisons": 300}, {"model": tuned})
    return tuned, reward


def test_parents_come_in_order_each_once(chain):
    tuned, reward = chain
    parents = lineage({"model": tuned, "reward model": [reward, "org/other-reward"]})
    assert parents == [
        {"role": "model", "model": "org/base", "hub_id": "org/base"},
        {"role": "model", "model": tuned, "stage": "sft", "data": "org/rows", "rows": 1200, "kind": "demonstrations"},
        {
            "role": "reward model",
            "model": reward,
            "stage": "reward",
            "data": "world",
            "rows": 300,
            "kind": "comparisons",
        },
        {"role": "reward model", "model": "org/other-reward", "hub_id": "org/other-reward"},
    ]
    # What only the reward model started from is not a start of the policy.
    roles = {entry["model"]: entry["role"] for entry in lineage({"model": "org/base", "reward model": reward})}
    assert roles == {"org/base": "model", tuned: "start of the reward model", reward: "reward model"}
    assert lineage({"model": None, "reward model": []}) == []


def test_reports_from_before_and_adapters_of_others_have_a_lineage_too(chain, tmp_path):
    tuned, _ = chain
    old = tmp_path / "sft" / "report.json"
    report = json.loads(old.read_text())
    del report["parents"]
    report["arguments"]["model_name_or_path"] = "org/older"
    old.write_text(json.dumps(report))
    assert [entry["model"] for entry in lineage({"model": tuned})] == ["org/older", tuned]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base in (tuned, str(adapter)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        expected = ["org/older", tuned, str(adapter)] if base == tuned else [str(adapter)]
        assert [entry["model"] for entry in lineage({"model": str(adapter)})] == expected


def test_the_card_names_base_stages_reward_data_and_given_flags(saved, chain):
    tuned, reward = chain
    arguments = {"learning_rate": 3e-6, "reward_funcs": ["/home/me/mine.py:short"], "dataset_name": "/data/p.jsonl"}
    metrics = {
        **change_of("proxy_reward", [0.1, 0.2, 0.3], [0.5, 0.8, 0.7]),
        **mean_of("kl_to_reference", [1.0, 1.4]),
        "train_prompts": 54,
    }
    given = {name: arguments[name] for name in ("learning_rate", "reward_funcs")}
    models = {"model": tuned, "reward model": [reward]}
    finished(saved, "rlhf", metrics, models, given, **arguments)
    card = model_card(saved)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"
    origin = card.partition("## Origin")[2].partition("## Reward")[0]
    assert "The base model is [org/base](https://huggingface.co/org/base)." in origin
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in origin.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        ["", "`org/base`", "start", ""],
        ["sft", "`sft`", "start", "1,200 demonstrations of `org/rows`"],
        ["reward", "`reward`", "reward model", "300 comparisons of the embedded world"],
        ["rlhf", "this one", "", "54 prompts of `p.jsonl`"],
    ]
    assert "Trained on the function `mine.py:short`; the reward model `reward`, trained by the reward stage" in card
    assert "`p.jsonl`, a local dataset. Trained on 54 prompts." in card
    (row,) = [line for line in card.splitlines() if line.startswith("| reward (trained on)")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "0.2",
        "0.667",
        "+0.467",
        "[0.18, 0.75]",
        "3",
        "too few",
    ]
    shown, others = (yaml.safe_load(block.partition("```")[0]) for block in card.split("```yaml\n")[1:])
    assert shown == {"learning_rate": 3e-6, "reward_funcs": ["mine.py:short"]}
    assert others == {"dataset_name": "p.jsonl", "seed": 1}
    # Given flags are open, all others folded.
    assert card.index("Given:") < card.index("<details><summary>2 others") < card.index("seed: 1")
    assert "/home/me" not in card and "/data" not in card


def test_a_local_base_is_known_from_elsewhere_too(tmp_path, monkeypatch):
    base, first = tmp_path / "models" / "tiny", tmp_path / "outputs" / "first"
    base.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    finished(first, "sft", models={"model": "models/tiny"}, model_name_or_path="models/tiny")
    folder = tmp_path / "outputs" / "further"
    finished(folder, "sft", models={"model": "outputs/first"}, model_name_or_path="outputs/first")
    settings = {"base_model_name_or_path": "models/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(base)
    with pytest.raises(InputError, match="adapter of 'models/tiny', which is not on the Hub"):
        check_base(folder)
    (folder / "report.json").unlink()
    check_base(folder)


def test_the_card_says_which_part_of_a_hub_dataset_it_was(saved):
    part = {"dataset_config": "en", "dataset_train_split": "train[:1%]", "dataset_revision": None}
    finished(saved, "sft", {"examples": 9}, dataset_name="org/rows", **part)
    assert "[org/rows](https://huggingface.co/datasets/org/rows), configuration `en`, split `train[:1%]`. Trained" in (
        model_card(saved)
    )


def test_a_model_from_new_weights_says_so(saved, tmp_path):
    base = finished(tmp_path / "pretrain", "pretrain", {"documents": 500})
    finished(saved, "sft", {"examples": 9}, {"model": base}, given={})
    card = model_card(saved)
    assert "The base model was made by the pretrain stage, from new weights (`pretrain`)." in card
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "No flag was given." in card and "## Reward" not in card


def test_an_adapter_that_started_from_one_of_the_hub_names_both(tmp_path):
    folder = Path(finished(tmp_path / "sft", "sft", {"examples": 9}, {"model": "org/adapter"}))
    settings = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A.weight": torch.zeros(2, 3)}, folder / "adapter_model.safetensors")
    card = model_card(folder)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"
    assert "A PEFT adapter of org/base with 6 parameters" in card
    links = [f"[org/{name}](https://huggingface.co/org/{name})" for name in ("base", "adapter")]
    assert f"The base model is {links[0]}; training started from {links[1]}." in card


@pytest.mark.parametrize("use_peft", [True, False])
def test_an_adapter_of_the_hub_gets_a_local_base_by_use_peft_alone(monkeypatch, use_peft):
    def find(name, revision):
        return "adapter_config.json" if (name, revision) == ("org/adapter", "v1") else None

    monkeypatch.setattr("transformers.utils.find_adapter_config_file", find)
    check_publishable(use_peft, "org/model", "v1")
    refused = pytest.raises(InputError, match="'org/adapter' is an adapter, which is merged into a local base first")
    with refused if use_peft else nullcontext():
        check_publishable(use_peft, "org/adapter", "v1")


def test_flags_are_given_by_their_values():
    arguments = {"seed": 3, "save_last": False, "sft.seed": 3, "sft.epochs": 2, "none": None, "x changed at": 1}
    given = given_flags(("seed", "no_save_last", "output_dir"), arguments)
    assert given == {"save_last": False, "seed": 3}
    assert split_flags(arguments, given) == (given, {"sft.epochs": 2})
    assert split_flags(arguments, None)[1] == {"seed": 3, "save_last": False, "sft.epochs": 2}
    assert given_flags(None, arguments) is None


def test_flags_are_shown_as_yaml_that_reads_back():
    values = {
        **{"learning_rate": 3e-6, "beta": -1e-05, "seed": 3, "on": True, "scale": 0.5, "big": 1e22, "none": None},
        **{
            "name": "org/base",
            "word": "no",
            "empty": "",
            "text": 'a: "b" # c\n- ü',
            "number": "12",
            "path": "/a b/c.py:f",
        },
        **{
            "list": ["x", 1, None],
            "mapping": {"min_lr_rate": 0.05},
            "sft.seed": 4,
            "odd key: x": 1,
            "path": "/a b/c.py:f",
        },
    }
    shown = "\n".join(flag_sections({}, values)).split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == values


def test_warnings_of_the_run_are_on_the_card(saved):
    report = read_report(saved) or {"stage": "try", "arguments": {}}
    (saved / "report.json").write_text(json.dumps({**report, "warnings": ["dials: 0.08, not above a guess (0.125)"]}))
    assert "**Warning:** dials: 0.08, not above a guess (0.125)" in model_card(saved)


def test_the_report_holds_what_the_card_needs(saved, chain):
    finished(saved, "sft", {}, {"model": chain[0]}, given={"seed": 1})
    report = read_report(saved)
    assert report["given"] == {"seed": 1} and [each["model"] for each in report["parents"]] == ["org/base", chain[0]]
    assert report["summary"] == ""


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("read /home/me/My Data/rows.jsonl, line 3", "read rows.jsonl, line 3"),
        ("'/home/me/My (old) Data, 2/rows of May.jsonl' has", "'rows of May.jsonl' has"),
        ("`/home/me/my run/model` and /srv/x/y", "`model` and y"),
        ("C:\\Users\\me\\My Documents\\x.txt, D:/a b/c", "x.txt, c"),
        ("file:///home/me/My Data/x and 3:/home/me/y", "x and 3:y"),
        ("~/My Data/rows.csv", "rows.csv"),
        ("/home/me/My Data/rows.jsonl:gold", "rows.jsonl:gold"),
        # Nothing of this is a local path.
        ("https://hub.co/a b/c, hf://datasets/me/rows/x and a/b c/d, 1/2", None),
        ("[a](https://hub.co/me/x), </details>, 3 km/h", None),
    ],
)
def test_absolute_paths_are_shortened_with_their_spaces(text, public):
    assert public_value(text) == (text if public is None else public)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("see /a b/c d: /a b/c d/e/f g", "see c d: f g"),
        ("x/a b/c d and /a b/c dear, //a b/c d", "x/a b/c d and /a b/c dear, //a b/c d"),
        ("=/a b/c d=", "=c d="),
    ],
)
def test_a_known_path_is_shortened_where_it_stands_alone(text, public):
    found = public_value({"k": text}, ["/a b/c d"])["k"]
    assert found == public_value(public)


def test_what_is_published_of_a_run_names_no_folder_of_this_machine(saved, tmp_path):
    folder = saved.rename(tmp_path / "My Models, of May")
    home = "/home/alice/Secret Plans (2026), draft"
    arguments = {
        "dataset_name": f"{home}/my rows of today.jsonl",
        "reward_funcs": [f"{home}/my rewards.py:short"],
        "dataset_mixture": [f"{home}/first part:0.5"],
        "reward_model_name_or_path": [f"{home}/reward one"],
        f"{home}/reward one changed at": 5,
        "output_dir": str(folder),
    }
    summary = f"Learned from {home}/my rows of today.jsonl, row 3, beside {home}/some/notes, in {folder}"
    samples = [{"prompt": f"open {home}/my rows of today.jsonl", "answer": f"{home}/first part is here"}]
    report = Report("sft", arguments, {"loss": 1.0}, tables={"Samples": samples}, summary=summary, given=arguments)
    report.write(folder)
    published = upload_list(folder)
    texts = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in published.items()}
    for name, text in texts.items():
        for private in ("/home/alice", "Secret", "draft/", str(tmp_path)):
            assert private not in text.decode(errors="replace"), name
    shown = "Learned from my rows of today.jsonl, row 3, beside notes, in My Models, of May"
    for name in ("report.json", "report.md", "README.md"):
        assert shown in texts[name].decode(), name
    assert json.loads(texts["report.json"])["arguments"]["reward one changed at"] == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"parents": [3, "a", {"role": "model"}, {"role": "model", "model": "a/b", "rows": "many", "stage": ["x"]}]},
        {"wall_seconds": None},
        {"arguments": {"model_name_or_path": "x" * 5000, "dataset_name": "y" * 5000}},
        {"arguments": {"reward_funcs": True, "reward_weights": 0.5}},
        # Of a thousand folders each is a known path, which may stand in any text.
        {"arguments": {"dataset_name": "/home" + "/My Data" * 1000 + "/x"}, "summary": "x/home" + "/My Data" * 1000},
    ],
)
def test_a_report_of_other_types_makes_a_card_all_the_same(fields, saved):
    report = {"stage": "sft", "arguments": {}, "metrics": {}, **fields}
    (saved / "report.json").write_text(json.dumps(report))
    assert "made by the sft stage" in model_card(saved)
