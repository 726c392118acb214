"""Tokenizers: a new model's byte-level BPE, chat templates, added tokens, and prompts for any model."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message, is_begun, read_tools
from hfllm.data.own_template import own_template
from hfllm.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin


# ---- chat templates ----
#
# The package's chat templates, and how their assistant turns are read back.
#
# They write the common parts of transformers' chat templates: turns, schemas of `tools`, an assistant's `tool_calls`,
# results of tools (role `tool`), and thoughts (`reasoning_content`) between `<think>` and `</think>`. As in Qwen3's,
# thoughts are shown from the last question on and dropped before it; `preserve_thinking=True` shows all of them, and
# `enable_thinking=False` opens the next turn with an empty one.


TURN_END = "<|end|>"
# A question and an answer, as our template writes them.
CONVERSATION = "<|user|>{}<|end|><|assistant|>{}<|end|>"
TOOL = "<|tool|>"
# Ordinary tokens where a vocabulary has them, not special ones: these vanish when completions are decoded for rewards.
THOUGHT_MARKS, CALL_MARKS = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")


def chat_template() -> str:
    """Return the family's chat template (Jinja), with `{% generation %}` around the assistant's text."""
    return files("hfllm.data").joinpath("chat_template.jinja").read_text(encoding="utf-8").strip()


def text_of_macro() -> str:
    """Return our chat template's macro for reading strings and lists of parts."""
    return "".join(chat_template().partition("{%- endmacro -%}")[:2])


def response_template() -> dict[str, Any]:
    """Return how `tokenizer.parse_response` reads the assistant's turns of our chat template, to the letter."""
    return _response_template("<|assistant|>", [TURN_END], {"open": "<think>", "close": "</think>"})


def chatml_response_template() -> dict[str, Any]:
    """Return the same for `chatml_template`."""
    # A model may leave out line breaks of the template; more of them belong to the words.
    thought = {"open_pattern": r"<think>\n?", "close_pattern": r"\n?</think>\n{0,2}"}
    return _response_template("<|im_start|>assistant\n", ["<|im_end|>\n", "<|im_end|>"], thought)


def _response_template(start: str, ends: list[str], thought: dict[str, str]) -> dict[str, Any]:
    # A turn may speak before and after a call or a thought: nothing of it is lost.
    text = {"content": "text", "content_args": {"strip": False}, "repeats": True}
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor": start,
        "fields": {
            "reasoning_content": {**thought, **text, "join": "\n"},
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": ends, **text, "join": ""},
        },
    }


def chatml_template() -> str:
    """Return a chat template in ChatML (`<|im_start|>`, `<|im_end|>`) with tools and thoughts.

    It is for tokenizers whose own template supports neither, such as SmolLM2's.
    """
    return text_of_macro() + files("hfllm.data").joinpath("chatml_template.jinja").read_text(encoding="utf-8").strip()


def brief_template() -> str:
    """Return a chat template that names tools behind their arguments without describing them, as in `(key) "find"`.

    It is for models that learn the purpose of each from its arguments: a prompt is then several times shorter for a
    model of a few layers, and the name follows what it is found by. Results begin with a space, as words of a text do,
    so that their tokens are the same as in an answer that repeats them. It writes no thoughts.
    """
    return text_of_macro() + files("hfllm.data").joinpath("brief_template.jinja").read_text(encoding="utf-8").strip()


