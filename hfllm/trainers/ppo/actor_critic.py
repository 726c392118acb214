"""Policy and critic behind one forward pass without computing padding.

Rows are packed to the left without gaps, so a batch is as wide as its longest row, and the head is applied only to
the tokens chosen by the policy: its actions. They are all response tokens unless an environment wrote some of them;
tokens of an environment are read and never predicted. Shapes: B rows, R response positions, W width of a batch, N
actions in it, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from hfllm.generation.packed.forms import learning_form
from hfllm.models.family.layers_hfllm import HfllmScore, missing_rows
from hfllm.models.family.modeling_hfllm import HfllmModel
from hfllm.models.loading.saved import reads_pictures
from hfllm.multimodal.processors import Pictures, place_tokens
from hfllm.trainers.engines import evaluation_mode
from hfllm.trainers.ppo.shared_base import AdapterScorer

LEAST = torch.finfo(torch.float32).min
# Of the width of sequences in half precision on a CPU, where each shape needs kernels of its own.
COLUMNS = 8


@dataclass
class Sequences:
    """Prompts followed by their responses, without padding between them.

    Padding is on the right, where no token of a causal model attends to it, so no mask is needed.

    Args:
        input_ids: (B, W), padded on the right.
        rows, columns: (N,), position of the state from which each action was sampled. Columns count from the
            end of the row (they are negative), so tokens prepended by an adapter do not matter.
        targets: (N,), the actions.
        lengths: (B,), tokens of the rows.
        pictures: the model's arguments for images.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    pictures: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The family's arguments to leave out padding, and last states other than those of the actions."""
        index = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        is_read = torch.zeros_like(self.input_ids, dtype=torch.bool)
        is_read[self.rows, self.columns] = True
        return {"attention_mask": (index < self.lengths.unsqueeze(1)).long(), "is_read": is_read}

    @classmethod
    def join(
        cls,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        response_ids: torch.Tensor,
        response_mask: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> "Sequences":
        """Join left-padded prompts and right-padded responses, given their masks.

        Args:
            action_mask: (B, R), 1 on the actions; by default all response tokens are.
        """
        ids = torch.cat((prompt_ids, response_ids), dim=1)
        before = prompt_mask.sum(1)
        lengths = before + response_mask.sum(1)
        width = int(lengths.max())
        width = max(width, min(width + missing_rows(width, ids.device, COLUMNS), ids.shape[1]))
        indices = torch.arange(width, device=ids.device)
        begins = prompt_ids.shape[1] - before
        sources = (begins.unsqueeze(1) + indices).clamp(max=ids.shape[1] - 1)
        rows, steps = (response_mask if action_mask is None else action_mask).nonzero(as_tuple=True)
        input_ids = ids.gather(1, sources)
        return cls(
            input_ids=input_ids,
            rows=rows,
            columns=before[rows] + steps - 1 - width,
            targets=response_ids[rows, steps],
            lengths=lengths,
            pictures={} if pictures is None else pictures.inputs(input_ids, [0] * len(ids)),
        )


def log_distribution(logits: torch.Tensor, temperature: float, never_sampled: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities (N, V) of the sampling distribution of tokens, in fp32.

    Without gradients the logits are overwritten, to avoid a second tensor of their size.

    Args:
        logits: (N, V).
        temperature: the sampling temperature.
        never_sampled: ids suppressed by generation (padding), with probability 0 here too.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[list(never_sampled)] = True
        return (logits.float() / temperature).masked_fill(blocked, LEAST).log_softmax(-1)
    logits = restricted(logits, temperature, never_sampled)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def restricted(logits: torch.Tensor, temperature: float, never_sampled: Sequence[int]) -> torch.Tensor:
    """Return logits (N, V) over the temperature, and the least number for some ids, in fp32; they are overwritten."""
    logits = logits.float()
    if temperature != 1:
        logits.div_(temperature)
    if never_sampled:
        logits[:, list(never_sampled)] = LEAST
    return logits


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of tokens from logits, overwriting them: one (N, V) tensor for the backward pass.

    On a GPU it is the only one. On a CPU, whose passes are small, a second one saves time.
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature, never_sampled):
        column, ctx.temperature = targets.unsqueeze(-1), temperature
        if logits.device.type != "cpu":
            distribution = log_distribution(logits, temperature, never_sampled)
            logprobs = distribution.gather(-1, column).squeeze(-1)
            ctx.save_for_backward(distribution.exp_(), targets)
            return logprobs
        logits = restricted(logits, temperature, never_sampled)
        probabilities = logits.softmax(-1)
        # The highest probability is one over the sum of exp(logit - highest): less time than a `logsumexp`.
        normalizer = logits.amax(-1) - probabilities.amax(-1).log()
        ctx.save_for_backward(probabilities, targets)
        return logits.gather(-1, column).squeeze(-1) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        probabilities, targets = ctx.saved_tensors
        # d log p(target) / d logits = onehot - p
        grad = probabilities.mul_(-grad_logprobs.unsqueeze(-1))
        grad.scatter_add_(1, targets.unsqueeze(-1), grad_logprobs.unsqueeze(-1))
        return grad.div_(ctx.temperature) if ctx.temperature != 1 else grad, None, None, None


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, never_sampled: Sequence[int]
) -> torch.Tensor:
    """Return the log-probabilities (N,) of tokens (N,) under `log_distribution`; the logits are overwritten."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        # As where the whole distribution is asked for, so that a policy is at no distance from itself.
        return log_distribution(logits, temperature, never_sampled).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return _TokenLogprobs.apply(logits, targets, temperature, tuple(never_sampled))


