"""Reward models in a federation: comparisons as tokens, and the trainer whose loss is a mean over pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.federation.organisations import Organisation

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, RewardConfig, RewardTrainer, SFTConfig

    from hfllm.stages.federated_learner import Rows

SIDES = ("chosen", "rejected")
# In place of rows where there are none, as at the server: a trainer wants one.
NOTHING = {f"{side}_ids": [0, 0] for side in SIDES}


def load_scorer(
    training_args: "SFTConfig", model_args: "ModelConfig"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model with one score for a sequence, and its tokenizer. A new head is drawn, the same by one seed.

    Raises:
        InputError: when they cannot be loaded.
    """
    from hfllm.runs.models import load_scorer_to_train, load_tokenizer

    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    model = load_scorer_to_train(model_args, training_args.output_dir)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def pairs_of(
    organisations: Sequence[Organisation], tokenizer: "PreTrainedTokenizerBase", longest: int | None
) -> "list[tuple[Rows, Rows]]":
    """Return rows and held-out rows of each organisation as tokens; a pair that is too long is left out, and said.

    Raises:
        InputError: when an organisation has no pair left.
    """
    from hfllm.data.conversations import Conversations
    from hfllm.runs.command_line import say

    conversations = Conversations(tokenizer)

    def tokens(rows: Sequence[Mapping[str, object]], what: str) -> "Rows":
        found = [{f"{side}_ids": conversations.whole(row, side) for side in SIDES} for row in rows]
        kept = [pair for pair in found if longest is None or max(map(len, pair.values())) <= longest]
        if len(kept) < len(rows):
            say(f"{what}: {len(rows) - len(kept):,} of {len(rows):,} pairs are longer than --max_length {longest}")
        if rows and not kept:
            raise InputError(f"no pair of {what} fits into --max_length {longest} tokens")
        return kept

    return [(tokens(each.rows, each.name), tokens(each.held_out, f"{each.name}, held out")) for each in organisations]


def reward_trainer(
    model: "PreTrainedModel",
    training_args: "SFTConfig",
    pairs: "Rows",
    tokenizer: "PreTrainedTokenizerBase",
    adapter: "PeftConfig | None",
) -> "RewardTrainer":
    """Return TRL's trainer of reward models with the flags' settings, which trains nothing by itself."""
    from datasets import Dataset

    from hfllm.trainers.trl_trainers import RewardTrainer

    return RewardTrainer(
        model=model,
        args=reward_config(training_args),
        train_dataset=Dataset.from_list(list(pairs[:1]) or [NOTHING]),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def reward_config(training_args: "SFTConfig") -> "RewardConfig":
    """Return arguments of a RewardTrainer with all settings that it has in common with an SFTTrainer."""
    from trl import RewardConfig

    from hfllm.runs.arguments import changed

    kinds = {name: getattr(training_args, name) for name in ("output_dir", "use_cpu", "bf16")}
    config = RewardConfig(**kinds, gradient_checkpointing=False, report_to="none")
    names = {each.name for each in fields(config)}
    common = {each.name: getattr(training_args, each.name) for each in fields(training_args) if each.name in names}
    return changed(config, **{**common, "chat_template_path": None})