def writes_as_ours(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer's chat template writes turns as the family's does, in this release or another."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # It may have none, or one that refuses anything.
    except Exception:
        return False
    return text == "<|user|>a<|end|><|assistant|>a<|end|><|user|>a<|end|><|assistant|>"


def plain_chat_template() -> str:
    """Return a chat template for tokenizers without one: roles in plain words, the end token after each answer.

    A line break, which tokenizers do not merge with words, separates role and text, so that a prompt's tokens
    are a prefix of the whole conversation's.
    """
    return (
        text_of_macro() + "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- 'Assistant:\\n' -}}"
        "{% generation %}{{- text_of(message['content']) + eos_token -}}{% endgeneration %}{{- '\\n' -}}"
        "{%- else -%}"
        "{{- message['role'] | capitalize + ':\\n' + text_of(message['content']) + '\\n' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
    )


@dataclass(frozen=True)
class BuiltInTemplate:
    """A chat template of the package.

    Args:
        chat_template: returns it.
        response_template: returns how its turns are read.
        needs: tokens without which a vocabulary cannot write turns.
        marks: its tokens for tools and thoughts; without them they are several tokens each.
    """

    chat_template: Callable[[], str]
    response_template: Callable[[], dict[str, Any]]
    needs: tuple[str, ...]
    marks: tuple[str, ...]


# By the names for `--chat_template_path`.
BUILT_IN: Mapping[str, BuiltInTemplate] = {
    "hfllm": BuiltInTemplate(
        chat_template,
        response_template,
        ("<|system|>", "<|user|>", "<|assistant|>", TURN_END),
        (TOOL, *CALL_MARKS, *THOUGHT_MARKS),
    ),
    "hfllm-brief": BuiltInTemplate(
        brief_template,
        response_template,
        ("<|system|>", "<|user|>", "<|assistant|>", TURN_END, TOOL),
        (TOOL, *CALL_MARKS),
    ),
    "chatml": BuiltInTemplate(
        chatml_template, chatml_response_template, ("<|im_start|>", "<|im_end|>"), (*CALL_MARKS, *THOUGHT_MARKS)
    ),
}


# A template with tools that keeps the model's own turns.
OWN = "own"


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Set a chat template: that of a file, or of `set_built_in`.

    Raises:
        InputError: see `set_built_in`, and for another name.
    """
    # It reads the output of another template.
    tokenizer.response_template = None
    if Path(name).is_file():
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    elif name in (*BUILT_IN, OWN):
        set_built_in(tokenizer, name)
    else:
        raise InputError(f"expected a file, or one of {', '.join((*BUILT_IN, OWN))}")


def set_built_in(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Set a chat template of `BUILT_IN`, or `own`, and how its turns are read.

    Raises:
        InputError: when the vocabulary lacks a token of its turns, or the own turns cannot be kept.
    """
    if name == OWN:
        tokenizer.chat_template, ends, start = own_template(tokenizer, text_of_macro())
        template = _response_template("", ends, {"open": "<think>", "close": "</think>"})
        del template["start_anchor"]
        tokenizer.response_template = {**template, **start}
        return
    built_in = BUILT_IN[name]
    if missing := [token for token in built_in.needs if token not in tokenizer.get_vocab()]:
        raise InputError(f"the chat template {name!r} needs the token {missing[0]!r}, which the tokenizer lacks")
    tokenizer.chat_template, tokenizer.response_template = built_in.chat_template(), built_in.response_template()


# ---- tokenizer ----


PAD, DOCUMENT_END, MASK = "<|pad|>", "<|endoftext|>", "<|mask|>"
# Learning merges takes time quadratic in a word's length: longer words, such as base64 data, are split.
LONGEST_WORD = 1000
TOO_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
SPECIAL_TOKENS = (PAD, DOCUMENT_END, TURN_END, "<|system|>", "<|user|>", "<|assistant|>")

# Names of tokens in published vocabularies that serve only as padding.
UNUSED = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|padding|>", "<|PAD|>", "<|vision_pad|>")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 1024,
    model_max_length: int = 512,
    mask_token: str | None = None,
    extra_special_tokens: Sequence[str] = (),
    added_tokens: Sequence[str] = (),
    splits_digits: bool = False,
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer: lossless on any text, not only on the training text.

    Args:
        texts: the texts to learn merges from.
        vocab_size: upper bound on the number of tokens; at least the 256 bytes and the special tokens.
        model_max_length: the model's context in tokens, beyond which the tokenizer warns.
        mask_token: the token at positions to predict, in a masked language model.
        extra_special_tokens: more special tokens, such as the tokens of infilling.
        added_tokens: more tokens, not special ones, such as `<think>`: text without special tokens keeps them.
        splits_digits: make every digit a token of its own, so that numbers are copied and not guessed.

    Returns:
        A fast tokenizer whose end-of-sequence token ends a turn, `<|endoftext|>` opens and separates documents, and
        whose chat template is ours.

    Raises:
        InputError: when `vocab_size` has no room for the bytes and the special tokens.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = [*SPECIAL_TOKENS, *([mask_token] if mask_token else []), *extra_special_tokens]
    smallest = 256 + len(special_tokens) + len(added_tokens)
    if vocab_size < smallest:
        raise InputError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone take {smallest}")
    # A text may hold them, such as a conversation; they are tokens of their own, and their spelling needs no merges.
    marks = re.compile("|".join(map(re.escape, [*special_tokens, *added_tokens])))
    texts = (marks.sub(" ", text) for text in texts)
    tokenizer = _untrained(splits_digits)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added_tokens),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_long_words(texts), trainer)
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=DOCUMENT_END,
        eos_token=TURN_END,
        **({"mask_token": mask_token} if mask_token else {}),
        **({"extra_special_tokens": list(extra_special_tokens)} if extra_special_tokens else {}),
        model_max_length=model_max_length,
        chat_template=chat_template(),
        response_template=response_template(),
        clean_up_tokenization_spaces=False,
    )
    fast_tokenizer.add_tokens(list(added_tokens))
    return fast_tokenizer


