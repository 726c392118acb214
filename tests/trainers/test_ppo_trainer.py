"""What TRL's last PPO got wrong is right here."""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

import hfllm
from hfllm.errors import InputError
from hfllm.trainers.ppo import sampling
from hfllm.trainers.ppo.setup import split_reference


def rows_of(dataset, count):
    return [dataset[index] for index in range(count)]


def value_model_of(make_model):
    return make_model(seed=5, model_class=hfllm.HfllmForSequenceClassification, num_labels=1)


class StepCounter(TrainerCallback):
    def __init__(self):
        self.steps, self.learning_rates = 0, []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.steps += 1
        self.learning_rates.append(optimizer.param_groups[0]["lr"])


# ---- optimizer steps ----


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "mini_batches", "accumulation"), [(1, 1, 1), (2, 3, 1), (3, 2, 2)])
def test_a_rollout_gives_exactly_epochs_times_mini_batches_steps(
    make_trainer, prompts, epochs, mini_batches, accumulation
):
    counter = StepCounter()
    trainer = make_trainer(
        num_ppo_epochs=epochs,
        num_mini_batches=mini_batches,
        gradient_accumulation_steps=accumulation,
        max_steps=-1,
        num_train_epochs=1,
        callbacks=[counter],
    )
    rollouts = []
    collect = trainer.collect_rollout
    trainer.collect_rollout = lambda rows: rollouts.append(len(rows)) or collect(rows)
    trainer.train()
    episodes = 2 * accumulation * mini_batches
    assert rollouts == [episodes] * math.ceil(len(prompts) / episodes)
    assert counter.steps == trainer.state.global_step == len(rollouts) * epochs * mini_batches


def test_every_episode_is_used_once_an_epoch(make_trainer, prompts):
    trainer = make_trainer(num_mini_batches=2, num_ppo_epochs=3)
    rollout = trainer.collect_rollout(rows_of(prompts, 8))
    for epoch in range(3):
        seen = [
            tuple(ids)
            for mini_batch in range(2)
            for micro in range(2)
            for ids in rollout.micro_batch(epoch * 2 + mini_batch, micro, 2)["response_ids"].tolist()
        ]
        assert len(seen) == 8
        assert sorted(rollout.order[epoch].tolist()) == list(range(8))
        tokens = sum(rollout.micro_batch(epoch * 2, micro, 2)["response_mask"].sum() for micro in range(2))
        assert rollout.mini_batch_tokens[epoch, 0] == tokens


def test_total_episodes_sets_the_steps(make_trainer):
    trainer = make_trainer(total_episodes=10, num_ppo_epochs=3, max_steps=-1)
    assert trainer.args.max_steps == 3 * 3  # ten episodes are three rollouts of four


@pytest.mark.slow
def test_learning_rate_schedule_and_logging_steps_are_obeyed(make_trainer):
    counter = StepCounter()
    trainer = make_trainer(max_steps=4, lr_scheduler_type="linear", logging_steps=2, callbacks=[counter])
    trainer.train()
    assert counter.learning_rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [entry["step"] for entry in trainer.state.log_history if "kl" in entry] == [2, 4]


@pytest.mark.slow
def test_max_grad_norm_is_obeyed(make_trainer):
    norms = []

    class GradientNorm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    for max_grad_norm in (1e-3, 0.0):
        norms.clear()
        make_trainer(max_grad_norm=max_grad_norm, max_steps=2, callbacks=[GradientNorm()]).train()
        if max_grad_norm:
            assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
        else:
            assert min(norms) > 1e-2


@pytest.mark.slow
def test_activation_checkpointing_recomputes_and_changes_nothing(make_trainer, make_model, prompts):
    def gradients(checkpointing):
        trainer = make_trainer(value_model=value_model_of(make_model), activation_checkpointing=checkpointing)
        forwards = []
        trainer.policy.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        rollout = trainer.collect_rollout(rows_of(prompts, 4))
        if checkpointing:
            trainer.model.activation_checkpointing_enable()
        forwards.clear()
        trainer.model.train()
        trainer.compute_loss(trainer.model, rollout.micro_batch(0, 0, 4)).backward()
        return len(forwards), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]

    once, plain = gradients(False)
    twice, recomputed = gradients(True)
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(plain, recomputed)


