"""Edits whose layer is known: each method that names a layer finds it; and what patching does at its ends."""

import pytest
import torch
from interpreted_models import hooks_of

from hfllm.evaluation.interpreting.hooks import COMPONENTS, batch_of, parts_of
from hfllm.evaluation.interpreting.measures import (
    causal_trace,
    interchange,
    last_logits_of,
    moved_share,
    subject_spread,
)
from hfllm.evaluation.interpreting.planted import (
    by_causal_trace,
    by_lens,
    by_restored_component,
    by_restored_stream,
    edited_weight,
    make_plant,
    planted,
)


def plant_of(parts, prompts, layer, component):
    prompt, others = prompts[0], prompts[3:24:3]
    ids, last = batch_of([prompt])
    said = int(last_logits_of(parts, ids, last).argmax())
    return make_plant(parts, prompt, next(each for each in prompt.others if each != said), layer, component, others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("any_model", "component"),
    [("ours-llama", "mlp"), ("ours-llama", "attention"), ("ours-mixtral", "mlp"), ("native-gpt2", "attention")],
    indirect=["any_model"],
)
def test_each_method_finds_the_layer_of_an_edit(any_model, prompts, component):
    parts = parts_of(any_model)
    spread, found = subject_spread(parts, prompts), []
    for layer in range(3):
        plant = plant_of(parts, prompts, layer, component)
        assert plant.has_taken
        found.append(
            [
                by_restored_stream(parts, plant),
                by_restored_component(parts, plant),
                by_lens(parts, plant),
                by_causal_trace(parts, plant, spread, samples=4),
            ]
        )
    assert found == [[layer] * 4 for layer in range(3)]
    assert hooks_of(any_model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("any_model", ["ours-llama", "native-gpt2"], indirect=True)
@pytest.mark.parametrize("component", COMPONENTS)
def test_an_edit_by_a_hook_is_the_edited_weight(any_model, prompts, component):
    parts = parts_of(any_model)
    plant = plant_of(parts, prompts, 1, component)
    ids, last = batch_of(prompts[:8])
    with planted(plant):
        hooked = last_logits_of(parts, ids, last)
    clean, before = last_logits_of(parts, ids, last), plant.module.weight.detach().clone()
    assert not torch.allclose(hooked, clean)
    with torch.no_grad():
        plant.module.weight.copy_(edited_weight(plant))
    torch.testing.assert_close(last_logits_of(parts, ids, last), hooked, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(plant.module.weight.detach() - before, rtol=1e-3) == 1


def test_an_edit_is_about_its_subject(parts, prompts):
    """Others' prompts, which its key is blind to, move far less than the subject's."""
    plant = plant_of(parts, prompts, 1, "mlp")
    ids, last = batch_of([prompts[0], *prompts[3:24:3]])
    before = last_logits_of(parts, ids, last)
    with planted(plant):
        change = (last_logits_of(parts, ids, last) - before).norm(dim=1)
    assert change[1:].max() < 0.25 * change[0]


def test_interchange_at_its_ends(parts, prompts):
    """All of the donor's embeddings give its answer, so does the last layer's last place; nothing patched, none."""
    pairs = [
        (prompts[0], other)
        for other in prompts[3:]
        if len(other.ids) == len(prompts[0].ids) and other.value != prompts[0].value
    ][:3]
    assert len(pairs) > 1
    sites = {"embeddings": parts.embeddings, "last": parts.layers[-1]}
    everywhere = [range(len(one.ids)) for one, _ in pairs]
    full = interchange(parts, pairs, everywhere, sites)
    for shares in full.values():
        torch.testing.assert_close(shares, torch.ones(len(pairs)), atol=1e-4, rtol=0)
    nothing = interchange(parts, pairs, [[] for _ in pairs], sites)
    assert all(torch.equal(shares, torch.zeros(len(pairs))) for shares in nothing.values())
    ends = interchange(parts, pairs, [[len(one.ids) - 1] for one, _ in pairs], sites)
    torch.testing.assert_close(ends["last"], torch.ones(len(pairs)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="as many tokens"):
        interchange(
            parts, [(prompts[0], next(each for each in prompts if len(each.ids) != len(prompts[0].ids)))], [[0]], sites
        )


def test_causal_tracing_at_its_ends(parts, prompts):
    """The subject's own vectors undo the noise wholly, places before it not at all."""
    prompt, spread = prompts[0], subject_spread(parts, prompts)
    first = min(prompt.subject_positions)
    sites = {"embeddings": parts.embeddings, "last": parts.layers[-1]}
    places = [prompt.subject_positions, list(range(first)), [len(prompt.ids) - 1]]
    effects, taken = causal_trace(parts, prompt, sites, spread, places)
    assert effects[0, 0] == pytest.approx(taken, abs=1e-6) and effects[1, 2] == pytest.approx(taken, abs=1e-6)
    assert effects[0, 1] == pytest.approx(0, abs=1e-6) and taken != 0
    again, _ = causal_trace(parts, prompt, sites, spread, places, batch_size=4)
    torch.testing.assert_close(again, effects)


def test_shares_are_cut_and_equal_runs_have_none():
    share = moved_share(torch.tensor([5.0, -5.0, 1.0]), torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]))
    assert share.tolist() == [2.0, -1.0, 0.0]
