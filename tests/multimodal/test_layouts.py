"""Our text models work inside each of transformers' composed classes."""

import pytest
import torch
import transformers
from layouts import HEARING, SEEING, compose
from seeing import TEXTS

EVERY = [(layout, text) for layout in (*SEEING, *HEARING) for text in TEXTS]
# Each layout and each text model once, and the others in the slow tests.
FAST = [(layout, list(TEXTS)[index % len(TEXTS)]) for index, layout in enumerate((*SEEING, *HEARING))]


def check(text, layout, folder):
    model, inputs = compose(layout, text)
    decoder = text.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert any(torch.equal(decoder, weight) for name, weight in model.named_parameters() if "q_proj" in name)
    media = next(name for name in inputs if name in ("pixel_values", "input_features"))
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite() and all(weight.grad is not None for weight in model.get_decoder().parameters())
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**{**inputs, media: inputs[media].flip(0) * 2}).logits
        assert not torch.equal(logits, other)
    fixed = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **fixed), model.generate(**inputs, **fixed, use_cache=False))
    model.save_pretrained(folder)
    again, report = transformers.AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "text"), FAST)
def test_each_layout_computes_trains_writes_and_loads(make_model, tmp_path, layout, text):
    check(make_model(**TEXTS[text]), layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "text"), [each for each in EVERY if each not in FAST])
def test_each_layout_takes_each_text_model(make_model, tmp_path, layout, text):
    check(make_model(**TEXTS[text]), layout, tmp_path)
