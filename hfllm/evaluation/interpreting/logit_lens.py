"""Read out what a model would say after each of its layers: the logit lens (nostalgebraist 2020).

The model's own last norm, head, scale and caps read the hidden states, in one pass over texts of a single token whose
last layer's output is replaced by them. So the lens is exact for any class, and its last row is the model's logits.
"""

from collections.abc import Sequence

import torch

from hfllm.evaluation.interpreting.hooks import Parts, as_numbers, hooked, recorded
from hfllm.evaluation.interpreting.prompts import FactPrompt, batch_of

# Values of logits in memory at a time.
MOST_LOGITS = 2**25


def read_out(parts: Parts, hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits (N, V) in 32 bits of hidden states (N, E) that stand for the last layer's output.

    Args:
        tokens: (N, K), those whose logits are returned, (N, K), instead of all.
    """
    vocabulary = parts.model.config.get_text_config().vocab_size
    size = max(MOST_LOGITS // vocabulary, 1)
    found = []
    with torch.no_grad():
        for first in range(0, len(hidden_states), size):
            states = hidden_states[first : first + size, None]
            ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
            with hooked([(parts.layers[-1], lambda output, states=states: states.to(output))]):
                logits = as_numbers(parts, parts.model(input_ids=ids, use_cache=False).logits[:, 0])
            found.append(logits if tokens is None else logits.gather(1, tokens[first : first + size]))
    return torch.cat(found)


def logit_lens(
    parts: Parts, input_ids: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logits after each layer (layers, B, V) in 32 bits at one place of each row.

    Args:
        input_ids: (B, S), padded on the right.
        places: (B,).
        tokens: (B, K), those whose logits are returned, (layers, B, K), instead of all.
    """
    rows = torch.arange(len(places), device=input_ids.device)
    _, states = recorded(parts, input_ids, places, parts.layers)
    stacked = torch.cat([each[rows, places] for each in states])
    repeated = None if tokens is None else tokens.repeat(len(states), 1)
    return read_out(parts, stacked, repeated).unflatten(0, (len(states), len(places)))


def value_ranks(parts: Parts, prompts: Sequence[FactPrompt], batch_size: int = 32) -> torch.Tensor:
    """Return how many other values stand above the right one after each layer, (layers, prompts): 0 is right.

    Equal values count as above: a model that knows nothing is not right by chance of the order.
    """
    found = []
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        ids, last = batch_of(some, parts.model.device)
        most = max(len(prompt.others) for prompt in some)
        # Rows with fewer values repeat the right one, which is never counted.
        tokens = [[each.value, *each.others, *[each.value] * (most - len(each.others))] for each in some]
        logits = logit_lens(parts, ids, last, torch.tensor(tokens, device=ids.device))
        is_other = torch.tensor([[n < len(each.others) for n in range(most)] for each in some], device=ids.device)
        found.append(((logits[..., 1:] >= logits[..., :1]) & is_other).sum(-1).cpu())
    return torch.cat(found, dim=1)


def decided_at(is_right: Sequence[bool]) -> int | None:
    """Return the first layer, from 1, from which on the right value stays first to the end; `None` if it is not there.

    Args:
        is_right: for each layer in order.
    """
    if not is_right or not is_right[-1]:
        return None
    wrong = [layer for layer, right in enumerate(is_right, 1) if not right]
    return wrong[-1] + 1 if wrong else 1
