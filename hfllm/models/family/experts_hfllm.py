"""A mixture of experts: the experts, their router, the balance of their loads, and the layer joining them.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: N tokens, E hidden_size.
"""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_fields_hfllm import expert_width, is_sparse, shared_width
from .configuration_hfllm import HfllmConfig
from .layers_hfllm import HfllmMLP, needs_autograd

# ---- experts ----


@use_experts_implementation
class HfllmExperts(nn.Module):
    """Gated MLPs of width W in two stacked tensors, (experts, 2 * W, E) and (experts, E, W)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        width = expert_width(config)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, tokens_NE: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # The loop below depends on the chosen experts; this is one graph.
            return grouped_mm_experts_forward(self, tokens_NE, indices, weights)
        output = torch.zeros_like(tokens_NE)
        # Under expert parallelism, `num_experts` marks a choice computed by another rank.
        for expert in indices.unique().tolist():
            if expert == self.num_experts:
                continue
            rows, ranks = torch.where(indices == expert)
            gate, up = nn.functional.linear(tokens_NE[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            mixed = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[rows, ranks, None]
            output.index_add_(0, rows, mixed.to(output.dtype))
        return output


class HfllmSparseMLP(nn.Module):
    """A mixture of experts instead of the MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.gate = HfllmRouter(config)
        self.experts = HfllmExperts(config)
        width = shared_width(config)
        self.shared_experts = HfllmMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, S, E) to (B, S, E); `token_mask` (B, S) is 0 for padding, not counted as load of the experts."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens) if token_mask is None else self.gate(tokens, token_mask)
        output = self.experts(tokens, indices, weights).reshape(hidden_states.shape)
        if self.shared_experts is None:
            return output
        shared = self.shared_experts(hidden_states)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
        return output + shared


def build_mlp(config: HfllmConfig, layer_idx: int) -> nn.Module:
    """Return the MLP of a layer, or its experts."""
    return HfllmSparseMLP(config) if is_sparse(config, layer_idx) else HfllmMLP(config)


def last_projections(mlp: nn.Module) -> list[nn.Module]:
    """Return modules writing into the residual stream: an MLP's `down_proj`, or the experts and the shared MLP's."""
    if isinstance(mlp, HfllmMLP):
        return [mlp.down_proj]
    return [mlp.experts] if mlp.shared_experts is None else [mlp.experts, mlp.shared_experts.down_proj]


def fp32_names(config: HfllmConfig) -> list[str]:
    """Return the names of weights kept in fp32 where a model is loaded in half precision: weights of the routers
    computing in fp32, as in DeepSeek's."""
    is_plain = (config.scoring_func, config.topk_method) == ("softmax", "greedy")
    return [] if is_plain else ["mlp.gate.weight", "e_score_correction_bias"]


def init_experts(module: nn.Module, std: float, residual_std: float) -> None:
    """Initialize a router or stacked experts, whose `down_proj` writes into the residual stream."""
    for name, parameter in module.named_parameters(recurse=False):
        init.normal_(parameter, mean=0.0, std=residual_std if name == "down_proj" else std)
    for buffer in module.buffers(recurse=False):
        init.zeros_(buffer)


# ---- router ----
#
# The router of a mixture of experts, and the bias for balancing the load of its experts.
#
# Shapes: N tokens, E hidden_size, X experts, G groups of them, k experts per token.


