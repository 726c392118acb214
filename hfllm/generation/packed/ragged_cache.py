"""A key-value cache whose rows have lengths of their own.

A row's token at position t lies in column t. To roll a row back is then to count its length down: what lies behind is
masked by the position of whoever asks, and overwritten when the row gets there again. Nothing is copied or moved,
whatever the rows of a batch accept, and the memory is allocated once.

Shapes: B rows, Q new tokens of each, K key-value heads, D head_dim, F numbers of a token's keys and values, C columns.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, side by side; allocated at the first update, when their sizes are known."""

    is_sliding = False
    is_compileable = True

    def __init__(self, cache: "RaggedCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate for what comes as (B, K, Q, D)."""
        self.allocate(keys, len(keys), *((part.shape[1], part.shape[3]) for part in (keys, values)))

    def allocate(
        self, like: torch.Tensor, rows: int, key_sizes: tuple[int, int], value_sizes: tuple[int, int]
    ) -> None:
        """Allocate for heads of these numbers and sizes, on the device and in the type of `like`."""
        self.sizes = key_sizes, value_sizes
        # Zeros: a masked column that held a NaN would still spoil the sum.
        self._look(like.new_zeros(rows, self.cache.capacity, sum(heads * size for heads, size in self.sizes)))
        self.is_initialized = True

    def _look(self, states: torch.Tensor) -> None:
        """Make the views that are written to, cell by cell, and read from, (B, K, C, D): once, not at every token."""
        self.states, self.cells = states, states.flatten(0, 1)
        keys, values = (heads * size for heads, size in self.sizes)
        self.key_cells, self.value_cells = self.cells.narrow(1, 0, keys), self.cells.narrow(1, keys, values)
        self.keys = states.narrow(2, 0, keys).unflatten(-1, self.sizes[0]).transpose(1, 2)
        self.values = states.narrow(2, keys, values).unflatten(-1, self.sizes[1]).transpose(1, 2)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self._look(self.states[rows])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, K, Q, D) in the columns that the cache names; return all (B, K, width, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.cache.cells.to(self.states.device)
        self.key_cells.index_copy_(0, at, key_states.transpose(1, 2).flatten(2).flatten(0, 1))
        self.value_cells.index_copy_(0, at, value_states.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.seen()

    def store(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for keys and values that lie side by side, (B * Q, F), once there is room."""
        self.cells.index_copy_(0, self.cache.cells, states)
        return self.seen()

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the columns that are looked at, (B, K, width, D)."""
        width = self.cache.width
        return self.keys.narrow(2, 0, width), self.values.narrow(2, 0, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return self.cache.capacity


class RaggedCache(Cache):
    """One `RaggedLayer` for each layer of a model.

    Args:
        num_layers: layers of the model.
        capacity: columns C, the longest sequence with its drafts.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity, self.width = capacity, 0
        self.cells: torch.Tensor | None = None
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])

    def place(self, columns: torch.Tensor, width: int) -> None:
        """Say where the next tokens go: `columns` (B, Q), and how many columns are looked at."""
        cells = columns
        if len(columns) > 1:
            cells = torch.arange(len(columns), device=columns.device).unsqueeze(1) * self.capacity + columns
        self.cells, self.width = cells.flatten(), width

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep(rows)
