"""Models of steps as rewards: what a step pays, where, and which models are taken for one."""

import math

import pytest
import torch

import hfllm
from hfllm.errors import InputError
from hfllm.rewards.models import RewardEnsemble, RewardModel, TokenRewardModel
from hfllm.rewards.steps import ProcessRewardModel, scoring_model


@pytest.fixture
def step_model(make_model):
    model = make_model(model_class=hfllm.HfllmForTokenClassification, num_labels=1)
    model.config.step_end = "sentence"
    return model


def test_each_step_pays_what_it_lacks_at_its_last_token(step_model, tokenizer):
    prompts = ["Go", "What is 1 plus 2?"]
    texts = ["Say red. The fox lives there. Go", "<think>One. Two.</think> The owl. Red."]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = ProcessRewardModel(step_model, tokenizer)(prompts, texts, completion_ids=ids)
    ends = [["Say red.", "Say red. The fox lives there.", texts[0]], ["<think>One.", "<think>One. Two."]]
    for prompt, own, rewards, steps in zip(prompts, ids, found, ends, strict=True):
        before = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            scores = step_model(input_ids=torch.tensor([before + own])).logits[0, len(before) :, 0]
        paid = {at: reward for at, reward in enumerate(rewards) if reward}
        read = [at for step in steps for at in range(len(own)) if tokenizer.decode(own[: at + 1]) == step]
        assert [*paid] == read and len(rewards) == len(own)
        assert [*paid.values()] == pytest.approx([1 / (1 + math.exp(-scores[at])) - 1 for at in read], abs=1e-5)


def test_a_turn_of_a_tool_is_no_step(step_model, tokenizer):
    ids = tokenizer("Say red. The fox. Go.", add_special_tokens=False)["input_ids"]
    words = tokenizer.decode(ids).split(" The")[0]
    first = next(at for at in range(len(ids)) if tokenizer.decode(ids[: at + 1]) == words) + 1
    mask = [1] * first + [0] * (len(ids) - first)
    (rewards,) = ProcessRewardModel(step_model, tokenizer)(["Go"], ["x"], completion_ids=[ids], action_mask=[mask])
    assert [at for at, reward in enumerate(rewards) if reward] == [first - 1]


def test_a_model_is_the_reward_that_it_was_trained_for(step_model, make_model, tokenizer):
    assert type(scoring_model(step_model, tokenizer)) is ProcessRewardModel
    tokens = make_model(model_class=hfllm.HfllmForTokenClassification, num_labels=1)
    assert type(scoring_model(tokens, tokenizer)) is TokenRewardModel
    whole = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
    assert type(scoring_model(whole, tokenizer)) is RewardModel
    tokens.config.step_end = "(a+)+b"
    with pytest.raises(InputError, match=r"has step_end '\(a\+\)\+b'; expected line or sentence"):
        scoring_model(tokens, tokenizer)
    tokens.config.step_end = ["line"]
    with pytest.raises(InputError, match=r"has step_end \['line'\]; expected line or sentence"):
        scoring_model(tokens, tokenizer)
    with pytest.raises(InputError, match="an ensemble takes one number per completion"):
        RewardEnsemble([scoring_model(step_model, tokenizer)] * 2)


@pytest.mark.slow
def test_ppo_is_paid_for_steps_beside_the_outcome(step_model, make_model, tokenizer, tmp_path):
    from hfllm.trainers.ppo.config import PPOConfig
    from hfllm.trainers.ppo.trainer import PPOTrainer

    step_model.save_pretrained(tmp_path / "steps")
    tokenizer.save_pretrained(tmp_path / "steps")
    args = PPOConfig(
        str(tmp_path / "ppo"), use_cpu=True, report_to="none", per_device_train_batch_size=2, num_mini_batches=1,
        response_length=8, max_steps=2, save_strategy="no", logging_steps=1, kl_coef=0.0, disable_tqdm=True,
    )  # fmt: skip
    outcome = lambda completions, **columns: [1.0] * len(completions)  # noqa: E731
    trainer = PPOTrainer(
        make_model(), [str(tmp_path / "steps"), outcome], args, [{"prompt": "Go."}] * 2, processing_class=tokenizer
    )
    rows = [trainer.train_dataset[index] for index in range(2)]
    batch = trainer.sample(rows)
    scores = trainer.score(rows, batch)
    assert scores.per_token is not None and (scores.per_token <= 0).all() and scores.total.tolist() == [1.0, 1.0]
    trainer.train()
