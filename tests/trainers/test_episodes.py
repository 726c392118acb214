"""What an environment writes into a response is read by the policy and learned by nobody.

Each invariant holds of episodes with such tokens at random places, and does not where they are taken for the policy's.
"""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import hfllm
from hfllm.trainers.ppo import episodes, formulas

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
CRITICS = ["head", "sequence", "token", "lora"]


def parts_of(make_model, critic):
    """What `make_trainer` needs for a critic of this kind; `lora` is a value head on a policy with an adapter."""
    if critic == "lora":
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return {"peft_config": config}
    kind = {"sequence": "HfllmForSequenceClassification", "token": "HfllmForTokenClassification"}.get(critic)
    return {"value_model": kind and make_model(seed=5, model_class=getattr(hfllm, kind), num_labels=1)}


def random_masks(rng, rows, width=12):
    """Rows of 1 (chosen) and 0 (an environment's): any order, also first or last, none at all, or all."""
    masks = [torch.randint(0, 2, (int(torch.randint(1, width + 1, (), generator=rng)),), generator=rng).tolist()]
    for row in range(1, rows):
        length = int(torch.randint(2, width + 1, (), generator=rng))
        mask = [1] * length
        first, count = (int(torch.randint(0, length, (), generator=rng)) for _ in range(2))
        mask[first : first + count] = [0] * len(mask[first : first + count])
        masks.append([[1] * length, mask, [0] * length][0 if row == 1 else 2 if row == 2 else 1])
    return masks


def rollout_func_of(masks, seed=0):
    """A `rollout_func` that puts random tokens where a mask has 0 and 1; the policy's are of its own kind too."""

    def sample(prompts, trainer):
        rng = torch.Generator().manual_seed(seed)
        texts = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        kept = [masks[row % len(masks)] for row in range(len(prompts))]
        ids = [torch.randint(20, 300, (len(mask),), generator=rng).tolist() for mask in kept]
        return {"prompt_ids": texts, "completion_ids": ids, "env_mask": kept}

    return sample


@pytest.fixture
def with_tools(make_trainer, make_model, monkeypatch):
    """A trainer whose episodes hold an environment's tokens, which it takes for the policy's if `ignored`."""

    def make(masks, critic="head", ignored=False, **settings):
        monkeypatch.undo()
        if ignored:
            plain = episodes.as_batch

            def careless(*args):
                batch = plain(*args)
                return {**batch, "action_mask": batch["response_mask"]}

            monkeypatch.setattr(episodes, "as_batch", careless)
        settings = {"response_length": 12, "per_device_train_batch_size": 8, **settings}
        settings |= {"gradient_accumulation_steps": 1, **parts_of(make_model, critic)}
        trainer = make_trainer(rollout_func=rollout_func_of(masks), **settings)
        if trainer.actor.value_model is None:
            torch.nn.init.normal_(trainer.actor.value_head.weight, generator=torch.Generator().manual_seed(1))
        # Away from the reference, so that there is a KL.
        with torch.no_grad():
            for parameter in trainer.policy.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        return trainer

    return make


def rows_of(prompts, count=8):
    return [prompts[index] for index in range(count)]


def fails_if(ignored):
    """The invariant must fail where the mask is ignored: otherwise its test would prove nothing."""
    return pytest.raises(AssertionError) if ignored else nullcontext()


# ---- formulas ----


def brute_force(scores, kl, values, gamma, lam, kl_coef):
    """Advantages and returns of one sequence of actions, by the definition."""
    rewards = [-kl_coef * each for each in kl]
    if rewards:
        rewards[-1] += scores
    advantages, later, after = [], 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        later = reward + gamma * after - value + gamma * lam * later
        after = value
        advantages.insert(0, later)
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def random_numbers(seed, rows=6, width=12):
    rng = torch.Generator().manual_seed(seed)
    masks = random_masks(rng, rows, width)
    mask = torch.tensor([row + [0] * (width - len(row)) for row in masks], dtype=torch.float64)
    kl, values, noise = (torch.randn(rows, width, generator=rng, dtype=torch.float64) for _ in range(3))
    return mask, torch.randn(rows, generator=rng, dtype=torch.float64), kl, values, noise