@pytest.mark.slow
def test_activation_checkpointing_trains_to_the_same_weights(make_trainer, monkeypatch):
    # Its hooks leave the samples to `generate`, which draws others.
    monkeypatch.setattr(sampling, "undecodable_reason", lambda *given: "of this test")

    def weights(**kwargs):
        trainer = make_trainer(max_steps=2, **kwargs)
        trainer.train()
        return trainer.policy.lm_head.weight.detach()

    expected = weights()
    torch.testing.assert_close(weights(activation_checkpointing=True), expected)
    torch.testing.assert_close(weights(gradient_checkpointing=True), expected)


@pytest.mark.slow
def test_bf16_is_obeyed(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=1)
    seen = []
    trainer.policy.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    trainer.train()
    assert seen[-1] == torch.bfloat16
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


# ---- the gradient ----


def gradient(trainer, rollout, micro_batch_size, episodes=8):
    trainer.model.zero_grad()
    trainer.model.train()
    for micro in range(episodes // micro_batch_size):
        trainer.compute_loss(trainer.model, rollout.micro_batch(0, micro, micro_batch_size)).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("separate_value_model", [False, True])
def test_the_gradient_is_the_same_for_any_split_into_micro_batches(
    make_trainer, make_model, prompts, separate_value_model
):
    value_model = value_model_of(make_model) if separate_value_model else None
    trainer = make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=1, value_model=value_model)
    rollout = trainer.collect_rollout(rows_of(prompts, 8))
    # Away from the sampling policy, so that the ratio and both clips matter.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole = gradient(trainer, rollout, 8)
    assert any(value.abs().max() > 1e-3 for value in whole.values())
    for size in (1, 2, 4):
        torch.testing.assert_close(gradient(trainer, rollout, size), whole, atol=1e-5, rtol=1e-4)


def test_before_the_first_update_ratio_is_one_and_kl_and_clip_fraction_are_zero(make_trainer):
    trainer = make_trainer(max_steps=1, num_ppo_epochs=1, gradient_accumulation_steps=2)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert first["clip_fraction"] == first["value_clip_fraction"] == 0


def test_after_an_update_the_kl_to_the_reference_is_above_zero(make_trainer, prompts):
    trainer = make_trainer(max_steps=2, learning_rate=1e-2)
    trainer.train()
    tokens = trainer.evaluate_tokens(trainer.sample(rows_of(prompts, 4)))
    assert (tokens.logprobs - tokens.ref_logprobs).abs().max() > 1e-3


def test_the_reference_survives_a_forward_bound_to_the_model(make_model):
    model = make_model()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # what TRL's SFTTrainer leaves behind
    reference, policy = split_reference(model, None)
    ids = torch.tensor([[7, 8, 9]])
    before = reference(ids).logits.clone()
    torch.testing.assert_close(before, policy(ids).logits)
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    torch.testing.assert_close(reference(ids).logits, before)
    assert not torch.allclose(policy(ids).logits, before)
    assert torch.allclose(copy.deepcopy(model)(ids).logits, policy(ids).logits)  # the trap itself


# ---- padding and the end of responses ----


