"""Rollouts, the training data of PPO: sampled responses and the values computed for them at that time.

A response holds the policy's chosen tokens, its actions, and tokens of an environment between them, such as the
results of tools. Shapes: N episodes, P prompt positions (left-padded), R response positions (right-padded).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfllm.multimodal.processors import Pictures

# The models' inputs from a batch, besides images.
MODEL_INPUTS = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "action_mask")
Batch = dict[str, torch.Tensor | Pictures]


@dataclass
class Rollout:
    """Episodes of one process. Prompt and response masks are 1 on real tokens.

    Computed values of tokens, each (N, R), are 0 where the policy chose none.

    Args:
        prompt_ids, prompt_mask: (N, P).
        response_ids, response_mask: (N, R); the end token, where sampled, is the last real token.
        action_mask: (N, R), 1 on the tokens chosen by the policy.
        logprobs, ref_logprobs: (N, R), of the actions under their sampling policy and the reference.
        values, advantages, returns: (N, R).
        order: (epochs, N), the shuffled order of the episodes per PPO epoch.
        mini_batch_tokens: (epochs, mini-batches), actions per mini-batch over *all* processes.
        pictures: the images of the prompts, `None` where no prompt has any.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    action_mask: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    order: torch.Tensor
    mini_batch_tokens: torch.Tensor
    pictures: Pictures | None = None

    PER_EPISODE = (*MODEL_INPUTS, "logprobs", "ref_logprobs", "values", "advantages", "returns")

    def micro_batch(self, step: int, micro_step: int, micro_batch_size: int) -> Batch:
        """Return the tensors of one backward pass.

        Args:
            step: optimizer step within the rollout, over epochs and their mini-batches.
            micro_step: backward pass within the optimizer step.
            micro_batch_size: episodes in a backward pass.
        """
        mini_batches = self.mini_batch_tokens.shape[1]
        epoch, mini_batch = divmod(step, mini_batches)
        start = mini_batch * (self.order.shape[1] // mini_batches) + micro_step * micro_batch_size
        rows = self.order[epoch, start : start + micro_batch_size]
        batch = {name: getattr(self, name)[rows] for name in self.PER_EPISODE}
        if self.pictures is not None:
            batch["pictures"] = self.pictures[rows]
        return {**trim(batch), "mini_batch_tokens": self.mini_batch_tokens[epoch, mini_batch]}

    def save(self, path: str | Path) -> None:
        """Write the rollout as safetensors."""
        from safetensors.torch import save_file

        # Copies, since the masks are one tensor where all tokens are the policy's.
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file({**tensors, **({} if self.pictures is None else self.pictures.tensors())}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "Rollout":
        """Read the file of `save`."""
        from safetensors.torch import load_file

        saved = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        # Rollouts once had no environment.
        saved.setdefault("action_mask", saved["response_mask"])
        pictures = Pictures.split_off(saved)
        return cls(**saved, pictures=pictures)


def model_inputs(batch: dict[str, Any]) -> Batch:
    """Return the models' inputs from a batch, with its images if it has any."""
    return {name: batch[name] for name in (*MODEL_INPUTS, "pictures") if batch.get(name) is not None}


def trim(batch: Batch) -> Batch:
    """Remove the columns with padding in every row: prompts on the left, responses on the right."""
    longest_prompt = int(batch["prompt_mask"].sum(1).max())
    longest_response = max(int(batch["response_mask"].sum(1).max()), 1)

    def cut(name: str, tensor: torch.Tensor | Pictures) -> torch.Tensor | Pictures:
        if isinstance(tensor, Pictures) or tensor.ndim == 1:
            return tensor
        return (
            tensor[:, tensor.shape[1] - longest_prompt :]
            if name.startswith("prompt_")
            else tensor[:, :longest_response]
        )

    return {name: cut(name, tensor) for name, tensor in batch.items()}


def with_actions(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a sampled batch with its `action_mask`: without one, the policy chose the whole response."""
    return batch if "action_mask" in batch else {**batch, "action_mask": batch["response_mask"]}


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-pad token ids to (N, P) and return them with their mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def length_groups(
    batch: Batch,
    bucket: int | None,
    most_tokens: int | None = None,
    most_rows: int | None = None,
    most_responses: int | None = None,
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield the rows of `batch` in groups of similar length, trimmed, with their indices.

    Args:
        bucket: rows of a group differ in length by fewer tokens than this; `None` allows any length.
        most_tokens: limit per group, padding included, unless a single row has more.
        most_rows: limit per group.
        most_responses: limit of the actions per group, whose logits are made, unless a single row has more.
    """
    lengths = batch["prompt_mask"].sum(1) + batch["response_mask"].sum(1)
    by_length = lengths.argsort(descending=True, stable=True)
    ordered = lengths[by_length].tolist()
    # Actions up to each row, without the row's own.
    actions = batch.get("action_mask", batch["response_mask"])
    cumulative = [0, *(actions.sum(1)[by_length].cumsum(0).tolist() if most_responses is not None else [])]
    start = 0
    while start < len(ordered):
        end = start + 1
        while (
            end < len(ordered)
            and (bucket is None or ordered[start] - ordered[end] < bucket)
            and (most_tokens is None or (end - start + 1) * ordered[start] <= most_tokens)
            and (most_rows is None or end - start < most_rows)
            and (most_responses is None or cumulative[end + 1] - cumulative[start] <= most_responses)
        ):
            end += 1
        rows = by_length[start:end]
        yield rows, trim({name: tensor[rows] for name, tensor in batch.items()})
        start = end
