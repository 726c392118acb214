"""Whether a saved model sees is one answer, also for types that are a causal language model's to transformers."""

import pytest
import transformers

from hfllm.models.loading.saved import is_for_pictures, reads_pictures

TYPES = {
    # Those of both auto classes: with the same class behind them, and with a class of words behind one.
    "gemma3": True,
    "llama4": True,
    "qwen3_5": True,
    "mllama": True,
    "llava": True,
    "qwen2_vl": True,
    # A model of words that transformers lists among those that see.
    "mistral4": False,
    "llama": False,
    "gemma3_text": False,
}


@pytest.mark.parametrize("name", TYPES)
def test_a_type_sees_or_not(name):
    config = transformers.CONFIG_MAPPING[name]()
    assert is_for_pictures(config) is TYPES[name]


def test_what_has_no_config_does_not_see():
    assert not is_for_pictures(None)
    assert reads_pictures(transformers.LlavaModel) and not reads_pictures(transformers.LlamaModel)
