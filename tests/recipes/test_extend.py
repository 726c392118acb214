"""hfllm extend in miniature: from nothing, on your own model and text, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import extend
import pytest
import torch
import yaml
from killed import SAVES, Killed
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfllm.errors import InputError
from hfllm.models.extension import ROPE_TYPES
from hfllm.stages.extend import ExtendArguments

QUICK = ("--num_eval_texts", "3", "--num_needles", "1", "--num_train_texts", "8", "--use_cpu", "true")
TRAINED = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no", "--logging_steps", "1")
FIGURES = {f"bits_per_byte_{where}_{when}" for where in ("short", "long") for when in ("before", "after", "change")}


def run(*argv):
    return extend.main(*extend.parse([*QUICK, *map(str, argv)]))


@pytest.mark.slow
def test_from_nothing(tiny, tmp_path, capsys):
    values = yaml.safe_load(Path(tiny["pretrain"]).read_text()) | {"max_position_embeddings": 64, "packing": False}
    del values["num_documents"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**values, "max_length": 64}))
    flags = ["--pretrain_config", tmp_path / "base.yaml", "--num_documents", "200", *TRAINED]
    flags += ["--output_dir", tmp_path / "out"]
    metrics = run(*flags)
    assert metrics["original_length"] == 64 and metrics["length"] == 256
    assert {*FIGURES, "bits_per_byte_long_cut", "bits_per_byte_long_untrained", "needle_after"} <= metrics.keys()
    assert "needle_text_after" not in metrics and metrics["train_loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.max_position_embeddings == 256
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"bits_by_position", "needle_before", "needle_after", "model"} <= report["artifacts"].keys()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "64 to 128" in text and "before, cut" in text and "depth 0.5" in text
    capsys.readouterr()
    assert run(*flags) == pytest.approx(metrics) and "already done" in capsys.readouterr().out


def test_your_own_model_and_book_without_training(saved, tmp_path):
    (tmp_path / "book.txt").write_text("The fox lives in the forest and eats fish. The owl is grey. " * 400)
    flags = ["--model_name_or_path", saved, "--dataset_name", tmp_path / "book.txt", "--max_steps", "0"]
    flags += ["--original_max_position_embeddings", "64", "--rope_type", "ntk", "--factor", "2"]
    metrics = run(*flags, "--output_dir", tmp_path / "out")
    assert {*FIGURES, "needle_after", "needle_text_after"} <= metrics.keys() and "train_loss" not in metrics
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (saved, tmp_path / "out"))
    # The positions alone have changed.
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    head = before.config.head_dim
    theta = before.config.rope_parameters["rope_theta"] * 2 ** (head / (head - 2))
    assert after.config.rope_parameters["rope_theta"] == pytest.approx(theta)


@pytest.mark.slow
def test_it_resumes_where_it_was(saved, tmp_path):
    (tmp_path / "book.txt").write_text("The fox lives in the forest and eats fish. The owl is grey. " * 400)
    flags = ["--model_name_or_path", saved, "--dataset_name", tmp_path / "book.txt", "--factor", "2"]
    flags += ["--original_max_position_embeddings", "64", *TRAINED, "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--output_dir", tmp_path / "out", "--resume_from_checkpoint", "auto"]
    metrics = run(*flags)
    (tmp_path / "out" / "report.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    assert run(*flags) == metrics


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--factor", "1"], "--factor 1.0: expected a number above 1"),
        (["--factor", "1.001"], "makes 256 tokens of 256: expected more"),
        (["--max_steps", "-2"], "--max_steps -2"),
        (["--num_needles", "0"], "--num_needles 0: expected at least 1"),
        (["--num_eval_texts", "1"], "--num_eval_texts 1: expected at least 2"),
        (["--use_peft"], "--use_peft cannot be used here"),
        (["--load_in_4bit"], "--load_in_4bit cannot be used here"),
        (["--pretrain_config", "x.yaml"], "--pretrain_config cannot be used here: the model is named"),
        (["--original_max_position_embeddings", "0"], "--original_max_position_embeddings 0"),
        (["--factor", "100"], "tokens together, and one row of the longer context needs 25600"),
    ],
)
def test_what_cannot_work_is_refused(saved, tmp_path, flags, message):
    (tmp_path / "short.txt").write_text("The fox is red. " * 40)
    words = ["--model_name_or_path", saved, "--dataset_name", tmp_path / "short.txt", "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match=message):
        run(*words, *flags)
    assert not (tmp_path / "out" / "report.json").exists()


def test_models_without_rotary_positions_are_refused(make_model, tokenizer, tmp_path):
    make_model(position_embedding_type="learned").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="has no rotary positions"):
        run("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")


def test_the_flag_knows_the_types_of_the_library():
    (flag,) = (each for each in dataclasses.fields(ExtendArguments) if each.name == "rope_type")
    assert flag.metadata["choices"] == [*ROPE_TYPES]


# ---- killed, see killed.py ----


def killed_flags(files):
    rows = files.rows({"text": "The fox lives in the forest and eats fish. The owl is grey. " * 400})
    sizes = ["--factor", "2", "--original_max_position_embeddings", "64", "--per_device_train_batch_size", "2"]
    return [*files.model(), *rows, *sizes, *QUICK, *SAVES]


KILLED = Killed(killed_flags)