def test_logprobs_of_generation_are_those_of_a_forward_pass(make_trainer, prompts, tokenizer):
    trainer = make_trainer(response_length=8, temperature=0.7)
    batch = trainer.sample(rows_of(prompts, 6))
    output = trainer.policy.generate(
        input_ids=batch["prompt_ids"],
        attention_mask=batch["prompt_mask"],
        generation_config=trainer.sampling_config,
        output_scores=True,
        return_dict_in_generate=True,
    )
    response = output.sequences[:, batch["prompt_ids"].shape[1] :]
    sampled = torch.stack(output.scores, dim=1).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
    ended = torch.isin(response, torch.tensor(trainer.eos_token_ids)).long()
    mask = (ended.cumsum(1) - ended == 0).long()
    logprobs = trainer.evaluate_tokens({**batch, "response_ids": response, "response_mask": mask}).logprobs
    torch.testing.assert_close(logprobs * mask, sampled.masked_fill(mask == 0, 0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("separate_value_model", [False, True])
def test_padding_changes_nothing(make_trainer, make_model, prompts, tokenizer, separate_value_model):
    """Each row alone, without any padding, gives what it gives in a padded batch."""
    value_model = value_model_of(make_model) if separate_value_model else None
    trainer = make_trainer(value_model=value_model, response_length=8)
    if not separate_value_model:
        torch.nn.init.normal_(trainer.actor.value_head.weight)
    batch = trainer.sample(rows_of(prompts, 6))
    batch["response_mask"] = torch.tensor([[1] * n + [0] * (8 - n) for n in (8, 1, 3, 5, 8, 2)])
    padded = trainer.evaluate_tokens(batch)
    for row in range(6):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] > 0]
        response = batch["response_ids"][row][batch["response_mask"][row] > 0]
        alone = trainer.evaluate_tokens(
            {
                "prompt_ids": prompt.unsqueeze(0),
                "prompt_mask": torch.ones_like(prompt).unsqueeze(0),
                "response_ids": response.unsqueeze(0),
                "response_mask": torch.ones_like(response).unsqueeze(0),
            }
        )
        for in_batch, by_itself in zip(padded, alone, strict=True):
            torch.testing.assert_close(in_batch[row, : len(response)], by_itself[0], atol=1e-5, rtol=1e-4)
            assert (in_batch[row, len(response) :] == 0).all()


@pytest.mark.slow
def test_the_tokenizers_padding_side_changes_nothing(make_trainer, make_model, prompts, tokenizer, monkeypatch):
    def train(padding_side):
        monkeypatch.setattr(tokenizer, "padding_side", padding_side)
        reward = make_model(seed=9, model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
        trainer = make_trainer(reward_funcs=reward, reward_processing_classes=tokenizer, max_steps=2)
        trainer.train()
        return trainer.policy.lm_head.weight.detach()

    assert torch.equal(train("left"), train("right"))


def test_padding_is_never_sampled_and_has_no_probability(make_trainer, make_model, prompts, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.pad_token_id] = 10 * model.lm_head.weight.abs().max()
    trainer = make_trainer(model=model, response_length=12)
    batch = trainer.sample(rows_of(prompts, 12))
    real = batch["response_ids"][batch["response_mask"] > 0]
    assert (real != tokenizer.pad_token_id).all()
    tokens = trainer.evaluate_tokens(batch)
    assert torch.isfinite(tokens.logprobs).all()
    assert torch.isfinite(tokens.entropy).all()


@pytest.mark.parametrize("always_end", [True, False])
def test_empty_and_unfinished_responses_are_finite_and_penalized(
    make_trainer, make_model, prompts, tokenizer, always_end
):
    class Forced(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden):
            logits = self.head(hidden)
            bias = torch.zeros(logits.shape[-1])
            bias[tokenizer.eos_token_id] = 1e4 if always_end else -1e4
            return logits + bias

    model = make_model()
    model.lm_head = Forced(model.lm_head)
    trainer = make_trainer(reward_funcs=lambda completions, **_: [1.0] * len(completions), missing_eos_penalty=3.0)
    trainer.model.policy.lm_head = model.lm_head
    trainer.reference.lm_head = model.lm_head
    rows = rows_of(prompts, 4)
    rollout = trainer.collect_rollout(rows)
    assert rollout.response_mask.sum(1).tolist() == ([1] * 4 if always_end else [6] * 4)
    assert trainer.completions[0]["reward"] == (1.0 if always_end else -2.0)
    loss = trainer.compute_loss(trainer.model, rollout.micro_batch(0, 0, 4))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(getattr(rollout, name)).all() for name in rollout.PER_EPISODE)


# ---- rewards ----


def test_rewards_are_weighted_and_see_the_columns(make_trainer, prompts):
    dataset = prompts.add_column("bonus", list(range(12)))

    def bonus(prompts, completions, bonus, **_):
        return [float(value) for value in bonus]

    def one(completions, **_):
        return [1.0] * len(completions)

    trainer = make_trainer(reward_funcs=[bonus, one], train_dataset=dataset, reward_weights=[0.5, -2.0])
    rows = rows_of(dataset, 4)
    assert trainer.score(rows, trainer.sample(rows)).total.tolist() == [-2.0, -1.5, -1.0, -0.5]


