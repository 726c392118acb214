"""Processors of images: a conversation as tokens and pixels, and the batches and positions of PPO."""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hfllm.data.formats import Message, content_text, counted, in_parts, is_begun, origin_of, read_tools, spells
from hfllm.data.images.files import read_image
from hfllm.data.images.rows import words_of_places
from hfllm.data.tokenizer import text_of_macro
from hfllm.errors import InputError, one_line, refuse_if
from hfllm.models.family.configuration_hfllm_vision import configured_size, picture_size, vectors_before_patches
from hfllm.models.loading.saved import reads_pictures

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, LlavaProcessor, PreTrainedConfig, PreTrainedModel


# ---- processors ----


IMAGE_TOKEN = "<|image|>"
# Of the towers with published weights trained with colors of their own mean and spread.
IMAGE_PROCESSORS = {
    "clip_vision_model": "CLIPImageProcessorPil",
    "siglip_vision_model": "SiglipImageProcessorPil",
    "dinov2": "BitImageProcessorPil",
}


def vision_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision_config: "PreTrainedConfig",
    *,
    image_token: str = IMAGE_TOKEN,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    image_processor: "BaseImageProcessor | None" = None,
) -> "LlavaProcessor":
    """Return the processor of a vision-language model: texts and images in, tokens and pixels out.

    It writes as many image tokens for an image as the tower's number of vectors for it. Its images are resized to the
    tower's size, whatever their own, by PIL; torchvision is not needed.

    Args:
        tokenizer: of the text model. The image token is added to it if it has none.
        vision_config: of the tower.
        image_token: a special token.
        vision_feature_select_strategy: as in `with_vision`.
        chat_template: one with `image_token` for a part `{"type": "image"}`; `None` takes the tokenizer's, and extends
            it so if it is ours.
        image_processor: instead of the default one for the tower.

    Returns:
        A processor, loadable again by `AutoProcessor`.

    Raises:
        InputError: for a tower without a size and a patch, a tokenizer with a chat template without images, or
            an image processor of another size.
    """
    from transformers import LlavaProcessor

    patch, size = getattr(vision_config, "patch_size", None), configured_size(vision_config)
    if not isinstance(patch, int) or size is None:
        kind = getattr(vision_config, "model_type", type(vision_config).__name__)
        raise InputError(f"the config of {kind!r} has no image_size and patch_size: it is no tower for pictures")
    _add_special(tokenizer, image_token)
    template = chat_template or picture_template(tokenizer, image_token)
    before = vectors_before_patches(vision_config)
    processor = LlavaProcessor(
        image_processor or _image_processor(vision_config.model_type, size),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=vision_feature_select_strategy or ("default" if before else "full"),
        chat_template=template,
        image_token=image_token,
        num_additional_image_tokens=before,
    )
    if image_processor is not None:
        check_processor(processor, vision_config)
    return processor


def picture_template(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> str:
    """Return a tokenizer's chat template, with `image_token` for every part `{"type": "image"}` of a message.

    Templates of this package, which refuse images, are extended so; others must support images.

    Raises:
        InputError: for a template without images, or no template.
    """
    template, macro = tokenizer.chat_template or "", text_of_macro()
    refuses = "{%- if part is not mapping or part['type'] != 'text'"
    if macro in template:
        shows = f"{{%- if part is mapping and part['type'] == 'image' -%}}{{{{- '{image_token}' -}}}}{{%- el"
        taught = macro.replace(refuses, shows + refuses.removeprefix("{%- "))
        taught = taught.replace(
            "{{- part['text'] -}}", "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
        )
        template = template.replace(macro, taught)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False) if template else ""
    # It may refuse anything in its own words.
    except Exception as error:
        text = str(error)
    if image_token not in text or "a" not in text:
        raise InputError(
            f"the tokenizer's chat template does not write {image_token} for a picture: give chat_template=, one that "
            "does so for {'type': 'image'}"
        )
    return template


