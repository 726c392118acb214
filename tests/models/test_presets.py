"""Published sizes: the arithmetic against the papers' and checkpoints' counts, and against the modules themselves."""

import pytest
import torch

import hfllm

# Exact numbers of weights, tied ones once.
PARAMETERS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "code-llama-7b": 6_738_546_688,
    "code-llama-13b": 13_016_028_160,
    "code-llama-34b": 33_743_970_304,
    "code-llama-70b": 68_976_910_336,
    "palm-8b": 8_632_012_800,
    "palm-62b": 62_495_662_080,
    "palm-540b": 540_356_474_880,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    # Without the layer that predicts a second token.
    "glm-4.5-air": 106_852_245_504,
    "glm-4.5": 352_797_814_784,
}


# One of each family; the others are of the same modules in other sizes.
BUILT = {"gpt1", "gpt2", "palm-8b", "llama-7b", "mistral-7b", "mixtral-8x7b", "qwen3-30b-a3b", "glm-4.5-air"}


@pytest.mark.parametrize("name", hfllm.list_presets())
def test_published_sizes(name):
    assert hfllm.HfllmConfig.from_preset(name).num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", [name if name in BUILT else pytest.param(name, marks=pytest.mark.slow) for name in hfllm.list_presets()]
)
def test_published_sizes_are_those_of_the_modules(name):
    with torch.device("meta"):
        model = hfllm.HfllmForCausalLM(hfllm.HfllmConfig.from_preset(name))
    assert model.num_parameters() == PARAMETERS[name]


def test_active_parameters_of_a_mixture():
    assert hfllm.HfllmConfig.from_preset("mixtral-8x7b").num_parameters(active_only=True) == 12_879_925_248


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("mixtral-8x22b", 141, 39), ("qwen3-30b-a3b", 30.5, 3.3), ("qwen3-235b-a22b", 235, 22)],
)
def test_published_sizes_of_mixtures(name, billions, active):
    """As the models are named or described by their authors, to the digit printed there; half a digit for 3.3."""
    config = hfllm.HfllmConfig.from_preset(name)
    assert config.num_parameters() / 1e9 == pytest.approx(billions, abs=0.5)
    assert config.num_parameters(active_only=True) / 1e9 == pytest.approx(active, rel=0.02)


def test_glm_counts_its_layer_for_a_second_token_and_no_tables():
    """arXiv:2508.06471, table 1: 355 billion weights, 32 of them active; that layer joins two states by one matrix."""
    config = hfllm.HfllmConfig.from_preset("glm-4.5")
    longer = hfllm.HfllmConfig.from_preset(
        "glm-4.5", num_hidden_layers=93, mlp_layer_types=[*["dense"] * 3, *["sparse"] * 90]
    )
    tables = 2 * config.vocab_size * config.hidden_size
    assert round((longer.num_parameters() + 2 * config.hidden_size**2 - tables) / 1e9) == 355
    assert round((config.num_parameters(active_only=True) - tables) / 1e9) == 32


def test_overrides_and_other_names():
    config = hfllm.HfllmConfig.from_preset("GPT-2-XL", num_hidden_layers=2)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 1600)
    assert hfllm.HfllmConfig.from_preset("llama-30b").num_parameters() == PARAMETERS["llama-33b"]
    assert hfllm.HfllmConfig.from_preset("codellama-34b").num_parameters() == PARAMETERS["code-llama-34b"]


def test_a_changed_config_leaves_the_presets_alone():
    hfllm.HfllmConfig.from_preset("code-llama-7b").rope_parameters["rope_theta"] = 5.0
    assert hfllm.HfllmConfig.from_preset("code-llama-13b").rope_parameters["rope_theta"] == 1e6


def test_unknown_presets_name_the_nearest():
    with pytest.raises(ValueError, match="llama-2-70b"):
        hfllm.HfllmConfig.from_preset("llama-2-71b")
    with pytest.raises(ValueError, match="never disclosed"):
        hfllm.HfllmConfig.from_preset("gpt-4")
