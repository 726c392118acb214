"""The organisations of a federation: their rows by the flags, tokenized, and what trains on them in this process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from hfllm.data.sources import WORLD
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.federation.organisations import (
    Organisation,
    check_organisations,
    dirichlet_shares,
    family_shares,
    split_evenly,
    world_organisations,
)
from hfllm.stages.federated import FROZEN_A, FederatedArguments, adapted, organisation_names, row_epsilons

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig

    from hfllm.stages.federated_learner import LocalLearner, Rows

# Held-out rows of an organisation, at most; of rows of its own that it has no others for, this share.
MOST_HELD_OUT, HELD_OUT_SHARE = 64, 0.1
# In place of rows where there are none, as at the server: a trainer wants one.
NOTHING = {"input_ids": [0, 0], "labels": [0, 0]}


def organisations_of(script_args: FederatedArguments, seed: int) -> list[Organisation]:
    """Return the organisations that the flags ask for, each with its rows.

    Raises:
        InputError: for a row that cannot be read, and an organisation without rows.
    """
    if script_args.organisation_names:
        return [Organisation(name, [], []) for name in script_args.organisation_names]
    if script_args.is_world:
        world, count = World(script_args.world_seed), script_args.num_organisations
        if script_args.dirichlet_alpha is None:
            shares = family_shares(count, script_args.main_share)
        else:
            shares = dirichlet_shares(count, script_args.dirichlet_alpha, seed)
        found = world_organisations(world, shares, script_args.num_examples, MOST_HELD_OUT, seed)
    elif script_args.organisation_files:
        names = organisation_names(script_args.organisation_files)
        found = [
            organisation_of_file(script_args, name, file, seed)
            for name, file in zip(names, script_args.organisation_files, strict=True)
        ]
    else:
        parts = split_evenly(_rows(script_args), script_args.num_organisations, script_args.dirichlet_alpha, seed)
        is_private = script_args.row_clip_norm is not None
        found = [_held_apart(f"organisation-{number}", rows, seed, is_private) for number, rows in enumerate(parts, 1)]
        found = [_unknown_to_others(each, found) for each in found]
    check_organisations(found)
    return found


def organisation_of_file(script_args: FederatedArguments, name: str, file: str, seed: int) -> Organisation:
    """Return the organisation whose rows are in a file or a dataset of the Hub.

    Raises:
        InputError: for a row that cannot be read, or none.
    """
    rows = _rows(replace(script_args, dataset_name=file))
    return _held_apart(name, rows, seed, script_args.row_clip_norm is not None)


def _rows(script_args: FederatedArguments) -> list[Mapping[str, object]]:
    from hfllm.data import formats
    from hfllm.data.images import refuse_images
    from hfllm.data.rows import flaw_of
    from hfllm.stages.user_rows import kept_rows

    def mapper(origin: str, row: formats.Row) -> formats.Row:
        refuse_images(origin, row, "hfllm federated")
        if script_args.has_pairs:
            return formats.to_preference(origin, row)
        row = formats.to_sft(origin, row)
        return formats.last_turn(row) if script_args.loss_on == "last" else row

    assert script_args.dataset_name != WORLD
    return kept_rows(script_args, mapper, flaw_of)


def _held_apart(name: str, rows: Sequence[Mapping[str, object]], seed: int, is_private: bool) -> Organisation:
    """Return an organisation that holds out a part of its rows, unless it has too few of them.

    Args:
        is_private: whether single rows are protected: then a row's own prompt alone decides on which side it is, since
            a shuffle of all of them would let one row move the others.
    """
    from hfllm.data.loading import prompt_key, split_rows

    if len(set(map(prompt_key, rows))) < 2:
        return Organisation(name, list(rows), [])
    if is_private:
        is_held = [_share_of(f"{seed} {prompt_key(row)}") < HELD_OUT_SHARE for row in rows]
        sides = [[row for row, held in zip(rows, is_held, strict=True) if held is side] for side in (False, True)]
        return Organisation(name, sides[0], sides[1][:MOST_HELD_OUT])
    return Organisation(name, *split_rows(list(rows), seed, HELD_OUT_SHARE, MOST_HELD_OUT))


def _share_of(text: str) -> float:
    """Return a number from 0 to 1 that a text's hash gives."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def _unknown_to_others(each: Organisation, every: Sequence[Organisation]) -> Organisation:
    """Return an organisation without held-out rows whose prompt another one learns: the model learns of all."""
    from hfllm.data.loading import prompt_key

    learned = {prompt_key(row) for other in every for row in other.rows}
    return replace(each, held_out=[row for row in each.held_out if prompt_key(row) not in learned])


@dataclass(frozen=True)
class Tokenized:
    """An organisation's rows as tokens.

    Args:
        name: of the organisation.
        rows, held_out: `input_ids` and `labels` of each, or `chosen_ids` and `rejected_ids`.
        num_sources: how many rows the organisation's own were made of: one may become several, or none.
    """

    name: str
    rows: "Rows"
    held_out: "Rows"
    num_sources: int


