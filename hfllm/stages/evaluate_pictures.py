"""The evaluation's questions about pictures: drawn here, or rows of the user's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse
from hfllm.stages.own_pictures import OF_PICTURES, given_flags

if TYPE_CHECKING:
    from hfllm.evaluation.pictures import Asked, Part
    from hfllm.stages.evaluate import EvaluateArguments

SUITE = "pictures"
STAGE = "hfllm evaluate"


def check(script_args: "EvaluateArguments") -> None:
    """Refuse flags of pictures without the suite, and the suite without pictures.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.stages.vision import DRAWN

    name, is_asked = script_args.dataset_name, SUITE in script_args.suites
    refuse(bool(name) and not is_asked, "--dataset_name", f"it is for --suites {SUITE}")
    if is_asked and not name:
        raise InputError(f"--suites {SUITE} needs --dataset_name: rows with pictures, or 'pictures' or 'digits'")
    for flag in given_flags(script_args, OF_PICTURES):
        refuse(not is_asked, f"--{flag}", f"it is for --suites {SUITE}")
        refuse(name in DRAWN, f"--{flag}", "it is for rows of your own, and these are drawn")
    if is_asked and not script_args.model_name_or_path:
        raise InputError(f"--suites {SUITE} needs --model_name_or_path: a model that sees (hfllm vision makes one)")


def parts_of(script_args: "EvaluateArguments") -> "list[Part]":
    """Return the questions that `--dataset_name` names.

    Raises:
        InputError: when a row or, with `--bad_images refuse`, a picture cannot be read.
    """
    from hfllm.evaluation.pictures import Part
    from hfllm.stages.evaluate import NUM_WORLD_ITEMS
    from hfllm.stages.vision import DRAWN, VisionArguments
    from hfllm.stages.vision_data import SHUFFLED, eval_parts, prior_of

    name, count = script_args.dataset_name, script_args.num_items
    if name not in DRAWN:
        return [Part("", own_questions(script_args))]
    drawn = VisionArguments(dataset_name=name, num_eval_examples=NUM_WORLD_ITEMS if count is None else count)
    prior = prior_of(drawn)
    return [
        Part(part.replace("_", " "), questions, prior)
        for part, questions in eval_parts(drawn).items()
        if part != SHUFFLED
    ]


def own_questions(script_args: "EvaluateArguments") -> "Sequence[Asked]":
    """Return the first answer of each of the user's rows as a question, of the first `--num_items` that are kept."""
    from hfllm.data.formats import Row, to_sft
    from hfllm.data.images import flaw_of_pictures
    from hfllm.data.loading import RowArguments
    from hfllm.data.picture_batches import words_of_places
    from hfllm.stages.evaluate import processor_of
    from hfllm.stages.own_pictures import by_turns, picture_mapper, refuse_token
    from hfllm.stages.user_rows import kept_rows
    from hfllm.stages.vision_data import asked_of

    name = script_args.dataset_name
    read = RowArguments(dataset_name=name, dataset_train_split="test")
    pictures = picture_mapper(script_args, name, to_sft, STAGE)
    # All models are asked the same; a processor without pictures is refused later.
    processors = map(processor_of, script_args.model_name_or_path or ())
    tokens = sorted({token for processor in processors for token in words_of_places(processor)})

    def mapper(origin: str, row: Row) -> Row:
        row = by_turns(pictures(origin, row))[0]
        refuse_token(origin, {"prompt": row["prompt"]}, tokens)
        return row

    return [asked_of(row) for row in kept_rows(read, mapper, flaw_of_pictures)][: script_args.num_items]
