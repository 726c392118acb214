"""Attributions: complete, equal to a derivative by differences, and equal to captum's where it is installed."""

from dataclasses import replace

import pytest
import torch
from interpreted_models import hooks_of

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import batch_of, hooked, last_logits, parts_of
from hfllm.evaluation.interpreting.measures import (
    GRADIENT_X_INPUT,
    INTEGRATED_GRADIENTS,
    attribute,
    captum_scores,
    mean_vector,
    strongest,
)


@pytest.mark.parametrize("any_model", ["ours-gpt2", "ours-llama", "native-gpt_neox"], indirect=True)
def test_integrated_gradients_sum_up_to_the_difference(any_model, prompts):
    parts = parts_of(any_model)
    found = attribute(parts, prompts[0], INTEGRATED_GRADIENTS, other=prompts[0].others[0], steps=64)
    assert found.gap < 0.02 * max(abs(found.change), 0.1)
    again = attribute(parts, prompts[0], INTEGRATED_GRADIENTS, other=prompts[0].others[0], steps=64, batch_size=5)
    torch.testing.assert_close(again.scores, found.scores, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in any_model.parameters()) and hooks_of(any_model) == 0


def test_the_difference_is_that_of_two_runs(parts, prompts):
    prompt, (ids, last) = prompts[0], batch_of(prompts[:1])
    with torch.no_grad():
        whole = last_logits(parts, ids, last)[0, prompt.value]
        mean = mean_vector(parts)
        with hooked([(parts.embeddings, mean.expand_as)]):
            nothing = last_logits(parts, ids, last)[0, prompt.value]
    assert attribute(parts, prompt).change == pytest.approx(float(whole - nothing), abs=1e-5)


def test_gradient_x_input_is_the_derivative_along_a_token(parts, prompts):
    """By differences: what the logit gains when one token's vector grows by a small share of itself."""
    parts.model.double()
    prompt, place, share = prompts[0], 4, 1e-3
    ids, _ = batch_of([prompt])

    def logit(factor):
        def scale(output):
            output = output.clone()
            output[:, place] *= factor
            return output

        with torch.no_grad(), hooked([(parts.embeddings, scale)]):
            return parts.model(input_ids=ids).logits[0, -1, prompt.value]

    slope = float((logit(1 + share) - logit(1 - share)) / (2 * share))
    scores = attribute(parts, prompt, GRADIENT_X_INPUT).scores
    assert float(scores[place]) == pytest.approx(slope, rel=1e-3) and strongest(scores, [place]) == place


def test_the_token_that_alone_is_seen_gets_everything(make_model, prompts):
    """A model with a window of one token reads the last one: the others add nothing."""
    parts = parts_of(make_model(sliding_window=1))
    for method in (GRADIENT_X_INPUT, INTEGRATED_GRADIENTS):
        scores = attribute(parts, prompts[0], method).scores
        assert strongest(scores, range(len(scores))) == len(scores) - 1 and scores[:-1].abs().max() < 1e-6


def test_captum_agrees(parts, prompts):
    pytest.importorskip("captum")
    prompt, other = prompts[0], prompts[0].others[0]
    pad = parts.embeddings.weight[0].detach()
    ours = attribute(parts, prompt, INTEGRATED_GRADIENTS, other, baseline=pad, steps=50).scores
    baselines = torch.zeros(1, len(prompt.ids), dtype=torch.long)
    theirs = captum_scores(parts, prompt, "LayerIntegratedGradients", other, n_steps=50, baselines=baselines)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    simple = captum_scores(parts, prompt, "LayerGradientXActivation", other)
    torch.testing.assert_close(simple, attribute(parts, prompt, GRADIENT_X_INPUT, other).scores, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="no method 'Saliency' for a layer"):
        captum_scores(parts, prompt, "Saliency")


def test_bad_input(parts, prompts, monkeypatch):
    with pytest.raises(InputError, match="'shap' is not one of gradient_x_input"):
        attribute(parts, prompts[0], "shap")
    monkeypatch.setitem(__import__("sys").modules, "captum", None)
    with pytest.raises(InputError, match=r"pip install 'hfllm\[interpret\]'"):
        captum_scores(parts, replace(prompts[0]))
