"""Sampling and judging responses."""

import json
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from hfllm.data.tokenizer import tokenize_prompts
from hfllm.evaluation.suites.world_suites import gold_by_group, judge_tasks, mean_gold, right_share
from hfllm.generation.responses import sample_responses
from hfllm.generation.speculative import speculative

by_generate = partial(sample_responses, fast=False)
ASKED = ["What is 1 plus 2? Please tell me.", "Go", "Say red.", "Is the fox red or blue?"]


@pytest.fixture
def fast_calls(monkeypatch):
    """How many batches the fast decoder has decoded."""
    calls, decode = [], speculative.decode
    monkeypatch.setattr(speculative, "decode", lambda *given, **more: calls.append(1) or decode(*given, **more))
    return calls


def test_batches_and_padding_do_not_matter_to_greedy_responses(make_model, tokenizer):
    model = make_model()
    prompts = ["Say red.", "What is 1 plus 2? Please tell me.", "Go"]
    together = sample_responses(model, tokenizer, prompts, 6, do_sample=False)
    alone = [sample_responses(model, tokenizer, [prompt], 6, do_sample=False)[0] for prompt in prompts]
    assert together == alone


def test_fast_responses_are_those_of_generate_in_the_order_of_the_prompts(make_model, tokenizer):
    model = make_model()
    prompts = ["What is 1 plus 2? Please tell me.", "Go", "Say red.", "Is the fox red or blue?"]
    plain = by_generate(model, tokenizer, prompts, 6, do_sample=False)
    assert sample_responses(model, tokenizer, prompts, 6, do_sample=False, batch_size=2) == plain
    assert len({responses[0] for responses in plain}) > 1
    sampled = sample_responses(model, tokenizer, prompts, 6, num_return_sequences=3, seed=1)
    assert sampled == sample_responses(model, tokenizer, prompts, 6, num_return_sequences=3, seed=1)
    assert [len(responses) for responses in sampled] == [3] * 4
    assert sample_responses(model, tokenizer, [], 6) == []
    # Options that the fast way does not know are the model's own: it is asked the plain way.
    model.generation_config.repetition_penalty = 5.0
    bent = by_generate(model, tokenizer, prompts, 6, do_sample=False)
    assert sample_responses(model, tokenizer, prompts, 6, do_sample=False) == bent != plain


# What transformers, other libraries and people write, none of which changes what is sampled at a given temperature.
HARMLESS = [
    {},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [2, 7], "max_length": 512},
    {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 3, "use_cache": False},
    {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "output_scores": False, "chat": "x"},
]


@pytest.mark.parametrize("options", HARMLESS, ids=["as saved", "sampling", "overridden", "at their defaults"])
def test_a_saved_model_is_decoded_fast(options, saved, tokenizer, fast_calls):
    path = saved / "generation_config.json"
    written = json.loads(path.read_text())
    assert written["output_attentions"] is False, "this test is about such fields"
    path.write_text(json.dumps({**written, **options}))
    model = AutoModelForCausalLM.from_pretrained(saved)
    plain = by_generate(model, tokenizer, ASKED, 6, do_sample=False)
    assert not fast_calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample_responses(model, tokenizer, ASKED, 6, do_sample=False, batch_size=2) == plain
        sample_responses(model, tokenizer, ASKED, 6, batch_size=2)
    assert len(fast_calls) == 2


def test_every_field_that_transformers_writes_by_default_is_harmless(make_model, tokenizer, fast_calls):
    """As a later version may write more of them into each saved model."""
    model = make_model()
    model.generation_config = GenerationConfig(**GenerationConfig._get_default_generation_params())
    sample_responses(model, tokenizer, ASKED, 2)
    assert len(fast_calls) == 1