class HfllmRouter(nn.Module):
    """Chooses the experts of the tokens. `ExpertFields` explains the effects of the config's fields.

    The default is Mixtral's (section 2.1): softmax over all experts, the best k, renormalized.

    Attributes:
        e_score_correction_bias: (X,) in fp32, with `topk_method="noaux_tc"`: added to the scores for the choice, not
            in the weights. With `router_bias_update_rate` every optimizer step on `weight` moves it.
        load: (X,) tokens per expert in the backward passes since the last step; `None` if there were none.
    """

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scoring_func, self.topk_method = config.scoring_func, config.topk_method
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob, self.routed_scaling_factor = config.norm_topk_prob, config.routed_scaling_factor
        self.is_plain = (self.scoring_func, self.topk_method) == ("softmax", "greedy")
        # In fp32 where the router computes in it, also in a new model of half precision, as in DeepSeek.
        dtype = None if self.is_plain else torch.float32
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size, dtype=dtype))
        self.update_rate, self.load = config.router_bias_update_rate, None
        if self.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_local_experts, dtype=torch.float32))
        if self.update_rate:
            _follow_optimizers(self)

    def forward(
        self, tokens_NE: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits (N, X), and the weights and indices (N, k) of the chosen experts.

        Args:
            token_mask: N numbers, 0 for padding, not counted as load; `None` means no padding.
        """
        if self.is_plain:
            logits = nn.functional.linear(tokens_NE, self.weight)
            weights, indices = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        else:
            # In fp32, as in DeepSeek: the choice depends on small differences.
            logits = nn.functional.linear(tokens_NE.float(), self.weight.float())
            scores = logits.float().sigmoid() if self.scoring_func == "sigmoid" else logits.float().softmax(dim=-1)
            indices = self._choice(scores.detach()).topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, indices)
        if self.training and self.update_rate:
            self._count(weights, indices, token_mask)
        if self.norm_topk_prob:
            total = weights.sum(dim=-1, keepdim=True)
            # All scores of a token may vanish where they are no shares.
            weights = weights / (total if self.is_plain else total + 1e-20)
        return logits, weights if self.routed_scaling_factor == 1 else weights * self.routed_scaling_factor, indices

    def _choice(self, scores_NX: torch.Tensor) -> torch.Tensor:
        """Return the basis of the choice: scores, perhaps with the bias, and no score outside of the best groups."""
        has_bias = self.topk_method == "noaux_tc"
        choice = scores_NX + self.e_score_correction_bias if has_bias else scores_NX
        if self.n_group == 1:
            return choice
        groups_NGX = choice.unflatten(-1, (self.n_group, -1))
        best_NG = groups_NGX.topk(2, dim=-1).values.sum(dim=-1) if has_bias else groups_NGX.amax(dim=-1)
        mask_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter(1, best_NG.topk(self.topk_group).indices, True)
        return groups_NGX.masked_fill(~mask_NG.unsqueeze(-1), -torch.inf).flatten(1)

    def _count(self, weights: torch.Tensor, indices: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """Add these tokens to `load` when the backward pass comes through their weights.

        There, since it comes exactly once: a forward pass may be none of training, or be run again by activation
        checkpointing. A compiler cannot follow, and counts in the forward pass, not run again in this case.
        """
        if not (weights.requires_grad and self.weight.requires_grad) or needs_autograd():
            return
        ones = torch.ones_like(indices)
        # A caller that drops tokens before this layer, as PPO does, leaves no padding.
        has_mask = token_mask is not None and token_mask.numel() == len(indices)
        counted = ones * (token_mask.reshape(-1, 1) != 0) if has_mask else ones
        # Not as long as the weight, since that may be split over processes.
        empty = torch.zeros_like(self.e_score_correction_bias, dtype=torch.int64)
        counts = empty.scatter_add(0, indices.flatten(), counted.flatten())

        def add(_: torch.Tensor | None = None) -> None:
            self.load = counts if self.load is None else self.load + counts

        if torch.compiler.is_compiling():
            add()
        else:
            weights.register_hook(_once(add))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "HfllmRouter":
        """Move to another device or precision, as every module does; the bias stays in fp32, where steps are exact."""
        bias = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device, torch.float32)
        return self

    def __setstate__(self, state: dict) -> None:
        """Restore a copy: it follows its own optimizer, and counts for itself."""
        super().__setstate__(state)
        self.load = None
        if self.update_rate:
            _follow_optimizers(self)


# ---- the bias after each optimizer step ----

# By the order of creation, the same in all processes.
_FOLLOWING: "WeakValueDictionary[int, HfllmRouter]" = WeakValueDictionary()
_NUMBERS = count()
# Of DeepSpeed: its optimizers hold copies of the weights, with one of these attributes.
_COPIED = ("ds_id", "_hp_mapping")


def _follow_optimizers(router: HfllmRouter) -> None:
    """Move the router's bias after every step of its optimizer, regardless of the caller."""
    number = next(_NUMBERS)
    if number == 0:
        register_optimizer_step_post_hook(_after_step)
    _FOLLOWING[number] = router


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    move_biases(_trained_by(optimizer))


def _trained_by(optimizer: torch.optim.Optimizer) -> list[HfllmRouter]:
    """Return the routers whose weights the optimizer holds."""
    routers = [router for _, router in sorted(_FOLLOWING.items())]
    if not routers:
        return []
    parameter_ids = {id(each) for group in optimizer.param_groups for each in group["params"]}
    result = [router for router in routers if id(router.weight) in parameter_ids]
    return result or [router for router in routers if any(hasattr(router.weight, name) for name in _COPIED)]


@torch.no_grad()
def move_biases(routers: list[HfllmRouter]) -> None:
    """Move the routers' biases against the load since the last call (arXiv:2408.15664, algorithm 1), and count again.

    Args:
        routers: the same in all processes, whose loads are added up.
    """
    routers = [router for router in routers if router.update_rate]
    if not routers:
        return
    loads = []
    for router in routers:
        bias = router.e_score_correction_bias
        load = torch.zeros(len(bias), dtype=torch.int64, device=bias.device) if router.load is None else router.load
        loads.append(load.to(bias.device))
        router.load = None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        together = torch.cat(loads)
        dist.all_reduce(together)
        loads = list(together.split([len(load) for load in loads]))
    for router, load in zip(routers, loads, strict=True):
        # In whole numbers: the sign of the mean minus the load.
        below = (load.sum() - len(load) * load).sign()
        router.e_score_correction_bias.add_(below, alpha=router.update_rate)


def _once(function: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """Return a hook that runs only at the first gradient, as when a graph is kept for a second backward pass."""
    is_done = False

    def hook(gradient: torch.Tensor) -> None:
        nonlocal is_done
        if not is_done:
            is_done = True
            function(gradient)

    return hook


# ---- balance ----
#
# The load-balancing loss of a mixture of experts.


@torch.compiler.assume_constant_result
def install_capturing_hooks(model: PreTrainedModel) -> None:
    """Install the hooks of `capture_outputs`: a compiler cannot trace their installation, so it runs it instead."""
    maybe_install_capturing_hooks(model)


def balance_loss(
    config: HfllmConfig, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the load-balancing loss over all layers (arXiv:2101.03961, equations 4 to 6); padding does not count.

    Of sigmoid scores it takes the experts' shares of their sum (arXiv:2412.19437, equations 17 to 20).

    Args:
        config: of the model.
        router_logits: one per layer with experts, (tokens, experts).
        attention_mask: (B, S) with 0 for padding; one of another shape says nothing about padding.
    """
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
    if config.scoring_func == "sigmoid":
        # The softmax of the logarithms of scores is their share.
        router_logits = tuple(nn.functional.logsigmoid(logits) for logits in router_logits)
    return load_balancing_loss_func(router_logits, config.num_local_experts, config.num_experts_per_tok, mask)


def counts_load(config: HfllmConfig, layer_idx: int, attention_mask: torch.Tensor | dict | None) -> bool:
    """Return whether a layer's experts have a bias that follows their load, and the mask marks padding."""
    is_followed = bool(config.router_bias_update_rate) and is_sparse(config, layer_idx)
    return is_followed and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def check_gradients(layers: nn.ModuleList, router_logits: tuple[torch.Tensor, ...], states: torch.Tensor) -> None:
    """Refuse reentrant activation checkpointing: it runs layers without a graph and so loses this loss's gradient.

    Args:
        layers: decoder layers; layers with experts have the router `mlp.gate`.
        router_logits: of each of these.
        states: the trunk's output, with a gradient if anything in the trunk is trained.

    Raises:
        ValueError: naming the two ways out.
    """
    sparse = [layer for layer in layers if hasattr(layer.mlp, "gate")]
    for layer, logits in zip(sparse, router_logits, strict=False):
        is_trained = layer.mlp.gate.weight.requires_grad or layer.gradient_checkpointing
        if is_trained and states.requires_grad and not logits.requires_grad:
            raise ValueError(
                "reentrant activation checkpointing loses the gradient of the experts' load-balancing loss: use "
                "use_reentrant=False (the default), or router_aux_loss_coef=0"
            )
