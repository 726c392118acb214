"""From prompts with pictures to token ids and the tensors that a processor makes of the pictures."""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from transformers import ProcessorMixin

from hfllm.data.picture_batches import words_of_places
from hfllm.data.rows import Message, content_text, is_begun, origin_of, read_tools, spells
from hfllm.errors import InputError
from hfllm.trainers.ppo.pictures import COLUMNS, PER_TOKEN, Pictures, Row, count_parts, filled_prompt, pictures_of

# Token ids of a prompt, and tensors of its pictures by the model's argument.
Encoded = tuple[list[int], dict[str, torch.Tensor]]
# Prompts that are processed at once: so many that what a call costs is little beside the pictures.
TOGETHER = 16
# Modes of pictures that are drawn in memory, and can be read.
DRAWN_MODES = ("L", "RGB", "RGBA")
# Processors whose results leave doubt, so that it is not tried again.
_ONE_BY_ONE: "WeakSet[ProcessorMixin]" = WeakSet()


def encode(
    rows: Sequence[Row],
    processor: ProcessorMixin,
    tools: Sequence[dict[str, Any]] | None = None,
    first: int = 0,
) -> tuple[list[list[int]], Pictures | None, list[list[Message]]]:
    """Return the token ids of each row's prompt, its pictures (`None` if no row has any), and the prompts with them.

    Rows are processed together where what the processor returns leaves no doubt which picture is whose, and else each
    by itself.

    Args:
        rows: of a conversation each; the same row several times in turn is processed once.
        tools: schemas, for all rows; else a row's own.
        first: the place of the first row in its dataset, for complaints.

    Raises:
        InputError: see `filled_prompt`, and for words that spell the token of a picture's place.
    """
    origins = [origin_of(row, f"prompt {place} of the dataset") for place, row in enumerate(rows, first)]
    for row, origin in zip(rows, origins, strict=True):
        if isinstance(row["prompt"], str) and pictures_of(row, origin):
            raise InputError(f"{origin}: the prompt is text; with pictures it must be a list of messages")
    distinct: list[_Asked] = []
    tokens = words_of_places(processor)
    numbers, before = [], None
    for row, origin in zip(rows, origins, strict=True):
        key = (row["prompt"], [row.get(name) for name in COLUMNS], row.get("tools"))
        if key != before:
            prompt = filled_prompt(row, origin)
            if spells(tokens, [content_text(each.get("content"), "") for each in prompt]):
                words = " or ".join(map(repr, tokens))
                raise InputError(f"{origin}: the words spell {words}, which stands for a picture's features")
            distinct.append(_Asked(prompt, tools or row.get("tools")))
        before = key
        numbers.append(len(distinct) - 1)
    encoded: list[Encoded] = []
    for start in range(0, len(distinct), TOGETHER):
        some = distinct[start : start + TOGETHER]
        encoded += _encode_together(some, processor) or [_encode_one(each, processor) for each in some]
    episodes = [encoded[number][1] for number in numbers]
    prompts = [distinct[number].prompt for number in numbers]
    ids = [encoded[number][0] for number in numbers]
    return ids, Pictures(episodes) if any(episodes) else None, prompts


def what_is_counted(row: Row) -> Hashable | None:
    """Return what the number of tokens of a prompt goes by, its words and the sizes of its pictures.

    `None` where a template may read more than these, for pictures that were not drawn in memory, each of which has to
    be opened, since it may be broken, or be turned, and for a row that is not as it should be.
    """
    with suppress(Exception):  # what is wrong is said where the row is read
        prompt, images = row["prompt"], row.get("images")
        images = [row.get("image")] if images is None else images
        if row.get("tools") or not isinstance(prompt, list) or not isinstance(images, list):
            return None
        said = [_counted_message(message) for message in prompt]
        sizes = [_counted_picture(image) for image in images]
        return None if None in said or None in sizes else (tuple(said), tuple(sizes))
    return None


def _counted_message(message: Message) -> Hashable | None:
    if not isinstance(message, dict) or message.keys() != {"role", "content"} or not isinstance(message["role"], str):
        return None
    content = message["content"]
    if isinstance(content, str):
        return message["role"], content
    found = [_counted_part(part) for part in content] if isinstance(content, list) else [None]
    return None if None in found else (message["role"], tuple(found))


