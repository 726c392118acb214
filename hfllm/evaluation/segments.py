"""How much a model gains from what it read before: a long document, piece by piece, with and without a memory."""

from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.generation.caches import SegmentMemory

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel


def nats_by_segment(
    model: "PreTrainedModel",
    ids: "torch.Tensor",
    segment_length: int,
    memory_length: int | None = None,
    cache: "Cache | None" = None,
) -> "torch.Tensor":
    """Return minus the log-probability of each token but the first, (B, S - 1), in nats.

    Args:
        ids: (B, S), a long document in each row, read in pieces. The first token of a piece is predicted from the
            piece before, in each case.
        segment_length: tokens of a piece, at least 2.
        memory_length: of `SegmentMemory`; `None` reads every piece as if nothing had been before, the control.
        cache: another cache to read with, such as a `SinkCache`, in place of a memory.

    Raises:
        InputError: for sizes that make no sense.
    """
    import torch

    if segment_length < 2 or ids.shape[1] < 2:
        raise InputError(f"segment_length={segment_length} and {ids.shape[1]} tokens: expected at least 2 of each")
    memory = cache if memory_length is None else SegmentMemory(model, memory_length)
    was_training, found = model.training, []
    model.eval()
    with torch.inference_mode():
        last = None
        for piece in ids.split(segment_length, dim=1):
            given = {"use_cache": False} if memory is None else {"cache": memory, "use_cache": True}
            logits = model(input_ids=piece, **given).logits.float()
            before = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], dim=1)
            targets = piece[:, 1:] if last is None else piece
            losses = torch.nn.functional.cross_entropy(before.flatten(0, 1), targets.flatten(), reduction="none")
            found.append(losses.view_as(targets).cpu())
            last = logits[:, -1:]
    model.train(was_training)
    return torch.cat(found, dim=1)


def streams(ids: "torch.Tensor", batch: int, segment_length: int) -> "torch.Tensor":
    """Return the batches of a training with memory, (steps, batch, segment_length): row b goes on in the next batch.

    Args:
        ids: (S,), one long text; its end is cut.

    Raises:
        InputError: when it is shorter than one batch.
    """
    steps = len(ids) // (batch * segment_length)
    if steps < 1:
        raise InputError(f"{len(ids)} tokens are fewer than {batch} rows of {segment_length}")
    rows = ids[: batch * steps * segment_length].view(batch, steps, segment_length)
    return rows.transpose(0, 1).contiguous()
