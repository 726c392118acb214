"""Keep texts of others, such as passages, from opening or ending a turn of a conversation."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What chat templates write around turns where the vocabulary has no token for it: `[/INST]`, `<<SYS>>`, `<|user|>`.
_MARK = re.compile(r"<+[^\s<>'\"{}]{1,60}>+|\[/?[A-Z_]{2,}\]")


def plain_text(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], str]:
    """Return a function of texts that breaks the control tokens which a text spells, such as `<|im_end|>`, by a space.

    Tokenizers read those as the tokens themselves, so that whoever writes a text would write turns. Control tokens are
    the special ones, those that were added to the vocabulary and stand in the chat template, and what that has in
    brackets. Other texts stay as they are.

    Args:
        tokenizer: the tokenizer of the model that reads the texts.
    """
    template = tokenizer.chat_template or ""
    written = "\n".join(template.values()) if isinstance(template, dict) else template
    added = tokenizer.added_tokens_decoder.values()
    spelled = {each.content.strip() for each in added if each.special or each.content in written}
    spelled |= {each.strip() for each in tokenizer.all_special_tokens} | set(_MARK.findall(written))
    # Of two that begin alike the longer one.
    longest_first = sorted(spelled - {""}, key=lambda token: (-len(token), token))
    if not longest_first:
        return str
    pattern = re.compile("|".join(map(re.escape, longest_first)))

    def plain(text: str) -> str:
        # Again, since a token may have spaces of its own; a token of a single character is left out.
        while pattern.search(text):
            text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else "", text)
        return text

    return plain
