"""The architecture of a new model, as flags; and the config of a model that is named or not yet trained."""

from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.runs.chain import Chain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig


@dataclass(frozen=True)
class ArchitectureArguments:
    """Architecture of a new model."""

    vocab_size: int = field(default=8192, metadata={"help": "Upper bound on the new tokenizer's vocabulary."})
    hidden_size: int = field(default=512, metadata={"help": "Width of the new model."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers of the new model."})
    num_attention_heads: int = field(default=8, metadata={"help": "Query heads of the new model."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Key-value heads of the new model."})
    max_position_embeddings: int = field(default=2048, metadata={"help": "Context of the new model."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the new weights."})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "Share embeddings and head."})
    norm_type: str = field(default="rmsnorm", metadata={"help": "rmsnorm or layernorm."})
    norm_placement: str = field(default="pre", metadata={"help": "pre, post, output or both."})
    mlp_type: str = field(default="gated", metadata={"help": "gated or plain."})
    hidden_act: str = field(default="silu", metadata={"help": "Activation of the MLP."})
    position_embedding_type: str = field(default="rope", metadata={"help": "rope, learned or none."})
    parallel_block: bool = field(default=False, metadata={"help": "Attention and MLP side by side, as in PaLM."})
    sliding_window: int | None = field(default=None, metadata={"help": "Tokens that each token attends to at most."})
    attention_chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens of a chunk, within which each token attends, as in Llama 4."}
    )
    layer_types: list[str] | None = field(
        default=None,
        metadata={
            "help": "Attention of each layer: full_attention, sliding_attention (with --sliding_window), "
            "chunked_attention (with --attention_chunk_size), linear_attention; a shorter list is repeated over the "
            "layers."
        },
    )
    no_rope_layers: list[int] | None = field(
        default=None,
        metadata={"help": "0 for each layer without rotary positions, 1 for the others; repeated likewise."},
    )
    linear_num_key_heads: int | None = field(default=None, metadata={"help": "Key heads of linear attention."})
    linear_num_value_heads: int | None = field(default=None, metadata={"help": "Its value heads."})
    linear_key_head_dim: int | None = field(default=None, metadata={"help": "Size of such a key head."})
    linear_value_head_dim: int | None = field(default=None, metadata={"help": "Size of such a value head."})
    linear_conv_kernel_dim: int = field(default=4, metadata={"help": "Tokens that its convolution sees."})
    sparse_block_size: int | None = field(
        default=None, metadata={"help": "Keys of a block, for --attn_implementation sparse."}
    )
    sparse_num_blocks: int | None = field(
        default=None, metadata={"help": "Blocks that a token attends to, its own included, for the same."}
    )
    num_local_experts: int = field(default=0, metadata={"help": "Experts of each layer; 0 means one dense MLP."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts that each token passes through."})
    moe_intermediate_size: int | None = field(default=None, metadata={"help": "Width of an expert."})
    n_shared_experts: int = field(default=0, metadata={"help": "Experts beside these that all tokens share."})
    first_k_dense_replace: int = field(default=0, metadata={"help": "First layers with a dense MLP and no experts."})
    scoring_func: str = field(default="softmax", metadata={"help": "Scores of a router: softmax or sigmoid."})
    topk_method: str = field(
        default="greedy", metadata={"help": "greedy, group_limited_greedy, or noaux_tc: a bias balances the load."}
    )
    n_group: int = field(default=1, metadata={"help": "Groups of experts."})
    topk_group: int = field(default=1, metadata={"help": "Groups that a token's experts come from."})
    router_bias_update_rate: float | None = field(
        default=None, metadata={"help": "Step of that bias; by default 0.001, and 0 keeps it."}
    )
    residual_init: str = field(default="plain", metadata={"help": "plain, gpt2 or depth: scale of the residual init."})


# The flags that are fields of `HfllmConfig`; the tokenizer determines the vocabulary size.
ARCHITECTURE = tuple(name for name in ArchitectureArguments.__dataclass_fields__ if name != "vocab_size")


# Fields that only some attention functions read; other models do not have them.
ONLY_IF_GIVEN = ("sparse_block_size", "sparse_num_blocks")


def architecture_of(script_args: ArchitectureArguments) -> dict[str, object]:
    """Return the fields of `HfllmConfig` that the flags describe.

    Raises:
        InputError: for a type of layer that there is not, with the nearest one, a list that does not divide the
            layers, sizes of linear attention without such a layer, and sizes of sparse attention of which one is
            missing or below 1.
    """
    fields = {name: getattr(script_args, name) for name in ARCHITECTURE}
    check_layer_types(script_args)
    for item in dataclass_fields(ArchitectureArguments):
        is_given = item.name.startswith("linear_") and fields[item.name] != item.default
        if is_given and "linear_attention" not in (script_args.layer_types or ()):
            raise InputError(f"--{item.name} {fields[item.name]} needs linear_attention in --layer_types")
    for name in ("layer_types", "no_rope_layers"):
        if fields[name]:
            fields[name] = repeated(name, fields[name], script_args.num_hidden_layers)
    sizes = [fields[name] for name in ONLY_IF_GIVEN]
    if sizes != [None, None] and not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(
            f"--sparse_block_size {sizes[0]} and --sparse_num_blocks {sizes[1]}: expected both, each at least 1"
        )
    return {name: value for name, value in fields.items() if value is not None or name not in ONLY_IF_GIVEN}


def check_layer_types(script_args: ArchitectureArguments) -> None:
    """Refuse types of layers that there are not.

    Raises:
        InputError: with the nearest one.
    """
    if script_args.layer_types is None:
        return
    from hfllm.models.family.configuration_fields_hfllm import LAYER_TYPES

    for name in script_args.layer_types:
        if name not in LAYER_TYPES:
            near = get_close_matches(name, LAYER_TYPES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"--layer_types {name!r} is not one of {', '.join(LAYER_TYPES)}{hint}")


def repeated(name: str, values: list, layers: int) -> list:
    """Return a list with one value for each layer: the values again and again.

    Raises:
        InputError: when that does not come out even.
    """
    if layers % len(values):
        raise InputError(
            f"--{name} has {len(values)} values for --num_hidden_layers {layers}: expected one for each, or a number "
            "that divides them"
        )
    return values * (layers // len(values))


def check_adapter(model_args: "ModelConfig", before: Chain, task_type: str = "CAUSAL_LM") -> None:
    """Refuse a new adapter that does not fit the model that a stage starts from, before that is trained or loaded.

    Raises:
        InputError: naming the flag, such as `--lora_target_modules`.
    """
    if not model_args.use_peft:
        return
    import torch

    from hfllm.runs.models import peft_config, try_adapter

    # The weights of the trial must not change the random numbers drawn later.
    with torch.random.fork_rng(devices=[]):
        try_adapter(config_to_train(model_args, before), peft_config(model_args, task_type))


def config_to_train(model_args: "ModelConfig", before: Chain) -> "PreTrainedConfig":
    """Return the config of the model that a stage starts from: the named one, or the one that pretraining will make.

    Args:
        model_args: with the model's name, if it has one.
        before: the stages that run first.

    Raises:
        InputError: when it cannot be loaded, or describes no model.
    """
    from hfllm.runs.models import load_config, named_fields, new_config

    made = before.parsed.get("pretrain")
    start = made[2] if made else model_args
    if start.model_name_or_path:
        return load_config(start.model_name_or_path, start.model_revision)
    named = made[0].config_name_or_path
    return new_config(named_fields(named) if named else architecture_of(made[0]))