def advantages_of(scores, kl, values, mask, gamma=0.97, lam=0.9):
    rewards = formulas.token_rewards(scores, kl, mask, 0.1)
    return formulas.generalized_advantages(rewards, values, mask, gamma, lam)


@pytest.mark.slow
@settings(max_examples=60, **QUICK)
@given(seed=st.integers(0, 10**6), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([1.0, 0.95, 0.0]))
def test_advantages_are_those_of_the_actions_with_the_tools_words_cut_out(seed, gamma, lam):
    mask, scores, kl, values, _ = random_numbers(seed)
    found = advantages_of(scores, kl, values, mask, gamma, lam)
    for row, chosen in enumerate(mask > 0):
        cut = brute_force(scores[row], kl[row, chosen].tolist(), values[row, chosen].tolist(), gamma, lam, 0.1)
        for part, expected in zip(found, cut, strict=True):
            torch.testing.assert_close(part[row, chosen], torch.tensor(expected, dtype=torch.float64))
            assert not part[row, ~chosen].any()


def test_advantages_over_all_tokens_are_others():
    mask, scores, kl, values, _ = random_numbers(3)
    real = (mask.flip(1).cumsum(1).flip(1) > 0).double()
    assert (real > mask).any()
    right, wrong = advantages_of(scores, kl, values, mask)[0], advantages_of(scores, kl, values, real)[0]
    assert ((right - wrong) * mask).abs().max() > 0.01


