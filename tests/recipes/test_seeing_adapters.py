"""What becomes of an adapter of a vision-language model: merged, judged, published with a card, and quantized."""

import evaluate
import merge
import push
import pytest
import quantize
import sft
import torch
from seeing_rows import halves, write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfllm.errors import InputError
from hfllm.evaluation.pictures import answer_pictures


@pytest.fixture(scope="module")
def adapter(seeing_folder, tmp_path_factory):
    """The folder of an adapter that was trained on pictures, and its rows."""
    folder = tmp_path_factory.mktemp("adapter")
    rows = write_rows(folder / "data", halves(16))
    named = ["--model_name_or_path", seeing_folder / "model", "--dataset_name", rows, "--output_dir", folder / "out"]
    flags = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2", "--learning_rate", "0.3"]
    sft.main(*sft.parse(list(map(str, [*named, *flags, "--save_strategy", "no"]))))
    return folder / "out", rows


@pytest.mark.slow
def test_it_is_merged_with_its_processor(adapter, seeing_folder, tmp_path):
    """The merged model says what the adapter on its base says, in logits on pictures."""
    folder, _ = adapter
    metrics = merge.main(*merge.parse(["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]))
    assert metrics["max_logit_change"] > 0.01
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    apart = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    text, image = "<user> <image> which side <assistant> left <eos>", halves(1)[0]["image"]
    inputs = processor(text=text, images=image, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, apart(**inputs).logits, atol=1e-4, rtol=0)
    sizes = push.main(
        *push.parse(["--model_name_or_path", str(tmp_path / "out"), "--hub_model_id", "me/m", "--dry_run"])
    )
    assert {"model.safetensors", "processor_config.json", "modeling_hfllm_vision.py"} <= sizes.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "processor = AutoProcessor.from_pretrained(" in card
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which side"}]}]
    assert len(answer_pictures(merged, processor, [asked], [[image]], 2)) == 1


@pytest.mark.slow
def test_it_is_judged_beside_its_base(adapter, seeing_folder, tmp_path):
    folder, rows = adapter
    named = ["--model_name_or_path", str(seeing_folder / "model"), str(folder), "--dataset_name", str(rows)]
    metrics = evaluate.main(*evaluate.parse([*named, "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "2"]))
    assert metrics["pictures/all/right/out_items"] == metrics["pictures/all/right/model_items"] == 16


def test_its_card_loads_it(adapter):
    folder, _ = adapter
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText.from_pretrained(" in card
    named = ["--model_name_or_path", str(folder)]
    with pytest.raises(InputError, match="base"):
        push.main(*push.parse([*named, "--hub_model_id", "me/seeing", "--dry_run"]))


@pytest.mark.slow
def test_it_is_quantized_with_its_base(adapter, seeing_folder, tmp_path):
    """Merged first: the loss before is that of both, and not that of the base."""
    folder, rows = adapter
    quick = ["--schemes", "dynamic", "--save_scheme", "dynamic", "--sensitivity", "none", "--rounds", "0"]
    quick += ["--dataset_name", str(rows), "--response_length", "2"]
    found = [
        quantize.main(*quantize.parse(["--model_name_or_path", str(name), "--output_dir", str(output), *quick]))
        for name, output in ((folder, tmp_path / "both"), (seeing_folder / "model", tmp_path / "base"))
    ]
    assert found[0]["reload_difference"] == 0 and found[0]["loss_n"] == 16
    assert abs(found[0]["loss_before"] - found[1]["loss_before"]) > 0.01
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "both")
    assert again.model.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    assert not list((tmp_path / "both").glob("adapter*")) and (tmp_path / "both" / "processor_config.json").is_file()