@pytest.mark.slow
def test_samples_of_a_saved_model_follow_its_distribution(saved, tokenizer, fast_calls):
    """A chi-square test of the first token of 4,000 samples against the softmax of the model's logits."""
    model, temperature, count = AutoModelForCausalLM.from_pretrained(saved), 0.5, 4000
    ids = torch.tensor(tokenize_prompts(ASKED[:1], tokenizer))
    with torch.no_grad():
        probabilities = (model(ids).logits[0, -1] / temperature).softmax(-1).tolist()
    expected: Counter = Counter()
    for text, probability in zip(
        tokenizer.batch_decode([[each] for each in range(len(probabilities))], skip_special_tokens=True),
        probabilities,
        strict=True,
    ):
        expected[text] += probability * count
    said = sample_responses(
        model, tokenizer, ASKED[:1], 1, num_return_sequences=count, temperature=temperature, seed=1
    )
    assert fast_calls
    found = Counter(said[0])
    cells = [(found[text], number) for text, number in expected.items() if number >= 10]
    rest = [sum(found.values()) - sum(seen for seen, _ in cells), count - sum(number for _, number in cells)]
    statistic = sum((seen - number) ** 2 / number for seen, number in [*cells, rest])
    # The distribution has the mean k and the variance 2k: five standard deviations.
    assert len(cells) > 20
    assert abs(statistic - len(cells)) < 5 * (2 * len(cells)) ** 0.5


def declined(model, tokenizer, **options):
    """What is said of a model that was to be decoded fast and was not, at two calls together."""
    plain = by_generate(model, tokenizer, ASKED, 3, do_sample=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert sample_responses(model, tokenizer, ASKED, 3, do_sample=False, **options) == plain
    return [str(each.message) for each in caught if "fast_generate" in str(each.message)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repetition_penalty": 5.0}, "its generation_config.json sets repetition_penalty=5.0"),
        ({"min_new_tokens": 2, "suppress_tokens": [5]}, "sets min_new_tokens=2, suppress_tokens=[5]"),
        ({"output_hidden_states": True}, "sets output_hidden_states=True"),
        ({"cache_implementation": "static"}, "sets cache_implementation='static'"),
        ({"guidance_scale": 0}, "sets guidance_scale=0"),
    ],
)
def test_options_that_the_fast_decoder_does_not_have_are_named_once(
    options, reason, make_model, tokenizer, fast_calls
):
    model = make_model()
    model.generation_config.disable_compile = False
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    (line,) = declined(model, tokenizer)
    assert line.startswith("HfllmForCausalLM is decoded by generate, not by the faster fast_generate: ")
    assert line.endswith(reason) and not fast_calls


def test_a_temperature_of_its_own_is_nothing_to_greedy_decoding(make_model, tokenizer, fast_calls):
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=0.2, min_p=0.1)
    assert sample_responses(model, tokenizer, ASKED, 3, do_sample=False) and fast_calls
    with pytest.warns(UserWarning, match="sets min_p=0.1"):
        sample_responses(model, tokenizer, ASKED, 3)


def test_a_model_that_was_asked_for_hidden_states_is_decoded_fast(make_model, tokenizer, fast_calls):
    """transformers leaves hooks on it, which do nothing from then on."""
    model = make_model()
    plain = by_generate(model, tokenizer, ASKED, 6, do_sample=False)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert sample_responses(model, tokenizer, ASKED, 6, do_sample=False) == plain
    assert len(fast_calls) == 1


def test_adapters_and_other_weights_are_said(make_model, tokenizer, saved, fast_calls):
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    (line,) = declined(get_peft_model(make_model(), adapter), tokenizer)
    assert "it is wrapped by PEFT (merge_and_unload() gives a plain model)" in line
    inside = inject_adapter_in_model(adapter, make_model())
    assert "self_attn.q_proj is a Linear of peft, not a plain linear layer" in declined(inside, tokenizer)[0]

    class Quantized(torch.nn.Parameter):
        """As libraries store rounded weights: a type of tensor within a plain layer."""

    other = make_model()
    layer = other.model.layers[0].mlp.down_proj
    layer.weight = Quantized(layer.weight.data)
    assert "down_proj has weights of type Quantized, not plain ones" in declined(other, tokenizer)[0]
    assert not fast_calls


def test_int8_weights_are_said(saved, tokenizer, fast_calls):
    pytest.importorskip("bitsandbytes")
    quantized = AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    assert "is a Linear8bitLt of bitsandbytes" in declined(quantized, tokenizer)[0]
    assert not fast_calls


