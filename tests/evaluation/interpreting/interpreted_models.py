"""Small models of several classes to look into, and how many hooks are in one."""

import torch

OURS = ("gpt1", "llama", "palm", "mixtral", "cohere")
NATIVE = ("llama", "gpt2", "gpt_neox", "mixtral")


def native_model(name, vocab_size, **settings):
    """A tiny random model of a class of transformers; its layers have an MLP and an attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": vocab_size}
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": vocab_size}
        sizes["initializer_range"] = 0.1
    else:
        sizes |= {"intermediate_size": 48, "initializer_range": 0.1}
    if name in ("qwen2", "mixtral", "llama"):
        sizes |= {"num_key_value_heads": 2}
    if name == "mixtral":
        sizes |= {"num_local_experts": 4, "head_dim": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **sizes, **ids, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


ANY = [*(f"ours-{name}" for name in OURS), *(f"native-{name}" for name in NATIVE)]


def hooks_of(model):
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