@pytest.mark.slow
def test_a_reward_of_weight_zero_is_logged_and_not_trained_on(make_trainer):
    def train(reward_funcs, **kwargs):
        trainer = make_trainer(reward_funcs=reward_funcs, **kwargs)
        trainer.train()
        return trainer

    def gold(completions, **_):
        return [float(len(completion)) for completion in completions]

    def proxy(completions, **_):
        return [1.0 if "a" in completion else 0.0 for completion in completions]

    alone = train(proxy)
    beside = train([proxy, gold], reward_weights=[1.0, 0.0])
    assert torch.equal(alone.policy.lm_head.weight, beside.policy.lm_head.weight)
    assert any("rewards/gold" in entry for entry in beside.state.log_history)


def test_conversational_prompts_use_the_chat_template(make_trainer, tokenizer):
    from datasets import Dataset

    seen = []

    def reward(prompts, completions, **_):
        seen.append((prompts[0], completions[0]))
        return [0.0] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": "Say red."}]}] * 4
    trainer = make_trainer(reward_funcs=reward, train_dataset=Dataset.from_list(rows))
    batch = trainer.sample(rows)
    trainer.score(rows, batch)
    assert tokenizer.decode(batch["prompt_ids"][0]) == "<|user|>Say red.<|end|><|assistant|>"
    (prompt, completion), *_ = seen
    assert prompt == rows[0]["prompt"]
    assert completion[0]["role"] == "assistant"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (lambda count: [1.0] * (count - 1), "returned 3 values for 4 completions"),
        (lambda count: [1.0, float("nan")] + [0.0] * (count - 2), "returned nan for completion 1"),
        (lambda count: ["high"] * count, "returned 'high'"),
        (lambda count: 1.0, "expected a list of 4 numbers"),
    ],
)
def test_bad_rewards_are_refused_by_name(make_trainer, prompts, returned, complaint):
    def crooked(completions, **_):
        return returned(len(completions))

    trainer = make_trainer(reward_funcs=crooked)
    with pytest.raises(InputError, match="crooked") as error:
        trainer.collect_rollout(rows_of(prompts, 4))
    assert complaint in str(error.value)


# ---- bad input ----


def test_bad_input_is_refused_before_training(make_trainer, make_args, prompts, tokenizer):
    from datasets import Dataset

    with pytest.raises(InputError, match=r"prompt 1 of the dataset has \d+ tokens.*context of 256"):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": ["Hi", "red fox " * 300]}))
    with pytest.raises(InputError, match="no column 'prompt'; it has: text"):
        make_trainer(train_dataset=Dataset.from_dict({"text": ["Hi"]}))
    with pytest.raises(InputError, match="empty"):
        make_trainer(train_dataset=prompts.select([]))
    with pytest.raises(InputError, match="2 reward_weights for 1 reward_funcs"):
        make_trainer(reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="fp16 does nothing on a CPU"):
        make_args(fp16=True)
    with pytest.raises(ValueError, match="total_episodes=8 and max_steps=4: give one of them"):
        make_args(total_episodes=8)
    with pytest.raises(ValueError, match="kl_estimator='k9'"):
        make_args(kl_estimator="k9")
    for token in ("pad_token", "eos_token"):
        broken = copy.deepcopy(tokenizer)
        setattr(broken, token, None)
        with pytest.raises(InputError, match=token.replace("_token", "") if token == "eos_token" else "padding token"):
            from hfllm.trainers.ppo.setup import special_tokens

            special_tokens(broken, make_trainer().policy, make_args())


def test_dropout_is_switched_off_wherever_a_model_keeps_it(make_trainer, make_args):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.5,
        pad_token_id=0,
    )
    trainer = make_trainer(model=LlamaForCausalLM(config), max_steps=1)
    policy = trainer.policy.train()
    ids = torch.randint(5, 300, (1, 9))
    assert torch.equal(policy(ids).logits, policy(ids).logits)


