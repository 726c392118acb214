"""Reward models that see: trained by `hfllm reward`, their control, and PPO that is rewarded by one."""

import json
import math
import os
import subprocess
import sys

import merge
import pytest
import reward
import rlhf
import torch
from safetensors.torch import load_file
from seeing_rows import WORDS, halves, make_processor, write_rows
from transformers import AutoModelForSequenceClassification, AutoProcessor

import hfllm
from hfllm.errors import InputError
from hfllm.rewards.models import PictureRewardModel, reward_model
from hfllm.stages.shared import load_processing_class

QUIET = ["--logging_steps", "20", "--save_strategy", "no", "--per_device_train_batch_size", "32"]
LEARNS = ["--max_steps", "50", "--learning_rate", "0.01"]


def run(model, rows, output, *flags):
    named = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", output, *QUIET, *flags]
    return reward.main(*reward.parse(list(map(str, named))))


@pytest.fixture(scope="module")
def judge(seeing_folder, tmp_path_factory):
    """A folder with a trained reward model, and its metrics."""
    folder = tmp_path_factory.mktemp("judge")
    rows = write_rows(folder / "data", halves(300), is_pair=True)
    held_out = write_rows(folder / "held_out", halves(64, seed=3), is_pair=True)
    metrics = run(seeing_folder / "model", rows, folder / "out", *LEARNS, "--eval_dataset_name", held_out)
    return folder / "out", metrics


def asked(rows):
    """Prompts with their pictures in place, as PPO gives them to a reward."""
    words = {"type": "text", "text": "which side"}
    return [[{"role": "user", "content": [{"type": "image", "image": row["image"]}, words]}] for row in rows]


