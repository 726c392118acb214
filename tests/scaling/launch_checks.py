"""What the installed accelerate and DeepSpeed think of a configuration file; unknown and deprecated keys raise.

Both libraries read some sections without looking for keys that they do not know. Of accelerate's sections, the keys
have to be flags of `accelerate launch`, which is what it copies them to; of DeepSpeed's, they have to be looked up.
"""

import copy
import logging
import os
import tempfile
from pathlib import Path
from unittest import mock

import yaml

SECTIONS = {
    "deepspeed_config": "DeepSpeed Arguments",
    "fsdp_config": "FSDP Arguments",
    "parallelism_config": "ParallelismConfig Arguments",
    "megatron_lm_config": "Megatron-LM Arguments",
}


def check_accelerate(path):
    """The environment that `accelerate launch` would start processes with.

    Raises:
        ValueError: for what accelerate refuses, and for a key that it would ignore or calls obsolete.
    """
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.to_fsdp2 import ARGUMENT_KEY_MAPPING
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    load_config_from_file(str(path))
    values = yaml.safe_load(Path(path).read_text())
    parser = launch.launch_command_parser()
    for section, title in SECTIONS.items():
        known = {
            action.dest for group in parser._action_groups if group.title == title for action in group._group_actions
        }
        assert known, title
        for key in values.get(section, {}):
            if key not in known:
                raise ValueError(f"{section}: accelerate would ignore {key}")
    for key in values.get("fsdp_config", {}):
        if values["fsdp_config"].get("fsdp_version") == 2 and ARGUMENT_KEY_MAPPING.get(key) != key:
            raise ValueError(f"fsdp_config: {key} is obsolete in FSDP2")
    # Port 0 asks no network; the address is what two machines need.
    flags = ["--main_process_port", "0", "--main_process_ip", "127.0.0.1"]
    args, started = parser.parse_args(["--config_file", str(path), *flags, "script.py"]), []
    launchers = {name: started.append for name in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher")}
    with mock.patch.multiple(launch, **launchers):
        launch.launch_command(args)
    (args,) = started
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def check_plugins(environment):
    """Build what a process builds from its environment.

    Raises:
        ValueError: for a value that accelerate's plugins refuse, or a warning of theirs.
    """
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    with mock.patch.dict(os.environ, environment), mock.patch("accelerate.utils.dataclasses.logger") as logger:
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            FullyShardedDataParallelPlugin()
        if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            # Refuses fields that belong into DeepSpeed's own file.
            DeepSpeedPlugin()
        sizes = ParallelismConfig() if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true" else None
        if logger.warning.called:
            raise ValueError(str(logger.warning.call_args))
    return sizes


class Watched(dict):
    """A dictionary that remembers which of its keys anybody asked for."""

    def __init__(self, values):
        super().__init__({key: Watched(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __copy__(self):
        other = Watched({})
        other.update(self)
        other.asked = self.asked
        return other


def check_deepspeed(path):
    """Fill in `auto` as the Trainer does, and let DeepSpeed read the result.

    Raises:
        ValueError: for what DeepSpeed refuses, warns of, or never looks up, and for an `auto` that nobody fills in.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    import hfllm

    filled = HfTrainerDeepSpeedConfig(str(path))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, report_to="none")
    filled.trainer_config_process(args)
    config = hfllm.HfllmConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    filled.trainer_config_finalize(args, hfllm.HfllmForCausalLM(config), 10)
    if '"auto"' in str(filled.config).replace("'", '"'):
        raise ValueError(f"nobody fills in auto: {filled.config}")
    watched, messages = Watched(filled.config), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        DeepSpeedConfig(watched)
    finally:
        logger.removeHandler(handler)
    for message in messages:
        if "deprecated" in message.lower():
            raise ValueError(message)
    for name in ignored_keys(filled.config, watched):
        raise ValueError(f"DeepSpeed never looks up {name}")


def ignored_keys(config, watched):
    """Keys that DeepSpeed did not ask for, of the whole and of each section that it does not check itself."""
    from deepspeed.runtime.config import DeepSpeedConfig

    yield from sorted(set(config) - watched.asked)
    for section, values in config.items():
        if not isinstance(values, dict):
            continue
        probe = copy.deepcopy(config)
        probe[section]["no_such_key"] = 1
        try:
            DeepSpeedConfig(probe)
        except ValueError:
            continue  # it is strict itself
        yield from (f"{section}.{key}" for key in sorted(set(values) - watched[section].asked))
