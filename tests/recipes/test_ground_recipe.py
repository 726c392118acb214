"""The recipe on passages in miniature: from nothing to its report, resumed, and refused.

What a model learns of passages on the embedded world is test_ground_world.py's.
"""

import hashlib
import json
import sys
from functools import partial

import ground
import pytest
import yaml
from killed import of_stages
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hfllm.data.world.passages import GROUPS
from hfllm.errors import InputError
from hfllm.grounding.abstention import Abstainer
from hfllm.runs import schedule
from hfllm.runs.lock import LOCK_FILE, release_all
from hfllm.stages.ground.build import PROMISES

TUNED = {"max_steps": 3, "per_device_train_batch_size": 8, "max_length": 256, "save_strategy": "no"}
CONFIGS = {
    "pretrain": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256},
        **{"vocab_size": 500, "num_documents": 300, "world_passages": 0.5, "max_steps": 4, "sample_steps": 0},
        **{"per_device_train_batch_size": 16, "save_strategy": "no", "learning_rate": 0.003},
    },
    "sft": TUNED,
    "grounded": TUNED,
    "reward": {**TUNED, "num_pairs": 24, "num_eval_prompts": 12, "num_samples": 2, "response_length": 4},
}
SIZES = {"num_examples": 60, "num_questions": 6, "num_samples": 2}
RUNS = ("pretrain", "sft", "grounded", "reward")
# Of the module that asks.
LENGTHS = ("hfllm.stages.ground.build",)
COUNTS = {
    **{"hfllm.stages.ground.build.NUM_WORLD_TASKS": 12, "hfllm.stages.ground.build.NUM_TASKS": 24},
    **{"hfllm.stages.ground.build.ALPHAS": (0.1, 0.2), "hfllm.stages.ground.build.SAVED_ALPHA": 0.1},
    **{"hfllm.stages.ground.build.NUM_EACH": 4},
    **{"hfllm.stages.ground.build.NUM_SPLITS": 2, "hfllm.stages.ground.build.WORDINGS": 1},
}


@pytest.fixture(scope="module", autouse=True)
def short():
    """Untrained models never end by themselves, and few questions are enough."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**{f"{module}.RESPONSE_LENGTH": 4 for module in LENGTHS}, **COUNTS}.items():
            patch.setattr(name, value)
        yield


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The flags of a tiny run."""
    folder = tmp_path_factory.mktemp("configs")
    for name, values in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    configs = [word for name in CONFIGS for word in (f"--{name}_config", str(folder / f"{name}.yaml"))]
    return [*configs, *(str(word) for name, value in SIZES.items() for word in (f"--{name}", value))]


