"""The texts of the recipe that extends a model: what the base learns from, and rows of the new length."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.loading import hash_of, split_places, texts_of, world_of
from hfllm.data.packing import long_rows
from hfllm.data.sources import WORLD
from hfllm.data.world.tasks import filler_documents, long_documents
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.stages.course import by_main_process, write_rows
from hfllm.stages.extend import BASE_TEXTS, BASE_WORDS, ExtendArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of fewer texts than these, such as one book, the end of each is held out and not some of them.
FEW_TEXTS = 20
HELD_OUT_END = 0.1


@dataclass(frozen=True)
class LongRows:
    """Rows of tokens, all of the new length.

    Args:
        train: to learn from.
        held_out: to judge by.
        fillers: texts around needles, by whose they are.
        are_joined: whether short texts were joined for the held-out rows.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    fillers: dict[str, list[list[int]]]
    are_joined: bool


def write_base_texts(script_args: ExtendArguments, output_dir: str, seed: int) -> None:
    """Write the texts of the world's base model where the file does not hold them already; other processes wait."""

    def write() -> None:
        world = World(script_args.world_seed)
        rows = ({"text": text} for text in long_documents(world, script_args.num_documents, BASE_WORDS, seed))
        write_rows("extend", Path(output_dir) / BASE_TEXTS, rows)

    by_main_process(write)


def texts_to_split(script_args: ExtendArguments, seed: int) -> tuple[list[str], list[str]]:
    """Return the user's texts to learn from and to judge by; none for the world, whose texts are written to measure.

    Raises:
        InputError: when there is no text.
    """
    if script_args.dataset_name == WORLD:
        return [], []
    from hfllm.data.loading import renaming_of

    source = (script_args.dataset_name, script_args.hub_part, script_args.max_samples)
    texts = list(texts_of(*source, renaming=renaming_of(script_args)))
    if not texts:
        raise InputError(f"--dataset_name {script_args.dataset_name} has no text")
    if len(texts) < FEW_TEXTS:
        cuts = [round(len(text) * (1 - HELD_OUT_END)) for text in texts]
        return [text[:cut] for text, cut in zip(texts, cuts, strict=True)], [
            text[cut:] for text, cut in zip(texts, cuts, strict=True)
        ]
    train, held_out = split_places(map(hash_of, texts), seed)
    return [texts[place] for place in train], [texts[place] for place in held_out]


def rows_of(
    script_args: ExtendArguments,
    texts: tuple[list[str], list[str]],
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    seed: int,
) -> LongRows:
    """Return the rows of the new length.

    Args:
        texts: of `texts_to_split`.

    Raises:
        InputError: when the texts are shorter than one row.
    """
    world = world_of(script_args) or World(script_args.world_seed)
    train, held_out = texts
    if script_args.dataset_name == WORLD:
        train = list(long_documents(world, script_args.num_train_texts, length, seed))
        held_out = list(long_documents(world, script_args.num_eval_texts, length, -1 - seed))
    filler = filler_documents(world, max(1000, script_args.num_needles * length // 8), -2 - seed)
    judged, are_joined = long_rows(held_out, tokenizer, length, script_args.num_eval_texts, seed, "held-out texts")
    learned, _ = long_rows(train, tokenizer, length, script_args.num_train_texts, seed)
    fillers = {"world": long_rows(filler, tokenizer, length, script_args.num_needles, seed)[0]}
    if script_args.dataset_name != WORLD:
        fillers["text"] = judged
    return LongRows(learned, judged, fillers, are_joined)
