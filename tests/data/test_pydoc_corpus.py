"""The documentation of the running Python as a corpus."""

import argparse
import sys
from itertools import islice
from pydoc_data.topics import topics

import pytest

from hfllm.data.sources import pydoc_documents


@pytest.fixture(scope="module")
def documents():
    before = set(sys.modules)
    found = list(pydoc_documents())
    # Documentation that is read by importing would have opened a browser by now.
    assert not {"antigravity", "this", "turtle"} & (set(sys.modules) - before)
    return found


@pytest.mark.slow
def test_it_holds_what_help_shows(documents):
    texts = dict(documents)
    assert len(texts) > 5000
    assert texts["argparse.ArgumentParser"].startswith("Object for parsing command line strings")
    assert texts["argparse.ArgumentParser"].split() == argparse.ArgumentParser.__doc__.split()
    assert texts["topics.assert"] == topics["assert"].strip()


@pytest.mark.slow
def test_each_text_comes_once_and_in_the_same_order(documents):
    assert len({text for _, text in documents}) == len(documents)
    assert list(islice(pydoc_documents(), 500)) == documents[:500]
    assert not [name for name, _ in documents if ".test." in name or name.startswith("test.")]
