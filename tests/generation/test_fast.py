"""`generate(custom_generate=fast_generate)` is `generate`."""

import pytest
import torch

from hfllm.errors import InputError
from hfllm.generation import fast_generate
from hfllm.generation.packed.model import has_int8
from hfllm.generation.speculative import speculative
from hfllm.generation.speculative.drafts import Int8Draft, PromptLookupDraft

needs_int8 = pytest.mark.skipif(not has_int8(torch.float32, torch.device("cpu")), reason="no fbgemm here")
FAST = {"custom_generate": fast_generate}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "llama", "gpt2"])
def test_greedy(kind, make_target, prompts, blurred):
    """Left padding, batches, rows that end at different times, without a draft and with each."""
    target = make_target(initializer_range=0.3) if kind == "ours" else make_target.native(kind)
    target.generation_config.eos_token_id = [3, 7, 20, 31]
    for rows in (1, 6):
        ids, mask = prompts(rows)
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        wanted = target.generate(ids, **options)
        for draft in (
            {},
            {"draft": None},
            {"draft": PromptLookupDraft()},
            {"draft": blurred(target), "num_draft_tokens": 3},
        ):
            assert torch.equal(target.generate(ids, **options, **draft, **FAST), wanted), draft


@pytest.mark.slow
@needs_int8
def test_greedy_with_the_int8_draft(make_target, prompts, monkeypatch):
    """300 prompts in fp32, as the recommended settings decode them."""
    monkeypatch.setattr(speculative, "INT8_FROM", 0)
    target = make_target(num_key_value_heads=2, initializer_range=0.3).float()
    target.generation_config.eos_token_id = [3, 7, 20, 31]
    assert isinstance(speculative.recommended_draft(target), Int8Draft)
    same = 0
    for seed in range(30):
        ids, mask = prompts(10, length=4 + seed % 7, seed=seed)
        options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
        wanted = target.generate(ids, **options)
        found = target.generate(ids, **options, **FAST)
        assert found.shape == wanted.shape
        same += int((found == wanted).all(1).sum())
    assert same == 300


def test_the_processors_of_generate_are_applied(make_target, prompts):
    """The most probable token alone is left, of those that may be said."""
    target = make_target()
    target.generation_config.eos_token_id = None
    ids, mask = prompts(4)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 1}
    free = target.generate(ids, **options)
    options |= {"suppress_tokens": free[:, -1].tolist(), "num_return_sequences": 2}
    wanted = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, **options, draft=None, **FAST), wanted)


def test_what_is_recommended(make_target, monkeypatch):
    small = make_target().float()
    assert speculative.recommended_draft(small) is None
    monkeypatch.setattr(speculative, "INT8_FROM", 0)
    assert speculative.recommended_draft(make_target()) is None
    for model in (make_target().float(), make_target.native("llama").float()):
        is_possible = has_int8(torch.float32, model.device)
        assert isinstance(speculative.recommended_draft(model), Int8Draft if is_possible else type(None))


def test_a_row_of_padding_is_refused(make_target):
    ids = torch.tensor([[0, 0], [0, 7]])
    with pytest.raises(InputError, match="row 0 of input_ids has no token"):
        make_target().generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=4, **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor depends on earlier tokens"),
        ({"max_time": 3.0}, "max_time=3.0"),
        ({"stopping_criteria": [lambda *_, **__: False]}, "cannot be combined with fast_generate"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"cache_implementation": "static"}, "has its own cache"),
        ({"draft": "int9"}, "draft 'int9'"),
    ],
)
def test_options_that_cannot_be_respected_are_refused(options, message, make_target, prompts):
    ids, mask = prompts(1)
    with pytest.raises(InputError, match=message):
        make_target().generate(ids, attention_mask=mask, max_new_tokens=4, **options, **FAST)


def test_few_rows_at_a_time_give_the_same(make_target):
    model = make_target(initializer_range=0.3)
    ids = torch.randint(4, 40, (7, 5), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": [3, 7, 20]}
    whole = model.generate(ids, **options)
    for draft in (None, PromptLookupDraft()):
        fast = {"custom_generate": fast_generate, "draft": draft, "most_rows": 3}
        assert model.generate(ids, **options, **fast).tolist() == whole.tolist()
    with pytest.raises(InputError, match="most_rows"):
        model.generate(ids, **options, custom_generate=fast_generate, most_rows=0)
