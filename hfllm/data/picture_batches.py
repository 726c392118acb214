"""Conversations with pictures as a batch of tensors, by a model's processor."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin


def conversation_batch(
    processor: "ProcessorMixin",
    conversations: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence["Image"]],
    padding_side: str = "right",
    add_generation_prompt: bool = False,
) -> Mapping[str, Any]:
    """Return what a model takes of conversations with pictures.

    Args:
        conversations: messages with parts; `{"type": "image"}` without a picture stands for the next of its pictures.
        images: of each conversation, in their order.
        padding_side: where shorter ones are padded.
        add_generation_prompt: whether the assistant's turn is begun.
    """
    filled = [_filled(said, pictures) for said, pictures in zip(conversations, images, strict=True)]
    with padding_on(padding_side, processor.tokenizer):
        return processor.apply_chat_template(
            filled,
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )


def _filled(conversation: Sequence[Mapping[str, Any]], pictures: Sequence["Image"]) -> list[dict[str, Any]]:
    left = iter(pictures)

    def put(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return {"type": part["type"], "text": part["text"]}
        return part if part.get("image") is not None else {"type": "image", "image": next(left)}

    def parts(content: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else [put(part) for part in content]

    return [{**message, "content": parts(message["content"])} for message in conversation]


@contextmanager
def padding_on(side: str, tokenizer: Any) -> Iterator[None]:
    """Context manager in which a tokenizer pads on a side, such as the left, which generation needs."""
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        yield
    finally:
        tokenizer.padding_side = before


def words_of_places(processor: object) -> tuple[str, ...]:
    """Return the texts of the tokens that stand for pictures, which the words of a row must not spell.

    Of some processors it is one at whose place another is written: Gemma 3 writes `<image_soft_token>` for each
    `<start_of_image>`, and features are put where it stands.

    Args:
        processor: a tokenizer, or anything that knows of no pictures, has none.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    number = getattr(processor, "image_token_id", None)
    found = [getattr(processor, "image_token", None), getattr(tokenizer, "image_token", None)]
    if tokenizer is not None and isinstance(number, int):
        found.append(tokenizer.convert_ids_to_tokens(number))
    # An AddedToken in some.
    return tuple(dict.fromkeys(str(each) for each in found if each and str(each)))
