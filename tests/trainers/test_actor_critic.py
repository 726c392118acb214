"""The lean forward pass equals the plain one, in value and gradient."""

import pytest
import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import hfllm
from hfllm.models.family import layers_hfllm
from hfllm.trainers.ppo.actor_critic import ActorCritic, Sequences, entropy_of, log_distribution, token_logprobs
from hfllm.trainers.ppo.rollout import length_groups

NATIVES = ("gpt2", "gpt_neox", "cohere", "mistral")


@pytest.fixture
def batch():
    """Three rows with prompts of 2, 5 and 4 tokens and responses of 3, 1 and 6."""
    generator = torch.Generator().manual_seed(0)
    prompt_mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    response_mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    return {
        "prompt_ids": torch.randint(10, 300, (3, 5), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "response_ids": torch.randint(10, 300, (3, 6), generator=generator) * response_mask,
        "response_mask": response_mask,
    }


def rows_of(batch):
    """Prompt and response ids of each row, without padding."""
    for prompt, prompt_mask, response, response_mask in zip(*batch.values(), strict=True):
        yield prompt[prompt_mask > 0], response[response_mask > 0]


def plain(actor, batch, temperature, never_sampled):
    """Log-probabilities and values row by row from whole logits: (B, R), 0 on padding."""
    logprobs, values = torch.zeros(batch["response_mask"].shape), torch.zeros(batch["response_mask"].shape)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        ids = torch.cat((prompt, response)).unsqueeze(0)
        output = actor.policy(input_ids=ids, output_hidden_states=True, use_cache=False)
        logits = output.logits[0, len(prompt) - 1 : -1] / temperature
        logits[:, list(never_sampled)] = torch.finfo(torch.float32).min
        logprobs[row, : len(response)] = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
        if actor.value_model is None:
            value = actor.value_head(output.hidden_states[-1])
        else:
            trunk = getattr(actor.value_model, actor.value_model.base_model_prefix)
            value = actor.value_model.score(trunk(input_ids=ids).last_hidden_state)
        values[row, : len(response)] = value[0, len(prompt) - 1 : -1, 0]
    return logprobs, values


def native(name, auto_class=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        **more,
    )
    return auto_class.from_config(config).eval()


def check(actor, batch, temperature=0.7, never_sampled=(0,), atol=1e-5):
    """Values and gradients of a random weighting of both outputs agree with `plain`."""
    weights = [torch.randn(batch["response_mask"].shape, generator=torch.Generator().manual_seed(at)) for at in (1, 2)]

    def gradients(logprobs, values):
        actor.zero_grad()
        ((logprobs * weights[0] + values * weights[1]) * batch["response_mask"]).sum().backward()
        return [parameter.grad.clone() for parameter in actor.parameters() if parameter.grad is not None]

    expected = plain(actor, batch, temperature, never_sampled)
    for with_distribution in (False, True):
        logprobs, values, distribution = actor(**batch, with_distribution=with_distribution)
        torch.testing.assert_close((logprobs, values), expected, atol=1e-5, rtol=1e-5)
        assert (distribution is not None) == with_distribution
        got = gradients(logprobs, values)
        torch.testing.assert_close(
            got, gradients(*plain(actor, batch, temperature, never_sampled)), atol=atol, rtol=1e-4
        )


@pytest.mark.parametrize("value", ["head", "token", "sequence"])
def test_training_without_padding_equals_evaluation(make_model, batch, value):
    heads = {"sequence": hfllm.HfllmForSequenceClassification, "token": hfllm.HfllmForTokenClassification}
    critic = None if value == "head" else make_model(seed=5, model_class=heads[value], num_labels=1)
    actor, results = ActorCritic(make_model(), critic, 0.7, (0,)), []
    weights = torch.linspace(-1, 1, 18).view(3, 6)
    for is_training in (True, False):
        actor.train(is_training).zero_grad()
        assert actor.leaves_out_padding == is_training
        logprobs, values, _ = actor(**batch)
        (logprobs * weights - values * weights.square()).sum().backward()
        gradients = [each.grad for each in actor.parameters() if each.grad is not None]
        results.append((logprobs, values, gradients))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_native", [False, True])
def test_rows_that_a_kernel_lacks_change_nothing(make_model, batch, is_native, monkeypatch):
    """Within autocast on a CPU, the head gets a few rows more than there are actions."""
    actor, results = ActorCritic(native("mistral") if is_native else make_model(), None, 0.7, (0,)), []
    torch.nn.init.normal_(actor.value_head.weight)
    for rows in (64, 1):
        monkeypatch.setattr(layers_hfllm, "ROWS", rows)
        actor.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, values, distribution = actor(**batch, with_distribution=True)
        (logprobs - values).sum().backward()
        results.append((logprobs, values, distribution, actor.policy.get_output_embeddings().weight.grad))
    torch.testing.assert_close(*results, atol=0.02, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt1",
        "mixtral",
        "glm4-moe",
        "cohere",
        "mistral",
        "gemma3",
        "olmo-hybrid",
        "deepseek",
        "llama4-chunks",
    ],
)
@pytest.mark.parametrize("separate_value_model", [False, True])
def test_the_lean_pass_is_the_plain_one(make_model, batch, family, separate_value_model):
    policy, value_model = make_model(**FAMILIES[family]), None
    if separate_value_model:
        head = hfllm.HfllmForSequenceClassification
        value_model = make_model(seed=4, model_class=head, num_labels=1, **FAMILIES[family])
    actor = ActorCritic(policy, value_model, 0.7, (0,))
    if not separate_value_model:
        torch.nn.init.normal_(actor.value_head.weight)
    # What is computed once per chunk, or from a state, is rounded otherwise in a row that begins elsewhere.
    # Rounding of its recurrence: on a CPU with AVX-512 one gradient of 12,800 was 1.1e-4 off, of .59.
    check(actor, batch, atol=2e-4 if family == "olmo-hybrid" else 1e-5)