def check_processor(processor: ProcessorMixin, vision_config: "PreTrainedConfig") -> None:
    """Refuse a processor with images of another size than a tower's, or with another number of vectors.

    Args:
        processor: of Llava's layout.
        vision_config: of the tower.
    """
    _check_patch(processor, vision_config)
    _check_size(processor, configured_size(vision_config))
    before, counted = vectors_before_patches(vision_config), processor.num_additional_image_tokens
    if before != counted:
        raise InputError(
            f"the processor has num_additional_image_tokens={counted} and the vision tower {before} vectors before "
            "those of patches"
        )


def check_fit(processor: ProcessorMixin, config: "PreTrainedConfig") -> None:
    """Refuse a processor of Llava's layout with images, or image tokens, that do not fit a model.

    Others, and towers with an unknown number of vectors, are left to the model.

    Args:
        config: of the model.
    """
    tower = getattr(config, "vision_config", None)
    if config.model_type not in ("hfllm_vision", "llava") or type(processor).__name__ != "LlavaProcessor":
        return
    _check_size(processor, picture_size(tower))
    if tower.model_type not in (*IMAGE_PROCESSORS, "vit"):
        return
    _check_patch(processor, tower)
    # `"default"` leaves out one per image.
    more = vectors_before_patches(tower) - (config.vision_feature_select_strategy == "default")
    counted = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if counted != more:
        raise InputError(
            f"the processor writes {counted:+} image tokens beside those of patches and the model has {more:+} "
            "vectors (vision_feature_select_strategy, num_additional_image_tokens)"
        )


def check_template(processor: ProcessorMixin, name: str) -> None:
    """Refuse a processor without a chat template for a question about an image.

    Args:
        name: of its model.
    """
    from PIL import Image

    whose = f"model {name!r}: its processor"
    if not processor.chat_template:
        raise InputError(
            f"{whose} has no chat template, by which conversations with pictures are written: save it with one, as "
            "hfllm.vision_processor makes it"
        )
    image_part = {"type": "image", "image": Image.new("RGB", (64, 64))}
    messages = [{"role": "user", "content": [image_part, {"type": "text", "text": "a"}]}]
    try:
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    # A template may refuse anything in its own words.
    except Exception as error:
        reason = one_line(error)
        raise InputError(f"{whose} cannot write a question about a picture by its chat template: {reason}") from None


def _check_size(processor: ProcessorMixin, size: tuple[int, int] | None) -> None:
    """Refuse a processor with images of another size than a tower's; either may be unknown."""
    output = output_size(processor.image_processor)
    if output is not None and size is not None and output != size:
        raise InputError(
            f"the processor makes pictures of {output[0]}x{output[1]} pixels and the vision tower takes "
            f"{size[0]}x{size[1]} (image_size)"
        )


def _check_patch(processor: ProcessorMixin, tower: "PreTrainedConfig") -> None:
    ours, theirs = getattr(processor, "patch_size", None), tower.patch_size
    refuse_if(ours != theirs, f"the processor has patch_size={ours} and the vision tower {theirs}")


def output_size(image_processor: "BaseImageProcessor") -> tuple[int, int] | None:
    """Return height and width of an image processor's output images, or `None` if they vary."""
    is_cropped = getattr(image_processor, "do_center_crop", False)
    size = getattr(image_processor, "crop_size" if is_cropped else "size", None)
    height, width = (getattr(size, name, None) for name in ("height", "width"))
    return None if height is None or width is None else (height, width)


def _image_processor(model_type: str, size: tuple[int, int]) -> "BaseImageProcessor":
    import transformers

    kind = getattr(transformers, IMAGE_PROCESSORS.get(model_type, "ViTImageProcessorPil"))
    exact = {"height": size[0], "width": size[1]}
    return kind(size=exact, do_center_crop=False, do_convert_rgb=True)


def _add_special(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    from transformers import AddedToken

    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)


