"""A key-value cache whose rows have different lengths.

A row's token at position t is stored in column t. To roll a row back, only its length is reduced: later columns are
masked by the query's position, and overwritten when the row reaches them again. Nothing is copied or moved,
however many tokens each row accepts, and the memory is allocated once.

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
        """Allocate memory for states of shape (B, K, Q, D)."""
        self.allocate(keys, len(keys), *((part.shape[1], part.shape[3]) for part in (keys, values)))

    def allocate(
        self, like: torch.Tensor, rows: int, key_sizes: tuple[int, int], value_sizes: tuple[int, int]
    ) -> None:
        """Allocate memory for this number and size of heads, on the device and in the dtype of `like`."""
        self.sizes = key_sizes, value_sizes
        # Zeros: a masked column that held a NaN would still spoil the sum.
        self._look(like.new_zeros(rows, self.cache.capacity, sum(heads * size for heads, size in self.sizes)))
        self.is_initialized = True

    def _look(self, states: torch.Tensor) -> None:
        """Make the views for writing (by cell) and reading, (B, K, C, D), once and not at every token."""
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
        """Store (B, K, Q, D) in the current columns of the cache; return all (B, K, width, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.cache.cells.to(self.states.device)
        self.key_cells.index_copy_(0, at, key_states.transpose(1, 2).flatten(2).flatten(0, 1))
        self.value_cells.index_copy_(0, at, value_states.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.seen()

    def store(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store concatenated keys and values, (B * Q, F), in memory that is already allocated."""
        self.cells.index_copy_(0, self.cache.cells, states)
        return self.seen()

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the visible columns, (B, K, width, D)."""
        width = self.cache.width
        return self.keys.narrow(2, 0, width), self.values.narrow(2, 0, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return self.cache.capacity


class RaggedCache(Cache):
    """A cache with one `RaggedLayer` per layer of a model.

    Args:
        num_layers: layers of the model.
        capacity: number of columns C: the longest sequence with its drafts.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity, self.width = capacity, 0
        self.cells: torch.Tensor | None = None
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])

    def place(self, columns: torch.Tensor, width: int) -> None:
        """Set where the next tokens are stored: `columns` (B, Q), and how many columns are visible."""
        cells = columns
        if len(columns) > 1:
            cells = torch.arange(len(columns), device=columns.device).unsqueeze(1) * self.capacity + columns
        self.cells, self.width = cells.flatten(), width

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep(rows)
