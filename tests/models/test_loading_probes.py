"""Chat templates and patterns that do not end are refused when they are loaded, and all others are taken."""

import json
import signal
import subprocess

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from hfllm.data import tokenizer as tokenizer_module
from hfllm.errors import InputError
from hfllm.models.loading import probes
from hfllm.models.loading.saved import saved_tokenizer
from hfllm.runs.output import explained

ENDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Of published tokenizers: Llama 3, GPT-4o and DeepSeek V3's numbers; Seed-OSS groups digits from the right.
PATTERNS = (
    ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDS + r"?|\s+",
    r"\p{N}{1,3}",
    r"\d{1,3}(?=(?:\d{3})*\b)",
)
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'x' * 10000000000 }}",
    "writes": "{% for a in range(99999) %}{{ messages[0].content }}, {{ 'again and again' }}{% endfor %}",
    "later": "{% if messages | length > 3 %}{{ 'x' * 10000000000 }}{% endif %}",
    "with tools": "{% if tools %}{{ 'x' * 10000000000 }}{% endif %}",
}
SAID = {
    "loops": "does not end for a short conversation: it was stopped after 1 seconds",
    "writes": "writes more than 1,048,576 letters for a short conversation",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(probes, "CPU_SECONDS", 1)
    for function in (probes._try_template, probes._try_pattern):
        function.cache_clear()
    # A child inherits what is ignored.
    before = signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGXCPU, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_a_chat_template_that_does_not_end_is_refused(name):
    with pytest.raises(InputError) as error:
        probes.check_template(ENDLESS[name], "--chat_template_path a.jinja: it")
    said = SAID.get(name, "takes more than 1 GB for a short conversation")
    assert str(error.value) == f"--chat_template_path a.jinja: it {said}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        *(each.chat_template() for each in tokenizer_module.BUILT_IN.values()),
        tokenizer_module.plain_chat_template(),
        "{{ raise_exception('only for images') }}",
        "{% for m in messages %}{{ m.content",
        "{% generation %}{{ 1 / 0 }}{% endgeneration %}{{ strftime_now('%Y') }}{{ tools | tojson(indent=2) }}",
        "{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
    ],
)
def test_all_others_are_taken(template):
    probes.check_template(template, "it", {"eos_token": "<end>"})


@pytest.mark.slow
@pytest.mark.parametrize("child", ["import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)"])
def test_what_was_killed_or_never_had_a_processor_was_not_tried(child, monkeypatch):
    monkeypatch.setattr(probes, "RENDER", child)
    monkeypatch.setattr(probes, "SECONDS", 0.5)
    probes.check_template("{{ messages }}", "it")


def saved_with(saved, template=None, pattern=None):
    """A saved tokenizer with another chat template, or another pattern."""
    if template is not None:
        (saved / "chat_template.jinja").write_text(template)
    if pattern is not None:
        file = saved / "tokenizer.json"
        settings = json.loads(file.read_text())
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, settings["pre_tokenizer"]]}
        file.write_text(json.dumps(settings))
    return str(saved)


def test_a_tokenizer_is_tried_before_it_is_used(saved):
    with pytest.raises(InputError, match=rf"^model '{saved}': its chat template takes more than 1 GB for a short"):
        saved_tokenizer(saved_with(saved, template=ENDLESS["memory"]))


@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"(?:\w+\s?)*;"])
def test_a_pattern_that_tries_for_ever_is_refused(saved, pattern):
    with pytest.raises(InputError) as error:
        saved_tokenizer(saved_with(saved, pattern=pattern))
    assert f"the pattern {pattern!r} of its tokenizer does not end for a short text" in str(error.value)


def test_patterns_of_published_tokenizers_are_taken(saved, tokenizer, monkeypatch):
    for pattern in PATTERNS:
        assert probes.REPEATED_GROUP.search(pattern) is None or probes._try_pattern(pattern) is None
    name = saved_with(saved, pattern=PATTERNS[0])
    assert saved_tokenizer(name).encode("Say red.") == tokenizer.encode("Say red.")
    # Nothing is tried that cannot repeat, or was tried before.
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("a child was started"))
    saved_tokenizer(name)


def test_a_pattern_that_its_library_gives_up_is_one_line(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("a*a*a*a*a*$"), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as error:
        tokenizer.encode("a" * 400 + "b")
    assert explained(error.value).startswith("a pattern of the tokenizer tries too many ways to match a text")
