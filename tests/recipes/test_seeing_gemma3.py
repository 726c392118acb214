"""A model that is a causal language model to transformers, too, is one that sees to every recipe: tiny Gemma 3."""

import evaluate
import pytest
import quantize
import reward
import rlhf
import sft
import torch
from safetensors.torch import load_file
from seeing_rows import TEMPLATE, TOWER, WORDS, halves, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from hfllm.models.loading.adapters import load_scorer
from hfllm.rewards.models import reward_model
from hfllm.stages.shared import load_processing_class

MARKS = {"boi_token": "<boi>", "image_token": "<image>", "eoi_token": "<eoi>"}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gemma3")
    words = [*WORDS, "<boi>", "<eoi>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = TEMPLATE.replace("'<image> '", "'<boi> '")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "extra_special_tokens": {**MARKS, "user_token": "<user>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4).save_pretrained(made / "model")
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(words)},
        vision_config={**TOWER, "image_size": 8, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=4,
        boi_token_index=12,
        eoi_token_index=13,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(made / "model")
    (made / "my.py").write_text("def same(completions, **columns):\n    return [0.5 for _ in completions]\n")
    return made


def flags(folder, rows, output, *more):
    named = ["--model_name_or_path", folder / "model", "--dataset_name", rows, "--output_dir", output, *more]
    return list(map(str, named))


@pytest.mark.slow
def test_it_is_fine_tuned_and_asked_about_pictures(folder, tmp_path):
    rows = write_rows(tmp_path / "data", halves(24))
    quick = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--freeze_text"]
    metrics = sft.main(*sft.parse(flags(folder, rows, tmp_path / "out", *quick, "--learning_rate", "0.1")))
    assert metrics["examples"] + metrics["eval_examples"] == 24
    before, after = (load_file(each / "model.safetensors") for each in (folder / "model", tmp_path / "out"))
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"vision_tower", "multi_modal_projector"}
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "out")) is Gemma3ForConditionalGeneration
    asked = evaluate.main(*evaluate.parse(flags(folder, rows, tmp_path / "asked", "--suites", "pictures")))
    assert any("best_guess" in name for name in asked)


@pytest.mark.slow
def test_it_is_aligned(folder, tmp_path):
    rows = write_rows(tmp_path / "data", halves(12))
    judged = ["--reward_funcs", f"{folder / 'my.py'}:same", "--num_eval_prompts", "2", "--response_length", "2"]
    quick = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--save_strategy", "no"]
    metrics = rlhf.main(*rlhf.parse(flags(folder, rows, tmp_path / "out", *judged, *quick)))
    assert metrics["episodes"] >= 4


@pytest.mark.slow
def test_a_reward_model_of_it_sees(folder, tmp_path):
    rows = write_rows(tmp_path / "data", halves(8), is_pair=True)
    quick = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--save_strategy", "no"]
    metrics = reward.main(*reward.parse(flags(folder, rows, tmp_path / "out", *quick)))
    assert metrics["train_comparisons"] + metrics["eval_comparisons"] == 8
    # What it learned of scores the picture of the prompt, through the reward of PPO.
    scores = reward_model(load_scorer(str(tmp_path / "out")), load_processing_class(str(tmp_path / "out")))
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": row["image"]}, {"type": "text", "text": "which"}]}]
        for row in halves(2, seed=5)
    ]
    one, other = scores(asked, [[{"role": "assistant", "content": "left"}]] * 2)
    assert one != other


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "dynamic"])
def test_it_is_quantized(folder, tmp_path, scheme):
    """Under the names by which transformers saves it, which are not those of the model in memory."""
    if scheme == "int8":
        pytest.importorskip("bitsandbytes")
    rows = write_rows(tmp_path / "data", halves(4))
    quick = ["--schemes", scheme, "--save_scheme", scheme, "--sensitivity", "none", "--rounds", "0"]
    metrics = quantize.main(*quantize.parse(flags(folder, rows, tmp_path / "out", *quick, "--response_length", "2")))
    assert metrics["reload_difference"] == 0 and metrics["linear_bytes_share"] < 0.4 and metrics["loss_n"] == 4
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert again.model.vision_tower.encoder.layers[0].mlp.fc1.weight.dtype == torch.int8
    assert again.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.int8