def test_two_rewards_of_one_name_are_logged_apart(make_trainer):
    def constant(value):
        def same(completions, **_):
            return [value] * len(completions)

        return same

    trainer = make_trainer(reward_funcs=[constant(1.0), constant(3.0)], max_steps=1)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert (logged["rewards/same"], logged["rewards/same_2"], logged["reward"]) == (1.0, 3.0, 4.0)


# ---- evaluation, saving ----


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(make_trainer, prompts, tmp_path):
    trainer = make_trainer(
        max_steps=4,
        eval_dataset=prompts,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="response_length",
        greater_is_better=False,
    )
    trainer.train()
    from transformers import AutoModelForCausalLM

    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(best.lm_head.weight, trainer.policy.lm_head.weight)


@pytest.mark.slow
def test_evaluation_does_not_disturb_training(make_trainer, prompts):
    plain = make_trainer(max_steps=4)
    plain.train()
    watched = make_trainer(max_steps=4, eval_dataset=prompts, eval_strategy="steps", eval_steps=1)
    watched.train()
    assert torch.equal(plain.policy.lm_head.weight, watched.policy.lm_head.weight)
    metrics = watched.evaluate()
    assert {"eval_reward", "eval_kl", "eval_entropy", "eval_response_length"} <= set(metrics)
    assert metrics["eval_reward"] == watched.evaluate()["eval_reward"]
    # What it keeps of each prompt: the errors of a report rest on it.
    values, said = watched.eval_values, watched.eval_completions
    assert [row["prompt"] for row in said] == prompts["prompt"]
    assert values["reward"] == pytest.approx([row["reward"] for row in said])
    for name in ("reward", "kl", "response_length", "unfinished"):
        assert len(values[name]) == len(prompts)
        assert sum(values[name]) / len(prompts) == pytest.approx(metrics[f"eval_{name}"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("separate_value_model", [False, True])
def test_the_saved_policy_loads_with_auto_classes(make_trainer, make_model, tmp_path, separate_value_model):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    trainer = make_trainer(max_steps=1, value_model=value_model_of(make_model) if separate_value_model else None)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == trainer.processing_class.chat_template
    if separate_value_model:
        critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "value_model")
        assert torch.equal(critic.score.weight, trainer.actor.value_model.score.weight)


@pytest.mark.slow
def test_lora_trains_the_adapter_against_the_model_without_it(make_trainer, tmp_path):
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=config, learning_rate=5e-2, max_steps=4)
    base = trainer.policy.base_model.model.lm_head.weight.clone()
    assert trainer.reference is None
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[-1] != pytest.approx(0, abs=1e-4)
    assert torch.equal(base, trainer.policy.base_model.model.lm_head.weight)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert isinstance(trainer.policy, PeftModel)


def test_a_model_with_an_adapter_gets_no_second_one(make_trainer, make_model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="model has an adapter already: leave peft_config out"):
        make_trainer(model=get_peft_model(make_model(), config), peft_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "separate"])
