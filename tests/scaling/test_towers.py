"""Vision towers in the planner: counts are those of the models, and pictures are work and memory."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import hfllm
from hfllm.errors import InputError
from hfllm.scaling.devices import find_device
from hfllm.scaling.planner import Request, plan
from hfllm.scaling.shapes import Shape

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 80}
TOWERS = {
    "siglip": transformers.SiglipVisionConfig(**WIDE),
    "siglip-headless": transformers.SiglipVisionConfig(**WIDE, vision_use_head=False),
    "clip": transformers.CLIPVisionConfig(**WIDE),
    "vit": transformers.ViTConfig(**WIDE),
    "dinov2": transformers.Dinov2Config(**SIZES),
}


def composed(tower, **options):
    text = hfllm.HfllmConfig(vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    fields = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **options}
    return hfllm.HfllmVisionConfig(vision_config=TOWERS[tower], text_config=text, image_token_index=5, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_parameters_tokens_and_flops_are_those_of_the_model(tower):
    for options in ({}, {"vision_feature_layer": [1, 3], "multimodal_projector_bias": False}):
        config = composed(tower, **options)
        shape = Shape.from_config(json.loads(config.to_json_string()))
        with torch.device("meta"):
            model = hfllm.HfllmForConditionalGeneration(config)
        assert shape.num_parameters() == sum(weight.numel() for weight in model.parameters())
        assert shape.tower.num_parameters() == shape.num_parameters() - config.text_config.num_parameters()
        pixels = torch.empty(1, 3, 32, 32, device="meta")
        with torch.no_grad():
            assert model.get_image_features(pixels).pooler_output[0].shape[0] == shape.tower.tokens
        if tower == "siglip-headless" and not options:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.get_image_features(pixels)
            # Three passes. The formula multiplies norms and biases too, a thirtieth at this width.
            assert 3 * counter.get_total_flops() == pytest.approx(shape.tower.flops_per_picture(), rel=0.04)


def test_pictures_cost_time_and_memory():
    shape = Shape.from_config(json.loads(composed("siglip").to_json_string()))
    text = replace(shape, tower=None)

    def best(shape, **options):
        device = find_device("h100")
        return plan(Request(shape, device, num_devices=1, max_length=256, global_batch_size=8, tokens=1e6, **options))[
            0
        ]

    assert best(text).days < best(shape).days < best(replace(shape, images_per_row=4)).days
    assert best(text).memory.weights < best(shape).memory.weights
    assert best(shape).memory.activations < best(replace(shape, images_per_row=4)).memory.activations
    assert best(text).runs_in_recipes and not best(shape).runs_in_recipes
    with pytest.raises(InputError, match=r"--images_per_row 17, of 16 tokens each, do not fit --max_length 256"):
        best(replace(shape, images_per_row=17))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["vision_config"].update(model_type="t5"), "vision_config: model_type 't5'"),
        (lambda values: values["vision_config"].update(model_type=[]), r"model_type \[\]"),
        (lambda values: values["text_config"].update(model_type={}), "model_type {}"),
        (lambda values: values["vision_config"].update(patch_size=64), "patch_size=64 is more than image_size=32"),
        (lambda values: values["vision_config"].update(hidden_size=0), "hidden_size=0 must be a whole number"),
        (lambda values: values["vision_config"].pop("image_size"), "vision_config: image_size is missing"),
        (lambda values: values.update(vision_config=3), "vision_config must be an object"),
        (lambda values: values.pop("vision_config"), "vision_config is missing"),
        (lambda values: values.update(text_config={"model_type": "llava"}), "text_config must be"),
        (lambda values: values["text_config"].pop("hidden_size"), "text_config: hidden_size is missing"),
    ],
)
def test_configs_that_cannot_be_counted_are_refused(change, message):
    values = json.loads(composed("siglip").to_json_string())
    change(values)
    with pytest.raises(InputError, match=message):
        Shape.from_config(values, "config.json")
