"""The next turn of a text reads what is new of it alone, and is what it is when all is read."""

import pytest
import torch

from hfllm.generation.packed import ragged_model
from hfllm.generation.packed.ragged_model import RaggedCache, RaggedModel
from hfllm.generation.packed.turns import Turns, shared
from hfllm.generation.speculative.acceptance import read_options
from hfllm.generation.speculative.speculative import continued
from hfllm.trainers.ppo.rollout import pad_prompts

ENDS = [3, 7, 20, 31]
PROMPTS = [[5, 6, 7], [9, 8], [9, 8], [11], [30, 32, 33, 12, 34], [5, 6, 7], [9, 8, 1], [2]]
# What follows the turn of a text, of different lengths; the last one tells another story from its second token on.
REPLIES = {6: [14], 4: [15, 16, 17, 18], 0: [19, 21], 1: [22, 23, 24]}


@pytest.fixture
def turn(make_target, monkeypatch):
    """Continues texts greedily, by the model of this kind; returns their new tokens, and how many were read."""

    def make(kind):
        model = make_target.native(kind) if kind else make_target(initializer_range=0.3)
        read, call = [], RaggedModel.__call__

        def counted(self, tokens, *args, **kwargs):
            read.append(tokens.numel())
            return call(self, tokens, *args, **kwargs)

        monkeypatch.setattr(RaggedModel, "__call__", counted)

        def run(texts, turns=None):
            ids, mask = pad_prompts(texts, 0, torch.device("cpu"))
            options = read_options(
                model, None, None, ids.shape[1], max_new_tokens=9, do_sample=False, eos_token_id=ENDS, pad_token_id=0
            )
            read.clear()
            new = continued(model, ids, mask, options, turns=turns)
            rows = zip(new.tokens.tolist(), new.lengths.tolist(), strict=True)
            return [row[:length] for row, length in rows], sum(read)

        return run

    return make


@pytest.mark.parametrize(("kind", "gap"), [(None, 40), (None, 1), ("llama", 1)])
def test_a_later_turn_is_that_of_the_whole_text(turn, kind, gap, monkeypatch):
    """With all rows read together, or those of like length apart."""
    monkeypatch.setattr(ragged_model, "LEAST_GAP", gap)
    parts, part = [], RaggedCache.part
    monkeypatch.setattr(RaggedCache, "part", lambda self, *rows: parts.append(rows) or part(self, *rows))
    run, turns = turn(kind), Turns()
    turns.begin(range(len(PROMPTS)))
    texts, _ = run(PROMPTS, turns)
    texts = [[*prompt, *new] for prompt, new in zip(PROMPTS, texts, strict=True)]
    assert len(set(map(len, texts))) > 3
    for _ in range(2):
        # Some texts go on, in another order; one of them was changed in the part that is known.
        texts = {row: [*texts[row], *reply] for row, reply in REPLIES.items()}
        texts[1] = [*texts[1][:1], 13, *texts[1][2:]]
        turns.begin(list(texts))
        new, tokens = run(list(texts.values()), turns)
        whole, all_tokens = run(list(texts.values()))
        assert new == whole and tokens < all_tokens
        assert sum(end - begin for begin, end in parts) == 4 and (len(parts) > 1) == (gap == 1)
        parts.clear()
        texts = {row: [*text, *added] for (row, text), added in zip(texts.items(), new, strict=True)}


def test_a_text_that_was_never_read_is_read_whole(turn):
    run, turns = turn(None), Turns()
    turns.begin([0, 1])
    run(PROMPTS[:2], turns)
    turns.begin([5, 1])
    texts = [[9, 9, 9, 4], [*PROMPTS[1], 4, 4]]
    assert run(texts, turns)[0] == run(texts)[0]
    turns.begin([8, 9])
    assert run(texts, turns) == run(texts)


def test_rows_with_like_counts_are_read_together():
    assert ragged_model._starts([2, 5, 3, 8]) == [0]
    assert ragged_model._starts([5, 5, 6, 9, 20, 21, 60]) == [0, 4, 6]
    assert ragged_model._starts([60, 20, 5]) == [0, 1, 2]


def test_the_last_token_is_always_read():
    assert shared([1, 2, 3], [1, 2, 3]) == 2
    assert shared([1, 2, 3], [1, 2, 3, 4]) == 3
    assert shared([1, 2], [1, 5, 3]) == 1 and shared([], [4]) == 0