def _untrained(splits_digits: bool) -> "Tokenizer":
    """Return a byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, bytes_of_words]) if splits_digits else bytes_of_words
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if TOO_LONG.search(text):
            yield from (text[at : at + LONGEST_WORD] for at in range(0, len(text), LONGEST_WORD))
        else:
            yield text


def truncated_tokenizer(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> "PreTrainedTokenizerFast":
    """Return the tokenizer for a smaller vocabulary, as if trained with it: for a byte-level BPE, the first merges.

    Args:
        tokenizer: from `train_tokenizer`; it is not changed.
        vocab_size: upper bound on the number of tokens, at most the tokenizer's.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, dropped = state["model"], len(tokenizer) - vocab_size
    if dropped > 0:
        # Each merge makes one token, and tokens are numbered in the order of the merges.
        model["merges"] = model["merges"][: len(model["merges"]) - dropped]
        model["vocab"] = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> set[int]:
    """Return the ids at the end of a response: see `configured_ends`, and the last one of a chat template's turn."""
    return configured_ends(tokenizer, model) | ({turn_end(tokenizer)} - {None})


def configured_ends(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> set[int]:
    """Return the tokenizer's end token, and the end tokens of the model's generation config."""
    configured = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}


def padding_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the padding token for a tokenizer that names none, or `None` if no token can serve.

    It is the vocabulary's token for padding, never used otherwise, or the unknown token, or else the end token. No
    label and no attention mask here depends on the position of padding tokens, so a learned end stays learned; a
    reward model then reads its score at the token before the end, in training and afterwards.
    """
    vocabulary = tokenizer.get_vocab()
    unknown = tokenizer.unk_token if tokenizer.unk_token not in (tokenizer.bos_token, tokenizer.eos_token) else None
    return next((token for token in (*UNUSED, unknown) if token in vocabulary), tokenizer.eos_token)


def template_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a chat template may raise: it is a program, and may fail by a division by zero."""
    from jinja2 import TemplateError

    return (ArithmeticError, AttributeError, LookupError, RecursionError, TemplateError, TypeError, ValueError)


def turn_end(tokenizer: "PreTrainedTokenizerBase | ProcessorMixin") -> int | None:
    """Return the special token that the chat template writes after an assistant's words, or `None` without one.

    A processor has its own template.

    Base models often have a chat template with another token at the end of turns than at the end of documents, such as
    `<|im_end|>` and `<|endoftext|>`.
    """
    writer, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(writer, "chat_template", None):
        return None
    answer = "Zyxwvut"
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}]
    if writer is not tokenizer:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    try:
        text = writer.apply_chat_template(turns, tokenize=False)
    except template_errors():
        # A template of another kind of conversation.
        return None
    _, result, after = text.rpartition(answer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if result and after else []
    return next((number for number in ids if number in special), None)


def tokenize_prompts(
    prompts: Sequence[str | list],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Any] | None = None,
    as_plain_text: bool = False,
) -> list[list[int]]:
    """Return the token ids of each prompt: text unchanged, messages by chat template up to the assistant's turn.

    Messages that end with the assistant's are to be continued: the turn stays open after them.

    Args:
        tools: for each prompt the tools that the chat template shows with its messages, as in a column `tools`.
        as_plain_text: whether special tokens spelled in messages are tokenized as text.

    Raises:
        InputError: when these are no tools, or the template cannot continue an assistant's turn.
    """
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    options = {"tokenize": True, "return_dict": True, "padding": False}
    if as_plain_text:
        options["sanitize_control_tokens"] = True
    if not any(tools or ()):
        tools = [None] * len(prompts)
    ids: list[list[int]] = []
    # Neighbors with the same tools and the same kind of end are written in one call.
    pairs = groupby(zip(prompts, tools, strict=True), key=lambda pair: (id(pair[1]), is_begun(pair[0])))
    for (_, is_open), group in pairs:
        some, group_tools = zip(*group, strict=True)
        ending = {"continue_final_message" if is_open else "add_generation_prompt": True}
        if group_tools[0]:
            ending["tools"] = read_tools("a prompt", group_tools[0])
        try:
            ids += tokenizer.apply_chat_template(list(some), **ending, **options)["input_ids"]
        except ValueError as error:
            if not is_open:
                raise
            raise InputError(
                "the chat template cannot leave the assistant's turn open, as prompts that end with its words "
                f"({some[0][-1]['content']!r:.40}) need; --augment 0 begins no answers, and without it leave these out"
            ) from error
    return ids


