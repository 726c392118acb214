"""Which weights of a vision-language model learn when its tower or its decoder is frozen, in several layouts."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from seeing import IMAGE, seeing

import hfllm
from hfllm.errors import InputError
from hfllm.multimodal.composed import freeze

TEXT = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
DEEP = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
# Of each layout whose projector lies inside the tower: its config, the tower's sizes, and what of the tower projects.
INSIDE = {
    "qwen2_vl": (transformers.Qwen2VLConfig, {"embed_dim": 16, "hidden_size": 32}, {"merger"}),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32},
        {"merger"},
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        {"merger", "deepstack_merger_list"},
    ),
    "glm4v": (
        transformers.Glm4vConfig,
        {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "image_size": 8},
        {"merger", "downsample"},
    ),
}


def make_model():
    """A model whose projector lies between tower and decoder, both 32 wide."""
    config = hfllm.HfllmConfig(vocab_size=IMAGE + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return seeing(hfllm.HfllmForCausalLM(config))


def composed(name, **more):
    kind, tower, inside = INSIDE[name]
    torch.manual_seed(0)
    config = kind(text_config={**TEXT, **ROPE}, vision_config={**DEEP, **tower, **more}, **TOKENS)
    return transformers.AutoModelForImageTextToText.from_config(config), inside


def learned(model, *flags):
    freeze(model, *flags)
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


# Where the tower is as wide as the decoder, its own layers are still told from what projects.
@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize("name", INSIDE)
def test_a_projector_inside_the_tower_learns(name, width):
    wide = {} if width is None else {"embed_dim" if name == "qwen2_vl" else "hidden_size": width}
    model, inside = composed(name, **wide)
    names = [each for each, _ in model.named_parameters()]
    projects = {each for each in names if each.startswith(tuple(f"model.visual.{part}." for part in inside))}
    decodes = {each for each in names if not each.startswith("model.visual.")}
    assert projects and decodes
    assert learned(model, True, False) == projects | decodes
    assert learned(model, True, True) == projects


def test_a_projector_outside_leaves_the_tower_whole():
    model = make_model()
    # What would be a projector in the tower if there were no other.
    tower = model.model.vision_tower
    tower.layers, tower.merger = torch.nn.ModuleList([torch.nn.Linear(32, 32)]), torch.nn.Linear(32, 32)
    names = {each for each, _ in model.named_parameters()}
    between = {each for each in names if "multi_modal_projector" in each}
    assert learned(model, True, False) == {each for each in names if "vision_tower" not in each}
    assert learned(model, True, True) == between and between


def test_with_nothing_between_one_part_must_learn():
    model = make_model()
    model.model.multi_modal_projector = torch.nn.Identity()
    decodes = {name for name, _ in model.named_parameters() if "vision_tower" not in name}
    assert learned(model, True, False) == decodes and decodes
    with pytest.raises(InputError, match="nothing is left to learn, since it has no projector") as error:
        freeze(model, True, True)
    assert "\n" not in str(error.value)


def test_a_layout_without_a_known_tower_is_named():
    model = make_model()
    model.model.eye = model.model.vision_tower
    del model.model.vision_tower
    with pytest.raises(InputError, match="no vision tower is known in a HfllmForConditionalGeneration"):
        freeze(model, True, False)


def test_an_adapter_has_nothing_to_freeze():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="--freeze_text cannot be used here: the model is an adapter"):
        freeze(model, False, True)
