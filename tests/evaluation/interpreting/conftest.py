"""Small models of several classes, and facts in their tokens."""

import pytest
from families import FAMILIES
from interpreted_models import native_model

from hfllm.evaluation.interpreting.hooks import encode_facts, parts_of
from hfllm.evaluation.interpreting.material import world_material


@pytest.fixture
def any_model(request, make_model, tokenizer):
    """A model by its name: `ours-llama`, `native-gpt2`, ..., with three layers."""
    kind, name = request.param.split("-", 1)
    if kind == "native":
        return native_model(name, len(tokenizer))
    return make_model(num_hidden_layers=3, **FAMILIES[name])


@pytest.fixture(scope="session")
def prompts(tokenizer, world):
    """Some of the world's facts, in tokens."""
    return encode_facts(tokenizer, world_material(world).facts, uses_chat_template=True)


@pytest.fixture
def parts(make_model):
    return parts_of(make_model(num_hidden_layers=3, num_key_value_heads=4))