def tokenized(
    organisations: Sequence[Organisation], tokenizer: "PreTrainedTokenizerBase", training_args: "SFTConfig"
) -> list[Tokenized]:
    """Return the rows of organisations as tokens.

    Raises:
        InputError: when an organisation has no row with anything to learn.
    """
    from hfllm.stages.sft import examples

    def tokens(rows: Sequence[Mapping[str, object]], what: str) -> tuple["Rows", int]:
        if not rows:
            return [], 0
        found, num_left_out = examples(list(rows), tokenizer, training_args, what)
        return found.to_list(), len(rows) - num_left_out

    return [
        Tokenized(each.name, rows, tokens(each.held_out, f"{each.name}, held out")[0], num_sources)
        for each in organisations
        for rows, num_sources in [tokens(each.rows, each.name)]
    ]


def tokenized_pairs(
    organisations: Sequence[Organisation], tokenizer: "PreTrainedTokenizerBase", training_args: "SFTConfig"
) -> list[Tokenized]:
    """Return the comparisons of organisations as tokens.

    Raises:
        InputError: when an organisation has no pair left.
    """
    from hfllm.stages.federated_pairs import pairs_of

    pairs = pairs_of(organisations, tokenizer, training_args.max_length)
    return [
        Tokenized(each.name, rows, held_out, len(rows))
        for each, (rows, held_out) in zip(organisations, pairs, strict=True)
    ]


def check_one_each(organisations: Sequence[Tokenized]) -> None:
    """Refuse organisations of whose rows one becomes several: privacy is of what is drawn, clipped and counted.

    Raises:
        InputError: naming the organisation.
    """
    for each in organisations:
        if len(each.rows) > each.num_sources:
            raise InputError(
                f"--row_clip_norm: {each.num_sources} rows of organisation {each.name!r} become {len(each.rows)} "
                "examples, and the privacy of one of these is not that of a row; expected one each, such as by "
                "--loss_on last"
            )


def pooled(organisations: Sequence[Tokenized]) -> "Rows":
    """Return the rows of all organisations together, as if one of them had them all."""
    return [row for each in organisations for row in each.rows]


# ---- what trains ----


@dataclass(frozen=True)
class Local:
    """What trains in this process: the learner, and the sha256 of what it began from and does not train.

    `row_epsilons` is what a run reveals of one row of each organisation; empty without noise on rows.
    """

    learner: "LocalLearner"
    tokenizer: "PreTrainedTokenizerBase"
    base_sha256: str
    organisations: Sequence[Tokenized]
    row_epsilons: Mapping[str, float] = field(default_factory=dict)

    @property
    def model(self) -> "PreTrainedModel":
        """The model."""
        return self.learner.model


def load_local(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    organisations: Sequence[Organisation],
) -> Local:
    """Load the model, put the adapter on it, and build the trainer whose loss organisations learn by.

    Raises:
        InputError: when the model cannot be loaded or an organisation has nothing to learn.
    """
    import torch
    from datasets import Dataset
    from transformers import set_seed

    from hfllm.federation.lora import freeze_a
    from hfllm.federation.updates import weights_sha256
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import fitting_length, load_to_train, peft_config
    from hfllm.stages import federated_pairs, sft
    from hfllm.stages.federated_learner import LocalLearner
    from hfllm.trainers.trl_trainers import SFTTrainer

    # Of rows that a template adds to the embeddings.
    set_seed(training_args.seed)
    trained_args, has_pairs = adapted(script_args, model_args), script_args.has_pairs
    if has_pairs:
        model, tokenizer = federated_pairs.load_scorer(training_args, trained_args)
    else:
        loaded = load_to_train(trained_args, training_args.output_dir)
        model, tokenizer = sft.with_template(training_args, *loaded)
    base = weights_sha256(dict(model.named_parameters()))
    args = changed(training_args, max_length=fitting_length(training_args.max_length, model))
    found = (tokenized_pairs if has_pairs else tokenized)(organisations, tokenizer, args)
    if script_args.row_clip_norm is not None:
        check_one_each(found)
    epsilons = row_epsilons(script_args, args, found)
    # Of the adapter's first weights: the same at every organisation, whatever was drawn before.
    set_seed(training_args.seed)
    torch.manual_seed(training_args.seed)
    adapter = peft_config(trained_args, "SEQ_CLS" if has_pairs else "CAUSAL_LM")
    if has_pairs:
        trainer = federated_pairs.reward_trainer(model, args, found[0].rows, tokenizer, adapter)
    else:
        trainer = SFTTrainer(
            model=model,
            args=changed(args, **sft.trained_as_they_are(args)),
            train_dataset=Dataset.from_list(list(found[0].rows[:1]) or [NOTHING]),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    if script_args.average == FROZEN_A:
        freeze_a(trainer.model)
    if adapter is not None:
        base = _with_adapter(base, trainer.model, adapter)
    steps = script_args.rounds * script_args.local_steps
    return Local(LocalLearner(trainer, steps, script_args.proximal_mu), tokenizer, base, found, epsilons)


def _with_adapter(base_sha256: str, model: "nn.Module", adapter: "LoraConfig") -> str:
    """Return the sha256 of the base model and of what is fixed of the adapter: the mean is wrong where that differs.

    These are the factors that stay as they were drawn, and what their product is multiplied by.
    """
    import hashlib

    from hfllm.federation.updates import weights_sha256

    frozen = {name: value for name, value in model.named_parameters() if "lora_" in name and not value.requires_grad}
    scale = f"{adapter.lora_alpha} {adapter.use_rslora}"
    return hashlib.sha256(f"{base_sha256} {weights_sha256(frozen)} {scale}".encode()).hexdigest()
