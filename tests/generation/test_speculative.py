"""Speculative decoding says what the target says: token by token when greedy, in distribution when sampling."""

import pytest
import torch
import transformers
from families import FAMILIES
from test_acceptance import LIMIT, surprise

from hfllm.errors import InputError
from hfllm.generation.packed.model import has_int8
from hfllm.generation.speculative import acceptance
from hfllm.generation.speculative.drafts import (
    AdaptiveDraftLength,
    EarlyExitDraft,
    Int8Draft,
    ModelDraft,
    PromptLookupDraft,
)
from hfllm.generation.speculative.speculative import fast_generate, speculative_generate
from hfllm.models.conversion.convert import config_to_native

NEW = 24
needs_int8 = pytest.mark.skipif(not has_int8(torch.float32, torch.device("cpu")), reason="no int8 kernels here")
WARPED = {"temperature": 0.6, "top_k": 4, "top_p": 0.9}


def drafts_of(target, blurred):
    return {
        "model": ModelDraft(blurred(target)),
        "lookup": PromptLookupDraft(),
        "early exit": EarlyExitDraft(2),
        "none": None,
    }


def greedy(target, ids, mask, new=NEW):
    return target.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False).tolist()


def assert_same(target, draft, ids, mask, new=NEW, wanted=None, **kwargs):
    """The tokens, the padding and the shape of `generate`; returns the statistics."""
    wanted = wanted or greedy(target, ids, mask, new)
    output = speculative_generate(target, draft, ids, mask, max_new_tokens=new, do_sample=False, **kwargs)
    assert output.sequences.tolist() == wanted
    return output.statistics


KINDS = ("gpt2", "llama", "mistral", "palm", "cohere", "qwen3", "mixtral-parallel-window", "no-positions")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native llama", "native gpt2", *KINDS])
def test_greedy_is_the_targets_own(kind, make_target, blurred, prompts):
    """All axes, batch 1 and 5, left padding, all drafts. A window of five is shorter than the prompts."""
    native = kind.removeprefix("native ")
    target = make_target.native(native) if native != kind else make_target(**FAMILIES[kind])
    found, one, five = {}, prompts(1, seed=1), prompts(5)
    wanted = greedy(target, *one), greedy(target, *five)
    for name, draft in drafts_of(target, blurred).items():
        assert_same(target, draft, *one, wanted=wanted[0], num_draft_tokens=3)
        found[name] = assert_same(target, draft, *five, wanted=wanted[1], num_draft_tokens=4)
    assert found["model"].tokens_per_target_call > 1.2
    assert 0 < found["model"].acceptance_rate < 1
    assert found["none"].tokens_per_target_call == 1
    assert found["none"].drafted == 0


@pytest.mark.slow
def test_many_prompts_end_at_different_times(make_target, blurred, prompts):
    """Forty prompts by five; several tokens end a row, so that rows end early, together or at the limit."""
    target = make_target(initializer_range=0.3)
    target.generation_config.eos_token_id = [3, 7, 20, 31]
    drafts, ends = drafts_of(target, blurred), set()
    for seed in range(8):
        ids, mask = prompts(5, length=5 + seed, seed=seed)
        wanted = greedy(target, ids, mask)
        for draft in drafts.values():
            assert_same(target, draft, ids, mask, wanted=wanted, num_draft_tokens="adaptive")
        ends |= {sum(token != 0 for token in row[ids.shape[1] :]) for row in wanted}
    assert len(ends) > 5
    assert min(ends) < 5
    assert max(ends) > 20


