"""Every option of PPOConfig does what its help says, and the invariants hold for their combinations."""

import copy
import math

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hfllm
from hfllm.errors import InputError
from hfllm.rewards.models import RewardEnsemble, RewardModel, TokenRewardModel
from hfllm.trainers.ppo import base_trainer
from hfllm.trainers.ppo.formulas import KLController, RunningMoments
from hfllm.trainers.ppo.trainer import PPOTrainer


def rows_of(dataset, count):
    return [dataset[index] for index in range(count)]


def value_model_of(make_model, kind):
    heads = {"sequence": hfllm.HfllmForSequenceClassification, "token": hfllm.HfllmForTokenClassification}
    return None if kind == "head" else make_model(seed=5, model_class=heads[kind], num_labels=1)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.policy.parameters()]


def gradient(trainer, rollout, micro_batch_size, episodes=8):
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._sums = {}
    for micro in range(episodes // micro_batch_size):
        batch = rollout.micro_batch(0, micro, micro_batch_size)
        tokens = batch.pop("mini_batch_tokens")
        for _, group in trainer._passes(batch):
            trainer.compute_loss(trainer.model, {**group, "mini_batch_tokens": tokens}).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


# ---- combinations ----


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    value=st.sampled_from(["head", "sequence", "token"]),
    padding_side=st.sampled_from(["left", "right"]),
    estimator=st.sampled_from(["k1", "k2", "k3", "full"]),
    place=st.sampled_from(["reward", "loss"]),
    size=st.sampled_from([1, 2, 4]),
    bucket=st.sampled_from([1, 4, 64]),
    most_tokens=st.sampled_from([8, 64, 4096]),
    extras=st.sampled_from([{}, {"entropy_coef": 0.1}, {"dual_clip": 2.0, "cliprange_value": None}]),
)
def test_no_split_changes_the_gradient(
    make_trainer,
    make_model,
    prompts,
    tokenizer,
    value,
    padding_side,
    estimator,
    place,
    size,
    bucket,
    most_tokens,
    extras,
):
    if estimator == "k1" and place == "loss":
        return
    tokenizer.padding_side = padding_side
    trainer = make_trainer(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        value_model=value_model_of(make_model, value),
        kl_estimator=estimator,
        kl_penalty=place,
        kl_coef=0.3,
        length_bucket_size=64,
        max_tokens_per_pass=4096,
        **extras,
    )
    rollout = trainer.collect_rollout(rows_of(prompts, 8))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole = gradient(trainer, rollout, 8)
    trainer.args.length_bucket_size, trainer.args.max_tokens_per_pass = bucket, most_tokens
    split = gradient(trainer, rollout, size)
    assert any(value.abs().max() > 1e-3 for value in whole.values())
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-3)
    tokenizer.padding_side = "right"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bound is that of a CPU")