# ---- plain text ----
#
# Keep the texts of other people, such as passages, from opening or ending a turn of a conversation.


# Turn marks of chat templates where the vocabulary has no token for them: `[/INST]`, `<<SYS>>`, `<|user|>`.
_MARK = re.compile(r"<+[^\s<>'\"{}]{1,60}>+|\[/?[A-Z_]{2,}\]")


def plain_text(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], str]:
    """Return a function that breaks the control tokens spelled in texts, such as `<|im_end|>`, by a space.

    Tokenizers read such spellings as the tokens themselves, so that the author of a text could write turns. Control
    tokens are the special ones, the tokens added to the vocabulary that stand in the chat template, and the template's
    marks in brackets. Other texts stay as they are.

    Args:
        tokenizer: the tokenizer of the model for the texts.
    """
    template = tokenizer.chat_template or ""
    written = "\n".join(template.values()) if isinstance(template, dict) else template
    added = tokenizer.added_tokens_decoder.values()
    spelled = {each.content.strip() for each in added if each.special or each.content in written}
    spelled |= {each.strip() for each in tokenizer.all_special_tokens} | set(_MARK.findall(written))
    # The longer one of two with the same beginning.
    longest_first = sorted(spelled - {""}, key=lambda token: (-len(token), token))
    if not longest_first:
        return str
    pattern = re.compile("|".join(map(re.escape, longest_first)))

    def plain(text: str) -> str:
        # Again, since a token may have spaces of its own; a token of a single character is left out.
        while pattern.search(text):
            text = pattern.sub(lambda result: f"{result[0][0]} {result[0][1:]}" if len(result[0]) > 1 else "", text)
        return text

    return plain


# ---- transcripts ----
#
# Conversations as plain text, for base models without a chat template.


SPEAKERS = {"user": "Human", "assistant": "Assistant"}
# The text with which a base model continues on the other side's turn: after a transcript, and after a conversation in
# the plain chat template, its replacement for a missing one.
NEXT_TURN, NEXT_PLAIN_TURN = "\n\nHuman:", "\nUser:\n"


def to_transcript(messages: Sequence[Message]) -> str:
    """Return a conversation in Anthropic's form, up to where the assistant speaks: `\\n\\nHuman: ...\\n\\nAssistant:`.

    It is the form of Bai et al. 2022 and of the dataset hh-rlhf. The text of a system message stands before it.
    """
    turns = [
        f"\n\n{SPEAKERS[message['role']]}: {message['content']}" if message["role"] in SPEAKERS else message["content"]
        for message in messages
    ]
    return "".join([*turns, "\n\nAssistant:"])


def to_prompt(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str | list[Message]:
    """Return a conversation in the tokenizer's form: messages for its chat template, a transcript without one."""
    return messages if tokenizer.chat_template else to_transcript(messages)


def next_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the text at the end of a base model's answer, `None` for a tokenizer with a chat template of its own."""
    if not tokenizer.chat_template:
        return NEXT_TURN
    return NEXT_PLAIN_TURN if tokenizer.chat_template == plain_chat_template() else None