# ---- pictures ----
#
# Images in prompts: a row's columns, the prompt with its images, and their tensors for the model.
#
# The format is TRL's of GRPOTrainer: a column `image` or `images`, and a prompt as a list of messages, with a part
# `{"type": "image"}` as the placeholder of every image. A prompt without placeholders gets them before the user's
# first words.


Row = Mapping[str, Any]
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
COLUMNS = ("images", "image")
# Outputs of a processor per token; all others are about images or parts of them.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# The images of a prompt or a reply: where its tokens begin in the sequence, and tensors by the model's argument.
ImageTensors = tuple[int, Mapping[str, torch.Tensor]]
# Names of configs for the placeholder tokens of media features. Such a token is never sampled.
PLACE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


@dataclass(frozen=True)
class Pictures:
    """A processor's output for every episode's images, on the CPU until a model reads it.

    Args:
        episodes: for every episode tensors by the model's argument, such as `pixel_values` and `image_sizes`: images
            or their parts along the first dimension; the arguments of `PER_TOKEN` (T,) along its first tokens. No
            tensors for an episode without images. Responses to one prompt share them.
    """

    episodes: Sequence[Mapping[str, torch.Tensor]]

    @classmethod
    def of_episodes(cls, episodes: "Sequence[Sequence[ImageTensors]]") -> "Pictures | None":
        """Return the images of episodes, in their order; `None` where there are none."""
        return cls([_joined_images(each) for each in episodes]) if any(episodes) else None

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, rows: torch.Tensor) -> "Pictures":
        """Return the images of some episodes, by their indices."""
        return self.of(rows.tolist())

    def of(self, rows: Sequence[int]) -> "Pictures":
        """Return the images of some episodes, by their indices."""
        return Pictures([self.episodes[row] for row in rows])

    def inputs(self, input_ids: torch.Tensor, begins: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the model's further arguments for these episodes as one batch, nothing where none has an image.

        Args:
            input_ids: (B, W), the batch.
            begins: the column of every row's first token.
        """
        batch = {}
        for name in dict.fromkeys(name for episode in self.episodes for name in episode):
            if name not in PER_TOKEN:
                parts = [episode[name] for episode in self.episodes if name in episode]
                batch[name] = _joined(parts).to(input_ids.device, non_blocking=True)
                continue
            batch[name] = torch.zeros_like(input_ids)
            for row, (episode, begin) in enumerate(zip(self.episodes, begins, strict=True)):
                if name in episode:
                    batch[name][row, begin : begin + len(episode[name])] = episode[name].to(input_ids.device)
        return batch

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by names for a file, without repeats, and the tensors' episodes."""
        distinct = {id(episode): episode for episode in self.episodes}
        numbers = {key: number for number, key in enumerate(distinct)}
        named_tensors = {"pictures": torch.tensor([numbers[id(episode)] for episode in self.episodes])}
        for number, episode in enumerate(distinct.values()):
            named_tensors |= {f"pictures.{number}.{name}": tensor.contiguous() for name, tensor in episode.items()}
        return named_tensors

    @classmethod
    def split_off(cls, tensors: dict[str, torch.Tensor]) -> "Pictures | None":
        """Take the output of `tensors` out of the tensors of a file; `None` if the file has none."""
        if "pictures" not in tensors:
            return None
        numbers = tensors.pop("pictures").tolist()
        distinct: list[dict[str, torch.Tensor]] = [{} for _ in range(max(numbers) + 1)]
        for key in [key for key in tensors if key.startswith("pictures.")]:
            _, number, name = key.split(".", 2)
            distinct[int(number)][name] = tensors.pop(key).cpu()
        return cls([distinct[number] for number in numbers])


def _joined_images(parts: "Sequence[ImageTensors]") -> Mapping[str, torch.Tensor]:
    if len(parts) == 1 and not parts[0][0]:
        # Episodes of one prompt share its tensors.
        return parts[0][1]
    joined: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for _, part in parts for name in part):
        own = [(begin, part[name]) for begin, part in parts if name in part]
        if name not in PER_TOKEN:
            joined[name] = _joined([tensor for _, tensor in own])
            continue
        joined[name] = own[0][1].new_zeros(max(begin + len(tensor) for begin, tensor in own))
        for begin, tensor in own:
            joined[name][begin : begin + len(tensor)] = tensor
    return joined


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors one after the other, padded with zeros to the largest, as processors pad images."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if all(list(part.shape[1:]) == shape for part in parts):
        return torch.cat(list(parts))
    joined = parts[0].new_zeros(sum(map(len, parts)), *shape)
    at = 0
    for part in parts:
        joined[(slice(at, at + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        at += len(part)
    return joined


# ---- models and processors ----


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or a tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def unable_to_read(policy: "PreTrainedModel") -> str | None:
    """Return a policy without image input, in words for an error message; `None` for one with it."""
    return None if reads_pictures(policy) else f"the policy ({type(policy).__name__})"


def place_tokens(model: "PreTrainedModel") -> set[int]:
    """Return the ids of the placeholder tokens for image features: a sampled one would have no features."""
    result = (getattr(model.config, name, None) for name in PLACE_TOKENS)
    return {number for number in result if isinstance(number, int)}


# ---- rows ----


def pictures_of(row: Row, origin: str) -> list[Any]:
    """Return the contents of a row's column `images`, or else `image`.

    Raises:
        InputError: when `images` is no list.
    """
    images = row.get("images")
    if images is None:
        return [row["image"]] if row.get("image") is not None else []
    if not isinstance(images, list | tuple):
        raise InputError(f"{origin}: images must be a list, got {type(images).__name__}; one picture is named image")
    return list(images)


def has_pictures(row: Row, origin: str) -> bool:
    """Return whether a row has images, or placeholders for them."""
    return bool(pictures_of(row, origin)) or count_parts(row["prompt"]) > 0


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def count_parts(prompt: str | Sequence[Message]) -> int:
    """Return the number of a prompt's parts other than text: image placeholders, filled or not, and other media."""
    if isinstance(prompt, str):
        return 0
    return sum(part.get("type") != "text" for message in prompt for part in _parts(message))


def filled_prompt(row: Row, origin: str) -> list[Message]:
    """Return a row's prompt with its images in their placeholders, opened.

    Raises:
        InputError: when there are more or fewer images than placeholders, or an unreadable image.
    """
    prompt, pictures = row["prompt"], pictures_of(row, origin)
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if pictures and not count_parts(prompt):
        prompt = _with_placeholders(prompt, len(pictures), origin)
    for part in (part for message in prompt for part in _parts(message)):
        if part.get("type") not in ("text", "image"):
            raise InputError(f"{origin}: a part of the type {part.get('type')!r}; PPO reads text and image")
    is_open = [part["type"] == "image" and part.get("image") is None for each in prompt for part in _parts(each)]
    if sum(is_open) != len(pictures):
        has = f"the column {column!r} has {len(pictures)}" if column else "there is no column image or images"
        raise InputError(f"{origin}: {counted(sum(is_open), 'place')} for pictures in the prompt, and {has}")
    rest = iter(pictures)

    def put(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        picture = part["image"] if part.get("image") is not None else next(rest)
        return {"type": "image", "image": read_image(picture, origin)}

    return [{**each, "content": [put(part) for part in _parts(each)]} if _parts(each) else each for each in prompt]


def _with_placeholders(prompt: list[Message], count: int, origin: str) -> list[Message]:
    """Return a prompt with placeholders before the user's first words, as TRL puts them."""
    first = next((at for at, message in enumerate(prompt) if message["role"] == "user"), None)
    refuse_if(first is None, f"{origin}: the prompt has no place for a picture, and no message of the user for one")
    content = prompt[first]["content"]
    parts = [
        *({"type": "image"} for _ in range(count)),
        *([{"type": "text", "text": content}] * isinstance(content, str)),
    ]
    parts += content if isinstance(content, list) else []
    return [*prompt[:first], {**prompt[first], "content": parts}, *prompt[first + 1 :]]


def without_pictures(prompt: str | list[Message]) -> str | list[Message]:
    """Return a prompt with empty image placeholders, as a table of completions shows it."""
    if isinstance(prompt, str) or not count_parts(prompt):
        return prompt

    def emptied(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["type"] == "text" else {"type": part["type"]}

    return [{**each, "content": [emptied(part) for part in _parts(each)]} if _parts(each) else each for each in prompt]


# ---- picture tokens ----
#
# From prompts with images to token ids and a processor's tensors of the images.


# Token ids of a prompt, and tensors of its images by the model's argument.
Encoded = tuple[list[int], dict[str, torch.Tensor]]
# Prompts processed at once: enough to make the cost of a call small next to the cost of the images.
TOGETHER = 16
# Modes of readable images drawn in memory.
DRAWN_MODES = ("L", "RGB", "RGBA")
# Processors with doubtful results, for no second try.
_ONE_BY_ONE: WeakSet[ProcessorMixin] = WeakSet()


def encode(
    rows: Sequence[Row],
    processor: ProcessorMixin,
    tools: Sequence[dict[str, Any]] | None = None,
    first: int = 0,
) -> tuple[list[list[int]], Pictures | None, list[list[Message]]]:
    """Return the token ids of the rows' prompts, their images (`None` if no row has any), and the prompts with them.

    Rows are processed together where the processor's output leaves no doubt about the prompt of an image, and else one
    by one.

    Args:
        rows: of a conversation each; the same row several times in turn is processed once.
        tools: schemas, for all rows; else a row's own.
        first: the index of the first row in its dataset, for error messages.

    Raises:
        InputError: see `filled_prompt`, and for words spelling the placeholder token of an image.
    """
    origins = [origin_of(row, f"prompt {index} of the dataset") for index, row in enumerate(rows, first)]
    for row, origin in zip(rows, origins, strict=True):
        if isinstance(row["prompt"], str) and pictures_of(row, origin):
            raise InputError(f"{origin}: the prompt is text; with pictures it must be a list of messages")
    distinct: list[_Request] = []
    tokens = words_of_places(processor)
    numbers, before = [], None
    for row, origin in zip(rows, origins, strict=True):
        key = (row["prompt"], [row.get(name) for name in COLUMNS], row.get("tools"))
        if key != before:
            prompt = filled_prompt(row, origin)
            if spells(tokens, [content_text(each.get("content"), "") for each in prompt]):
                words = " or ".join(map(repr, tokens))
                raise InputError(f"{origin}: the words spell {words}, which stands for a picture's features")
            distinct.append(_Request(prompt, tools or row.get("tools")))
        before = key
        numbers.append(len(distinct) - 1)
    encoded: list[Encoded] = []
    for start in range(0, len(distinct), TOGETHER):
        some = distinct[start : start + TOGETHER]
        encoded += _encode_together(some, processor) or [
            encode_messages(each.prompt, processor, **each.options()) for each in some
        ]
    episodes = [encoded[number][1] for number in numbers]
    prompts = [distinct[number].prompt for number in numbers]
    ids = [encoded[number][0] for number in numbers]
    return ids, Pictures(episodes) if any(episodes) else None, prompts


def what_is_counted(row: Row) -> Hashable | None:
    """Return the data that determine the number of tokens of a prompt, its words and the sizes of its images.

    `None` where a template may read more than these, for images not drawn in memory, which all have to be opened,
    since they may be broken or rotated, and for an invalid row.
    """
    with suppress(Exception):  # the error is raised where the row is read
        prompt, images = row["prompt"], row.get("images")
        images = [row.get("image")] if images is None else images
        if row.get("tools") or not isinstance(prompt, list) or not isinstance(images, list):
            return None
        messages = [_counted_message(message) for message in prompt]
        sizes = [_counted_picture(image) for image in images]
        return None if None in messages or None in sizes else (tuple(messages), tuple(sizes))
    return None


def _counted_message(message: Message) -> Hashable | None:
    if not isinstance(message, dict) or message.keys() != {"role", "content"} or not isinstance(message["role"], str):
        return None
    content = message["content"]
    if isinstance(content, str):
        return message["role"], content
    result = [_counted_part(part) for part in content] if isinstance(content, list) else [None]
    return None if None in result else (message["role"], tuple(result))


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


class _Request(NamedTuple):
    """A prompt with its images, and the schemas of its tools."""

    prompt: list[Message]
    tools: Any

    def options(self) -> dict[str, Any]:
        """Return the arguments of the chat template."""
        tool_kwargs = {"tools": read_tools("a prompt", self.tools)} if self.tools else {}
        return {"continue_final_message" if is_begun(self.prompt) else "add_generation_prompt": True, **tool_kwargs}


def _encode_together(requests: Sequence[_Request], processor: ProcessorMixin) -> list[Encoded] | None:
    """Return the results of `encode_messages`, at a fraction of its cost; `None` where they are not certain.

    They are certain where images become `pixel_values` of one size and nothing else: then every image is a tensor by
    itself, the same whatever is next to it, the images are as many as in the prompts, and all take as many positions.
    """
    options, counts = requests[0].options(), [count_parts(each.prompt) for each in requests]
    if len(requests) == 1 or processor in _ONE_BY_ONE or any(each.options() != options for each in requests[1:]):
        return None
    try:
        conversations = [in_parts(each.prompt) for each in requests]
        fields = dict(_templated(processor, conversations, processor_kwargs={"padding": True}, **options))
    except Exception:
        # The prompt and its error are found one by one.
        return None
    pixels, mask = fields.get("pixel_values"), fields.get("attention_mask")
    has_others = set(fields) - {"pixel_values"} != {"input_ids", "attention_mask"}
    if has_others or (pixels is not None and not (torch.is_tensor(pixels) and pixels.ndim == 4)):
        _ONE_BY_ONE.add(processor)
        return None
    if (0 if pixels is None else len(pixels)) != sum(counts):
        return None
    ids = [row[row_mask > 0].tolist() for row, row_mask in zip(fields["input_ids"], mask, strict=True)]
    token = getattr(processor, "image_token_id", None)
    indices = {some.count(token) / count for some, count in zip(ids, counts, strict=True) if count}
    begin = getattr(processor.tokenizer, "bos_token_id", None)
    # The addition of a beginning depends on the first prompt's words, where templates leave it to the tokenizer.
    begins = {next((at for at, number in enumerate(some) if number != begin), len(some)) for some in ids}
    if len(indices) > 1 or len(begins) > 1:
        return None
    # Copies: a view would keep all of them as long as one is needed.
    parts = iter([] if pixels is None else [part.clone() for part in pixels.split([each for each in counts if each])])
    return [(some, {"pixel_values": next(parts)} if count else {}) for some, count in zip(ids, counts, strict=True)]


def encode_messages(messages: Sequence[Message], processor: ProcessorMixin, **options: Any) -> Encoded:
    """Return the token ids of a conversation, and the tensors of its opened images by the model's argument.

    Args:
        options: of the processor's `apply_chat_template`.
    """
    fields = dict(_templated(processor, [in_parts(messages)], **options))
    ids = fields.pop("input_ids")[0].tolist()
    fields.pop("attention_mask", None)
    pictures = count_parts(messages)
    tensors = {name: torch.as_tensor(value) for name, value in fields.items()} if pictures else {}
    return ids, {name: value[0] if name in PER_TOKEN else value for name, value in tensors.items()}


def _templated(processor: ProcessorMixin, messages: list[list[Message]], **options: Any) -> Mapping[str, Any]:
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)