@pytest.mark.slow
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 7, "adaptive", AdaptiveDraftLength(0.0, minimum=2, maximum=9)])
def test_every_draft_length_gives_the_same(num_draft_tokens, make_target, blurred, prompts):
    target = make_target()
    statistics = assert_same(target, blurred(target), *prompts(5), num_draft_tokens=num_draft_tokens)
    fixed = (num_draft_tokens, num_draft_tokens)
    bounds = {"adaptive": (0, 12)}.get(num_draft_tokens, fixed if isinstance(num_draft_tokens, int) else (2, 9))
    # At the end there is no room for a whole draft.
    assert bounds[0] <= max(statistics.steps) <= bounds[1]
    # The prompt's run comes before any draft.
    assert statistics.steps[0] == 0
    assert min(statistics.steps[1:3]) >= bounds[0]


@pytest.mark.slow
def test_padding_on_either_side_and_one_token_prompts(make_target, blurred, prompts):
    target = make_target()
    ids, mask = prompts(5)
    left = speculative_generate(target, blurred(target), ids, mask, max_new_tokens=8).sequences[:, ids.shape[1] :]
    right_ids, right_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        right_ids[row, :length], right_mask[row, :length] = ids[row, -length:], 1
    right = speculative_generate(target, blurred(target), right_ids, right_mask, max_new_tokens=8)
    assert torch.equal(right.sequences[:, ids.shape[1] :], left)
    single = torch.tensor([[5], [9]])
    for draft in drafts_of(target, blurred).values():
        assert_same(target, draft, single, torch.ones_like(single), num_draft_tokens=3)


@pytest.mark.slow
def test_prompts_of_very_different_lengths(make_target, blurred, prompts, monkeypatch):
    """Where the logits of all columns in which rows end would be too many."""
    from hfllm.generation.packed import ragged_model

    monkeypatch.setattr(ragged_model, "MOST_LOGITS", 3 * 40)
    target = make_target()
    ids, mask = prompts(5)
    assert_same(target, blurred(target), ids, mask, num_draft_tokens=3)
    assert_same(target, None, ids, mask)


def test_one_new_token(make_target, blurred, prompts):
    target = make_target()
    assert_same(target, blurred(target), *prompts(5), new=1, num_draft_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"sliding_window": 5}], ids=["full", "window"])
def test_eager_attention(axes, make_target, blurred, prompts):
    """Against prompts without padding, whose masks come to NaN in transformers' eager attention in fp64."""
    target = make_target(**axes)
    target.set_attn_implementation("eager")
    ids, _ = prompts(3, length=17)
    assert_same(target, blurred(target), ids[:, -8:], torch.ones(3, 8, dtype=torch.long), num_draft_tokens=4)


@pytest.mark.slow
def test_learned_positions_are_used_to_the_last(make_target, blurred, prompts):
    """Drafts of a row reach beyond the table; what the row keeps does not."""
    target = make_target(**{**FAMILIES["gpt2"], "max_position_embeddings": 40})
    target.generation_config.eos_token_id = None
    ids, mask = prompts(5, length=10)
    for draft in drafts_of(target, blurred).values():
        assert_same(target, draft, ids, mask, new=30, num_draft_tokens=6)
    with pytest.raises(InputError, match=r"41 tokens, but the model, a hfllm, has positions for 40"):
        speculative_generate(target, None, ids, mask, max_new_tokens=31)


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True])
def test_no_cache_is_kept_where_the_factors_of_longrope_change(make_target, blurred, prompts, native):
    """Keys of the short factors are right up to the limit, to the last token."""
    target = make_target(rope_parameters=LONGROPE)
    if native:
        target = transformers.Phi3ForCausalLM(config_to_native(target.config)).eval().double()
    target.generation_config.eos_token_id = None
    ids, mask = prompts(3, length=10)
    for draft in drafts_of(target, blurred).values():
        for packed in (None, False):
            assert_same(target, draft, ids, mask, new=6, num_draft_tokens=6, packed=packed)
            with pytest.raises(InputError, match=r"make 17 tokens, but the model, a .*, has other rotary factors be"):
                speculative_generate(target, draft, ids, mask, max_new_tokens=7, packed=packed)
    kind, shorter = "phi3" if native else "hfllm", {**LONGROPE, "original_max_position_embeddings": 12}
    draft = make_target(rope_parameters=shorter)
    with pytest.raises(
        InputError, match="15 tokens, but the draft model, a hfllm, has other rotary factors beyond 12"
    ):
        speculative_generate(target, draft, ids, mask, max_new_tokens=5)
    with pytest.raises(InputError, match=f"17 tokens, but the model, a {kind}, has other rotary factors beyond 16"):
        target.generate(ids, attention_mask=mask, max_new_tokens=7, custom_generate=fast_generate)


