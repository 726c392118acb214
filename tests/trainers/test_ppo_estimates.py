"""What PPO compares answers with, prompts drawn again, what others have sampled, and the averages of the loss."""

import pytest
import torch

from hfllm.errors import InputError
from hfllm.trainers.ppo import episodes
from hfllm.trainers.ppo import trainer as ppo
from hfllm.trainers.ppo.formulas import kl_estimate
from hfllm.trainers.ppo.rollout import sampling_logprobs


def rows_of(dataset, count):
    return [dataset[index] for index in range(count)]


def in_pairs(dataset, count):
    """Rows of a rollout with two answers to each prompt."""
    return [dataset[index // 2] for index in range(count)]


def earning(*rewards):
    """A reward function that pays these for the completions of a rollout, in their order."""
    return lambda completions, **columns: list(rewards[: len(completions)])


def rollout_of(trainer, rows):
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.actor.value_head.weight)
    torch.manual_seed(1)
    return trainer.collect_rollout(rows)


# ---- baselines ----


def test_the_group_is_the_baseline(make_trainer, prompts):
    """Every token of an answer has the answer's reward less that of the prompt's other answer."""
    trainer = make_trainer(
        baseline="group", num_generations=2, kl_coef=0.0, whiten_advantages=False,
        reward_funcs=earning(1.0, 0.25, 0.5, 0.5),
    )  # fmt: skip
    rollout = rollout_of(trainer, in_pairs(prompts, 4))
    expected = torch.tensor([[0.75], [-0.75], [0.0], [0.0]]) * rollout.action_mask
    torch.testing.assert_close(rollout.advantages, expected)
    torch.testing.assert_close(rollout.returns, torch.tensor([[1.0], [0.25], [0.5], [0.5]]) * rollout.action_mask)


def test_the_groups_returns_hold_the_penalty_and_discount(make_trainer, prompts):
    trainer = make_trainer(
        baseline="group", num_generations=2, kl_coef=0.3, gamma=0.9, whiten_advantages=False,
        reward_funcs=earning(1.0, 0.25, 0.5, 0.5),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    rollout = rollout_of(trainer, in_pairs(prompts, 4))
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs)
    scores, firsts = (1.0, 0.25, 0.5, 0.5), []
    for row, length in enumerate(rollout.action_mask.sum(1).tolist()):
        earned, later = [], 0.0
        for at in reversed(range(length)):
            later = (scores[row] if at == length - 1 else 0.0) - 0.3 * kl[row, at].item() + 0.9 * later
            earned.insert(0, later)
        firsts.append(earned[0])
        torch.testing.assert_close(rollout.returns[row, :length], torch.tensor(earned), atol=1e-5, rtol=1e-5)
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        expected = (rollout.returns[row] - firsts[other]) * rollout.action_mask[row]
        torch.testing.assert_close(rollout.advantages[row], expected, atol=1e-5, rtol=1e-5)


def test_beside_the_group_the_critic_learns_the_rest(make_trainer, prompts):
    """As if the answers earned what they earn more than the others to their prompt, and nothing else changes."""
    settings = {"num_generations": 2, "kl_coef": 0.1, "lam": 0.9}
    both = make_trainer(baseline="both", reward_funcs=earning(1.0, 0.25, 0.5, 0.5), **settings)
    less = make_trainer(baseline="critic", reward_funcs=earning(0.75, -0.75, 0.0, 0.0), **settings)
    first, second = (rollout_of(each, in_pairs(prompts, 4)) for each in (both, less))
    torch.testing.assert_close(first.advantages, second.advantages)
    torch.testing.assert_close(first.returns, second.returns)


def test_during_its_warm_up_the_critic_learns_what_is_earned(make_trainer, prompts):
    settings = {"kl_coef": 0.0, "lam": 0.5, "value_lam": 0.5, "critic_warmup_steps": 2, "whiten_advantages": False}
    trainer = make_trainer(critic_warmup_lam=1.0, **settings)
    plain = rollout_of(make_trainer(**settings), rows_of(prompts, 4))
    warm = rollout_of(trainer, rows_of(prompts, 4))
    earned = warm.returns[:, :1] * warm.action_mask
    torch.testing.assert_close(warm.returns, earned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(warm.advantages, plain.advantages)
    trainer.state.global_step = 2
    torch.testing.assert_close(rollout_of(trainer, rows_of(prompts, 4)).returns, plain.returns)


# ---- averages ----


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_each_response_counts_alike(make_trainer, prompts, place):
    """The loss of the mean of the responses' means is the mean of the losses of mini-batches of one response."""
    settings = {"kl_penalty": place, "kl_estimator": "k3", "entropy_coef": 0.02, "vf_coef": 0.3}
    trainer = make_trainer(loss_aggregation="sequence", **settings)
    rollout = rollout_of(trainer, rows_of(prompts, 4))
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    batch = rollout.micro_batch(0, 0, 4)
    # As if an environment had written the ends.
    batch["action_mask"] = (torch.arange(6) < torch.tensor([[6], [3], [1], [4]])).long()
    batch["mini_batch_tokens"] = batch["action_mask"].sum()
    whole = trainer.compute_loss(trainer.model, batch)
    trainer.args.loss_aggregation = "token"
    singles = []
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items() if name != "mini_batch_tokens"}
        one["mini_batch_tokens"] = one["action_mask"].sum()
        singles.append(trainer.compute_loss(trainer.model, one))
    torch.testing.assert_close(whole, torch.stack(singles).mean())
    assert abs(whole - trainer.compute_loss(trainer.model, batch)) > 1e-4


def test_right_answers_are_learned_as_texts(make_trainer, prompts):
    settings = {"vf_coef": 0.0, "kl_coef": 0.0, "reward_funcs": earning(1.0, 0.0, 2.0, 0.9)}
    trainer = make_trainer(positive_lm_coef=0.5, **settings)
    rollout = rollout_of(trainer, rows_of(prompts, 4))
    assert rollout.is_positive.tolist() == [1, 0, 1, 0]
    batch = rollout.micro_batch(0, 0, 4)
    logprobs, _, _ = trainer.actor(**{name: batch[name] for name in ppo.model_inputs(batch)})
    mask = batch["action_mask"] * batch["is_positive"].unsqueeze(1)
    expected = -0.5 * (logprobs * mask).sum() / mask.sum()
    learned = trainer.compute_loss(trainer.model, batch)
    trainer.args.positive_lm_coef = 0.0
    torch.testing.assert_close(learned - trainer.compute_loss(trainer.model, batch), expected)
    # Split into two backward passes the sum is the same, as for the other terms.
    trainer.args.positive_lm_coef = 0.5
    parts = [trainer.compute_loss(trainer.model, rollout.micro_batch(0, at, 2)) for at in range(2)]
    torch.testing.assert_close(sum(parts), learned)


def test_a_rollout_with_right_answers_is_saved_and_read(make_trainer, prompts, tmp_path):
    trainer = make_trainer(positive_lm_coef=0.5, reward_funcs=earning(1.0, 0.0, 2.0, 0.9), max_steps=2)
    rollout = rollout_of(trainer, rows_of(prompts, 4))
    rollout.save(tmp_path / "rollout.safetensors")
    read = ppo.Rollout.load(tmp_path / "rollout.safetensors", torch.device("cpu"))
    assert torch.equal(read.is_positive, rollout.is_positive)
    assert torch.equal(read.mini_batch_positive_tokens, rollout.mini_batch_positive_tokens)
    trainer.train()
    assert trainer.state.log_history[0]["positive"] == 0.5
    assert trainer.state.log_history[0]["positive_lm_loss"] > 0


# ---- dynamic sampling ----


def test_prompts_whose_answers_earn_the_same_are_drawn_again(make_trainer, prompts):
    """The second prompt teaches nothing, once: another one with its answers and rewards stands in its place."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(prompts)
        return [1.0, 0.0, 0.5, 0.5] if len(calls) == 1 else [0.25, 0.75]

    trainer = make_trainer(
        dynamic_sampling_rounds=3, num_generations=2, baseline="group", kl_coef=0.0, whiten_advantages=False,
        reward_funcs=reward,
    )  # fmt: skip
    rows = in_pairs(prompts, 4)
    rollout = rollout_of(trainer, rows)
    assert [len(each) for each in calls] == [4, 2]
    assert calls[1][0] == calls[1][1]
    said = trainer.processing_class.batch_decode(rollout.prompt_ids, skip_special_tokens=True)
    assert said == [*trainer.processing_class.batch_decode(
        trainer.processing_class([row["prompt"] for row in rows[:2]])["input_ids"], skip_special_tokens=True
    ), *trainer.processing_class.batch_decode(
        trainer.processing_class(list(calls[1]))["input_ids"], skip_special_tokens=True
    )]  # fmt: skip
    torch.testing.assert_close(rollout.advantages, torch.tensor([[1.0], [-1.0], [-0.5], [0.5]]) * rollout.action_mask)
    # Of what is learned the log-probabilities are those of a pass over just these tokens.
    inputs = ppo.model_inputs({name: getattr(rollout, name) for name in ppo.Rollout.PER_EPISODE})
    torch.testing.assert_close(rollout.logprobs, trainer.actor(**inputs)[0], atol=1e-4, rtol=1e-4)
    metrics = trainer._drain_metrics("")
    assert (metrics["redrawn_prompts"], metrics["prompts_alike"]) == (0.5, 0.0)
    # The mean reward is that of the prompts as they came.
    assert metrics["reward"] == 0.5


def test_it_draws_no_more_often_than_it_may_and_the_same_when_resumed(make_trainer, prompts):
    def run():
        asked = []

        def reward(prompts, completions, **columns):
            asked.append(list(prompts))
            return [0.5] * len(completions)

        trainer = make_trainer(dynamic_sampling_rounds=2, num_generations=2, reward_funcs=reward)
        rollout_of(trainer, in_pairs(prompts, 4))
        return asked, trainer._drain_metrics("")

    (first, metrics), (second, _) = run(), run()
    assert [len(each) for each in first] == [4, 4, 4]
    assert first == second and first[1] != first[2]
    assert (metrics["redrawn_prompts"], metrics["prompts_alike"]) == (2.0, 1.0)


def test_rewards_of_tokens_are_replaced_too(make_trainer, prompts):
    calls = []

    def reward(completions, completion_ids, **columns):
        calls.append(len(completions))
        low = 0.0 if len(calls) == 1 else 0.5
        return [[low] * (len(ids) - 1) + [float(row % 2) if len(calls) > 1 else 0.0] for row, ids in
                enumerate(completion_ids)]  # fmt: skip

    trainer = make_trainer(
        dynamic_sampling_rounds=1, num_generations=2, baseline="group", kl_coef=0.0, whiten_advantages=False,
        reward_funcs=reward,
    )  # fmt: skip
    rollout = rollout_of(trainer, in_pairs(prompts, 4))
    lengths = rollout.action_mask.sum(1)
    earned = 0.5 * (lengths - 1) + torch.tensor([0.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(rollout.returns[:, 0], earned)


# ---- what others have sampled ----


def sampled_elsewhere(shift):
    """A rollout_func whose sampler gives the policy's own log-probabilities plus a shift for each token."""

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        turns = [tokens for tokens, _ in trainer.continue_ids(ids, trainer.args.response_length)]
        logprobs = []
        for prompt, response in zip(ids, turns, strict=True):
            batch = episodes.as_batch(
                [episodes.Episode(prompt, list(response), [1] * len(response))], 0, torch.device("cpu")
            )
            own = trainer.actor(**ppo.model_inputs(batch))[0][0].tolist()
            logprobs.append([value + shift for value in own])
        return {"prompt_ids": ids, "completion_ids": turns, "logprobs": logprobs}

    return rollout


def test_what_another_engine_sampled_is_weighed(make_trainer, prompts):
    def rollout(shift, **settings):
        trainer = make_trainer(rollout_func=sampled_elsewhere(shift), whiten_advantages=False, **settings)
        return rollout_of(trainer, rows_of(prompts, 4)), trainer._drain_metrics("")

    plain, _ = rollout(0.0, importance_sampling_cap=None)
    same, metrics = rollout(0.0)
    torch.testing.assert_close(same.advantages, plain.advantages, atol=1e-5, rtol=1e-5)
    assert metrics["importance_sampling/weight"] == pytest.approx(1, abs=1e-4)
    assert metrics["importance_sampling/capped"] == 0
    rarer, metrics = rollout(-0.05)
    torch.testing.assert_close(rarer.advantages, plain.advantages * 1.05127, atol=1e-4, rtol=1e-4)
    assert metrics["importance_sampling/gap"] == pytest.approx(0.05, abs=1e-4)
    with pytest.warns(UserWarning, match="log-probabilities 1.00 nats from the policy's"):
        capped, metrics = rollout(-1.0)
    torch.testing.assert_close(capped.advantages, plain.advantages * 2, atol=1e-4, rtol=1e-4)
    assert metrics["importance_sampling/capped"] == 1
    by_response, _ = rollout(-0.05, importance_sampling_level="sequence")
    whole = torch.exp(0.05 * plain.action_mask.sum(1, keepdim=True))
    torch.testing.assert_close(by_response.advantages, plain.advantages * whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("logprobs", "complaint"),
    [
        ([[-1.0], [-1.0, -2.0]], "rollout_func, prompt 0: 1 logprobs for 2 completion_ids"),
        ([[-1.0, None], [-1.0, -2.0]], "rollout_func, prompt 0: logprobs has None for token 1"),
        ([[-1.0, -2.0], [-1.0, 0.5]], "prompt 1: logprobs has 0.5 for token 1, which the policy chose; expected a"),
        ([[-1.0, float("nan")], [-1.0, -2.0]], "prompt 0: logprobs has nan for token 1"),
    ],
)
def test_bad_logprobs_are_refused_by_place(logprobs, complaint):
    with pytest.raises(InputError) as error:
        sampling_logprobs(logprobs, [[1, 1], [1, 1]], (2, 3), "rollout_func")
    assert complaint in str(error.value)


def test_a_critic_that_decides_nothing_moves_no_policy(make_trainer, prompts):
    trainer = make_trainer(baseline="group", num_generations=2, vf_coef=5.0, reward_funcs=earning(1.0, 1.0, 1.0, 1.0))
    batch = rollout_of(trainer, in_pairs(prompts, 4)).micro_batch(0, 0, 4)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer.compute_loss(trainer.model, batch).backward()
    assert trainer.actor.value_head.weight.grad.abs().max() > 0
    assert all(each.grad is None or not each.grad.any() for each in trainer.policy.parameters())


def test_unknown_logprobs_weigh_one(make_trainer):
    trainer = make_trainer()
    sampled = sampling_logprobs([[None, -1.0]], [[1, 1]], (1, 2), "vLLM", may_lack=True)
    weights = trainer._importance(torch.tensor([[-3.0, -1.0]]), sampled, torch.ones(1, 2))
    assert weights.tolist() == [[1.0, 1.0]]
    with pytest.raises(InputError, match="prompt 0: logprobs is None; expected a list of numbers"):
        sampling_logprobs([None], [[1]], (1, 1), "rollout_func")


def test_answers_drawn_again_may_be_longer_and_paid_as_a_whole(make_trainer, prompts):
    """First each token is paid, then each response."""
    calls = []

    def reward(completions, completion_ids, **columns):
        calls.append(len(completions))
        return [[0.0] * len(ids) for ids in completion_ids] if len(calls) == 1 else [1.0, 0.0, 1.0, 0.0]

    trainer = make_trainer(
        dynamic_sampling_rounds=1, num_generations=2, baseline="group", kl_coef=0.0, whiten_advantages=False,
        reward_funcs=reward,
    )  # fmt: skip
    plain, lengths = trainer.sample, iter((2, 6))

    def cut(rows):
        batch, length = plain(rows), next(lengths)
        for name in ("response_ids", "response_mask"):
            batch[name] = batch[name][:, :length]
        return {**batch, "witness": None}

    trainer.sample = cut
    rollout = rollout_of(trainer, in_pairs(prompts, 4))
    assert rollout.returns[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_tokens_of_others_need_no_logprobs():
    found = sampling_logprobs([[None, [-1.5, -9.0]], [torch.tensor(-2.0)]], [[0, 1], [1]], (2, 3), "vLLM")
    assert found.tolist() == [[0, -1.5, 0], [-2, 0, 0]]


# ---- settings that do not go together ----


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"baseline": "group"}, "baseline='group' compares the answers to a prompt: num_generations must be at least"),
        ({"dynamic_sampling_rounds": 2}, "dynamic_sampling_rounds=2 compares the answers to a prompt"),
        ({"baseline": "group", "num_generations": 2, "lam": 0.9}, "baseline='group' has no use of lam=0.9"),
        ({"baseline": "mean"}, "baseline"),
        ({"critic_warmup_lam": 1.0}, "critic_warmup_lam=1.0 is for critic_warmup_steps, which is 0"),
        ({"importance_sampling_cap": 0.0}, "importance_sampling_cap must be"),
        ({"loss_aggregation": "batch"}, "loss_aggregation"),
        ({"positive_lm_min_reward": 0.5}, "positive_lm_min_reward=0.5 is for positive_lm_coef, which is 0"),
        (
            {"importance_sampling_cap": None, "importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence' is for importance_sampling_cap, which is None",
        ),
    ],
)
def test_settings_without_effect_are_refused(make_args, settings, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        make_args(**settings)
