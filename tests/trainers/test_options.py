"""The options that help lists without torch are those that the trainers' arguments add to transformers'."""

import pickle
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hfllm.trainers.distillation.config import DistillationConfig
from hfllm.trainers.distillation.options import DistillationOptions
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.options import PPOOptions

BOTH = pytest.mark.parametrize(
    ("options", "config", "not_listed", "dictionary"),
    [
        # The recipe loads the model itself.
        (PPOOptions, PPOConfig, {"model_init_kwargs"}, "generation_kwargs"),
        (DistillationOptions, DistillationConfig, set(), "teacher_model_init_kwargs"),
    ],
)


@BOTH
def test_help_lists_what_the_arguments_add(options, config, not_listed, dictionary):
    stock = {item.name for item in fields(TrainingArguments)}
    added = {item.name for item in fields(config)} - stock
    assert {item.name for item in fields(options)} == added - not_listed
    args, defaults = config("out", use_cpu=True, bf16=False), options()
    assert {name: getattr(args, name) for name in vars(defaults)} == vars(defaults)


@BOTH
def test_arguments_are_parsed_checked_and_pickled_whole(options, config, not_listed, dictionary):
    words = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--temperature", "0.5"]
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses([*words, f"--{dictionary}", '{"top_k": 3}'])
    assert (args.output_dir, args.temperature, getattr(args, dictionary)) == ("out", 0.5, {"top_k": 3})
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    assert repr(args).startswith(f"{config.__name__}(output_dir='out', ") and "temperature=0.5" in repr(args)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        config("out", use_cpu=True, bf16=False, temperature=0.0)
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got None$"):
        config("out", use_cpu=True, bf16=False, temperature=None)