def test_statistics_add_up(make_target, blurred, prompts):
    target = make_target()
    target.generation_config.eos_token_id = None
    ids, mask = prompts(1)
    seen = speculative_generate(target, blurred(target), ids, mask, max_new_tokens=NEW, num_draft_tokens=3).statistics
    assert seen.tokens == NEW
    assert seen.target_calls == len(seen.steps)
    assert seen.drafted == sum(seen.steps)
    # Each run of the target adds a token of its own, but where the end cuts a draft short.
    assert 0 <= seen.accepted + seen.target_calls - seen.tokens <= 3
    assert seen.accepted <= seen.tested <= seen.drafted
    assert seen.tested - seen.accepted <= seen.target_calls


@pytest.mark.slow
def test_the_target_runs_as_often_as_the_statistics_say(make_target, blurred, prompts):
    target, widths = make_target(), []
    draft = blurred(target)
    hook = lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1])  # noqa: E731
    target.register_forward_pre_hook(hook, with_kwargs=True)
    ids, mask = prompts(1)
    seen = speculative_generate(target, draft, ids, mask, max_new_tokens=NEW, num_draft_tokens=3).statistics
    assert widths[0] == ids.shape[1]
    assert len(widths) == seen.target_calls
    assert sum(widths[1:]) == seen.drafted + seen.target_calls - 1


def joint_distribution(target, prompt, **warp):
    """Probabilities of every pair of next tokens, (V, V), by the target alone."""
    from hfllm.generation.speculative.acceptance import read_options

    sampler = read_options(target, None, None, prompt.shape[1], max_new_tokens=2, do_sample=True, **warp).sampler
    size = target.config.vocab_size
    pairs = torch.cat((prompt.expand(size, -1), torch.arange(size).unsqueeze(1)), dim=1)
    with torch.no_grad():
        probs = sampler.probabilities(target(pairs).logits[:, -2:])
    return probs[0, 0].unsqueeze(1) * probs[:, 1]