def said(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.slow
def test_it_prefers_what_the_picture_shows(judge):
    """New pictures are judged right, and those of other rows by chance."""
    folder, metrics = judge
    assert metrics["reward_model_accuracy"] > 0.9 and metrics["reward_model_accuracy_n"] == 64
    assert 0.3 < metrics["other_pictures_accuracy"] < 0.7 and metrics["train_comparisons"] == 300
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = reward_model(model, AutoProcessor.from_pretrained(folder))
    assert isinstance(scores, PictureRewardModel)
    new = halves(60, seed=9)
    sides = [row["side"] for row in new]
    others = ["left" if side == "right" else "right" for side in sides]
    right, wrong = (scores(asked(new), said(texts)) for texts in (sides, others))
    assert sum(one > other for one, other in zip(right, wrong, strict=True)) > 54


@pytest.mark.slow
def test_a_score_is_that_of_the_conversation_alone(judge):
    """However a batch is mixed and padded, and as the trunk and the head compute it by hand."""
    folder, _ = judge
    model, processor = (each.from_pretrained(folder) for each in (AutoModelForSequenceClassification, AutoProcessor))
    scores, rows = reward_model(model, processor), halves(3)
    prompts = [*asked(rows), "say left", [{"role": "user", "content": "which side is bright"}]]
    answers = [*said(["left", "right bright", "say"]), "left left left", said(["right"])[0]]
    together = scores(prompts, answers)
    for place, pair in enumerate(zip(prompts, answers, strict=True)):
        assert together[place] == pytest.approx(scores([pair[0]], [pair[1]])[0], abs=1e-5)
    ids = processor(
        text="<user> <image> which side <assistant> left <eos>", images=rows[0]["image"], return_tensors="pt"
    )
    with torch.no_grad():
        by_hand = model.score(model.model(**ids).last_hidden_state[0, -1]).item()
    assert together[0] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.slow
def test_an_answer_that_spells_the_token_of_a_picture_is_scored(judge):
    """A policy may write it at any time; it is read with a space in it, in prompts too."""
    folder, _ = judge
    model, processor = (each.from_pretrained(folder) for each in (AutoModelForSequenceClassification, AutoProcessor))
    scores, rows = reward_model(model, processor), halves(2)
    prompts, answers = [*asked(rows), "say <image> left"], [*said(["left <image>", "<image> <image>"]), "<image>"]
    spaced = [*asked(rows), "say < image> left"], [*said(["left < image>", "< image> < image>"]), "< image>"]
    found = scores(prompts, answers)
    assert found == scores(*spaced) and all(map(math.isfinite, found))
    assert "<image>" in answers[0][0]["content"]


@pytest.mark.slow
def test_ppo_is_rewarded_by_what_it_sees(judge, seeing_folder, tmp_path, monkeypatch):
    """Each response is scored with a picture as it lies in the file; the critic may be such a model, too."""
    folder, _ = judge
    drawn, batches, scores = halves(64, seed=4), [], PictureRewardModel.scores

    def recorded(self, batch):
        batches.append(batch)
        return scores(self, batch)

    monkeypatch.setattr(PictureRewardModel, "scores", recorded)
    rows = write_rows(tmp_path / "data", drawn)
    named = {"model_name_or_path": seeing_folder / "model", "dataset_name": rows, "output_dir": tmp_path / "out"}
    flags = {"reward_model_name_or_path": folder, "num_eval_prompts": 4, "max_steps": 2, "save_strategy": "no"}
    flags |= {"per_device_train_batch_size": 4, "response_length": 2, "value_model": "reward"}
    given = [each for name, value in (named | flags).items() for each in (f"--{name}", str(value))]
    assert rlhf.main(*rlhf.parse(given))["episodes"] == 16
    assert sum(len(batch["input_ids"]) for batch in batches) >= 16
    sums = {round(_pixels(row["image"]).sum().item(), 2) for row in drawn}
    for batch in batches:
        assert len(batch["pixel_values"]) == len(batch["input_ids"])
        assert {round(each.sum().item(), 2) for each in batch["pixel_values"]} <= sums


def _pixels(image):
    return make_processor().image_processor(image, return_tensors="pt")["pixel_values"]


@pytest.mark.slow
def test_frozen_parts_stay_and_an_adapter_is_saved(seeing_folder, judge, tmp_path):
    rows = write_rows(tmp_path / "data", halves(12), is_pair=True)
    before = load_file(seeing_folder / "model" / "model.safetensors")
    flags = ["--max_steps", "1", "--learning_rate", "0.1", "--freeze_vision", "--freeze_text"]
    run(seeing_folder / "model", rows, tmp_path / "frozen", *flags)
    after = load_file(tmp_path / "frozen" / "model.safetensors")
    moved = {name.split(".")[1] for name in after if name in before and not torch.equal(after[name], before[name])}
    assert moved == {"multi_modal_projector"} and "score.weight" in after
    peft = ["--use_peft", "--lora_target_modules", "q_proj", "--max_steps", "1", "--learning_rate", "0.1"]
    run(seeing_folder / "model", rows, tmp_path / "adapter", *peft)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("score" in name for name in names) and any("lora_B" in name for name in names)
    merged = ["--model_name_or_path", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    assert merge.main(*merge.parse(list(map(str, merged))))["max_logit_change"] > 0
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    told = ["<user> <image> which side <assistant> left <eos>", "<user> <image> which <eos>"]
    shown = [[row["image"]] for row in halves(2)]
    inputs = processor(text=told, images=shown, padding=True, return_tensors="pt")
    auto = AutoModelForSequenceClassification
    apart = auto.from_pretrained(tmp_path / "adapter", num_labels=1)
    with torch.no_grad():
        scores = [each(**inputs).logits for each in (auto.from_pretrained(tmp_path / "merged"), apart)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_text_alone_and_both_mixed(seeing_folder, tmp_path):
    pairs = [("say left", "left", "right"), ("say", "say", "is")]
    text = "\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), each, strict=True))) for each in pairs)
    rows = write_rows(tmp_path / "data", halves(6), is_pair=True)
    rows.write_text(rows.read_text() + "\n" + text)
    metrics = run(seeing_folder / "model", rows, tmp_path / "mixed", "--max_steps", "1")
    assert metrics["train_comparisons"] + metrics["eval_comparisons"] == 8
    rows.write_text(text)
    metrics = run(seeing_folder / "model", rows, tmp_path / "text", "--max_steps", "1")
    assert "other_pictures_accuracy" not in metrics
    assert AutoProcessor.from_pretrained(tmp_path / "text").image_token == "<image>"
    with pytest.raises(InputError, match="--freeze_text cannot be used here: no row has a picture"):
        run(seeing_folder / "model", rows, tmp_path / "no", "--freeze_text")
    with pytest.raises(InputError, match="--chat_template_path cannot be used here: the model sees"):
        run(seeing_folder / "model", rows, tmp_path / "no", "--chat_template_path", "chatml")


def test_pictures_in_some_rows_alone_are_refused_where_weights_are_split(seeing_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    rows = write_rows(tmp_path / "data", halves(8), is_pair=True)
    rows.write_text(rows.read_text() + '\n{"prompt": "say", "chosen": "left", "rejected": "is"}')
    with pytest.raises(InputError, match=r"pictures in \d of \d .* rows: DeepSpeed and FSDP") as error:
        run(seeing_folder / "model", rows, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_cannot_be_judged_is_refused(seeing_folder, tmp_path):
    rows = write_rows(tmp_path / "data", halves(3), is_pair=True)
    with pytest.raises(InputError, match="--max_length cannot be used here: rows with pictures are not cut"):
        run(seeing_folder / "model", rows, tmp_path / "out", "--max_length", "9")
    rows.write_text(rows.read_text().replace('"chosen": "left"', '"chosen": "<image> left"'))
    with pytest.raises(InputError, match=r"line \d: a place \(<image>\) in an answer"):
        run(seeing_folder / "model", rows, tmp_path / "out")
    config = hfllm.HfllmConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    hfllm.HfllmForCausalLM(config).save_pretrained(tmp_path / "text")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    rows = write_rows(tmp_path / "data", halves(3), is_pair=True)
    with pytest.raises(InputError, match="line 1: the row has pictures, and the model reads text alone"):
        run(tmp_path / "text", rows, tmp_path / "out")
    with pytest.raises(InputError, match="sees: give it its processor"):
        model = AutoModelForSequenceClassification.from_pretrained(seeing_folder / "model", num_labels=1)
        reward_model(model, load_processing_class(str(tmp_path / "text")))


CODE = """
import sys
sys.modules["hfllm"] = None  # not installed
import torch
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
kept = torch.load(folder + "/kept.pt", weights_only=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
with torch.no_grad():
    assert torch.equal(model(**kept["inputs"]).logits, kept["logits"])
print("SCORED")
"""


@pytest.mark.slow
@pytest.mark.turn(7)
def test_it_scores_where_hfllm_is_not_installed(judge, tmp_path):
    folder, _ = judge
    model, processor = (each.from_pretrained(folder) for each in (AutoModelForSequenceClassification, AutoProcessor))
    text, image = "<user> <image> which side <assistant> left <eos>", halves(1)[0]["image"]
    inputs = dict(processor(text=text, images=image, return_tensors="pt"))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "logits": logits}, tmp_path / "model" / "kept.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "SCORED" in done.stdout, done.stderr[-2000:]