def test_what_sampling_saw_is_not_asked_again_unless_it_is_wrong(
    make_trainer, make_model, prompts, value, monkeypatch
):
    model = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1) if value else None
    rows = [prompts[index] for index in range(8)]
    trainer = make_trainer(value_model=model)
    batch = trainer.sample(rows)
    plain = trainer.evaluate_tokens({**batch, "witness": None})
    assert trainer._trusted == {}
    torch.testing.assert_close(trainer.evaluate_tokens(batch), plain, atol=1e-5, rtol=1e-5)
    assert trainer._trusted == {"padded": True}
    calls, forward = [], trainer.actor.forward
    monkeypatch.setattr(trainer.actor, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    torch.testing.assert_close(trainer.evaluate_tokens(batch), plain, atol=1e-5, rtol=1e-5)
    assert not calls
    # What was found right with padding says nothing of prompts without.
    trainer.evaluate_tokens(trainer.sample([rows[0]] * 4))
    assert calls and trainer._trusted == {"padded": True, "unpadded": True}

    liar = make_trainer(value_model=model)
    batch = liar.sample(rows)
    batch["witness"].logprobs += 0.1
    torch.testing.assert_close(liar.evaluate_tokens(batch), plain, atol=1e-5, rtol=1e-5)
    assert liar._trusted == {"padded": False}
    again = liar.sample(rows)
    again["witness"].logprobs += 0.1
    expected = liar.evaluate_tokens({**again, "witness": None})
    torch.testing.assert_close(liar.evaluate_tokens(again), expected, atol=1e-5, rtol=1e-5)

    # Wrong values alone are found too, where a head on the trunk gives them.
    liar = make_trainer(value_model=model)
    batch = liar.sample(rows)
    batch["witness"].values += 0.1
    torch.testing.assert_close(liar.evaluate_tokens(batch), plain, atol=1e-5, rtol=1e-5)
    assert liar._trusted == {"padded": value is not None}


def test_in_bfloat16_the_policy_is_at_no_distance_from_itself(make_trainer, prompts):
    trainer = make_trainer(bf16=True, learning_rate=0.0, kl_estimator="k1")
    batch = trainer.sample([prompts[index] for index in range(8)])
    tokens = trainer.evaluate_tokens(batch)
    torch.testing.assert_close(tokens.ref_logprobs, tokens.logprobs, atol=2e-3, rtol=0)


def test_a_policy_loaded_in_bfloat16_is_at_no_distance_from_its_reference(make_trainer, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    trainer = make_trainer(str(tmp_path), model_init_kwargs={"dtype": "bfloat16"}, kl_estimator="k1")
    ids = torch.randint(10, 300, (4, 250), generator=torch.Generator().manual_seed(0))
    parts = {"prompt_ids": ids[:, :10], "response_ids": ids[:, 10:]}
    masks = {name.replace("ids", "mask"): torch.ones_like(part) for name, part in parts.items()}
    tokens = trainer.evaluate_tokens({**parts, **masks})
    assert trainer.reference.dtype == torch.bfloat16
    assert tokens.logprobs.any() and not tokens.kl.any()


def test_nothing_that_a_trainer_reports_holds_the_token_that_loaded_the_policy(make_trainer, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "policy")
    trainer = make_trainer(str(tmp_path / "policy"), model_init_kwargs={"token": "kept-to-myself", "revision": "v1"})
    # As TensorBoard and others get them.
    assert "v1" in trainer.args.to_json_string() and "kept-to-myself" not in trainer.args.to_json_string()


class Counted(torch.utils.data.Dataset):
    """Rows that note when they are fetched and moved; `together` is how datasets of the Hub fetch a batch."""

    def __init__(self, rows, together):
        self.rows, self.fetched, self.moved = rows, [], []
        if together:
            self.__getitems__ = lambda places: [self[place] for place in places]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        self.fetched.append(place)
        return {**self.rows[place], "place": place, "value": Moved(self.moved, place)}


class Moved(float):
    def __new__(cls, log, place):
        value = super().__new__(cls, place)
        value.log = log
        return value

    def to(self, device, **_):
        self.log.append(int(self))
        return self


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False])
def test_rows_are_fetched_and_moved_once_for_each_rollout(make_trainer, prompts, together):
    seen = []

    def reward(prompts, completions, place, value, **columns):
        seen.append((list(place), prompts))
        assert value == place
        return [float(len(each)) for each in completions]

    rows = Counted([dict(row) for row in prompts], together)
    trainer = make_trainer(reward_funcs=reward, train_dataset=rows, max_steps=8)
    rows.fetched.clear()
    trainer.train()
    rollouts = -(-8 // trainer.args.steps_per_rollout)
    assert trainer.args.steps_per_rollout > 1 and len(seen) == rollouts > 1
    asked = [place for places, _ in seen for place in places]
    # The loader looks one batch ahead.
    assert rows.fetched[: len(asked)] == asked == rows.moved[: len(asked)]
    assert len(rows.fetched) <= len(asked) + len(seen[0][0])
    for places, texts in seen:
        assert texts == [prompts[place]["prompt"] for place in places]
        assert len({*places}) == len(places)


def test_asking_for_the_policy_looks_for_no_engine(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", None)
    assert trainer.policy is trainer.actor.policy is trainer.model.policy
