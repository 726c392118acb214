"""Rows that leave the batch when they have ended change nothing but the time."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hfllm.generation.packed.model import unsupported_reason
from hfllm.trainers.ppo import sampling
from hfllm.trainers.ppo.actor_critic import ActorCritic
from hfllm.trainers.ppo.sampling import OnlyFinite, SampledLogprobs, generate_responses

# Many tokens end a response here, so that random models end theirs after different numbers of tokens.
ENDS, PAD = list(range(7, 40)), 0


def config(**more):
    settings = {"max_new_tokens": 24, "do_sample": False, "num_beams": 1, "use_cache": True}
    return GenerationConfig(**{**settings, "pad_token_id": PAD, "eos_token_id": ENDS, **more})


@pytest.fixture
def ids():
    prompts = torch.randint(10, 300, (24, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    mask[::3, :2] = 0
    return prompts.masked_fill(mask == 0, PAD), mask


@pytest.fixture(params=["llama", "mistral", "gpt2", "mixtral", "olmo-hybrid", "deepseek", "llama4-chunks"])
def model(make_model, request):
    return make_model(**{**FAMILIES[request.param], "tie_word_embeddings": False})


@pytest.fixture
def by_generate(monkeypatch):
    """Sample by `generate`, as where a cache of its own is impossible."""
    monkeypatch.setattr(sampling, "undecodable_reason", lambda *given: "of this test")


@pytest.mark.slow
@pytest.mark.parametrize("is_fast", [True, False])
def test_greedy_responses_are_those_of_generate(model, is_fast, ids, tokenizer, monkeypatch, request):
    if not is_fast:
        request.getfixturevalue("by_generate")
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda *a, **k: calls.append(len(k["input_ids"])) or generate(*a, **k)
    )
    got = generate_responses(model, *ids, config(), tokenizer)
    split_at = list(calls)
    expected = generate(model, input_ids=ids[0], attention_mask=ids[1], generation_config=config())[:, 6:]
    for row in range(24):
        ended = torch.isin(expected[row], torch.tensor(ENDS)).nonzero()
        length = int(ended[0]) + 1 if len(ended) else 24
        assert int(got["response_mask"][row].sum()) == length
        assert torch.equal(got["response_ids"][row, :length], expected[row, :length])
        assert (got["response_ids"][row, length:] == PAD).all()
        assert bool(got["is_ended"][row]) == bool(len(ended))
    lengths = got["response_mask"].sum(1)
    assert len(lengths.unique()) > 1
    if not is_fast:
        assert split_at[0] == 24 and len(split_at) > 1 and split_at[1] <= 12
    else:
        # What it cannot decode is left to `generate`.
        assert bool(split_at) == (unsupported_reason(model) is not None)


def test_recording_or_not_the_samples_are_the_same(make_model, ids, tokenizer, by_generate):
    """And in another way they are others, of the same distribution."""
    model, settings = make_model(), config(do_sample=True, top_k=0)
    torch.manual_seed(1)
    plain = generate_responses(model, *ids, settings, tokenizer)
    torch.manual_seed(1)
    witness = SampledLogprobs((24, 24), 1.0, (), None, torch.device("cpu"))
    assert torch.equal(
        generate_responses(model, *ids, settings, tokenizer, witness)["response_ids"], plain["response_ids"]
    )


@pytest.mark.slow
def test_a_cache_whose_rows_cannot_be_picked_is_built_again(make_model, ids, tokenizer, monkeypatch, by_generate):
    model = make_model()
    expected = generate_responses(model, *ids, config(), tokenizer)
    monkeypatch.setattr(sampling, "DynamicCache", int)
    got = generate_responses(model, *ids, config(), tokenizer)
    assert torch.equal(got["response_ids"], expected["response_ids"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.5},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"begin_suppress_tokens": [50, 60]},
    ],
)
def test_other_settings_work(make_model, ids, tokenizer, more):
    model = make_model()
    settings = config(**more)
    got = generate_responses(model, *ids, settings, tokenizer)
    whole = model.generate(input_ids=ids[0], attention_mask=ids[1], generation_config=settings)[:, 6:]
    width = got["response_ids"].shape[1]
    mask = got["response_mask"] > 0
    assert torch.equal(got["response_ids"][mask], whole[:, :width][mask])
    assert got["response_mask"].sum(1).min() >= more.get("min_new_tokens", 1)


@pytest.mark.slow
def test_stop_strings_end_responses(make_model, ids, tokenizer):
    model = make_model()
    free = generate_responses(model, *ids, config(eos_token_id=[-1]), tokenizer)
    text = tokenizer.decode(free["response_ids"][0])
    stop = next(letter for letter in text if letter.isascii() and letter.isalnum())
    got = generate_responses(model, *ids, config(eos_token_id=[-1], stop_strings=[stop]), tokenizer)
    assert bool(got["is_ended"][0])
    assert got["response_mask"].sum(1).min() < 24
    for ids_of, mask, is_ended in zip(got["response_ids"], got["response_mask"], got["is_ended"], strict=True):
        text = tokenizer.decode(ids_of[mask > 0])
        assert (stop in text) == bool(is_ended)
        assert stop not in tokenizer.decode(ids_of[mask > 0][:-1])


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "most_rows"), [(False, None), (True, None), (False, 9)])
def test_a_witness_says_what_a_second_pass_says(model, ids, tokenizer, adapter, most_rows):
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(init_lora_weights=False))
    actor = ActorCritic(model, None, 0.7, (PAD,)).eval()
    torch.nn.init.normal_(actor.value_head.weight)
    witness = SampledLogprobs((24, 24), 0.7, (PAD,), actor.value_head, torch.device("cpu"))
    settings = config(do_sample=True, temperature=0.7, top_k=0, suppress_tokens=[PAD])
    got = generate_responses(model, *ids, settings, tokenizer, witness, most_rows)
    mask = got["response_mask"] > 0
    assert len(mask.sum(1).unique()) > 1
    with torch.no_grad():
        logprobs, values, distribution = actor(*ids, got["response_ids"], got["response_mask"], True)
    width = mask.shape[1]
    # Linear attention reads token by token what the second pass reads in chunks.
    near = 5e-5 if "linear_attention" in model.config.layer_types else 1e-5
    assert_close = partial(torch.testing.assert_close, atol=near, rtol=near)
    assert_close(witness.logprobs[:, :width][mask], logprobs[mask])
    assert_close(witness.values[:, :width][mask], values[mask])
    entropy = -(distribution.exp() * distribution).sum(-1)
    assert_close(witness.entropy[:, :width][mask], entropy)
    assert not model._forward_hooks and not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_native_policy_is_sampled_over_packed_weights(family, ids, tokenizer, monkeypatch):
    """With what a second pass says, before an update and after it."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    grouped = {} if family == "gpt2" else {"num_key_value_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **grouped)).train()
    monkeypatch.setattr(type(model), "generate", lambda *given, **more: pytest.fail("generate decoded it"))
    actor = ActorCritic(model, None, 0.7, (PAD,))
    torch.nn.init.normal_(actor.value_head.weight)
    settings = config(do_sample=True, temperature=0.7, top_k=0, suppress_tokens=[PAD])
    optimizer = torch.optim.SGD(actor.parameters(), lr=1e-3)
    for _ in range(2):
        witness = SampledLogprobs((24, 24), 0.7, (PAD,), actor.value_head, torch.device("cpu"))
        got = generate_responses(model, *ids, settings, tokenizer, witness)
        assert model.training
        mask = got["response_mask"] > 0
        logprobs, values, _ = actor.eval()(*ids, got["response_ids"], got["response_mask"])
        # Values reach 40 after the update.
        for recorded, found, near in ((witness.logprobs, logprobs, 1e-5), (witness.values, values, 1e-4)):
            torch.testing.assert_close(recorded[:, : mask.shape[1]][mask], found[mask], atol=near, rtol=1e-5)
        (logprobs.sum() + values.sum()).backward()
        optimizer.step()
        actor.train()
    assert len(mask.sum(1).unique()) > 1


