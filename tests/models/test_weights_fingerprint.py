"""Fingerprints of weights: equal for equal weights, and other for any change that training makes."""

import torch

from hfllm.models.loading import weights as weights_module
from hfllm.models.loading.weights import weights_fingerprint


def test_models_are_told_apart_by_their_weights(make_model, monkeypatch):
    monkeypatch.setattr(weights_module, "MOST_VALUES", 64)
    model = make_model()
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(make_model()) != weights_fingerprint(make_model(seed=1))
    assert before != weights_fingerprint(make_model().bfloat16())
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1e-6)
    assert before != weights_fingerprint(model)
