"""Training on episodes that an environment wrote a part of: every option works, or is refused by name."""

import pytest
import torch
from datasets import Dataset
from ddp_run import ask_twice
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from trl import import_utils
from trl.generation import vllm_generation as trl_generation

import hfllm
from hfllm.errors import InputError
from hfllm.rewards.functions import completion_text, length_penalty
from hfllm.trainers.ppo.rollout import Rollout

TURNS = {"rollout_func": ask_twice, "response_length": 12}


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "sequence", "lora"])
def test_without_an_environment_the_bits_are_those_of_sampling_as_ever(make_trainer, make_model, monkeypatch, critic):
    def alone(prompts, trainer):
        asked = trainer.processing_class(list(prompts))["input_ids"]
        turns = trainer.continue_ids(asked, trainer.args.response_length)
        return {
            "prompt_ids": asked,
            "completion_ids": [ids for ids, _ in turns],
            "is_ended": [is_ended for _, is_ended in turns],
            "logprobs": None,
        }

    def trained(**settings):
        parts = {}
        if critic == "sequence":
            model = make_model(seed=5, model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
            parts = {"value_model": model}
        if critic == "lora":
            parts = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])}
        trainer = make_trainer(missing_eos_penalty=0.5, **parts, **settings)
        # What is recorded during sampling differs from a second pass by rounding.
        monkeypatch.setattr(trainer, "_witness", lambda episodes: None)
        trainer.train()
        return weights_of(trainer)

    expected = trained()
    assert same(trained(rollout_func=alone), expected)
    assert not same(trained(**TURNS), expected)


def test_a_resumed_run_ends_with_the_same_bits(make_trainer, tmp_path):
    settings = {**TURNS, "max_steps": 6, "lr_scheduler_type": "cosine"}
    whole = make_trainer(**settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=1, **settings).train()
    for step in (2, 3):  # between rollouts, and within one
        folder = tmp_path / "cut" / f"checkpoint-{step}"
        kept = load_file(folder / "rollout_0.safetensors")
        assert (kept["action_mask"] < kept["response_mask"]).any()
        resumed = make_trainer(output_dir=str(tmp_path / "cut"), **settings)
        resumed.train(resume_from_checkpoint=str(folder))
        assert same(weights_of(resumed), weights_of(whole))


def test_a_rollout_saved_before_there_were_environments_is_the_policys_alone(make_trainer, prompts, tmp_path):
    rollout = make_trainer().collect_rollout([prompts[index] for index in range(4)])
    rollout.save(tmp_path / "new")
    old = load_file(tmp_path / "new")
    assert torch.equal(old.pop("action_mask"), rollout.response_mask)
    save_file(old, tmp_path / "old")
    loaded = Rollout.load(tmp_path / "old", torch.device("cpu"))
    assert torch.equal(loaded.action_mask, rollout.response_mask)


