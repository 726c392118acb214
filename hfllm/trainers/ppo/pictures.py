"""Pictures in prompts: a row's columns, the prompt with its pictures, and the tensors that a model reads of them.

The format is that of TRL's GRPOTrainer: a column `image` or `images`, and a prompt that is a list of messages, with a
part `{"type": "image"}` at the place of each picture. A prompt without places has them before the user's first words.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hfllm.data.image_files import read_image
from hfllm.data.images import counted
from hfllm.data.rows import Message
from hfllm.errors import InputError
from hfllm.models.loading.saved import reads_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfllm.trainers.ppo.config import PPOConfig

Row = Mapping[str, Any]
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
COLUMNS = ("images", "image")
# What a processor returns about each token; anything else is about pictures or parts of them.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# Names of configs for the tokens at whose places features of media are put. Such a token is never sampled.
PLACE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


@dataclass(frozen=True)
class Pictures:
    """What a processor made of each episode's pictures, on the CPU until a model reads it.

    Args:
        episodes: for each episode tensors by the model's argument, such as `pixel_values` and `image_sizes`: pictures
            or their parts along the first dimension; those of `PER_TOKEN` (P,) along the prompt. No tensors for a
            prompt without pictures. Responses to one prompt share them.
    """

    episodes: Sequence[Mapping[str, torch.Tensor]]

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, rows: torch.Tensor) -> "Pictures":
        """Return those of some episodes, by their indices."""
        return Pictures([self.episodes[row] for row in rows.tolist()])

    def inputs(self, input_ids: torch.Tensor, begins: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the model's further arguments for these episodes as one batch, nothing where none has a picture.

        Args:
            input_ids: (B, W), the batch.
            begins: the column of each row's first token.
        """
        made = {}
        for name in dict.fromkeys(name for episode in self.episodes for name in episode):
            if name not in PER_TOKEN:
                parts = [episode[name] for episode in self.episodes if name in episode]
                made[name] = _joined(parts).to(input_ids.device, non_blocking=True)
                continue
            made[name] = torch.zeros_like(input_ids)
            for row, (episode, begin) in enumerate(zip(self.episodes, begins, strict=True)):
                if name in episode:
                    made[name][row, begin : begin + len(episode[name])] = episode[name].to(input_ids.device)
        return made

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by names for a file, each once, and which are whose."""
        distinct = {id(episode): episode for episode in self.episodes}
        numbers = {key: number for number, key in enumerate(distinct)}
        made = {"pictures": torch.tensor([numbers[id(episode)] for episode in self.episodes])}
        for number, episode in enumerate(distinct.values()):
            made |= {f"pictures.{number}.{name}": tensor.contiguous() for name, tensor in episode.items()}
        return made

    @classmethod
    def split_off(cls, tensors: dict[str, torch.Tensor]) -> "Pictures | None":
        """Take what `tensors` wrote out of the tensors of a file; `None` if that has none."""
        if "pictures" not in tensors:
            return None
        numbers = tensors.pop("pictures").tolist()
        distinct: list[dict[str, torch.Tensor]] = [{} for _ in range(max(numbers) + 1)]
        for key in [key for key in tensors if key.startswith("pictures.")]:
            _, number, name = key.split(".", 2)
            distinct[int(number)][name] = tensors.pop(key).cpu()
        return cls([distinct[number] for number in numbers])


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors one after the other, padded with zeros to the largest, as processors pad pictures."""
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
    """Return a policy that reads no pictures, in words for a complaint; `None` for one that does."""
    return None if reads_pictures(policy) else f"the policy ({type(policy).__name__})"