@pytest.mark.parametrize(("tokens", "asked_for", "bound"), [(16, None, 2), (2, None, 1), (16, 3, 3)])
def test_a_large_vocabulary_makes_passes_small_on_a_cpu(tokens, asked_for, bound, make_trainer, prompts, monkeypatch):
    """Rows of 8 tokens: as many as the logits of so many tokens allow, at least one, or what is asked for."""
    trainer = make_trainer(max_tokens_per_pass=asked_for and 8 * asked_for, length_bucket_size=64)
    monkeypatch.setattr(base_trainer, "LEAST_CPU_TOKENS", 8)
    monkeypatch.setattr(base_trainer, "MOST_CPU_LOGITS", tokens * trainer.policy.config.vocab_size)
    ones = torch.ones(6, 4, dtype=torch.long)
    batch = {name: ones for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")}
    assert max(len(group["prompt_ids"]) for _, group in trainer._passes(batch)) == bound


def test_rows_of_any_length_share_a_pass_where_padding_is_not_computed(make_trainer):
    trainer = make_trainer()
    lengths = torch.tensor([[2], [30], [60]])
    mask = (torch.arange(60) < lengths).long()
    batch = {name: mask for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")}
    trainer.model.train()
    assert len(list(trainer._passes(batch))) == 1
    # A hook would see rows without padding.
    trainer.policy.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert len(list(trainer._passes(batch))) == 3


# ---- the reference and its KL ----


@pytest.mark.slow
def test_the_full_kl_is_the_mean_of_the_sampled_ones(make_trainer, prompts):
    """k1 over many samples of one token estimates what `full` computes."""
    full = make_trainer(kl_estimator="full", response_length=1)
    with torch.no_grad():
        for parameter in full.policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = full.sample([{"prompt": "Go"}] * 4000)
    exact, sampled = full.evaluate_tokens(batch).kl, full.evaluate_tokens(batch)
    assert exact.std() < 1e-4
    estimate = (sampled.logprobs - sampled.ref_logprobs)[:, 0]
    assert exact[0, 0] > 0.01
    assert abs(estimate.mean() - exact[0, 0]) < 4 * estimate.std() / math.sqrt(4000)


def test_without_a_coefficient_there_is_no_reference(make_trainer, prompts):
    trainer = make_trainer(kl_coef=0.0, max_steps=2, eval_dataset=prompts)
    assert trainer.reference is None
    trainer.train()
    assert not logged(trainer, "kl")
    assert "eval_kl" not in trainer.evaluate()


def test_the_coefficient_is_steered_to_its_target():
    controller = KLController(0.1, target=2.0, horizon=100)
    controller.update(kl=4.0, episodes=10)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    controller.update(kl=1.8, episodes=10)
    assert controller.coefficient == pytest.approx(0.102 * (1 - 0.1 * 10 / 100))
    controller.update(kl=0.0, episodes=10_000)
    assert controller.coefficient > 0
    fixed = KLController(0.1)
    fixed.update(kl=100.0, episodes=10)
    assert fixed.coefficient == 0.1


@pytest.mark.slow
def test_a_steered_coefficient_is_used_and_logged(make_trainer):
    trainer = make_trainer(kl_target=1e-3, kl_horizon=8, learning_rate=1e-2, max_steps=8)
    trainer.train()
    coefficients = logged(trainer, "kl_coef")
    # The first rollout's KL is 0, below the target: less penalty. Then it is far above.
    assert coefficients[1] == pytest.approx(0.05 * (1 - 0.2 * 4 / 8))
    assert coefficients[-1] > coefficients[1]


@pytest.mark.slow
def test_a_penalty_in_the_loss_pulls_to_the_reference(make_trainer, prompts):
    def distance(coefficient, estimator):
        trainer = make_trainer(
            kl_coef=coefficient,
            kl_estimator=estimator,
            kl_penalty="loss",
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            max_steps=8,
        )
        trainer.train()
        tokens = trainer.evaluate_tokens(trainer.sample(rows_of(prompts, 12)))
        return (tokens.logprobs - tokens.ref_logprobs).square().mean()

    free = distance(1e-6, "k2")
    for estimator in ("k2", "k3", "full"):
        assert distance(10.0, estimator) < 0.6 * free, estimator


@pytest.mark.slow
def test_the_reference_moves_as_often_and_far_as_asked(make_trainer):
    trainer = make_trainer(
        sync_ref_model=True, ref_model_sync_steps=4, ref_model_mixup_alpha=0.25, max_steps=6, learning_rate=1e-2
    )
    before = trainer.reference.lm_head.weight.clone()
    seen = []
    collect = trainer.collect_rollout
    trainer.collect_rollout = lambda rows: (
        seen.append((trainer.reference.lm_head.weight.clone(), trainer.policy.lm_head.weight.clone())) or collect(rows)
    )
    trainer.train()
    # Rollouts begin at steps 0, 2 and 4.
    assert torch.equal(seen[0][0], before) and torch.equal(seen[1][0], before)
    torch.testing.assert_close(seen[2][0], 0.75 * before + 0.25 * seen[2][1])
    assert (seen[2][1] - before).abs().max() > 1e-3
    with pytest.raises(InputError, match="sync_ref_model"):
        make_trainer(sync_ref_model=True, kl_coef=0.0)


# ---- the steps ----


@pytest.mark.slow
def test_the_rest_of_a_rollout_is_skipped_beyond_the_target_kl(make_trainer):
    trainer = make_trainer(num_ppo_epochs=6, max_steps=12, learning_rate=3e-2, target_kl=1e-3)
    states, changes = [], []
    step = trainer.training_step

    def spy(model, inputs, num_items=None):
        states.append(trainer.policy.lm_head.weight.detach().clone())
        return step(model, inputs, num_items)

    trainer.training_step = spy
    trainer.train()
    states.append(trainer.policy.lm_head.weight.detach())
    changes = [
        not torch.equal(one, other) for one, other in zip(states[::2], [*states[2::2], states[-1]], strict=True)
    ]
    for rollout in (changes[:6], changes[6:12]):
        assert rollout[0]  # the first step is always taken
        assert not rollout[-1]
        assert rollout == sorted(rollout, reverse=True)  # and after a skipped one none is


@pytest.mark.slow
@pytest.mark.parametrize("value", ["head", "sequence"])
def test_the_critic_warms_up_alone(make_trainer, make_model, value):
    trainer = make_trainer(
        value_model=value_model_of(make_model, value), critic_warmup_steps=4, max_steps=4, weight_decay=0.1
    )
    before = weights(trainer)
    critic = [parameter.detach().clone() for parameter in trainer.actor.critic_parameters()]
    trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, weights(trainer), strict=True))
    assert not any(
        torch.equal(one, other) for one, other in zip(critic, trainer.actor.critic_parameters(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("value", ["head", "sequence"])
def test_the_critic_has_a_learning_rate_of_its_own(make_trainer, make_model, value):
    trainer = make_trainer(value_model=value_model_of(make_model, value), value_learning_rate=0.5, max_steps=1)
    trainer.train()
    critic = {id(parameter) for parameter in trainer.actor.critic_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(id(parameter) in critic, set()).add(group["initial_lr"])
    assert rates == {True: {0.5}, False: {1e-3}}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        list(trainer.model.parameters())
    )


def test_an_optimizer_that_lacks_weights_is_refused(make_model, make_args, tokenizer, prompts):
    def build(groups, value_model=None, **kwargs):
        optimizer = torch.optim.SGD(groups, lr=1e-3)
        return PPOTrainer(
            policy,
            lambda completions, **_: [0.0] * len(completions),
            make_args(**kwargs),
            prompts,
            processing_class=tokenizer,
            value_model=value_model,
            optimizers=(optimizer, None),
        )

    policy, critic = make_model(), value_model_of(make_model, "sequence")
    with pytest.raises(InputError, match=r"optimizers: 1 weights would not be trained, the first value_head.weight"):
        build(policy.parameters())
    groups = [{"params": list(model.parameters())} for model in (policy, critic)]
    assert len(build(groups, critic).optimizer.param_groups) == 2
    with pytest.raises(InputError, match="optimizers: value_learning_rate has no effect"):
        build(groups, critic, value_learning_rate=0.1)


@pytest.mark.slow
def test_an_entropy_bonus_keeps_the_policy_open(make_trainer, prompts):
    def entropy(coefficient):
        trainer = make_trainer(
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            entropy_coef=coefficient,
            max_steps=12,
            learning_rate=1e-2,
            whiten_advantages=False,
        )
        trainer.train()
        return logged(trainer, "entropy")[-1]

    assert entropy(1.0) > entropy(0.0) + 0.05


@pytest.mark.slow
def test_the_pretraining_term_is_the_language_modeling_loss(make_trainer, prompts, tokenizer):
    texts = Dataset.from_dict({"text": ["The fox is red.", "Say it.", "A blue hat and a red fox"]})
    trainer = make_trainer(ptx_coef=2.0, ptx_dataset=texts, max_steps=2)
    batches = [trainer.ptx.batch(at, 0, 1, torch.device("cpu")) for at in range(2)]
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [trainer.policy(**batch).loss * count / sum(tokens) for batch, count in zip(batches, tokens, strict=True)]
    expected = torch.autograd.grad(2.0 * sum(losses), list(trainer.policy.parameters()))
    micro = trainer.collect_rollout(rows_of(prompts, 4)).micro_batch(0, 0, 2)

    def gradient_of(**inputs):
        trainer.model.zero_grad()
        for trainer._micro_step in range(2):
            trainer.compute_loss(trainer.model, {**micro, **inputs}).backward()
        return [parameter.grad.clone() for parameter in trainer.policy.parameters()]

    for added, plain, own in zip(gradient_of(adds_ptx=True), gradient_of(), expected, strict=True):
        torch.testing.assert_close(added - plain, own, atol=1e-5, rtol=1e-4)
    trainer.train()
    assert len(logged(trainer, "ptx_loss")) == 2
    assert logged(trainer, "ptx_loss")[0] == pytest.approx(sum(losses).item(), rel=1e-5)
    batch = batches[0]
    again = trainer.ptx.batch(0, 0, 1, torch.device("cpu"))
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert (batch["labels"] == -100).equal(batch["attention_mask"] == 0)
    places = [trainer.ptx._row(place) for place in range(6)]
    assert sorted(places[:3]) == sorted(places[3:]) == [0, 1, 2]
    with pytest.raises(InputError, match="give both, or neither"):
        make_trainer(ptx_coef=2.0)
    with pytest.raises(InputError, match="column 'text'; it has: words"):
        make_trainer(ptx_coef=2.0, ptx_dataset=Dataset.from_dict({"words": ["a"]}))


def test_the_loss_is_its_formula(make_trainer, prompts):
    trainer = make_trainer(vf_coef=0.3, dual_clip=1.5, cliprange=0.2, cliprange_high=0.3, cliprange_value=0.1)
    torch.nn.init.normal_(trainer.actor.value_head.weight)
    batch = trainer.collect_rollout(rows_of(prompts, 4)).micro_batch(0, 0, 4)
    # As if by another policy and critic: further than all three clips.
    batch["logprobs"] -= torch.linspace(-1, 1, 6)
    batch["values"] -= torch.linspace(-0.3, 0.3, 6)
    inputs = {name: batch[name] for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")}
    logprobs, values, _ = trainer.actor(**inputs)
    loss, bounded = 0.0, 0
    for row, step in batch["response_mask"].nonzero().tolist():
        ratio = (logprobs - batch["logprobs"])[row, step].exp().item()
        advantage, value = batch["advantages"][row, step].item(), values[row, step].item()
        old, target = batch["values"][row, step].item(), batch["returns"][row, step].item()
        gain = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
        bounded += advantage < 0 and gain < 1.5 * advantage
        gain = max(gain, 1.5 * advantage) if advantage < 0 else gain
        error = max((value - target) ** 2, (min(max(value, old - 0.1), old + 0.1) - target) ** 2)
        loss += (0.3 * error / 2 - gain) / batch["mini_batch_tokens"].item()
    assert bounded
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss, rel=1e-4)


def test_whitened_rewards_have_unit_variance_and_keep_their_mean(make_trainer, prompts):
    def rewards_of(**kwargs):
        # Of values that are 0, without discount, returns are the rewards that are still to come.
        trainer = make_trainer(kl_coef=0.0, lam=1.0, gamma=1.0, **kwargs)
        rollout = trainer.collect_rollout(rows_of(prompts, 4))
        after = torch.nn.functional.pad(rollout.returns[:, 1:], (0, 1))
        return (rollout.returns - after)[rollout.response_mask > 0]

    plain = rewards_of()
    expected = (plain - plain.mean()) / plain.std() + plain.mean()
    torch.testing.assert_close(rewards_of(whiten_rewards=True), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def test_the_critic_learns_by_a_lambda_of_its_own(make_trainer, prompts):
    def rollout_of(**kwargs):
        trainer = make_trainer(kl_coef=0.0, whiten_advantages=False, **kwargs)
        torch.manual_seed(0)
        torch.nn.init.normal_(trainer.actor.value_head.weight)
        torch.manual_seed(0)
        return trainer.collect_rollout(rows_of(prompts, 4))

    plain, own = rollout_of(), rollout_of(value_lam=1.0)
    torch.testing.assert_close(own.advantages, plain.advantages)
    # Without discount and KL the return of every token is what the response earned.
    earned = own.returns[:, :1].expand_as(own.returns) * own.response_mask
    torch.testing.assert_close(own.returns, earned, atol=1e-5, rtol=1e-5)
    assert (plain.returns - own.returns).abs().max() > 1e-3
    assert torch.equal(rollout_of(lam=0.95).advantages, plain.advantages)
    longer = [rollout_of(response_length=32, **lam) for lam in ({}, {"lam": 0.95})]
    assert longer[0].response_mask.sum(1).max() > 20
    assert (longer[0].advantages - longer[1].advantages).abs().max() > 1e-3
    by_length = rollout_of(lam_alpha=0.5)
    assert (by_length.advantages - plain.advantages).abs().max() > 1e-3
    torch.testing.assert_close(by_length.returns, (by_length.advantages + plain.values) * plain.response_mask)


def test_the_dual_clip_bounds_what_a_bad_token_can_do():
    from hfllm.trainers.ppo.formulas import policy_loss

    old, new, mask = torch.zeros(1, 1), torch.full((1, 1), 3.0), torch.ones(1, 1)
    bad = -torch.ones(1, 1)
    assert policy_loss(new, old, bad, mask, 0.2)[0].item() == pytest.approx(math.exp(3.0))
    assert policy_loss(new, old, bad, mask, 0.2, dual_clip=4.0)[0].item() == pytest.approx(4.0)
    good = torch.ones(1, 1)
    assert policy_loss(new, old, good, mask, 0.2, dual_clip=4.0)[0].item() == pytest.approx(-1.2)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(make_trainer, tmp_path):
    from safetensors.torch import load_file

    trainer = make_trainer(max_steps=4)
    compute = trainer.compute_loss

    def spoil(model, inputs, *args, **kwargs):
        if trainer.state.global_step == 1:
            inputs["advantages"] = inputs["advantages"] * float("nan")
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spoil
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1; its batch is in .*not_finite_1_0"):
        trainer.train()
    batch = load_file(tmp_path / "ppo" / "not_finite_1_0.safetensors")
    assert {"prompt_ids", "response_ids", "advantages"} <= set(batch)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_run_and_keep_the_prompts(make_trainer, prompts, tmp_path, weight):
    from safetensors.torch import load_file

    trainer = make_trainer()
    trainer.state.global_step = 3
    with torch.no_grad():
        trainer.policy.lm_head.weight[7] = weight
    with pytest.raises(FloatingPointError, match=r"sampled from are not finite at step 3; the prompts .*_finite_3_0"):
        trainer.collect_rollout(rows_of(prompts, 4))
    kept = load_file(tmp_path / "ppo" / "not_finite_3_0.safetensors")
    first = kept["prompt_ids"][0][kept["prompt_mask"][0] > 0]
    assert trainer.processing_class.decode(first) == prompts[0]["prompt"]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step(make_trainer, tmp_path, max_grad_norm):
    from hfllm.trainers.ppo.rollout import Rollout

    trainer = make_trainer(max_steps=4, max_grad_norm=max_grad_norm)
    step = trainer.training_step

    def spoil(*args, **kwargs):
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 1:
            next(trainer.policy.parameters()).grad[0, 0] = float("inf")
            trainer.before = weights(trainer)
        return loss

    trainer.training_step = spoil
    with pytest.raises(
        FloatingPointError, match=r"norm of the gradient is (inf|nan) at step 1; its rollout is in .*_1_0"
    ):
        trainer.train()
    assert all(map(torch.equal, weights(trainer), trainer.before))
    rollout = Rollout.load(tmp_path / "ppo" / "not_finite_1_0.safetensors", torch.device("cpu"))
    assert torch.equal(rollout.advantages, trainer._rollout.advantages)


# ---- rewards ----


def test_rewards_may_come_token_by_token(make_trainer, prompts):
    def ids_over_100(completions, completion_ids, **_):
        return [[float(token > 100) for token in ids] for ids in completion_ids]

    trainer = make_trainer(
        reward_funcs=ids_over_100, kl_coef=0.0, reward_weights=[2.0], lam=1.0, whiten_advantages=False
    )
    rollout = trainer.collect_rollout(rows_of(prompts, 4))
    # Values are 0 at first, so that returns are the rewards that are still to come.
    rewards = 2.0 * (rollout.response_ids > 100) * rollout.response_mask
    expected = rewards.flip(1).cumsum(1).flip(1) * rollout.response_mask
    torch.testing.assert_close(rollout.returns, expected)

    def too_few(completions, **_):
        return [[1.0]] * len(completions)

    with pytest.raises(InputError, match="1 per-token rewards for completion 0; expected one for each of its 6"):
        make_trainer(reward_funcs=too_few).collect_rollout(rows_of(prompts, 4))


@pytest.mark.slow
@pytest.mark.parametrize("by_name", [False, True])
def test_a_model_may_reward_each_token(make_trainer, make_model, prompts, tokenizer, tmp_path, by_name):
    scorer = make_model(seed=3, model_class=hfllm.HfllmForTokenClassification, num_labels=1)
    reward = scorer
    if by_name:
        reward = str(tmp_path / "scorer")
        scorer.save_pretrained(reward)
        tokenizer.save_pretrained(reward)
    trainer = make_trainer(reward_funcs=reward, reward_processing_classes=None if by_name else tokenizer, max_steps=1)
    rows = rows_of(prompts, 4)
    batch = trainer.sample(rows)
    scores = trainer.score(rows, batch)
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] > 0]
        response = batch["response_ids"][row][batch["response_mask"][row] > 0]
        with torch.no_grad():
            expected = scorer(input_ids=torch.cat((prompt, response)).unsqueeze(0)).logits[0, len(prompt) :, 0]
        torch.testing.assert_close(scores.per_token[row, : len(response)], expected, atol=1e-5, rtol=1e-5)
        assert not scores.per_token[row, len(response) :].any()
    assert not scores.total.any()
    trainer.train()


@pytest.mark.slow
def test_a_reward_model_by_name_has_a_trained_head_with_one_label(
    make_trainer, make_model, tokenizer, tmp_path, saved
):
    from hfllm.runs.models import NamedModel, load_reward_model

    with pytest.raises(InputError, match=r"the reward model '.*model' has no head for scores"):
        make_trainer(reward_funcs=str(saved))
    # The recipes' way; where training starts from a language model the head is new.
    like = NamedModel(str(saved), settings={"dtype": "float32"})
    with pytest.raises(InputError, match="has no head for scores"):
        RewardModel(load_reward_model(str(saved), like), tokenizer)
    assert make_trainer(value_model=str(saved)).actor.value_model.has_new_head
    make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=2).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    for load in (lambda name: make_trainer(reward_funcs=name), lambda name: load_reward_model(name, like)):
        with pytest.raises(InputError, match=r"two': score.weight is of the shape \(2, 32\); expected one label"):
            load(str(tmp_path / "two"))


@pytest.mark.slow
def test_an_adapter_by_name_is_a_reward(make_trainer, prompts, tokenizer, tmp_path, saved):
    from peft import LoraConfig, get_peft_model

    def adapter(model_class, task):
        model = model_class.from_pretrained(saved, **({} if task == "CAUSAL_LM" else {"num_labels": 1}))
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
        model.save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
        return model

    scorer = adapter(hfllm.HfllmForSequenceClassification, "SEQ_CLS")
    texts = ["Say red.", "Go"], ["Red.", "Away"]
    expected = RewardModel(scorer, tokenizer)(*texts)
    given = make_trainer(reward_funcs=str(tmp_path / "SEQ_CLS")).scorer.rewards[0]
    assert given(*texts) == pytest.approx(expected, abs=1e-6) and abs(expected[0] - expected[1]) > 1e-4
    adapter(hfllm.HfllmForTokenClassification, "TOKEN_CLS")
    rewards = make_trainer(reward_funcs=str(tmp_path / "TOKEN_CLS")).scorer.rewards
    assert isinstance(rewards[0], TokenRewardModel)
    adapter(hfllm.HfllmForCausalLM, "CAUSAL_LM")
    with pytest.raises(InputError, match="has no head for scores"):
        make_trainer(reward_funcs=str(tmp_path / "CAUSAL_LM"))


def test_a_model_for_tokens_must_have_the_policys(make_trainer, make_model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["another"])
    scorer = make_model(model_class=hfllm.HfllmForTokenClassification, num_labels=1, vocab_size=len(other))
    with pytest.raises(InputError, match="its tokenizer is not the policy's"):
        make_trainer(reward_funcs=scorer, reward_processing_classes=other)


def test_an_ensemble_of_models_trains(make_trainer, make_model, tokenizer):
    head = hfllm.HfllmForSequenceClassification
    members = [RewardModel(make_model(seed=at, model_class=head, num_labels=1), tokenizer) for at in (7, 8, 9)]
    trainer = make_trainer(reward_funcs=RewardEnsemble(members, "uncertainty"), max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/uncertainty_of_3")


def test_running_moments_are_those_of_all_numbers():
    numbers, moments = torch.randn(100, dtype=torch.float64) * 3 + 5, RunningMoments()
    for part in numbers.split(7):
        moments.update(len(part), part.sum().item(), part.square().sum().item())
    assert moments.mean == pytest.approx(numbers.mean().item())
    assert moments.std == pytest.approx(numbers.std(correction=0).item())
    assert RunningMoments().std == 1.0


def test_scores_are_normalized_and_clipped_for_training_and_logged_as_they_are(make_trainer, prompts):
    def huge(completions, **_):
        return [1000.0 + 10 * at for at in range(len(completions))]

    trainer = make_trainer(
        reward_funcs=huge, normalize_rewards=True, reward_clip=1.0, kl_coef=0.0, lam=1.0, whiten_advantages=False
    )
    rollout = trainer.collect_rollout(rows_of(prompts, 4))
    expected = ((torch.arange(4.0) - 1.5) / math.sqrt(1.25)).clamp(-1, 1)
    torch.testing.assert_close(rollout.returns[:, 0], expected, atol=1e-4, rtol=1e-4)
    assert trainer.completions[3]["reward"] == 1030.0


def test_advantages_are_clipped(make_trainer, prompts):
    trainer = make_trainer(advantage_clip=0.3)
    assert trainer.collect_rollout(rows_of(prompts, 4)).advantages.abs().max() == pytest.approx(0.3)


@pytest.mark.slow
def test_per_token_rewards_are_part_of_the_logged_reward_and_are_not_rescaled(make_trainer, prompts):
    def two_a_token(completions, completion_ids, **_):
        return [[2.0] * len(ids) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=two_a_token, max_steps=1, eval_dataset=prompts)
    trainer.train()
    assert logged(trainer, "reward") == logged(trainer, "rewards/two_a_token")
    assert trainer.evaluate()["eval_reward"] == pytest.approx(2 * trainer.evaluate()["eval_response_length"])
    assert trainer.completions[0]["reward"] > 0
    with pytest.raises(InputError, match="normalize_rewards and reward_clip"):
        make_trainer(reward_funcs=two_a_token, reward_clip=1.0).collect_rollout(rows_of(prompts, 4))
    with pytest.raises(InputError, match="'two_a_token' gives lists"):
        RewardEnsemble([two_a_token, two_a_token])(["a"], ["b"], completion_ids=[[1, 2]])


def test_a_small_spread_around_a_large_mean_is_normalized(make_trainer, prompts):
    def high(completions, **_):
        return [1000.0 + 0.1 * at for at in range(len(completions))]

    trainer = make_trainer(reward_funcs=high, normalize_rewards=True, kl_coef=0.0, lam=1.0, whiten_advantages=False)
    returns = trainer.collect_rollout(rows_of(prompts, 4)).returns[:, 0]
    assert returns.std(correction=0).item() == pytest.approx(1.0, abs=1e-2)


def test_a_value_model_has_one_number_and_learns(make_trainer, make_model, tokenizer):
    two = make_model(model_class=hfllm.HfllmForTokenClassification, num_labels=2)
    with pytest.raises(InputError, match="value_model has num_labels=2"):
        make_trainer(value_model=two)
    shared = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
    with pytest.raises(InputError, match="value_model is one of the reward models"):
        make_trainer(reward_funcs=shared, reward_processing_classes=tokenizer, value_model=shared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 64}, r"value_model has 64 tokens and the policy \d+"),
        ({"vocab_size": 1000}, r"value_model has 1000 tokens and the policy \d+"),
        ({"is_causal": False}, "value_model of type hfllm looks at later tokens"),
        (
            {"position_embedding_type": "learned", "max_position_embeddings": 8},
            "context of 8 leaves room for 2; a value",
        ),
    ],
)
def test_a_value_model_that_cannot_read_as_the_policy_does_is_refused(make_trainer, make_model, fields, message):
    critic = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1, **fields)
    with pytest.raises(InputError, match=message):
        make_trainer(value_model=critic)


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_value_model_with_an_adapter_is_refused(make_trainer, make_model, tmp_path, is_wrapped):
    from peft import LoraConfig, get_peft_model

    head = hfllm.HfllmForSequenceClassification
    value_model_of(make_model, "sequence").save_pretrained(tmp_path / "base")
    base = head.from_pretrained(tmp_path / "base")
    critic = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    if not is_wrapped:
        critic.save_pretrained(tmp_path / "adapter")
        critic = head.from_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="value_model has an adapter"):
        make_trainer(value_model=critic)


