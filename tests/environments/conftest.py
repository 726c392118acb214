"""A tokenizer for tools."""

import pytest
from tool_tokenizer import make


@pytest.fixture(scope="session")
def tool_tokenizer():
    return make()