def entropy_of(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Return the entropies (N,) in nats of log-distributions (N, V)."""
    if log_probabilities.requires_grad:
        return -(log_probabilities.exp() * log_probabilities).sum(-1)
    return torch.cat([-(part.exp().mul_(part)).sum(-1) for part in log_probabilities.split(512)])


@contextmanager
def head_on(model: PreTrainedModel, sequences: Sequences) -> Iterator[list[torch.Tensor]]:
    """Apply the model's head only to the states of the actions, collected in the yielded list."""
    states: list[torch.Tensor] = []

    def select(module: nn.Module, args: tuple) -> tuple:
        states.append(args[0][sequences.rows, sequences.columns])
        return (_rounded_up(states[-1]).unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield states
    finally:
        handle.remove()


def _rounded_up(states: torch.Tensor) -> torch.Tensor:
    """Return states (N, E) with rows of zeros after them, up to a number that has a kernel."""
    return nn.functional.pad(states, (0, 0, 0, missing_rows(len(states), states.device)))


def leaves_out_padding(trunk: nn.Module) -> bool:
    """Return whether a trunk computes tokens alone, without padding; see `HfllmModel`."""
    return isinstance(trunk, HfllmModel) and trunk.device.type == "cpu" and trunk.computes_by_token


@contextmanager
def actions_only(trunk: PreTrainedModel, sequences: Sequences) -> Iterator[dict[str, torch.Tensor]]:
    """Let the last layer compute as little as it can besides the states of the actions.

    Yields:
        More arguments for the call of the trunk, or of its model.
    """
    if leaves_out_padding(trunk):
        yield sequences.masks
        return
    with last_mlp_on(trunk, sequences):
        yield {}


@contextmanager
def last_mlp_on(trunk: PreTrainedModel, sequences: Sequences) -> Iterator[None]:
    """Let the last layer's MLP compute only the states of the actions, since nothing reads the others.

    For the others its output is zero. Trunks with a different result, or with layers recomputed in the backward pass,
    are left unchanged; each trunk is tried once.
    """
    if not _may_skip_last_mlp(trunk):
        yield
        return
    with _mlp_at(trunk.layers[-1].mlp, (sequences.rows, sequences.columns)):
        yield


@contextmanager
def _mlp_at(mlp: nn.Module, indices: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    shapes: list[torch.Size] = []

    def select(module: nn.Module, args: tuple) -> tuple:
        shapes.append(args[0].shape)
        return (_rounded_up(args[0][indices]).unsqueeze(0), *args[1:])

    def spread_out(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.new_zeros(shapes.pop()).index_put(indices, output.squeeze(0)[: len(indices[0])])

    handles = mlp.register_forward_pre_hook(select), mlp.register_forward_hook(spread_out)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _may_skip_last_mlp(trunk: PreTrainedModel) -> bool:
    mlp = getattr(getattr(trunk, "layers", [None])[-1], "mlp", None)
    if mlp is None or not type(mlp).__name__.endswith("MLP") or trunk.is_activation_checkpointing:
        return False
    if trunk.dtype != torch.float32 or any(hasattr(parameter, "ds_id") for parameter in mlp.parameters()):
        return False
    if not hasattr(trunk, "_hfllm_may_skip_last_mlp"):
        trunk._hfllm_may_skip_last_mlp = _is_same_without(trunk, mlp)
    return trunk._hfllm_may_skip_last_mlp


@torch.no_grad()
def _is_same_without(trunk: PreTrainedModel, mlp: nn.Module) -> bool:
    """Return whether the last states of a short sequence stay the same when the MLP computes only these.

    They differ where a layer is used more than once, or the MLP returns more than a tensor.
    """
    ids = torch.arange(8, device=trunk.device).unsqueeze(0) % trunk.config.get_text_config().vocab_size
    rows, columns = torch.zeros(3, dtype=torch.long, device=ids.device), torch.tensor([-3, -2, -1], device=ids.device)
    try:
        with evaluation_mode(trunk):
            whole = trunk(input_ids=ids, use_cache=False).last_hidden_state[rows, columns]
            with _mlp_at(mlp, (rows, columns)):
                part = trunk(input_ids=ids, use_cache=False).last_hidden_state[rows, columns]
        return torch.allclose(part, whole, atol=1e-5, rtol=1e-5)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


@torch.no_grad()
def looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether the output of a model with a head at a token depends on later tokens."""
    trunk = getattr(model, model.base_model_prefix)
    ids = torch.arange(16, device=trunk.device).view(2, 8) % trunk.config.get_text_config().vocab_size
    for token in place_tokens(model):
        # It stands for an image, and there is none.
        ids[ids == token] = token - 1 if token else 1
    ids[1, :2] = ids[0, :2]
    with evaluation_mode(trunk), _without_flash_attention(model):
        one, other = trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :2]
    # In low precision the rounding of a row may depend on the rest of the batch.
    is_exact = trunk.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    tolerance = 1e-3 if is_exact else 5e-2
    return not torch.allclose(one, other, atol=tolerance, rtol=tolerance)


@contextmanager
def _without_flash_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model still on the CPU run there, where flash attention does not."""
    chosen = model.config._attn_implementation or ""
    if "flash" not in chosen or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def response_logits(model: PreTrainedModel, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (N, V) of the actions, and the states (N, E) they are computed from."""
    model = learning_form(model)
    with head_on(model, sequences) as states, actions_only(model.get_decoder(), sequences) as masks:
        logits = model(input_ids=sequences.input_ids, use_cache=False, **masks, **sequences.pictures).logits
    if not states:
        raise TypeError(f"{type(model).__name__} does not call its output embeddings, where PPO reads the states")
    return logits.squeeze(0)[: len(states[0])], states[0]


def value_head_of(model: PreTrainedModel) -> nn.Module:
    """Return the linear head of a sequence- or token-classification model."""
    for name in ("score", "classifier"):
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise ValueError(f"{type(model).__name__} has no head named score or classifier")


def in_fp32(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Apply a value head in fp32: autocast, or weights in 16 bits, would leave 8 bits of its values."""
    with torch.autocast(states.device.type, enabled=False):
        weight = next(head.parameters())
        # ZeRO-3 gathers the weights of a called module.
        if type(head) in (nn.Linear, HfllmScore) and weight.dtype.itemsize < 4 and not hasattr(weight, "ds_id"):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(states.float(), weight.float(), bias)
        return head(states.to(weight.dtype))


class ActorCritic(nn.Module):
    """Policy and value model as one module, so one engine (DDP, DeepSpeed) trains both.

    Args:
        policy: a causal language model.
        value_model: a sequence- or token-classification model with one label whose head is read at every position;
            `None` puts a linear value head, starting at zero, on the policy's trunk. An `AdapterScorer` is an adapter
            of the policy's base.
        temperature, never_sampled: see `token_logprobs`.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: PreTrainedModel | AdapterScorer | None,
        temperature: float,
        never_sampled: Sequence[int],
    ):
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.temperature, self.never_sampled = temperature, tuple(never_sampled)
        if value_model is None:
            weight = policy.get_output_embeddings().weight
            self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)
            self.value_head.to(weight.device)

    @property
    def leaves_out_padding(self) -> bool:
        """Whether both models compute tokens alone, so rows of any lengths may share a pass."""
        trunks = [learning_form(self.policy).get_decoder()]
        if self.value_model is not None:
            trunks.append(getattr(self.value_model, self.value_model.base_model_prefix))
        return all(map(leaves_out_padding, trunks))

    # Trainer and DeepSpeed read these from the model.
    @property
    def config(self):
        return self.policy.config

    @property
    def generation_config(self):
        return self.policy.generation_config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        if isinstance(self.value_model, AdapterScorer):
            own = {"use_reentrant": False, "context_fn": self.value_model.recomputed}
            kwargs["activation_checkpointing_kwargs"] = {
                **(kwargs.get("activation_checkpointing_kwargs") or {}),
                **own,
            }
            self.policy.activation_checkpointing_enable(**kwargs)
            return
        for model in (self.policy, self.value_model):
            if model is not None:
                model.activation_checkpointing_enable(**kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Complete Trainer's card of an adapter, as PEFT does."""
        self.policy.create_or_update_model_card(output_dir)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return the parameters for only the value estimates."""
        if isinstance(self.value_model, AdapterScorer):
            return self.value_model.own_parameters()
        return list((self.value_head if self.value_model is None else self.value_model).parameters())

    def forward(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        response_ids: torch.Tensor,
        response_mask: torch.Tensor,
        with_distribution: bool = False,
        detach_trunk: bool = False,
        action_mask: torch.Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities and values, each (B, R) and 0 on an environment's tokens and on padding.

        The value at position t is for the state before response token t was sampled.

        Args:
            with_distribution: also return the log-distribution (N, V) at each action, row by row.
            detach_trunk: stop the value head's gradient at the trunk.
            action_mask: (B, R), 1 on the tokens chosen by the policy; by default all response tokens.
            pictures: the images of the prompts.
        """
        parts = (prompt_ids, prompt_mask, response_ids, response_mask, action_mask, pictures)
        sequences = Sequences.join(*parts)
        mask = (response_mask if action_mask is None else action_mask) > 0
        logprobs, distribution, states = self._judge(self.policy, sequences, with_distribution)
        values = self._values(sequences, states.detach() if detach_trunk else states)
        return scatter_to_mask(logprobs, mask), scatter_to_mask(values.squeeze(-1).float(), mask), distribution

    def judge(
        self,
        model: PreTrainedModel,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        response_ids: torch.Tensor,
        response_mask: torch.Tensor,
        with_distribution: bool = False,
        action_mask: torch.Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities (B, R) and log-distribution of the same responses under the reference model."""
        parts = (prompt_ids, prompt_mask, response_ids, response_mask, action_mask, pictures)
        sequences = Sequences.join(*parts)
        logprobs, distribution, _ = self._judge(model, sequences, with_distribution)
        return scatter_to_mask(logprobs, (response_mask if action_mask is None else action_mask) > 0), distribution

    def estimate_values(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        response_ids: torch.Tensor,
        response_mask: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> torch.Tensor:
        """Return the values (B, R) of a separate critic model, as `forward` does."""
        parts = (prompt_ids, prompt_mask, response_ids, response_mask, action_mask, pictures)
        sequences = Sequences.join(*parts)
        mask = (response_mask if action_mask is None else action_mask) > 0
        return scatter_to_mask(self._values(sequences, None).squeeze(-1).float(), mask)

    def _judge(self, model, sequences, with_distribution):
        logits, states = response_logits(model, sequences)
        settings = (self.temperature, self.never_sampled)
        if not with_distribution:
            return token_logprobs(logits, sequences.targets, *settings), None, states
        distribution = log_distribution(logits, *settings)
        return distribution.gather(-1, sequences.targets.unsqueeze(-1)).squeeze(-1), distribution, states

    def _values(self, sequences: Sequences, states: torch.Tensor | None) -> torch.Tensor:
        if self.value_model is None:
            return in_fp32(self.value_head, states)
        trunk = getattr(self.value_model, self.value_model.base_model_prefix)
        pictures = sequences.pictures if reads_pictures(trunk) else {}
        shares = isinstance(self.value_model, AdapterScorer)
        with self.value_model.active() if shares else nullcontext(), actions_only(trunk, sequences) as masks:
            inputs = {"input_ids": sequences.input_ids, "use_cache": False, **masks, **pictures}
            hidden_states = trunk(**inputs).last_hidden_state
        return in_fp32(value_head_of(self.value_model), hidden_states[sequences.rows, sequences.columns])


def scatter_to_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Place (N,) values, row by row, at the ones of a (B, R) mask; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