def _counted_part(part: object) -> Hashable | None:
    if not isinstance(part, dict) or [*part] not in (["type"], ["type", "text"]):
        return None
    words = tuple(part.values())
    return words if all(isinstance(word, str) for word in words) else None


def _counted_picture(image: object) -> tuple[int, int] | None:
    from PIL.Image import Image

    if not isinstance(image, Image) or image.mode not in DRAWN_MODES:
        return None
    # Fails where it was closed.
    image.load()
    return None if image.format is not None or image.info or image.getexif() else image.size


class _Asked(NamedTuple):
    """A prompt with its pictures, and the schemas of tools it is shown."""

    prompt: list[Message]
    tools: Any

    def options(self) -> dict[str, Any]:
        """Return the arguments of the chat template."""
        shown = {"tools": read_tools("a prompt", self.tools)} if self.tools else {}
        return {"continue_final_message" if is_begun(self.prompt) else "add_generation_prompt": True, **shown}

    def parts(self) -> list[Message]:
        """Return the prompt with lists of parts alone, which templates of processors read."""
        return [
            {**each, "content": [{"type": "text", "text": each["content"]}]}
            if isinstance(each.get("content"), str)
            else each
            for each in self.prompt
        ]


def _encode_together(asked: Sequence[_Asked], processor: ProcessorMixin) -> list[Encoded] | None:
    """Return what `_encode_one` does for each, at a fraction of its cost; `None` where that is not sure.

    It is where pictures become `pixel_values` of one size and nothing else: then each is a tensor by itself, the same
    whatever is beside it, they are as many as the prompts have, and each takes as many places.
    """
    options, counts = asked[0].options(), [count_parts(each.prompt) for each in asked]
    if len(asked) == 1 or processor in _ONE_BY_ONE or any(each.options() != options for each in asked[1:]):
        return None
    try:
        said = [each.parts() for each in asked]
        fields = dict(_templated(processor, said, processor_kwargs={"padding": True}, **options))
    except Exception:
        # Whose prompt it is, and what is wrong, is found one by one.
        return None
    pixels, mask = fields.get("pixel_values"), fields.get("attention_mask")
    has_others = set(fields) - {"pixel_values"} != {"input_ids", "attention_mask"}
    if has_others or (pixels is not None and not (torch.is_tensor(pixels) and pixels.ndim == 4)):
        _ONE_BY_ONE.add(processor)
        return None
    if (0 if pixels is None else len(pixels)) != sum(counts):
        return None
    ids = [row[seen > 0].tolist() for row, seen in zip(fields["input_ids"], mask, strict=True)]
    token = getattr(processor, "image_token_id", None)
    places = {some.count(token) / count for some, count in zip(ids, counts, strict=True) if count}
    begin = getattr(processor.tokenizer, "bos_token_id", None)
    # Whether a beginning is added goes by the first prompt's words, where templates leave it to the tokenizer.
    begins = {next((at for at, number in enumerate(some) if number != begin), len(some)) for some in ids}
    if len(places) > 1 or len(begins) > 1:
        return None
    # Copies: a view would keep all of them as long as one is needed.
    parts = iter([] if pixels is None else [part.clone() for part in pixels.split([each for each in counts if each])])
    return [(some, {"pixel_values": next(parts)} if count else {}) for some, count in zip(ids, counts, strict=True)]


def _encode_one(asked: _Asked, processor: ProcessorMixin) -> Encoded:
    fields = dict(_templated(processor, [asked.parts()], **asked.options()))
    ids = fields.pop("input_ids")[0].tolist()
    fields.pop("attention_mask", None)
    pictures = count_parts(asked.prompt)
    tensors = {name: torch.as_tensor(value) for name, value in fields.items()} if pictures else {}
    return ids, {name: value[0] if name in PER_TOKEN else value for name, value in tensors.items()}


def _templated(processor: ProcessorMixin, said: list[list[Message]], **options: Any) -> Mapping[str, Any]:
    return processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt", **options)