@pytest.mark.slow
def test_few_prompts_at_a_time_get_the_same_answers(make_model, ids, tokenizer):
    model = make_model()
    whole, few = (generate_responses(model, *ids, config(), tokenizer, most_rows=rows) for rows in (None, 5))
    for name, expected in whole.items():
        assert torch.equal(few[name], expected), name


@pytest.mark.parametrize("kind", ["none", "lora", "prompt"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_keeps_its_own_settings(make_model, ids, tokenizer, kind, fails, monkeypatch):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    base = model = make_model()
    base.generation_config.min_p = 0.999
    if kind == "lora":
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    elif kind == "prompt":
        model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    seen, kind_of = [], type(base.get_input_embeddings())
    embed = kind_of.forward
    monkeypatch.setattr(kind_of, "forward", lambda *given: seen.append(base.generation_config.min_p) or embed(*given))
    model.train()
    if fails:
        with torch.no_grad():
            base.lm_head.weight[7] = float("nan")
    with pytest.raises(FloatingPointError) if fails else nullcontext():
        generate_responses(model, *ids, config(), tokenizer)
    assert seen and not any(seen)
    assert model.training and model.generation_config.min_p == base.generation_config.min_p == 0.999


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(("at", "value"), [(3, float("nan")), (3, float("inf")), (slice(None), -float("inf"))])
def test_one_row_without_a_distribution_stops_sampling(row, at, value):
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    # What is never sampled gives no cause.
    scores[:, 1] = -float("inf")
    assert not scores.softmax(-1).isnan().any()
    assert torch.equal(OnlyFinite()(None, scores), scores)
    scores[row, at] = value
    assert scores.softmax(-1).isnan().any(-1).nonzero().tolist() == [[row]]
    with pytest.raises(FloatingPointError, match="are not finite"):
        OnlyFinite()(None, scores)


def test_a_single_prompt_that_the_policy_cannot_read_stops_sampling(make_model, ids, tokenizer):
    model, (prompts, mask) = make_model(tie_word_embeddings=False), ids
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    prompts[-1, -1] = 5
    with pytest.raises(FloatingPointError):
        generate_responses(model, prompts, mask, config(), tokenizer)
    generate_responses(model, prompts[:-1], mask[:-1], config(suppress_tokens=[5]), tokenizer)
