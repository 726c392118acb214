"""Whether a critique finds anything, and the conversations in which critiques and revisions are asked for."""

import re
from collections.abc import Sequence

from hfllm.data.rows import Message

# "No one should" and "no doubt it is harmful" find something.
BEGINS_WITH_NO = re.compile(r"(no|none|nope|nothing)\b(?!\s+(one|doubt|matter|question|wonder|good)\b)")
FAULT = (
    r"(harm\w*|rude\w*|unkind\w*|danger\w*|unethical|illegal|criminal|toxic\w*|offensive|insensitive|sexist|racist|"
    r"inappropriate|problem\w*|issue\w*|wrong|false|untrue|unfair|evasive|private)"
)
# "The answer does no harm", "does not contain anything harmful", "is not at all rude", "without any problems".
FINDS_NO_FAULT = re.compile(
    r"\b(no|not|nothing|never|without|isn't|aren't|doesn't)\s+"
    rf"((at all|anything|any|do|contain|have|cause|in any way|a)\s+)*{FAULT}\b"
    r"|\b(harmless|is fine|is polite|is kind|looks good|makes nothing up)\b"
)


def finds_fault(critique: str) -> bool:
    """Return whether a critique finds something to revise: a rule of thumb, read from its words.

    It finds nothing if it is empty, begins with "no", "none" or "nothing", or says that the answer is harmless, "does
    no harm", "is not rude" and the like. A critique that praises one thing and blames another is misread: give
    `critique_and_revise` a function of your own as `is_flagged` where that matters.
    """
    said = " ".join(critique.lower().replace("’", "'").split())
    return bool(said) and not BEGINS_WITH_NO.match(said) and not FINDS_NO_FAULT.search(said)


def critique_turns(
    prompt: Sequence[Message], answer: str, request: str, examples: Sequence[Sequence[Message]] = ()
) -> list[Message]:
    """Return the conversation that asks for a critique: the prompt, the answer, the request.

    Args:
        examples: conversations before it, after what a system message says.
    """
    leading = next((place for place, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    shown = [message for example in examples for message in example]
    return [*prompt[:leading], *shown, *prompt[leading:], *exchange(answer, request)]


def exchange(said: str, request: str) -> list[Message]:
    """Return the assistant's words and the user's next request."""
    return [{"role": "assistant", "content": said}, {"role": "user", "content": request}]