# ---- sampling ----


def test_what_is_never_sampled_has_no_probability_whoever_asked_for_it(make_trainer, make_model, prompts, tokenizer):
    model = make_model()
    with torch.no_grad():
        for token in (9, tokenizer.pad_token_id):
            model.lm_head.weight[token] = 10 * model.lm_head.weight.abs().max()
    trainer = make_trainer(model=model, generation_kwargs={"suppress_tokens": [9], "eos_token_id": 5})
    batch = trainer.sample(rows_of(prompts, 12))
    real = batch["response_ids"][batch["response_mask"] > 0]
    assert not torch.isin(real, torch.tensor([9, tokenizer.pad_token_id])).any()
    assert torch.isfinite(trainer.evaluate_tokens(batch).logprobs).all()
    assert trainer.eos_token_ids == [5]
    assert trainer.actor.never_sampled == tuple(sorted((9, tokenizer.pad_token_id)))


def test_the_models_own_generation_config_does_not_bend_the_samples(make_trainer, make_model, prompts):
    model = make_model()
    model.generation_config.min_p = 0.999  # next to greedy
    trainer = make_trainer(model=model, response_length=12)
    samples = trainer.sample([{"prompt": "Go"}] * 8)["response_ids"]
    assert len({tuple(row) for row in samples.tolist()}) > 4
    assert trainer.policy.generation_config.min_p == 0.999


