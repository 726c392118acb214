"""Train the byte-level BPE tokenizer of a new model, with our chat template, and tokenize prompts for any model."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hfllm.data.chat_templates import TURN_END, chat_template, response_template
from hfllm.data.messages import is_begun, read_tools
from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

PAD, DOCUMENT_END, MASK = "<|pad|>", "<|endoftext|>", "<|mask|>"
# Learning merges takes time quadratic in a word's length: longer words, such as base64 data, are split.
LONGEST_WORD = 1000
TOO_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
SPECIAL_TOKENS = (PAD, DOCUMENT_END, TURN_END, "<|system|>", "<|user|>", "<|assistant|>")

# What published vocabularies call a token that is there for padding and nothing else.
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
        mask_token: token that marks a token to predict, in a masked language model.
        extra_special_tokens: more special tokens, such as those of infilling.
        added_tokens: more tokens that are no special ones, such as `<think>`: text without special tokens keeps them.
        splits_digits: make every digit a token of its own, so that numbers are copied and not guessed.

    Returns:
        A fast tokenizer whose end-of-sequence token ends a turn, `<|endoftext|>` opens and separates documents, and
        whose chat template is ours.

    Raises:
        InputError: when `vocab_size` has no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = [*SPECIAL_TOKENS, *([mask_token] if mask_token else []), *extra_special_tokens]
    smallest = 256 + len(special_tokens) + len(added_tokens)
    if vocab_size < smallest:
        raise InputError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone take {smallest}")
    # A text may hold them, such as a conversation; they are tokens of their own, and what they spell needs no merges.
    marks = re.compile("|".join(map(re.escape, [*special_tokens, *added_tokens])))
    texts = (marks.sub(" ", text) for text in texts)
    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, bytes_of_words]) if splits_digits else bytes_of_words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added_tokens),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_long_words(texts), trainer)
    made = PreTrainedTokenizerFast(
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
    made.add_tokens(list(added_tokens))
    return made


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if TOO_LONG.search(text):
            yield from (text[at : at + LONGEST_WORD] for at in range(0, len(text), LONGEST_WORD))
        else:
            yield text


def truncated_tokenizer(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that a smaller vocabulary would have given: for a byte-level BPE, the first merges.

    Args:
        tokenizer: from `train_tokenizer`; it is not changed.
        vocab_size: upper bound on the number of tokens, at most the tokenizer's.
    """
    import json

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
    """Return the ids that end a response: see `configured_ends`, and the one that ends a turn of the chat template."""
    return configured_ends(tokenizer, model) | ({turn_end(tokenizer)} - {None})


def configured_ends(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> set[int]:
    """Return the tokenizer's end token, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}


def padding_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the token to pad with where a tokenizer names none, or `None` if no token can serve.

    One that its vocabulary has for this and never uses otherwise, or the unknown token, or else the end token. No
    label and no attention mask here comes from where padding tokens are, so an end that is learned stays learned; a
    reward model then reads its score at the token before the end, in training and afterwards.
    """
    vocabulary = tokenizer.get_vocab()
    unknown = tokenizer.unk_token if tokenizer.unk_token not in (tokenizer.bos_token, tokenizer.eos_token) else None
    return next((token for token in (*UNUSED, unknown) if token in vocabulary), tokenizer.eos_token)


def template_errors() -> tuple[type[Exception], ...]:
    """Return what a chat template may raise: it is a program, and ends as one does, such as by a division by zero."""
    from jinja2 import TemplateError

    return (ArithmeticError, AttributeError, LookupError, RecursionError, TemplateError, TypeError, ValueError)


def turn_end(tokenizer: "PreTrainedTokenizerBase | ProcessorMixin") -> int | None:
    """Return the special token that the chat template writes after an assistant's words, or `None` without one.

    A processor has a template of its own.

    Base models often have a chat template whose turns end by another token than their documents, such as
    `<|im_end|>` and `<|endoftext|>`.
    """
    writer, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(writer, "chat_template", None):
        return None
    said = "Zyxwvut"
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": said}]
    if writer is not tokenizer:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    try:
        text = writer.apply_chat_template(turns, tokenize=False)
    except template_errors():
        # A template of another kind of conversation.
        return None
    _, found, after = text.rpartition(said)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found and after else []
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
        tools: for each prompt those that the chat template shows with its messages, as in a column `tools`.
        as_plain_text: whether special tokens that messages spell are tokenized as text.

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
    # Neighbors that show the same tools and end alike are written in one call.
    pairs = groupby(zip(prompts, tools, strict=True), key=lambda pair: (id(pair[1]), is_begun(pair[0])))
    for (_, is_open), group in pairs:
        some, shown = zip(*group, strict=True)
        ending = {"continue_final_message" if is_open else "add_generation_prompt": True}
        if shown[0]:
            ending["tools"] = read_tools("a prompt", shown[0])
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
