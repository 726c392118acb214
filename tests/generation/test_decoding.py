"""Plain decoding over a ragged cache: what it computes, and what it does not compute again."""

import pytest
import torch

from hfllm.generation.packed.decoding import continue_prompts
from hfllm.generation.packed.ragged_model import RaggedCache, RaggedModel, ragged_model
from hfllm.generation.speculative.acceptance import draw

ENDS = [3, 7, 20, 31]


def greedy(logits, rows, steps):
    return logits.argmax(-1)


def continued(model, prompts, new=12, packed=True, ends=ENDS, **more):
    sizes = [len(each) for each in prompts]
    padded = torch.zeros(len(prompts), max(sizes), dtype=torch.long)
    for row, each in enumerate(prompts):
        padded[row, : len(each)] = torch.tensor(each)
    target = ragged_model(model, max(sizes) + new, packed=packed, **{"with_states": True})
    return continue_prompts(target, padded, sizes, greedy, new, ends, 0, **more)


PROMPTS = [[5, 6, 7], [9, 8], [9, 8], [9, 8], [11], [30, 31, 32, 33], [30, 31, 32, 33], [5, 6, 7], [9, 8, 1]]


# Layers that see only some columns too: the place of an ended row has columns of its own.
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}


@pytest.mark.parametrize("options", [{}, WINDOWS])
@pytest.mark.parametrize(("packed", "most_rows"), [(True, None), (False, None), (True, 1), (True, 3), (False, 3)])
def test_each_row_is_continued_as_alone(packed, most_rows, options, make_target):
    model = make_target(initializer_range=0.3, **options)
    together = continued(model, PROMPTS, packed=packed, most_rows=most_rows)
    assert len({*together.lengths.tolist()}) > 2 and together.has_ended.any() and not together.has_ended.all()
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ENDS)[0, len(prompt) :]
        length = int(together.lengths[row])
        assert together.tokens[row, :length].tolist() == wanted.tolist()
        assert not together.tokens[row, length:].any()
        assert bool(together.has_ended[row]) == (int(wanted[-1]) in ENDS)


@pytest.mark.parametrize("most_rows", [None, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_an_observer_gets_the_logits_and_states_of_each_token(packed, most_rows, make_target):
    model, seen = make_target(initializer_range=0.3), {}

    def observe(steps, rows, *noted):
        for at, place in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            seen.setdefault(place, [part[at] for part in noted])

    new = continued(model, PROMPTS, packed=packed, observe=observe, most_rows=most_rows)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*prompt, *new.tokens[row, : new.lengths[row]].tolist()]])
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0, len(prompt) - 1 :]
        for step in range(int(new.lengths[row])):
            logits, own, token = seen[row, step]
            assert int(token) == int(new.tokens[row, step])
            torch.testing.assert_close(own, states[step])
            torch.testing.assert_close(logits, model.lm_head(states[step]).detach())


def test_prompts_that_wait_keep_the_batch_full(make_target):
    """One of 16 answers has 40 tokens, the others one: in fixed batches of 8 each would wait for the longest."""
    prompts, long = [[row % 20 + 4] for row in range(64)], torch.arange(64) % 16 == 0

    def ends_others(logits, rows, steps):
        return torch.where(long[rows], 9, 3)

    new = continue_prompts(
        ragged_model(make_target(), 41, packed=True),
        torch.tensor(prompts),
        [1] * 64,
        ends_others,
        40,
        ENDS,
        0,
        most_rows=8,
    )
    assert new.lengths.tolist() == [40 if each else 1 for each in long.tolist()]
    # 220 tokens; two runs of 40 tokens one after the other, and the places that come free take the next ones.
    assert len(new.running) < 100 and sum(new.running) == 60 + 4 * 40


def test_equal_prompts_are_read_once(make_target, monkeypatch):
    read, prefill = [], RaggedModel.prefill
    monkeypatch.setattr(
        RaggedModel, "prefill", lambda self, tokens, *a: read.append(len(tokens)) or prefill(self, tokens, *a)
    )
    continued(make_target(), PROMPTS)
    continued(make_target(), [[9], [9, 0]])
    assert read == [5, 2]


def test_dropping_rows_copies_no_more_than_it_saves(make_target, monkeypatch):
    """One row ends at each token: copying the others each time would copy half of the batch per token."""
    copied, keep = [], RaggedCache.keep
    monkeypatch.setattr(RaggedCache, "keep", lambda self, rows: copied.append(len(rows)) or keep(self, rows))
    rows = 32

    def ends_one_row(logits, indices, steps):
        tokens = torch.full((len(logits),), 9)
        tokens[0 if len(logits) < rows else int(steps[0])] = 3
        return tokens

    model, lengths = make_target(), torch.arange(rows) + 4
    padded = torch.randint(4, 40, (rows, 35), generator=torch.Generator().manual_seed(0))
    target = ragged_model(model, 35 + 40, packed=True)
    new = continue_prompts(target, padded, lengths.tolist(), ends_one_row, 40, ENDS, 0)
    assert new.has_ended.any() and sum(copied) < sum(new.running) / 2
    assert copied and len(copied) < 12


def test_draws_follow_the_distribution_and_never_take_the_impossible():
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(20_000, -1)
    counts = torch.bincount(draw(probs, generator), minlength=6)
    assert not counts[[0, 2, 5]].any()
    expected = probs[0, [1, 3, 4]] * 20_000
    # Two degrees of freedom: above 27.6 one time in a million.
    assert float(((counts[[1, 3, 4]] - expected) ** 2 / expected).sum()) < 27.6


def test_the_last_possible_token_is_drawn_where_rounding_ends_below_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **given: torch.ones(*shape, dtype=torch.float64))
    assert draw(torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.0]])).tolist() == [1, 0]


def test_nothing_is_drawn_from_what_is_not_a_number():
    with pytest.raises(FloatingPointError, match="NaN"):
        draw(torch.tensor([[0.5, 0.5], [float("nan"), 0.5]]))


def test_nothing_is_run_in_vain_where_all_rows_end_together(make_target, monkeypatch):
    ran, call = [], RaggedModel.__call__
    monkeypatch.setattr(
        RaggedModel,
        "__call__",
        lambda self, tokens, *a, **k: ran.append(tokens.shape[1]) or call(self, tokens, *a, **k),
    )
    new = continued(make_target(), [[row + 4, 5] for row in range(16)], new=1, most_rows=4)
    assert ran == [2] * 4 and new.lengths.tolist() == [1] * 16