def test_a_prompt_that_may_not_fit_is_left_to_generate(make_model, tokenizer, fast_calls):
    """A table of learned positions: generate reads as far as the model does not stop by itself."""
    model = make_model(position_embedding_type="learned", max_position_embeddings=20)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    assert all(by_generate(model, tokenizer, ["Go"], 30, do_sample=False))
    with pytest.warns(UserWarning, match="positions for 20: shorten the prompt or max_new_tokens"):
        assert sample_responses(model, tokenizer, ["Go"], 30, do_sample=False)
    assert not fast_calls


@pytest.mark.slow
def test_a_text_that_may_outgrow_the_factors_of_longrope_is_left_to_generate(make_model, tokenizer, fast_calls):
    """Which reads it again there; up to there the fast decoder says the same."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 48, "factor": 4.0}
    model = make_model(
        rope_parameters={**rope, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    )
    model.generation_config.eos_token_id = None
    length = max(map(len, tokenize_prompts(ASKED, tokenizer)))
    for new in (48 - length, 80):
        plain = by_generate(model, tokenizer, ASKED, new, do_sample=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert sample_responses(model, tokenizer, ASKED, new, do_sample=False) == plain
        said = [str(each.message) for each in caught if "other rotary factors beyond 48" in str(each.message)]
        assert (len(said), len(fast_calls)) == (int(new == 80), 1)


def test_sampling_is_seeded_and_leaves_the_random_state(make_model, tokenizer):
    model = make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample_responses(model, tokenizer, ["Go"] * 4, 8, num_return_sequences=2, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sample_responses(model, tokenizer, ["Go"] * 4, 8, num_return_sequences=2, seed=3)
    assert first != sample_responses(model, tokenizer, ["Go"] * 4, 8, num_return_sequences=2, seed=4)
    assert [len(responses) for responses in first] == [2] * 4


@pytest.mark.parametrize("fast", [False, True])
def test_a_low_temperature_is_greedy_in_the_limit_and_a_high_one_is_not(make_model, tokenizer, fast):
    model, prompts = make_model(), ["Go", "Say red.", "Is the fox red or blue?"]
    greedy = sample_responses(model, tokenizer, prompts, 6, do_sample=False)
    assert sample_responses(model, tokenizer, prompts, 6, temperature=1e-4, fast=fast) == greedy
    assert sample_responses(model, tokenizer, prompts, 6, temperature=2.0, fast=fast) != greedy


def test_what_was_cut_off_may_be_left_out(make_model, tokenizer):
    model = make_model()
    prompt = torch.tensor(tokenize_prompts(["Go"], tokenizer))
    said = model.generate(prompt, do_sample=False, max_new_tokens=6)[0, prompt.shape[1] :].tolist()
    model.generation_config.eos_token_id = [said[-1]]
    length = said.index(said[-1]) + 1
    settings = {"do_sample": False, "only_ended": True}
    expected = tokenizer.decode(said[:length], skip_special_tokens=True)
    assert sample_responses(model, tokenizer, ["Go"], length, **settings) == [[expected]]
    assert sample_responses(model, tokenizer, ["Go"], length - 1, **settings) == [[]]
    assert sample_responses(model, tokenizer, ["Go"], length - 1, do_sample=False) != [[]]


def test_judging_gives_each_task_its_gold(make_model, tokenizer, world):
    tasks = world.evaluation_tasks(24)
    rows = judge_tasks(make_model(), tokenizer, tasks, 4, do_sample=True)
    assert [row["prompt"] for row in rows] == [task.question for task in tasks]
    groups = gold_by_group(rows)
    assert groups["all"] == mean_gold(rows)
    assert set(groups) >= {"held-out instances", "held-out phrasings", "fact", "harm"}


def test_shares():
    rows = [{"gold": value} for value in (1.0, 0.5, 0.0, -1.0)]
    assert right_share(rows) == 0.5
    assert mean_gold(rows) == 0.125
    assert mean_gold([]) == right_share([]) == 0
