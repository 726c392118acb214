"""Pretraining: its flags, the flags of the architecture, default settings, and checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import TextArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.flags import ALWAYS, NAMED, NOT_NEGATIVE, POSITIVE, Clashes, Fact, Refused, at_least, check_flags, flag
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.pipeline import Chain
from hfllm.runs.recipes import is_sharded, settings_file, settings_for_the_world
from hfllm.trainers.learning_rate import BatchArguments, MuonArguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments
    from trl import ModelConfig


# ---- architecture ----
#
# The architecture of a new model, as flags; and the config of a named or not yet trained model.


NOT_NEW = (
    NAMED.because("it is for a new model, without --model_name_or_path"),
    Fact(lambda flags: flags.config_name_or_path, "--config_name_or_path has it"),
)
NOT_SPARSE = (
    *NOT_NEW,
    Fact(lambda flags: flags.attn_implementation != "sparse", "it needs --attn_implementation sparse"),
)


@dataclass(frozen=True)
class ArchitectureArguments:
    """Architecture of a new model."""

    vocab_size: int = flag(8192, "Upper bound on the new tokenizer's vocabulary.", takes=at_least(1), never=NOT_NEW)
    hidden_size: int = flag(512, "Width of the new model.", takes=at_least(1), never=NOT_NEW)
    num_hidden_layers: int = flag(8, "Layers of the new model.", takes=at_least(1), never=NOT_NEW)
    num_attention_heads: int = flag(8, "Query heads of the new model.", takes=at_least(1), never=NOT_NEW)
    num_key_value_heads: int | None = flag(None, "Key-value heads of the new model.", takes=at_least(1), never=NOT_NEW)
    max_position_embeddings: int = flag(2048, "Context of the new model.", takes=at_least(1), never=NOT_NEW)
    initializer_range: float = flag(0.02, "Standard deviation of the new weights.", takes=POSITIVE, never=NOT_NEW)
    tie_word_embeddings: bool = flag(False, "Share embeddings and head.", never=NOT_NEW)
    norm_type: str = flag("rmsnorm", "rmsnorm or layernorm.", never=NOT_NEW)
    norm_placement: str = flag("pre", "pre, post, output or both.", never=NOT_NEW)
    mlp_type: str = flag("gated", "gated or plain.", never=NOT_NEW)
    hidden_act: str = flag("silu", "Activation of the MLP.", never=NOT_NEW)
    position_embedding_type: str = flag("rope", "rope, learned or none.", never=NOT_NEW)
    parallel_block: bool = flag(False, "Attention and MLP side by side, as in PaLM.", never=NOT_NEW)
    qk_norm: bool = flag(False, "Normalize the queries and keys of each head, as in Qwen 3.", never=NOT_NEW)
    sliding_window: int | None = flag(None, "Tokens that each token attends to at most.", never=NOT_NEW)
    attention_chunk_size: int | None = flag(
        None, "Tokens of a chunk, within which each token attends, as in Llama 4.", never=NOT_NEW
    )
    layer_types: list[str] | None = flag(
        None,
        "Attention of each layer: full_attention, sliding_attention (with --sliding_window), "
        "chunked_attention (with --attention_chunk_size), linear_attention; a shorter list is repeated over the "
        "layers.",
        never=NOT_NEW,
    )
    no_rope_layers: list[int] | None = flag(
        None, "0 for each layer without rotary positions, 1 for the others; repeated likewise.", never=NOT_NEW
    )
    linear_num_key_heads: int | None = flag(None, "Key heads of linear attention.", never=NOT_NEW)
    linear_num_value_heads: int | None = flag(None, "Its value heads.", never=NOT_NEW)
    linear_key_head_dim: int | None = flag(None, "Size of such a key head.", never=NOT_NEW)
    linear_value_head_dim: int | None = flag(None, "Size of such a value head.", never=NOT_NEW)
    linear_conv_kernel_dim: int = flag(4, "Tokens that its convolution sees.", never=NOT_NEW)
    sparse_block_size: int | None = flag(None, "Keys of a block, for --attn_implementation sparse.", never=NOT_SPARSE)
    sparse_num_blocks: int | None = flag(
        None, "Blocks that a token attends to, its own included, for the same.", never=NOT_SPARSE
    )
    num_local_experts: int = flag(0, "Experts of each layer; 0 means one dense MLP.", never=NOT_NEW)
    num_experts_per_tok: int = flag(2, "Experts that each token passes through.", never=NOT_NEW)
    moe_intermediate_size: int | None = flag(None, "Width of an expert.", never=NOT_NEW)
    n_shared_experts: int = flag(0, "Experts beside these that all tokens share.", never=NOT_NEW)
    first_k_dense_replace: int = flag(0, "First layers with a dense MLP and no experts.", never=NOT_NEW)
    scoring_func: str = flag("softmax", "Scores of a router: softmax or sigmoid.", never=NOT_NEW)
    topk_method: str = flag(
        "greedy", "greedy, group_limited_greedy, or noaux_tc: a bias balances the load.", never=NOT_NEW
    )
    n_group: int = flag(1, "Groups of experts.", never=NOT_NEW)
    topk_group: int = flag(1, "Groups that a token's experts come from.", never=NOT_NEW)
    router_bias_update_rate: float | None = flag(
        None, "Step of that bias; by default 0.001, and 0 keeps it.", never=NOT_NEW
    )
    residual_init: str = flag("plain", "plain, gpt2 or depth: scale of the residual init.", never=NOT_NEW)

    clashes: ClassVar[Clashes] = {
        "--sparse_block_size {sparse_block_size} and --sparse_num_blocks {sparse_num_blocks}: expected both, each at "
        "least 1": lambda flags: (
            (flags.sparse_block_size, flags.sparse_num_blocks) != (None, None)
            and min(flags.sparse_block_size or 0, flags.sparse_num_blocks or 0) < 1
        ),
    }

    def architecture(self) -> dict[str, object]:
        """Return the fields of `HfllmConfig` described by the flags; the tokenizer determines the vocabulary size."""
        from hfllm.models.family.configuration_fields_hfllm import SPARSE_SIZES

        fields = {item.name: getattr(self, item.name) for item in dataclass_fields(ArchitectureArguments)}
        del fields["vocab_size"]
        for item in dataclass_fields(ArchitectureArguments):
            is_set = item.name.startswith("linear_") and fields[item.name] != item.default
            if is_set and "linear_attention" not in (self.layer_types or ()):
                raise InputError(f"--{item.name} {fields[item.name]} needs linear_attention in --layer_types")
        for name in ("layer_types", "no_rope_layers"):
            if fields[name]:
                fields[name] = repeated(name, fields[name], self.num_hidden_layers)
        # Read by sparse attention alone; other models do not have them.
        return {name: value for name, value in fields.items() if value is not None or name not in SPARSE_SIZES}


def repeated(name: str, values: list, layers: int) -> list:
    """Return a list with one value for each layer: the values repeated in order."""
    if layers % (count := len(values)):
        expected = "expected one for each, or a number that divides them"
        raise InputError(f"--{name} has {count} values for --num_hidden_layers {layers}: {expected}")
    return values * (layers // count)


def check_adapter(model_args: "ModelConfig", before: Chain, task_type: str = "CAUSAL_LM") -> None:
    """Refuse a new adapter incompatible with the initial model of a stage, before the model is trained or loaded."""
    if not model_args.use_peft:
        return
    import torch

    from hfllm.runs.models import peft_config, try_adapter

    # The weights of the trial must not change the random numbers drawn later.
    with torch.random.fork_rng(devices=[]):
        config = config_to_train(model_args.model_name_or_path, model_args.model_revision, before)
        try_adapter(config, peft_config(model_args, task_type))


def config_to_train(name: str | None, revision: str, before: Chain) -> "PreTrainedConfig":
    """Return the config of the initial model of a stage: the named one, or the one of the pretraining to come.

    Args:
        name: of the model, if it has one.
        revision: of the model.
        before: the stages to run first.
    """
    from hfllm.runs.models import load_config, new_config

    parsed = before.parsed.get("pretrain")
    if parsed:
        name, revision = parsed[2].model_name_or_path, parsed[2].model_revision
    return load_config(name, revision) if name else new_config(parsed[0].model_fields())


# ---- pretraining ----


# The libraries' dataclasses of flags accepted by pretraining in addition to its own.
LIBRARY = ("transformers.TrainingArguments", "trl.ModelConfig")
OBJECTIVES = ("causal", "masked", "infilling")
CHINCHILLA = "chinchilla"
UNPACKED = Fact(lambda flags: not flags.packing, "it needs --packing true")


@dataclass(frozen=True)
class PretrainArguments(TextArguments, BatchArguments, MuonArguments, ArchitectureArguments, RemoteCodeArguments):
    """Objective, length and schedule of the run, and where a new model comes from."""

    total_tokens: str | None = flag(
        None,
        "Tokens to train on, in place of --num_train_epochs; 'chinchilla' means 20 per parameter "
        "(Hoffmann et al. 2022, arXiv:2203.15556).",
        never=UNPACKED,
    )
    objective: str = flag(
        "causal",
        "'causal' predicts the next token; 'masked' predicts masked ones, in a new bidirectional model; "
        "'infilling' is causal on documents cut in three, Code Llama's format.",
        choices=[*OBJECTIVES],
        never=Fact(lambda flags: not flags.packing and flags.objective != "causal", UNPACKED.reason),
    )
    packing: bool = flag(True, "Fill rows of --max_length with documents that do not attend to each other; else pad.")
    max_length: int = flag(512, "Tokens per row; longer documents are split.", takes=at_least(1))
    length_curriculum: str | None = flag(
        None,
        "Row lengths by share of the run's tokens, such as 0:128,0.2:256,0.5:512; needs packing.",
        never=(
            UNPACKED,
            Fact(
                lambda flags: flags.objective == "infilling",
                "it would cut documents in the middle of the infilling format",
            ),
        ),
    )
    batch_ramp: str | None = flag(
        None, "Tokens per batch by share of the run's tokens, such as 0:4096,0.3:16384; needs packing.", never=UNPACKED
    )
    z_loss_coef: float = flag(
        0.0,
        "Weight of the squared log-partition function (PaLM: 1e-4); needs packing.",
        takes=NOT_NEGATIVE,
        never=UNPACKED,
    )
    loss_spikes: str = flag(
        "stop", "What to do at a loss far above its running median: stop the run, or warn.", choices=["stop", "warn"]
    )
    sample_steps: int | None = flag(
        None,
        "Steps between samples; by default four times per run, 0 means never, as under DeepSpeed.",
        takes=at_least(0),
    )
    peak_flops: float | None = flag(
        None, "Peak FLOP/s of one device; the share that is reached is logged as mfu.", takes=POSITIVE
    )
    tokenizer_name_or_path: str | None = flag(
        None,
        "Tokenizer of the new model; by default one is trained on the texts.",
        never=NAMED.because("the model brings its own"),
    )
    config_name_or_path: str | None = flag(
        None,
        "Architecture of the new model, in place of its flags: a preset (gpt2, llama-2-7b, ...), a "
        "config.json, or the folder that holds one. All other defaults are then those of transformers.",
        never=NOT_NEW[0],
    )
    loss_chunk_size: int | None = flag(
        None,
        "Tokens per chunk of an hfllm model's loss, so that a batch's logits are never all in memory; "
        "1024 by default, 0 means all at once.",
        takes=NOT_NEGATIVE,
    )

    refused: ClassVar[Refused] = {
        "use_peft": ALWAYS.because("pretraining trains all weights"),
        "train_sampling_strategy": ALWAYS.because("the order of documents is this recipe's own"),
        "lr_scaling_rule": Fact(lambda flags: flags.batch_ramp is not None, "--batch_ramp changes the batch"),
        "dataset_mixture": UNPACKED,
        "max_steps": Fact(
            lambda flags: flags.batch_ramp or flags.total_tokens,
            "the run's length is --total_tokens or --num_train_epochs",
        ),
    }
    clashes: ClassVar[Clashes] = {
        f"--total_tokens {{total_tokens!r}}: expected a number of tokens, or {CHINCHILLA!r}": lambda flags: (
            flags.total_tokens not in (None, CHINCHILLA)
            and not (flags.total_tokens.isdecimal() and int(flags.total_tokens) > 0)
        ),
        "--attn_implementation sparse cannot be used here: --objective masked sees later tokens": lambda flags: (
            flags.attn_implementation == "sparse" and flags.objective == "masked"
        ),
        "--attn_implementation sparse needs --sparse_block_size and --sparse_num_blocks": lambda flags: (
            flags.attn_implementation == "sparse"
            and not (flags.model_name_or_path or flags.config_name_or_path or flags.sparse_block_size)
        ),
    }

    def model_fields(self) -> dict[str, object]:
        """Return the fields of a new model's config: of `--config_name_or_path`, or described by the flags.

        Only the former have a `vocab_size`; else the tokenizer determines it.
        """
        from hfllm.runs.models import named_fields

        return named_fields(self.config_name_or_path) if self.config_name_or_path else self.architecture()


def default_settings(values: Mapping[str, object]) -> list[Path]:
    """Return the default settings of the small models; none for a named model or architecture."""
    if values.get("model_name_or_path") or values.get("config_name_or_path"):
        return []
    if values.get("dataset_name", WORLD) == WORLD and not values.get("dataset_mixture"):
        return settings_for_the_world("pretrain", values)
    return [settings_file("pretrain/text.yaml"), *([settings_file("pretrain/text_sharded.yaml")] * is_sharded(values))]


# ---- what is refused ----


def check(script_args: PretrainArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> None:
    """Refuse flags that would have no effect or would fail later."""
    from hfllm.runs.models import check_attention, check_trainable, load_config, new_config
    from hfllm.trainers.pretraining.muon import check_muon

    own, is_masked = model_args.model_name_or_path, script_args.objective == "masked"
    refuse(bool(own) and is_masked, "--objective masked", "it makes a new model, without --model_name_or_path")
    check_flags(script_args, training_args, model_args)
    check_muon(script_args.use_muon, training_args)
    if not own:
        config = new_config({**script_args.model_fields(), "is_causal": not is_masked})
    check_trainable(model_args, adapters=False)
    check_attention(model_args.attn_implementation, load_config(own, model_args.model_revision) if own else config)
