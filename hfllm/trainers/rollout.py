"""What PPO learns from: sampled responses with what was known about them when they were sampled.

Shapes: N episodes, P prompt positions (left-padded), R response positions (right-padded).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel


@dataclass
class Rollout:
    """Episodes of one process. All masks are 1 on real tokens; every (N, R) tensor is 0 where padded.

    Args:
        prompt_ids, prompt_mask: (N, P).
        response_ids, response_mask: (N, R); the end token, where sampled, is the last real token.
        logprobs, ref_logprobs: (N, R), of the sampled tokens under the policy that sampled them and the reference.
        values, advantages, returns: (N, R).
        order: (epochs, N), the shuffled order of the episodes in each PPO epoch.
        mini_batch_tokens: (epochs, mini-batches), real response tokens of each mini-batch over *all* processes.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    order: torch.Tensor
    mini_batch_tokens: torch.Tensor

    PER_EPISODE = (
        "prompt_ids",
        "prompt_mask",
        "response_ids",
        "response_mask",
        "logprobs",
        "ref_logprobs",
        "values",
        "advantages",
        "returns",
    )

    def micro_batch(self, step: int, micro_step: int, micro_batch_size: int) -> dict[str, torch.Tensor]:
        """The tensors of one backward pass.

        Args:
            step: optimiser step within the rollout, epoch by epoch, mini-batch by mini-batch.
            micro_step: backward pass within the optimiser step.
            micro_batch_size: episodes in a backward pass.
        """
        mini_batches = self.mini_batch_tokens.shape[1]
        epoch, mini_batch = divmod(step, mini_batches)
        start = mini_batch * (self.order.shape[1] // mini_batches) + micro_step * micro_batch_size
        rows = self.order[epoch, start : start + micro_batch_size]
        batch = {name: getattr(self, name)[rows] for name in self.PER_EPISODE}
        return {**trim(batch), "mini_batch_tokens": self.mini_batch_tokens[epoch, mini_batch]}

    def save(self, path: str | Path) -> None:
        """Write the rollout as safetensors."""
        from safetensors.torch import save_file

        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "Rollout":
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        return cls(**{name: tensor.to(device) for name, tensor in load_file(path).items()})


def trim(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut the columns that are padding in every row: prompts on the left, responses on the right."""
    longest_prompt = int(batch["prompt_mask"].sum(1).max())
    longest_response = max(int(batch["response_mask"].sum(1).max()), 1)
    return {
        name: tensor[:, tensor.shape[1] - longest_prompt :]
        if name.startswith("prompt_")
        else tensor[:, :longest_response]
        for name, tensor in batch.items()
    }


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-pad token ids to (N, P) and give their mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def response_mask(response_ids: torch.Tensor, eos_token_ids: Sequence[int]) -> torch.Tensor:
    """Mask (N, R) of the tokens up to and including the first end token."""
    ended = torch.isin(response_ids, torch.tensor(eos_token_ids, device=response_ids.device)).long()
    return (ended.cumsum(1) - ended == 0).long()


@torch.no_grad()
def sample_responses(
    policy: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    generation_config: GenerationConfig,
    eos_token_ids: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one response a prompt. Returns ids and mask, each (N, R), with the padding token after the end."""
    was_training = policy.training
    policy.eval()
    output = policy.generate(input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=generation_config)
    policy.train(was_training)
    response_ids = output[:, prompt_ids.shape[1] :]
    mask = response_mask(response_ids, eos_token_ids)
    return response_ids.masked_fill(mask == 0, generation_config.pad_token_id), mask


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, so that padding on any side changes nothing."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, never_sampled: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens and entropies of the distribution that they were sampled from.

    Args:
        logits: (B, R, V).
        token_ids: (B, R).
        temperature: that of sampling.
        never_sampled: ids that generation suppresses (padding), and that therefore have no probability here either.

    Returns:
        Two (B, R) tensors in fp32; the entropies carry no gradient.
    """
    logits = logits.float() / temperature
    if never_sampled:
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[list(never_sampled)] = True
        logits = logits.masked_fill(blocked, torch.finfo(logits.dtype).min)
    log_probabilities = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return log_probabilities.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


class ActorCritic(nn.Module):
    """Policy and value model behind one forward, so that one engine (DDP, DeepSpeed) trains both.

    Args:
        policy: a causal language model.
        value_model: a sequence- or token-classification model with one label whose `score` head is read at every
            position; `None` puts a linear value head on the policy's trunk, which starts at zero.
        temperature, never_sampled: see `token_logprobs`.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: PreTrainedModel | None,
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

    # Trainer and DeepSpeed ask the model for these.
    @property
    def config(self):
        return self.policy.config

    @property
    def generation_config(self):
        return self.policy.generation_config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        for model in (self.policy, self.value_model):
            if model is not None:
                model.activation_checkpointing_enable(**kwargs)

    def forward(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        response_ids: torch.Tensor,
        response_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies and values, each (B, R); logits are made for response positions only.

        The value at position t is that of the state before response token t was sampled.
        """
        sequences = sequence_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
        length = response_ids.shape[1]
        needs_trunk = self.value_model is None
        output = self.policy(**sequences, logits_to_keep=length + 1, use_cache=False, output_hidden_states=needs_trunk)
        logprobs, entropy = token_logprobs(
            output.logits[:, -length - 1 : -1], response_ids, self.temperature, self.never_sampled
        )
        if needs_trunk:
            hidden_states = output.hidden_states[-1][:, -length - 1 : -1]
            values = self.value_head(hidden_states.to(self.value_head.weight.dtype))
        else:
            trunk = getattr(self.value_model, self.value_model.base_model_prefix)
            hidden_states = trunk(**sequences, use_cache=False).last_hidden_state[:, -length - 1 : -1]
            values = self.value_model.score(hidden_states)
        return logprobs, entropy, values.squeeze(-1).float()


def sequence_inputs(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, response_ids: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The model's inputs for prompts followed by their responses."""
    attention_mask = torch.cat((prompt_mask, response_mask), dim=1)
    return {
        "input_ids": torch.cat((prompt_ids, response_ids), dim=1),
        "attention_mask": attention_mask,
        "position_ids": positions(attention_mask),
    }


@torch.no_grad()
def reference_logprobs(reference: PreTrainedModel, actor: ActorCritic, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities (B, R) of the batch's responses under `reference`, as the actor computes its own."""
    length = batch["response_ids"].shape[1]
    output = reference(**sequence_inputs(**batch), logits_to_keep=length + 1, use_cache=False)
    logits = output.logits[:, -length - 1 : -1]
    return token_logprobs(logits, batch["response_ids"], actor.temperature, actor.never_sampled)[0]


def chunks(batch: dict[str, torch.Tensor], size: int) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
    """Rows of `batch`, `size` at a time and trimmed, with the slice that they are."""
    count = next(iter(batch.values())).shape[0]
    for start in range(0, count, size):
        rows = slice(start, start + size)
        yield rows, trim({name: tensor[rows] for name, tensor in batch.items()})