OPTIONS = {
    "target_kl": {"target_kl": 1e-6},
    "critic warm-up": {"critic_warmup_steps": 2},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "full KL in the loss": {"kl_estimator": "full", "kl_penalty": "loss", "entropy_coef": 0.01},
    "no reference": {"kl_coef": 0.0},
    "pretraining": {"ptx_coef": 0.1, "ptx_dataset": Dataset.from_dict({"text": ["The fox lives here."] * 4})},
    "scales": {"normalize_rewards": True, "reward_clip": 1.0, "whiten_rewards": True, "advantage_clip": 1.0},
    "bf16": {"bf16": True},
    "small passes": {"max_tokens_per_pass": 8, "length_bucket_size": 1, "local_rollout_forward_batch_size": 1},
    "checkpointing": {"activation_checkpointing": True},
    "generations": {"num_generations": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(make_trainer, option):
    trainer = make_trainer(**TURNS, **OPTIONS[option])
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert not same(before, after)
    logged = [entry for entry in trainer.state.log_history if "response_length" in entry]
    # Two turns of at most three tokens; the words between them do not count.
    assert logged and all(entry["response_length"] <= 6 for entry in logged)
    assert trainer._rollout.response_mask.sum(1).max() > 6


@pytest.mark.slow
def test_the_steps_beyond_the_target_kl_are_skipped(make_trainer):
    free, held = (make_trainer(**TURNS, target_kl=target, num_ppo_epochs=4) for target in (None, 1e-9))
    for trainer in (free, held):
        trainer.train()
    assert not same(weights_of(free), weights_of(held))


@pytest.mark.slow
def test_episodes_without_any_action_teach_nothing_and_break_nothing(make_trainer, prompts):
    def silent(prompts, trainer):
        asked = trainer.processing_class(list(prompts))["input_ids"]
        return {"prompt_ids": asked, "completion_ids": [[50, 51]] * len(prompts), "env_mask": [[0, 0]] * len(prompts)}

    trainer = make_trainer(rollout_func=silent, weight_decay=0.0)
    before = weights_of(trainer)
    trainer.train()
    assert same(before, weights_of(trainer))
    assert all(entry["loss"] == 0 for entry in trainer.state.log_history if "loss" in entry)


def test_evaluation_samples_the_same_episodes(make_trainer, prompts):
    trainer = make_trainer(**TURNS, eval_dataset=prompts.select(range(5)))
    metrics = trainer.evaluate()
    assert metrics["eval_response_length"] <= 6
    assert len(trainer.eval_values["reward"]) == 5


def test_columns_of_the_function_reach_the_rewards(make_trainer, prompts):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, completions=completions)
        return [0.0] * len(prompts)

    def sample(prompts, trainer):
        output = ask_twice(prompts, trainer)
        completions = [f"said {row}" for row in range(len(prompts))]
        return {**output, "completions": completions, "steps": list(range(len(prompts))), "game": "chess"}

    trainer = make_trainer(rollout_func=sample, response_length=12, reward_funcs=reward)
    rows = [prompts[index] for index in range(3)]
    batch = trainer.sample(rows)
    trainer.score(rows, batch)
    assert seen["steps"] == [0, 1, 2] and seen["game"] == ["chess"] * 3
    assert seen["completions"] == ["said 0", "said 1", "said 2"]
    assert list(map(len, seen["action_mask"])) == list(map(len, seen["completion_ids"]))
    assert [row["completion"] for row in trainer.completions] == seen["completions"]
    chosen = [sum(mask) for mask in seen["action_mask"]]
    assert length_penalty(0.5, free=1)([], **seen) == [-0.5 * (count - 1) for count in chosen]


def test_a_tools_words_are_not_the_assistants():
    said = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "The answer is 7."},
        {"role": "assistant", "content": "It is 6."},
    ]
    assert completion_text(said) == "It is 6."


GOOD = {"prompt_ids": [[5, 6]], "completion_ids": [[30, 31, 32]], "env_mask": [[1, 0, 1]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": None}, "rollout_func must return prompt_ids and completion_ids; missing: completion_ids"),
        ({"prompt_ids": [[5], [6]]}, "rollout_func returned 2 prompt_ids for 1 prompts"),
        ({"is_ended": [True, True]}, "rollout_func returned 2 is_ended for 1 prompts"),
        ({"env_mask": [[1, 0]]}, "prompt 0: env_mask has 2 entries for 3 completion_ids"),
        ({"env_mask": [[1, 2, 0]]}, "prompt 0: env_mask must hold 0 and 1, got 2"),
        ({"prompt_ids": [[]]}, "prompt 0: prompt_ids is empty"),
        (
            {"completion_ids": [[30] * 9], "env_mask": None},
            "prompt 0: completion_ids has 9 tokens; response_length is 6",
        ),
        ({"prompt_ids": [[5] * 254]}, "prompt 0: 257 tokens; the model's context is 256"),
        ({"completion_ids": [[30, -1, 32]]}, "prompt 0: token -1 is none of the policy's 400"),
        ({"completion_ids": [[30, 31, 0]]}, "says that the policy chose token 0, which is never sampled"),
    ],
)
def test_what_no_policy_can_have_sampled_is_refused(make_trainer, prompts, changes, message):
    output = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    trainer = make_trainer(rollout_func=lambda prompts, trainer: output)
    with pytest.raises(InputError, match=message):
        trainer.sample([prompts[0]])


def test_an_end_token_of_the_policys_ends_an_episode_and_a_tools_does_not(make_trainer, prompts, tokenizer):
    end = tokenizer.eos_token_id
    output = {
        "prompt_ids": [[5]] * 4,
        "completion_ids": [[30, end], [30, end], [30, 31], []],
        "env_mask": [[1, 1], [1, 0], [1, 1], []],
    }
    trainer = make_trainer(rollout_func=lambda prompts, trainer: output)
    batch = trainer.sample([prompts[index] for index in range(4)])
    assert batch["is_ended"].tolist() == [True, False, False, False]


class Engine:
    """An engine that answers every prompt with two tokens."""

    def __init__(self, **settings):
        pass

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations):
        return prompts, [[40, 41]] * len(prompts), None, None


def test_a_function_may_sample_with_vllm(make_trainer, prompts, monkeypatch):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(trl_generation, "VLLMGeneration", Engine)
    trainer = make_trainer(use_vllm=True, max_steps=2, **TURNS)
    trainer.train()
    batch = trainer.sample([prompts[index] for index in range(4)])
    assert batch["response_ids"][:, :2].tolist() == [[40, 41]] * 4
    assert not batch["action_mask"][:, 2].any()