def sampled_surprise(target, draft, num_draft_tokens=2, draws=6_000, **warp):
    """Of the first two tokens sampled through the loop, in batches: the first has no draft, the second has."""
    prompt, generator = torch.tensor([[4, 1, 2, 4, 1]]), torch.Generator().manual_seed(0)
    rows = prompt.expand(2_000, -1)
    counts = torch.zeros(target.config.vocab_size**2, dtype=torch.long)
    for _ in range(draws // len(rows)):
        output = speculative_generate(
            *(target, draft, rows, None),
            **{
                "max_new_tokens": 4,
                "do_sample": True,
                "num_draft_tokens": num_draft_tokens,
                "generator": generator,
                **warp,
            },
        )
        first, second = output.sequences[:, prompt.shape[1] :][:, :2].unbind(1)
        counts += torch.bincount(first * target.config.vocab_size + second, minlength=len(counts))
    return surprise(counts, joint_distribution(target, prompt, **warp).flatten())


@pytest.fixture
def small_vocabulary(make_target, blurred):
    target = make_target(vocab_size=6, initializer_range=0.3, num_hidden_layers=2, eos_token_id=None).float()
    return target, {
        "model": ModelDraft(blurred(target, 0.1)),
        "lookup": PromptLookupDraft(),
        "early exit": EarlyExitDraft(1),
        "int8": Int8Draft(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "lookup", "early exit", pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize(
    "warp", [{"top_k": 0}, {"temperature": 0.6, "top_k": 4, "top_p": 0.9}], ids=["plain", "warped"]
)
def test_samples_follow_the_target(name, warp, small_vocabulary):
    target, drafts = small_vocabulary
    assert sampled_surprise(target, drafts[name], **warp) < LIMIT


@pytest.mark.slow
def test_that_test_fails_when_the_rule_is_broken(small_vocabulary, monkeypatch):
    target, drafts = small_vocabulary
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    assert sampled_surprise(target, drafts["model"], top_k=0) > 2 * LIMIT
    assert sampled_surprise(target, drafts["lookup"], top_k=0) > 2 * LIMIT


@pytest.mark.slow
def test_a_seed_gives_the_same_samples_again(make_target, blurred, prompts):
    target = make_target()
    draft = blurred(target)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"max_new_tokens": 20, "do_sample": True, "generator": generator}
        return speculative_generate(target, draft, *prompts(5), **options).sequences.tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_options_come_from_where_generate_takes_them(make_target, prompts):
    from transformers import GenerationConfig

    target = make_target()
    target.generation_config.max_new_tokens = 7
    target.generation_config.eos_token_id = None
    assert speculative_generate(target, None, *prompts(2)).sequences.shape[1] == 9 + 7
    config = GenerationConfig(max_new_tokens=5)
    assert speculative_generate(target, None, *prompts(2), config).sequences.shape[1] == 9 + 5
    assert speculative_generate(target, None, *prompts(2), max_new_tokens=3).sequences.shape[1] == 9 + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor depends on earlier tokens"),
        ({"min_new_tokens": 3}, "MinNewTokensLengthLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"encoder_repetition_penalty": 50.0}, r"encoder_repetition_penalty=50\.0"),
        ({"encoder_no_repeat_ngram_size": 1}, "encoder_no_repeat_ngram_size=1"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"output_scores": True}, "output_scores=True"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"max_new_tokens": None}, "max_new_tokens=None"),
        ({"max_newtokens": 3}, "takes no argument max_newtokens"),
        ({"num_draft_tokens": -2}, "num_draft_tokens -2"),
    ],
)
def test_options_that_cannot_be_respected_are_refused(options, message, make_target, prompts):
    with pytest.raises(InputError, match=message):
        speculative_generate(make_target(), PromptLookupDraft(), *prompts(1), **{"max_new_tokens": 4, **options})


@needs_int8
@pytest.mark.parametrize("setting", ["packed=False", "compile=True"])
def test_the_int8_draft_needs_a_packed_target(setting, make_target, prompts):
    name, _, value = setting.partition("=")
    with pytest.raises(InputError, match=f"the int8 draft cannot be combined with {setting}"):
        speculative_generate(
            make_target().float(), Int8Draft(), *prompts(1), max_new_tokens=4, **{name: value == "True"}
        )


def test_prompts_without_a_token_are_refused(make_target, prompts):
    ids, mask = prompts(3)
    mask[1] = 0
    with pytest.raises(InputError, match="row 1 of input_ids has no token"):
        speculative_generate(make_target(), None, ids, mask, max_new_tokens=2)
    with pytest.raises(InputError, match=r"shape \(9,\)"):
        speculative_generate(make_target(), None, ids[0], mask[0], max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.turn(2)
def test_compiled_models_say_the_same(make_target, blurred, prompts):
    """Rows that have ended stay in the batch; a deep copy does not run what was compiled for its original."""
    import copy

    target = make_target().float()
    draft = ModelDraft(blurred(target))
    for source in (draft, PromptLookupDraft()):
        assert_same(target, source, *prompts(3), num_draft_tokens=2, compile=True)
    other = copy.deepcopy(target)
    other.lm_head.weight.data.neg_()
    assert_same(other, PromptLookupDraft(), *prompts(3), num_draft_tokens=2, compile=True)