@settings(max_examples=60, **QUICK)
@given(seed=st.integers(0, 10**6))
def test_whatever_is_written_at_a_tools_words_changes_nothing(seed):
    mask, scores, kl, values, noise = random_numbers(seed)
    noise *= 1e6 * (1 - mask)
    clean, noisy = (advantages_of(scores, kl + n, values + n, mask) for n in (0 * noise, noise))
    for one, other in zip(clean, noisy, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(formulas.masked_whiten(values, mask), formulas.masked_whiten(values + noise, mask))
    advantages, returns = clean
    for loss in (
        lambda n: formulas.policy_loss(values + n, kl + n, advantages + n, mask, 0.2, 2.0),
        lambda n: formulas.value_loss(values + n, kl + n, returns + n, mask, 0.2),
    ):
        assert torch.equal(torch.stack(loss(0 * noise)), torch.stack(loss(noise)))
    assert torch.equal(
        formulas.explained_variance(values, returns, mask),
        formulas.explained_variance(values + noise, returns - noise, mask),
    )


@settings(max_examples=60, **QUICK)
@given(seed=st.integers(0, 10**6))
def test_the_score_lies_on_the_last_action_and_whitening_counts_actions(seed):
    mask, scores, kl, values, _ = random_numbers(seed)
    rewards = formulas.token_rewards(scores, 0 * kl, mask, 0.1)
    for row, chosen in enumerate(mask > 0):
        places = chosen.nonzero().flatten().tolist()
        assert rewards[row].nonzero().flatten().tolist() == places[-1:]
        if places:
            assert rewards[row, places[-1]] == scores[row]
    real = values[mask > 0]
    expected = (real - real.mean()) / real.std() if len(real) > 1 else 0 * real
    torch.testing.assert_close(formulas.masked_whiten(values, mask)[mask > 0], expected, atol=1e-6, rtol=1e-6)


# ---- the trainer ----

MASKS = random_masks(torch.Generator().manual_seed(7), 8)


def plain_logits(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    # Padding is never sampled.
    return logits.index_fill(-1, torch.tensor([0]), torch.finfo(torch.float32).min).log_softmax(-1)


def plain_values(trainer, ids):
    """The critic's values before each token, from whole sequences."""
    actor = trainer.actor
    if actor.value_model is None:
        model = trainer.policy.get_base_model() if hasattr(trainer.policy, "get_base_model") else trainer.policy
        return actor.value_head(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]).squeeze(-1)
    states = actor.value_model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return actor.value_model.score(states).squeeze(-1)


def actions_of(trainer, row):
    """Where the actions of a `MASKS` row are: their places in the response."""
    return [place for place, chosen in enumerate(MASKS[row]) if chosen]


def sequences(batch):
    """Prompt and response of each row without padding, and the length of the prompt."""
    for prompt, prompt_mask, response, mask in zip(
        *(batch[name] for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")), strict=True
    ):
        before = prompt[prompt_mask > 0].tolist()
        yield before + response[mask > 0].tolist(), len(before)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("critic", CRITICS)
def test_actions_are_judged_after_all_that_was_read_and_nothing_else_is(with_tools, prompts, critic, ignored):
    trainer = with_tools(MASKS, critic, ignored, kl_estimator="k1")
    batch = trainer.sample(rows_of(prompts))
    tokens = trainer.evaluate_tokens(batch)
    expected = [torch.zeros_like(tokens.logprobs) for _ in range(3)]
    with torch.no_grad():
        for row, (ids, before) in enumerate(sequences(batch)):
            logprobs, values = plain_logits(trainer.policy, ids), plain_values(trainer, ids)
            for place in actions_of(trainer, row):
                at = before + place - 1
                distribution = logprobs[at]
                expected[0][row, place] = distribution[ids[at + 1]]
                expected[1][row, place] = values[at]
                expected[2][row, place] = -(distribution.exp() * distribution).sum()
    with fails_if(ignored):
        for part, name in zip(expected, ("logprobs", "values", "entropy"), strict=True):
            torch.testing.assert_close(getattr(tokens, name), part, atol=1e-4, rtol=1e-4)
        chosen = batch["response_mask"].new_tensor([mask + [0] * (12 - len(mask)) for mask in MASKS])
        chosen = chosen[:, : tokens.kl.shape[1]]
        assert not tokens.kl[chosen == 0].any() and not tokens.ref_logprobs[chosen == 0].any()
    assert tokens.kl.abs().max() > 1e-3


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("critic", CRITICS)
def test_a_rollout_is_that_of_the_actions_alone(with_tools, prompts, critic, ignored):
    """Advantages and returns by brute force from the actions, whitened over these; so are counts and means."""
    trainer = with_tools(MASKS, critic, ignored, gamma=0.97, lam=0.9, kl_coef=0.2)
    rows = rows_of(prompts)
    rollout = trainer.collect_rollout(rows)
    scores = [row["reward"] for row in trainer.completions]
    kl = (rollout.logprobs - rollout.ref_logprobs).tolist()
    places = [actions_of(trainer, row) for row in range(8)]
    each = [
        brute_force(
            scores[row],
            [kl[row][place] for place in where],
            [rollout.values[row, place].item() for place in where],
            *(0.97, 0.9, 0.2),
        )
        for row, where in enumerate(places)
    ]
    whole = torch.tensor([advantage for advantages, _ in each for advantage in advantages])
    mean, std = whole.mean(), whole.std()
    with fails_if(ignored):
        for row, (where, (advantages, returns)) in enumerate(zip(places, each, strict=True)):
            torch.testing.assert_close(
                rollout.advantages[row, where], (torch.tensor(advantages) - mean) / std, atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(rollout.returns[row, where], torch.tensor(returns), atol=1e-4, rtol=1e-4)
            elsewhere = [place for place in range(rollout.advantages.shape[1]) if place not in where]
            for name in ("advantages", "returns", "values", "logprobs", "ref_logprobs"):
                assert not getattr(rollout, name)[row, elsewhere].any(), name
        counts = torch.tensor([len(where) for where in places])
        assert (rollout.mini_batch_tokens == counts.sum()).all()
        logged = {name: torch.cat(values).mean().item() for name, values in trainer._metrics.items()}
        assert logged["response_length"] == counts.float().mean().item()
        of_kl = [sum(kl[row][place] for place in where) for row, where in enumerate(places)]
        assert logged["kl"] == pytest.approx(sum(of_kl) / 8, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("critic", CRITICS)
def test_the_gradient_is_that_of_the_actions_alone(with_tools, prompts, critic, ignored):
    """Against a loss from whole sequences, row by row, with an entropy bonus and a KL in the loss."""
    terms = {"entropy_coef": 0.3, "kl_penalty": "loss", "kl_estimator": "k3", "kl_coef": 0.4, "vf_coef": 0.7}
    trainer = with_tools(MASKS, critic, ignored, **terms)
    batch = trainer.collect_rollout(rows_of(prompts)).micro_batch(0, 0, 8)
    order = trainer_order(batch, trainer, prompts)
    actor = trainer.actor.train()
    # As if by another policy and critic, so that the ratios are not 1.
    batch["logprobs"] = (batch["logprobs"] - 0.1) * (batch["logprobs"] != 0)
    trainer.compute_loss(trainer.model, batch).backward()
    found = {name: each.grad.clone() for name, each in actor.named_parameters() if each.grad is not None}
    actor.zero_grad()
    loss, count = 0.0, 0
    for at, (ids, before) in enumerate(sequences(batch)):
        distribution, values = plain_logits(trainer.policy, ids), plain_values(trainer, ids)
        for place in actions_of(trainer, order[at]):
            here, token = distribution[before + place - 1], ids[before + place]
            ratio = (here[token] - batch["logprobs"][at, place]).exp()
            advantage = batch["advantages"][at, place]
            loss = loss - torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
            value, old, target = values[before + place - 1], batch["values"][at, place], batch["returns"][at, place]
            bounded = old + (value - old).clamp(-0.2, 0.2)
            loss = loss + 0.7 * 0.5 * torch.maximum((value - target) ** 2, (bounded - target) ** 2)
            loss = loss + 0.3 * (here.exp() * here).sum()
            gap = here[token] - batch["ref_logprobs"][at, place]
            loss = loss + 0.4 * ((-gap).exp() - 1 + gap)
            count += 1
    (loss / count).backward()
    with fails_if(ignored):
        for name, each in actor.named_parameters():
            if each.grad is not None:
                torch.testing.assert_close(found[name], each.grad, atol=2e-4, rtol=2e-3, msg=name)
    assert max(each.abs().max() for each in found.values()) > 1e-2


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("critic", CRITICS)
def test_whatever_a_rollout_holds_at_a_tools_words_changes_no_bit(with_tools, prompts, critic, ignored):
    trainer = with_tools(MASKS, critic, kl_penalty="loss", kl_estimator="k3", dual_clip=2.0)
    batch = trainer.collect_rollout(rows_of(prompts)).micro_batch(0, 0, 8)
    noisy = {**batch, "action_mask": batch["response_mask"]} if ignored else dict(batch)
    for name in ("advantages", "returns", "values", "logprobs", "ref_logprobs"):
        # Beyond what fp32 holds in an exponent, unless it counts.
        noisy[name] = batch[name] + (3.0 if ignored else 100.0) * (1 - batch["action_mask"])
    found = []
    for each in (batch, noisy):
        trainer._sums = {}
        trainer.actor.zero_grad()
        loss = trainer.compute_loss(trainer.model, each)
        loss.backward()
        gradients = [each.grad for each in trainer.actor.parameters() if each.grad is not None]
        found.append([loss.detach(), *trainer._sums.values(), *(each.clone() for each in gradients)])
    with fails_if(ignored):
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def trainer_order(batch, trainer, prompts):
    """Which row of `MASKS` each shuffled episode of a micro-batch came from, by its tokens."""
    sampled = rollout_func_of(MASKS)([row["prompt"] for row in rows_of(prompts)], trainer)["completion_ids"]
    rows = [row[mask > 0].tolist() for row, mask in zip(batch["response_ids"], batch["response_mask"], strict=True)]
    return [sampled.index(row) for row in rows]


@pytest.mark.parametrize("ignored", [False, True])
def test_the_scale_of_rewards_and_the_critics_grade_are_those_of_actions(with_tools, prompts, ignored):
    settings = {"whiten_rewards": True, "whiten_advantages": False, "gamma": 1.0, "lam": 1.0, "kl_coef": 0.2}
    trainer = with_tools(MASKS, "head", ignored, **settings)
    rollout = trainer.collect_rollout(rows_of(prompts))
    rewards = []
    for row, completion in enumerate(trainer.completions):
        where = actions_of(trainer, row)
        each = -0.2 * (rollout.logprobs - rollout.ref_logprobs)[row, where]
        each[-1:] += completion["reward"]
        rewards.append(each)
    whole = torch.cat(rewards)
    scaled = [(each - whole.mean()) / whole.std() + whole.mean() for each in rewards]
    # Without discount, returns are the rewards still to come.
    returns = torch.cat([each.flip(0).cumsum(0).flip(0) for each in scaled])
    values = torch.cat([rollout.values[row, actions_of(trainer, row)] for row in range(8)])
    found = torch.cat([rollout.returns[row, actions_of(trainer, row)] for row in range(8)])
    with fails_if(ignored):
        torch.testing.assert_close(found, returns, atol=1e-4, rtol=1e-4)
    grade = 1 - (returns - values).var() / returns.var()
    with fails_if(ignored):
        assert trainer._metrics["explained_variance"][0].item() == pytest.approx(grade.item(), abs=1e-4)


@pytest.mark.parametrize("critic", ["sequence", "token"])
def test_a_critic_that_is_a_model_says_alone_what_it_says_beside_the_policy(with_tools, prompts, critic):
    trainer = with_tools(MASKS, critic)
    batch = trainer.sample(rows_of(prompts))
    inputs = {name: value for name, value in batch.items() if name.endswith("_ids") or name.endswith("_mask")}
    with torch.no_grad():
        torch.testing.assert_close(trainer.actor.estimate_values(**inputs), trainer.actor(**inputs)[1])


def test_the_policy_reads_what_a_tool_says(with_tools, prompts):
    trainer = with_tools([[1, 1, 0, 0, 1, 1]])
    batch = trainer.sample(rows_of(prompts))
    before = trainer.evaluate_tokens(batch)
    batch["response_ids"][:, 2] = (batch["response_ids"][:, 2] + 50) % 200 + 20
    after = trainer.evaluate_tokens(batch)
    for name in ("logprobs", "values"):
        one, other = getattr(before, name), getattr(after, name)
        assert torch.equal(one[:, :2], other[:, :2]) and not one[:, 2:4].any()
        assert ((one - other)[:, 4:].abs() > 1e-5).all(), name


@pytest.mark.parametrize("critic", CRITICS)
def test_rewards_by_token_are_earned_by_actions(with_tools, prompts, critic):
    seen = []

    def each(completions, completion_ids, action_mask, **columns):
        seen.append(action_mask)
        return [[1.0 if chosen else 1000.0 for chosen in mask] for mask in action_mask]

    trainer = with_tools(MASKS, critic, reward_funcs=each)
    trainer.scorer.rewards, trainer.scorer.names = [each], ["each"]
    rows = rows_of(prompts)
    scores = trainer.score(rows, trainer.sample(rows))
    assert seen[0] == MASKS
    assert scores.reward.tolist() == [float(sum(mask)) for mask in MASKS]
