"""Checks of recipes that run other recipes, before the first of the runs: a later one may come hours later."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message
from hfllm.data.loading import RowArguments
from hfllm.data.sources import PYDOC, WORLD
from hfllm.data.tokenizer import template_errors
from hfllm.errors import InputError, one_line, refuse_if
from hfllm.flags import changed
from hfllm.models.devices import forked_random
from hfllm.models.loading.saved import max_length_of
from hfllm.runs.command_line import say
from hfllm.runs.models import NamedModel, load_config, load_tokenizer, load_value_model, named_model
from hfllm.runs.pipeline import Course, Parsed, Row
from hfllm.runs.stage import Stage
from hfllm.stages.rlhf import build as rlhf
from hfllm.stages.rlhf import flags as rlhf_flags
from hfllm.trainers.ppo.setup import check_critic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- flags of the runs ----


def check_runs(course: Course) -> None:
    """Refuse the flags of the runs (YAML files may set them) as the runs would, but before the first one."""
    for name, recipe in course.recipes.items():
        parsed = course.runs[name]
        Stage(recipe, *before_its_rows(parsed)).check_flags()
        if recipe == "rlhf":
            _check_ppo(*parsed)


def before_its_rows(parsed: Parsed) -> Parsed:
    """Return the flags of a run whose rows do not exist yet: an always available source stands for their file."""
    is_written = getattr(parsed[0], "dataset_name", WORLD) != WORLD
    return (changed(parsed[0], dataset_name=PYDOC), *parsed[1:]) if is_written else parsed


def _check_ppo(script_args: Any, training_args: Any, model_args: Any) -> None:
    rlhf_flags.check(script_args, training_args, model_args)
    rlhf.checked_functions(script_args.reward_funcs)
    rlhf_flags.check_rewards(script_args, training_args)
    documents = (script_args.num_prompts, training_args.seed, script_args.world_seed)
    rlhf.ptx_texts(script_args.ptx_dataset_name, *documents, script_args.max_row_bytes)
    if script_args.value_model not in ("head", "reward"):
        with forked_random(training_args.device):
            check_critic(load_value_model(script_args.value_model, named_model(model_args), ()))


# ---- models and rows of the user ----


@dataclass(frozen=True)
class Room:
    """How long the conversations of a model may be.

    Args:
        tokenizer: the model's, with a chat template.
        context: its longest sequence in tokens; `None` without a limit.
    """

    tokenizer: "PreTrainedTokenizerBase"
    context: int | None

    def holds(self, messages: Sequence[Message], answer: int = 0, longest: int | None = None) -> bool:
        """Return whether a conversation fits.

        Args:
            answer: tokens to be generated after it; 0 for a conversation to learn from.
            longest: another limit in tokens, such as a run's `max_length`.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=bool(answer))
        except template_errors() as error:
            raise InputError(f"the chat template of the model takes no such conversation: {one_line(error)}") from None
        count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + answer
        return all(count <= limit for limit in (self.context, longest) if limit)


def room_of(model: NamedModel) -> Room:
    """Return the room of the user's model."""
    return Room(load_tokenizer(model.name, model.revision), max_length_of(load_config(model.name, model.revision)))


def longest_of(course: Course, run: str) -> int | None:
    """Return the `max_length` of a run of fine-tuning."""
    return next((group.max_length for group in course.runs[run] if hasattr(group, "max_length")), None)


def say_left_out(stage: str, kind: str, kept: Sequence[object], all_of_them: Sequence[object], reason: str) -> None:
    """Print how many are left out, if any.

    Raises:
        InputError: when all are.
    """
    count = len(all_of_them) - len(kept)
    refuse_if(bool(all_of_them) and not kept, f"{stage}: all {count} {kind} are left out: {reason}")
    if count:
        say(f"{stage}: {count} of {len(all_of_them)} {kind} are left out: {reason}")


def refuse_own_inputs_in(output_dir: str, model: str | None, script_args: RowArguments) -> None:
    """Refuse the user's model where the runs write, and rows where their rows are written."""
    folder = Path(output_dir)
    refuse_inputs_in(folder, {"model_name_or_path": model})
    names = {name: getattr(script_args, name) for name in ("dataset_name", "eval_dataset_name")}
    refuse_inputs_in(folder / "data", names)


def refuse_inputs_in(folder: Path, names: Mapping[str, str | None], runs: str = "runs") -> None:
    """Refuse models and rows at the output paths of the runs.

    Args:
        folder: where the runs write.
        names: the user's models and datasets, by flag.
        runs: what they are called.
    """
    for flag, name in names.items():
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--{flag} {name} lies in {folder}, where the {runs} write: choose another --output_dir")


def prompts_with_room(stage: str, kind: str, rows: Sequence[Row], unfit: Collection[int], reason: str) -> list[Row]:
    """Return the prompts with room for an answer, and print the number of others.

    Args:
        stage: the recipe.
        kind: what the prompts are called.
        rows: the prompts.
        unfit: indices of the rows without room.
        reason: what they lack, beginning with "no room".
    """
    refuse_if(unfit and len(unfit) == len(rows), f"{kind}: all {len(rows)} leave {reason}")
    if unfit:
        say(f"{stage}: {len(unfit)} of {len(rows)} {kind} are left out: {reason}")
    return [row for index, row in enumerate(rows) if index not in unfit]