@pytest.mark.parametrize("name", NATIVES)
def test_it_is_for_native_classes_too(batch, name):
    scorer = native(name, AutoModelForSequenceClassification, num_labels=1) if name != "cohere" else None
    check(ActorCritic(native(name), scorer, 0.7, (0,)), batch)


def test_an_adapter_takes_part(make_model, batch):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(init_lora_weights=False))
    actor = ActorCritic(model, None, 0.7, (0,))
    torch.nn.init.normal_(actor.value_head.weight)
    check(actor, batch)


def test_a_trunk_that_uses_its_last_layer_twice_keeps_its_whole_mlp(make_model, batch):
    model = make_model()
    layers = model.model.layers
    layers.append(layers[-1])
    model.config.num_hidden_layers = 3
    actor = ActorCritic(model, None, 0.7, (0,))
    torch.nn.init.normal_(actor.value_head.weight)
    check(actor, batch)
    assert not model.model._hfllm_may_skip_last_mlp


def test_an_mlp_that_returns_more_than_a_tensor_is_left_alone(make_model, batch):
    model = make_model()
    plain = model.model.layers[-1].mlp

    class PairMLP(torch.nn.Module):
        def forward(self, states):
            return plain(states), None

    class Layer(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            layer.mlp = First(PairMLP())

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs)

    class First(torch.nn.Module):
        def __init__(self, pair):
            super().__init__()
            self.pair = pair

        def forward(self, states):
            return self.pair(states)[0]

    wrapped = Layer(model.model.layers[-1])
    wrapped.mlp = wrapped.layer.mlp.pair
    model.model.layers[-1] = wrapped
    actor = ActorCritic(model, None, 0.7, (0,))
    torch.nn.init.normal_(actor.value_head.weight)
    check(actor, batch)
    assert not model.model._hfllm_may_skip_last_mlp


def test_a_plain_trunk_skips_it(make_model, batch):
    model = make_model()
    check(ActorCritic(model, None, 0.7, (0,)), batch)
    assert model.model._hfllm_may_skip_last_mlp


def test_the_value_heads_gradient_can_end_at_the_trunk(make_model, batch):
    actor = ActorCritic(make_model(), None, 1.0, ())
    torch.nn.init.normal_(actor.value_head.weight)
    actor(**batch, detach_trunk=True)[1].sum().backward()
    assert [name for name, parameter in actor.named_parameters() if parameter.grad is not None] == [
        "value_head.weight"
    ]
    assert actor.critic_parameters() == [actor.value_head.weight]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_logprobs_have_the_gradient_of_log_softmax(temperature):
    logits, targets = torch.randn(7, 11, dtype=torch.float32), torch.randint(2, 11, (7,))
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = token_logprobs(one * 1.0, targets, temperature, (0, 1))
    blocked = torch.zeros(11, dtype=torch.bool)
    blocked[:2] = True
    whole = (other / temperature).masked_fill(blocked, torch.finfo(torch.float32).min).log_softmax(-1)
    expected = whole.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(7)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_the_distribution_and_its_entropy_are_the_same_with_and_without_gradients():
    logits = torch.randn(1100, 13)
    with torch.no_grad():
        lean = log_distribution(logits.clone(), 0.8, (3,))
        entropy = entropy_of(lean)
    tracked = log_distribution(logits.clone().requires_grad_(), 0.8, (3,))
    torch.testing.assert_close(lean, tracked.detach())
    torch.testing.assert_close(entropy, entropy_of(tracked).detach())
    uniform = torch.zeros(1, 16).log_softmax(-1)
    assert entropy_of(uniform).item() == pytest.approx(torch.tensor(16.0).log().item())


def test_rows_are_joined_without_gaps(batch):
    sequences = Sequences.join(**batch)
    assert sequences.input_ids.shape == (3, 10)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        together = torch.cat((prompt, response))
        assert torch.equal(sequences.input_ids[row, : len(together)], together)
        own = sequences.rows == row
        assert torch.equal(sequences.targets[own], response)
        # The state before each response token is that of the token to its left.
        places = sequences.columns[own] + 10
        assert torch.equal(sequences.input_ids[row, places], torch.cat((prompt[-1:], response[:-1])))


@pytest.mark.parametrize(
    "bounds", [(None, None, None), (2, None, None), (4, 16, None), (None, 1, None), (None, 30, 2)]
)
def test_groups_hold_every_row_once_within_their_bounds(batch, bounds):
    bucket, most_tokens, most_rows = bounds
    lengths = batch["prompt_mask"].sum(1) + batch["response_mask"].sum(1)
    seen = []
    for rows, group in length_groups({**batch, "extra": torch.arange(3)}, bucket, most_tokens, most_rows):
        own = lengths[rows]
        assert torch.equal(group["extra"], rows)
        assert bucket is None or own.max() - own.min() < bucket
        assert most_tokens is None or len(rows) == 1 or len(rows) * own.max() <= most_tokens
        assert most_rows is None or len(rows) <= most_rows
        assert int(group["response_mask"].sum()) == int(batch["response_mask"][rows].sum())
        seen += rows.tolist()
    assert sorted(seen) == [0, 1, 2]