def check_uses(
    args: "PPOConfig", counts: Sequence[tuple[int, int]], value_model: "PreTrainedModel | None", samples: bool
) -> None:
    """Refuse what cannot carry pictures, and warn of a critic that does not read them.

    Args:
        counts: for each dataset its prompts with pictures, and all.
        samples: whether something else than the trainer samples: tools, environments, a `rollout_func`.

    Raises:
        InputError: naming the option.
    """
    if not any(count for count, _ in counts):
        return
    if args.use_vllm:
        raise InputError("use_vllm=True with pictures: PPO gives vLLM no pictures; leave use_vllm out")
    if samples:
        raise InputError(
            "tools, environment_factory and rollout_func read no pictures: leave the pictures out, or them"
        )
    # Also where accelerate brings it, and not the flag.
    if args.deepspeed_plugin is not None and any(0 < count < total for count, total in counts):
        # A process whose prompts have none would not take part in gathering or reducing the vision tower.
        raise InputError("deepspeed with pictures in some prompts only: give each prompt a picture, or use DDP")
    if value_model is not None and not reads_pictures(getattr(value_model, value_model.base_model_prefix)):
        kind = type(value_model).__name__
        warnings.warn(f"value_model ({kind}) reads no pictures: its values go by the words alone", stacklevel=3)


def place_tokens(model: "PreTrainedModel") -> set[int]:
    """Return the ids of tokens whose places features of pictures take: a sampled one would have no features."""
    found = (getattr(model.config, name, None) for name in PLACE_TOKENS)
    return {number for number in found if isinstance(number, int)}


# ---- rows ----


def pictures_of(row: Row, origin: str) -> list[Any]:
    """Return what a row has in its column `images`, or else `image`.

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
    """Return whether a row has pictures, or places for them."""
    return bool(pictures_of(row, origin)) or count_parts(row["prompt"]) > 0


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def count_parts(prompt: str | list[Message]) -> int:
    """Return the parts of a prompt that are not text: places of pictures, filled or not, and other media."""
    if isinstance(prompt, str):
        return 0
    return sum(part.get("type") != "text" for message in prompt for part in _parts(message))


def filled_prompt(row: Row, origin: str) -> list[Message]:
    """Return a row's prompt with its pictures in their places, opened.

    Raises:
        InputError: when there are more or fewer pictures than places, or one cannot be read.
    """
    prompt, given = row["prompt"], pictures_of(row, origin)
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if given and not count_parts(prompt):
        prompt = _with_places(prompt, len(given), origin)
    for part in (part for message in prompt for part in _parts(message)):
        if part.get("type") not in ("text", "image"):
            raise InputError(f"{origin}: a part of the type {part.get('type')!r}; PPO reads text and image")
    is_open = [part["type"] == "image" and part.get("image") is None for each in prompt for part in _parts(each)]
    if sum(is_open) != len(given):
        has = f"the column {column!r} has {len(given)}" if column else "there is no column image or images"
        raise InputError(f"{origin}: {counted(sum(is_open), 'place')} for pictures in the prompt, and {has}")
    rest = iter(given)

    def put(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        picture = part["image"] if part.get("image") is not None else next(rest)
        return {"type": "image", "image": read_image(picture, origin)}

    return [{**each, "content": [put(part) for part in _parts(each)]} if _parts(each) else each for each in prompt]


def _with_places(prompt: list[Message], count: int, origin: str) -> list[Message]:
    """Return a prompt with places before the user's first words, as TRL puts them."""
    first = next((at for at, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise InputError(f"{origin}: the prompt has no place for a picture, and no message of the user for one")
    said = prompt[first]["content"]
    parts = [*({"type": "image"} for _ in range(count)), *([{"type": "text", "text": said}] * isinstance(said, str))]
    parts += said if isinstance(said, list) else []
    return [*prompt[:first], {**prompt[first], "content": parts}, *prompt[first + 1 :]]


def without_pictures(prompt: str | list[Message]) -> str | list[Message]:
    """Return a prompt whose places of pictures are empty, as a table of completions shows it."""
    if isinstance(prompt, str) or not count_parts(prompt):
        return prompt

    def emptied(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["type"] == "text" else {"type": part["type"]}

    return [{**each, "content": [emptied(part) for part in _parts(each)]} if _parts(each) else each for each in prompt]
