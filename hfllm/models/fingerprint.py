"""Tell models apart by their weights, where they have no file that could be compared."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Values of a tensor that are read; of a larger one so many, evenly from all over it.
MOST_VALUES = 1 << 16


def weights_fingerprint(model: "nn.Module") -> str:
    """Return a digest of a model's weights: names, shapes, types, and up to 65,536 values of each tensor.

    Training changes nearly every value, so that another state of the same model has another digest, and a model of
    billions is read in a second.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        some = value.detach().flatten()[:: -(-value.numel() // MOST_VALUES) or 1]
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