@pytest.mark.parametrize(("name", "argument"), [("temperature", "temperature"), ("max_new_tokens", "response_length")])
def test_what_has_an_argument_of_its_own_is_refused_in_generation_kwargs(make_trainer, name, argument):
    with pytest.raises(InputError, match=f"generation_kwargs has {name}=3: set {argument} itself"):
        make_trainer(generation_kwargs={name: 3})


# ---- rollouts and tracking ----


@pytest.mark.slow
def test_each_prompt_gets_its_generations_in_one_rollout(make_trainer):
    trainer = make_trainer(num_generations=2, max_steps=4)
    seen = []
    collect = trainer.collect_rollout
    trainer.collect_rollout = lambda rows: seen.append([row["prompt"] for row in rows]) or collect(rows)
    trainer.train()
    for prompts in seen:
        assert prompts[0::2] == prompts[1::2]


@pytest.mark.slow
def test_completions_are_kept_as_parquet_and_shown(make_trainer, prompts, tmp_path, monkeypatch):
    trainer = make_trainer(log_completions=True, max_steps=4, eval_dataset=prompts)
    shown = []
    monkeypatch.setattr(base_trainer, "log_table", lambda callbacks, *table: shown.append(table))
    trainer.train()
    trainer.evaluate()
    assert [(name, step) for name, _, step in shown][:2] == [("completions", 0), ("completions", 2)]
    assert shown[-1][0].startswith("eval_completions_0") and set(shown[0][1][0]) == {
        "prompt",
        "completion",
        "letters",
        "reward",
    }
    files = sorted((tmp_path / "ppo" / "completions").iterdir())
    assert [file.name for file in files][:2] == ["000000_0.parquet", "000002_0.parquet"]
    rows = Dataset.from_parquet(str(files[0]))
    assert set(rows.column_names) == {"prompt", "completion", "letters", "reward"}
    assert len(rows) == 4
    assert any(file.name.startswith("eval_000004") for file in files)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_penalty": "loss"}, "kl_estimator='k1' has no gradient"),
        ({"kl_penalty": "both"}, "kl_penalty='both' is not one of reward, loss"),
        ({"num_generations": 3}, "num_generations=3 must divide the 4 episodes"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1, got 0.5"),
        ({"target_kl": -1.0}, "target_kl must be above 0"),
        ({"entropy_coef": -0.1}, "entropy_coef must not be negative"),
        ({"ref_model_mixup_alpha": 2.0}, "ref_model_mixup_alpha must lie in"),
        ({"max_tokens_per_pass": 0}, "max_tokens_per_pass must be at least 1"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target=6.0 steers kl_coef, which is 0"),
        ({"cliprange_value": -0.1}, "cliprange_value must not be negative"),
        ({"value_lam": 1.5}, "value_lam must lie in"),
        ({"lam_alpha": 0.05, "lam": 0.9}, "lam_alpha=0.05 takes lambda from the length: leave out lam=0.9"),
        ({"generation_kwargs": {"topk": 5}}, "generation_kwargs has an unknown 'topk'; did you mean 'top_k'"),
    ],
)
def test_bad_options_are_refused_by_name(make_args, values, message):
    with pytest.raises(ValueError, match=message):
        make_args(**values)


