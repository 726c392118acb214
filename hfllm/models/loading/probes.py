"""Try out, in a limited child process, parts of a tokenizer's files that may run forever.

A chat template is a program, and a pattern of a tokenizer may try more ways to match than there are seconds. Neither
can be stopped while running, so each is tried on something short before its use. Problems with only longer texts or
other conversations are not found in this way.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# Limits of the child: seconds of a processor, and of a busy machine, bytes, and letters of a short conversation.
CPU_SECONDS, SECONDS, MEMORY, MOST_WRITTEN = 5, 120, 1 << 30, 1 << 20
TOO_LONG, NO_MEMORY, TOO_MUCH = 40, 41, 42
# The exit code of a child with its seconds of a processor used up; Windows has no such limit.
OUT_OF_TIME = -getattr(signal, "SIGXCPU", 24)
# A repeated group, with something in it that may repeat too; all other patterns are stopped by the library's own
# limit.
REPEATED_GROUP = re.compile(r"\)[+?]?(?:[*+]|\{\d*,?\d*\})")
LIMITS = f"""
import json, sys
given = json.load(sys.stdin)
try:
    import resource, signal
    # The first one ends it by a signal that nobody else sends.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass
"""
# As transformers renders a template, without the marks of the assistant's tokens.
RENDER = f"""{LIMITS}
import jinja2.ext, jinja2.sandbox
from datetime import datetime
def tojson(value, **options):
    return json.dumps(value, ensure_ascii=False, indent=options.get("indent"))
def raise_exception(message):
    raise jinja2.TemplateError(message)
made = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
made.filters["tojson"] = tojson
made.globals |= {{"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}}
try:
    template = made.from_string(given["template"])
except MemoryError:
    sys.exit({NO_MEMORY})
except Exception:
    sys.exit()
for variables in given["conversations"]:
    size = 0
    try:
        for part in template.generate(**variables, **given["tokens"]):
            size += len(part)
            if size > {MOST_WRITTEN}:
                sys.exit({TOO_MUCH})
    except MemoryError:
        sys.exit({NO_MEMORY})
    # A template of another kind of conversation.
    except Exception:
        pass
"""
MATCH = f"""{LIMITS}
from tokenizers import Regex, pre_tokenizers
split = pre_tokenizers.Split(Regex(given["pattern"]), "isolated")
for text in given["texts"]:
    try:
        split.pre_tokenize_str(text)
    except MemoryError:
        sys.exit({NO_MEMORY})
    except BaseException as error:
        sys.exit({TOO_LONG} if "retry" in str(error) else 0)
"""
QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "A fox."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "At what."}}},
    },
}
CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {"messages": [QUESTION], "add_generation_prompt": True},
    {
        "messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER],
        "add_generation_prompt": False,
    },
    {"messages": [QUESTION], "tools": [TOOL], "add_generation_prompt": True},
    {
        "messages": [
            {**QUESTION, "content": [{"type": "text", "text": "Hi"}]},
            {**ANSWER, "content": [{"type": "text", "text": "A"}]},
        ]
    },
)
WORDS = "The quick brown foxes don't jump over 1,234 lazy dogs, and 56 owls (at 7:30) say: hello! "


def check_tokenizer(name: str, loaded: "PreTrainedTokenizerBase | ProcessorMixin") -> None:
    """Refuse a tokenizer, or the tokenizer of a processor, whose patterns or chat templates do not end."""
    tokenizer = getattr(loaded, "tokenizer", None) or loaded
    for pattern in _patterns(tokenizer):
        if REPEATED_GROUP.search(pattern) and (complaint := _try_pattern(pattern)):
            raise InputError(f"model {name!r}: the pattern {pattern!r:.80} of its tokenizer {complaint}")
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for holder in {id(each): each for each in (loaded, tokenizer)}.values():
        templates = getattr(holder, "chat_template", None)
        for template in templates.values() if isinstance(templates, Mapping) else [templates]:
            if isinstance(template, str):
                check_template(template, f"model {name!r}: its chat template", tokens)


def check_template(template: str, whose: str, tokens: Mapping[str, str] | None = None) -> None:
    """Refuse a chat template without an end, or with a huge output, for a short conversation.

    Args:
        whose: the beginning of the complaint.
        tokens: special tokens by their names in templates, such as `bos_token`.

    Raises:
        InputError: saying which.
    """
    if complaint := _try_template(template, json.dumps(tokens or {})):
        raise InputError(f"{whose} {complaint}")


@cache
def _try_template(template: str, tokens: str) -> str | None:
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    arguments = {"template": plain, "conversations": CONVERSATIONS, "tokens": json.loads(tokens)}
    return _complaint(RENDER, arguments, "a short conversation")


@cache
def _try_pattern(pattern: str) -> str | None:
    letters = sorted({each for each in pattern if each.isprintable() and each not in "\\()[]{}|?*+^$"})[:40]
    # Some are tried only where a required letter occurs at all.
    ends = ("", "!", "\n", "x", *(f"\0{each}" for each in letters))
    runs = [each * 40 + end for each in [*"aA1. \n", "ab", *letters] for end in ends]
    return _complaint(MATCH, {"pattern": pattern, "texts": [WORDS, WORDS * 4, *runs]}, "a short text")


def _complaint(code: str, arguments: Mapping[str, Any], on: str) -> str | None:
    """Return the problem found by a child in its task, or `None`: also where it could not do the task at all."""
    endless = f"does not end for {on}: it was stopped after {CPU_SECONDS} seconds"
    # Without the user's own modules: a folder may hold a json.py.
    command, written = [sys.executable, "-I", "-c", code], json.dumps({**arguments, "seconds": CPU_SECONDS})
    try:
        done = subprocess.run(command, input=written, text=True, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # A limited child would have ended: it had no processor, or waited for a disk.
        return None if find_spec("resource") else endless
    except OSError:
        return None
    if done.returncode == NO_MEMORY:
        return f"takes more than {MEMORY >> 30} GB for {on}"
    if done.returncode == TOO_MUCH:
        return f"writes more than {MOST_WRITTEN:,} letters for {on}"
    # Any other signal says nothing about the tried file, such as the signal of a machine out of memory.
    return endless if done.returncode in (TOO_LONG, OUT_OF_TIME) else None


def _patterns(tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yield the regular expressions of a tokenizer's parts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        result = getattr(backend, part, None)
        if result is not None:
            yield from _regexes(json.loads(result.__getstate__()))


def _regexes(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _regexes(each)