def run(*flags):
    schedule._job = None
    return ground.main(*ground.parse(list(map(str, flags))))


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The folder of a run that nothing interrupted, and what repeats the command there with more flags."""
    folder = tmp_path_factory.mktemp("ground") / "out"
    run(*words, "--output_dir", folder)
    return folder, partial(run, *words, "--output_dir", folder)


def digests(folder):
    made = [*sorted(folder.glob("*/*.safetensors")), *sorted(folder.glob("data/*.jsonl"))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_the_course_from_nothing_leaves_models_rows_and_a_report(whole):
    folder, _ = whole
    report, text = report_of(folder), (folder / "report.md").read_text()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*RUNS, "data"}
    assert not list(folder.rglob(LOCK_FILE)) and not list(folder.rglob("*.tmp*"))
    for name in RUNS:
        kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        model, tokenizer = (each.from_pretrained(folder / name) for each in (kind, AutoTokenizer))
        assert len(tokenizer) <= model.config.vocab_size and report["artifacts"][name] == name
    metrics = report["metrics"]
    for model in ("sft", "grounded"):
        for group in GROUPS:
            assert {f"{model}_{group}_right", f"{model}_{group}_right_se"} <= metrics.keys()
            assert metrics[f"{model}_{group}_right_n"] == 6
        assert metrics[f"{model}_one_passage_right_home_n"] == 2
        assert f"{model}_injected_follows" in metrics and metrics[f"{model}_world_gold_n"] == 12
    for way in ("gated", "ungated"):
        assert {f"{way}_{kind}_right_n" for kind in ("answerable", "unanswerable", "closed_known")} <= metrics.keys()
    assert metrics["gate"] > 0 and "world_gold_kept" in metrics
    # Whatever is promised is measured, by the names of its figures.
    promised = {name for each in PROMISES for name in (each.metric, each.control) if isinstance(name, str)}
    assert promised <= metrics.keys()
    assert {f"three_passages_{way}_right_n" for way in ("apart", "alike")} <= metrics.keys()
    unions = [f"{model}_{group}" for model in ("sft", "grounded") for group in ("three_passages", "contradicting")]
    for name in (*unions, "grounded_answerable", "grounded_unanswerable"):
        assert metrics[f"{name}_union_right_n"] == 6
    assert metrics["injected_dropped_follows_n"] == 6
    # The abstainers lie beside the model, and their figures are of the other halves.
    for kind, rows in (("without", 12), ("with", 18)):
        abstainer = Abstainer.load(folder / "grounded" / f"abstainer_{kind}_passages.json")
        assert (abstainer.rows, abstainer.alpha, abstainer.measure) == (rows, 0.1, "sequence_probability")
    assert metrics["abstainer_risk_without_n"] == 12 and metrics["abstainer_coverage_with_n"] == 18
    assert {
        "semantic_entropy_aurc",
        "coverage_10_sequence_probability",
        "risk_20_semantic_entropy_se",
    } <= metrics.keys()
    for way in ("one_sample", "greedy", "first_supported", "majority_of_meaning", "best_rewarded", "best_possible"):
        assert {f"{way}_right", f"{way}_abstained_n"} <= metrics.keys()
    assert metrics["verification_gain"] == metrics["first_supported_right"] - metrics["one_sample_right"]
    for title in ("## Right answers, greedy", "## Passages found by BM25", "## Uncertainty and being wrong"):
        assert title in text
    for name in ("right", "risk_coverage", "reliability"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    # Each arm has learned something of its own.
    assert len({value for name, value in digests(folder).items() if name.endswith("model.safetensors")}) == len(RUNS)


@pytest.mark.slow
def test_the_same_command_reuses_and_another_flag_is_refused_by_its_name(whole, capsys):
    folder, again = whole
    before = digests(folder)
    assert again() == report_of(folder)["metrics"]
    assert f"ground: already done in {folder} (remove that folder to redo it)" in capsys.readouterr().out
    for flags, difference in (
        (("--seed", 7), "seed=42, this one has seed=7"),
        (("--grounded_fraction", 0.25), "grounded_fraction=0.5, this one has grounded_fraction=0.25"),
    ):
        with pytest.raises(InputError, match=f"holds a finished run with {difference}") as error:
            again(*flags)
        assert "\n" not in str(error.value)
    assert digests(folder) == before


@pytest.mark.slow
def test_a_run_that_was_stopped_makes_what_is_missing_with_the_same_bits(whole, capsys):
    folder, again = whole
    before, metrics = digests(folder), report_of(folder)["metrics"]
    # As if it had been killed while it learned to read: what builds on that is made again.
    made = (*(folder / "grounded").glob("report.*"), *(folder / "grounded").glob("*.safetensors"))
    for path in (folder / "report.json", *made):
        path.unlink()
    capsys.readouterr()
    assert again() == metrics
    printed = capsys.readouterr().out
    assert f"sft: already done in {folder / 'sft'}" in printed and f"=== sft -> {folder / 'grounded'}" in printed
    assert digests(folder) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_examples", "9"], "--num_examples 9: expected at least 10"),
        (["--num_samples", "1"], "--num_samples 1: expected at least 2"),
        (["--num_questions", "5"], "--num_questions 5: expected at least 6"),
        (["--grounded_fraction", "0"], "--grounded_fraction 0.0: expected a share above 0, at most 1"),
        (["--grounded_fraction", "1.5"], "--grounded_fraction 1.5: expected a share above 0, at most 1"),
        (["--grounded_fraction", "nan"], "--grounded_fraction nan: expected a share above 0, at most 1"),
        (["--grounded_config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(InputError) as error:
        run(*flags, "--output_dir", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError) as error:
        run("--output_dir", tmp_path / "out")
    assert str(error.value) == "hfllm ground needs bm25s: pip install 'hfllm[grounding]'"
    assert not (tmp_path / "out").exists()


# ---- killed, see killed.py ----


KILLED = of_stages(lambda files: files.settings(SIZES, CONFIGS))