def test_beams_are_refused(make_trainer):
    with pytest.raises(InputError, match="num_beams must be 1"):
        make_trainer(generation_kwargs={"num_beams": 3})


@pytest.mark.parametrize(
    ("engine_type", "values", "message"),
    [
        ("FSDP", {}, "does not work with FSDP: shard by DeepSpeed"),
        ("DEEPSPEED", {"target_kl": 0.1}, "target_kl=0.1 does not work with DeepSpeed"),
        ("DEEPSPEED", {"critic_warmup_steps": 2}, "critic_warmup_steps=2 does not work with DeepSpeed"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(make_trainer, monkeypatch, engine_type, values, message):
    trainer = make_trainer(**values)
    kind = property(lambda self: DistributedType[engine_type])
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", kind)
    with pytest.raises(InputError, match=message):
        trainer._check_engine()


def test_a_prompt_that_the_chat_template_refuses_is_named(make_trainer, tokenizer, monkeypatch):
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", f"{refusal}{tokenizer.chat_template}")
    rows = [{"prompt": [{"role": role, "content": "Go"}]} for role in ("user", "user", "system")]
    message = "prompt 2 of the dataset: the chat template cannot write this prompt: System role not supported"
    with pytest.raises(InputError, match=message):
        make_trainer(train_dataset=rows)
    # A template is a program, and may end like one.
    endless = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"
    for fault in ("{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", endless):
        faulty = refusal.replace("{{ raise_exception('System role not supported') }}", fault)
        monkeypatch.setattr(tokenizer, "chat_template", faulty)
        with pytest.raises(InputError, match="prompt 2 of the dataset: the chat template cannot write this prompt"):
            make_trainer(train_dataset=rows)
