"""The run of test_architecture.py: imports in the order of the argument, and then a model by its type's name."""

import sys

assert not {"transformers", "hfllm"} & set(sys.modules)
exec(sys.argv[1])
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

config = AutoConfig.for_model("hfllm", num_hidden_layers=1, hidden_size=16, num_attention_heads=1)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "HfllmForCausalLM"
