"""Policy, critic, reference and reward model on one base compute what separate copies do."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from hfllm.errors import InputError
from hfllm.models.loading.adapters import load_base, put_on
from hfllm.rewards.models import RewardEnsemble, RewardModel
from hfllm.trainers.ppo import shared_base
from hfllm.trainers.ppo.actor_critic import ActorCritic
from hfllm.trainers.ppo.setup import as_reference
from hfllm.trainers.ppo.shared_base import CRITIC, AdapterReward, active, put_critic_on, saved_scorer

LORA = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PROMPTS = ["Say red.", "What is 1 plus 2?", "The fox"]
COMPLETIONS = [" A red hat.", " 3", " is in the wood today"]


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def scorer(base, tokenizer, tmp_path):
    """An adapter for scores of that base, as `hfllm reward --use_peft` saves it."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(**{**LORA, "r": 3}, task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    return str(tmp_path / "scorer")


@pytest.fixture
def make_policy(make_model, base):
    def make():
        torch.manual_seed(2)
        model = type(make_model()).from_pretrained(base)
        return get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))

    return make


def apart(name):
    """The same scorer with a base of its own, its adapter not merged."""
    saved = saved_scorer(name)
    model, _ = load_base(saved, AutoModelForSequenceClassification, num_labels=1, dtype=torch.float32)
    return put_on(model, saved)


def batch(tokenizer):
    rows = [tokenizer(text)["input_ids"][:5] for text in COMPLETIONS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(5, 60, (3, 6), generator=generator)
    return {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "response_ids": response,
        "response_mask": torch.ones_like(response),
    }


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_reward_scores_with_the_bits_of_a_separate_model(make_policy, scorer, tokenizer):
    policy = make_policy()
    before, learns = policy(torch.tensor([[5, 6, 7]])).logits, trained(policy)
    reward = AdapterReward(scorer, tokenizer)
    with pytest.raises(InputError, match="is on no policy yet: PPOTrainer"):
        reward(PROMPTS, COMPLETIONS)
    reward.put_on(policy)
    separate = RewardModel(apart(scorer), tokenizer)
    assert reward(PROMPTS, COMPLETIONS) == separate(PROMPTS, COMPLETIONS)
    assert len(set(reward(PROMPTS, COMPLETIONS))) == 3
    assert trained(policy) == learns and policy.active_adapter == "default"
    assert torch.equal(policy(torch.tensor([[5, 6, 7]])).logits, before)


def test_two_rewards_and_a_critic_take_turns(make_policy, scorer, tokenizer):
    policy = make_policy()
    critic, rewards = put_critic_on(policy, None), [AdapterReward(scorer, tokenizer) for _ in range(2)]
    for reward in rewards:
        reward.put_on(policy)
    assert rewards[0](PROMPTS, COMPLETIONS) == rewards[1](PROMPTS, COMPLETIONS)
    assert sorted(policy.peft_config) == [CRITIC, "default", "reward_0", "reward_1"]
    own = {id(each) for each in critic.own_parameters()}
    assert own and all(each.requires_grad for each in critic.own_parameters())
    names = {name for name in trained(policy) if id(policy.get_parameter(name)) not in own}
    assert names and all(".default." in name for name in names)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_have_the_bits_of_separate_copies(make_policy, scorer, tokenizer, checkpoints):
    policy = make_policy()
    actor = ActorCritic(policy, put_critic_on(policy, scorer), 1.0, [0])
    inputs = batch(tokenizer)
    policy_apart, critic_apart = make_policy(), apart(scorer).train()
    for name, parameter in critic_apart.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    separate = ActorCritic(policy_apart, critic_apart.base_model.model, 1.0, [0])
    for each in (actor, separate):
        each.train()
        if checkpoints:
            each.activation_checkpointing_enable()
        logprobs, values, _ = each(**inputs)
        with torch.no_grad(), as_reference(each.policy):
            each.judge(each.policy, **inputs)
        (logprobs.sum() + (values**2).sum()).backward()
        each.results = logprobs, values
    for ours, theirs in zip(actor.results, separate.results, strict=True):
        assert torch.equal(ours, theirs)
    grads = {name: each.grad for name, each in policy_apart.named_parameters() if each.requires_grad}
    own = {name: each.grad for name, each in policy.named_parameters() if ".default." in name}
    assert grads.keys() == own.keys() and all(torch.equal(grads[name], own[name]) for name in own)
    theirs = {name: each.grad for name, each in critic_apart.named_parameters() if "lora_" in name}
    ours = {name: each.grad for name, each in policy.named_parameters() if f".{CRITIC}." in name}
    assert len(ours) == len(theirs) > 0
    for name, grad in ours.items():
        assert torch.equal(grad, theirs[name.replace(f".{CRITIC}.", ".default.")]) and grad.abs().sum() > 0
    head = critic_apart.base_model.model.score.modules_to_save["default"].weight.grad
    assert torch.equal(actor.value_model.score.weight.grad, head)


def test_a_run_trains_each_adapter_and_resumes_to_the_bit(make_trainer, make_policy, scorer, tokenizer, tmp_path):
    def run(folder, **kwargs):
        options = {"shared_base": True, "value_model": scorer, "reward_funcs": scorer, "save_strategy": "steps"}
        trainer = make_trainer(model=make_policy(), output_dir=str(tmp_path / folder), save_steps=2, **options)
        start = copy.deepcopy(trainer.policy.state_dict())
        trainer.train(**kwargs)
        return trainer, start

    trainer, start = run("run")
    end = trainer.policy.state_dict()
    moved = {name.split(".")[-2] for name in end if not torch.equal(end[name], start[name])}
    assert moved == {"default", CRITIC}
    assert next(row for row in trainer.state.log_history if "kl" in row)["kl"] == pytest.approx(0, abs=1e-5)
    again, _ = run("again", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, end[name]) for name, value in again.policy.state_dict().items())
    assert torch.equal(again.actor.value_model.score.weight, trainer.actor.value_model.score.weight)
    trainer.save_model(str(tmp_path / "saved"))
    saved = PeftModel.from_pretrained(make_policy().get_base_model(), tmp_path / "saved")
    ids = torch.tensor([[5, 9, 40, 41]])
    assert torch.equal(saved(ids).logits, trainer.policy.eval()(ids).logits)
    # The critic is an adapter for scores like any other.
    critic = apart(str(tmp_path / "saved" / "value_model"))
    assert torch.equal(critic(ids).logits, trainer.actor.value_model(input_ids=ids).logits)


def test_a_new_critic_learns_beside_a_new_adapter(make_trainer, base, make_model):
    config = LoraConfig(**{**LORA, "init_lora_weights": True}, task_type="CAUSAL_LM")
    trainer = make_trainer(model=str(base), peft_config=config, shared_base=True)
    assert trainer.reference is None and trainer.args.value_learning_rate == pytest.approx(3e-3)
    trainer.train()
    assert trainer.actor.value_model.score.weight.abs().sum() > 0
    rows = [row for row in trainer.state.log_history if "kl" in row]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and abs(rows[-1]["kl"]) > 0


def test_members_of_an_ensemble_share_the_base_too(make_trainer, make_policy, scorer, tokenizer):
    ensemble = RewardEnsemble([AdapterReward(scorer, tokenizer), AdapterReward(scorer, tokenizer)], "mean")
    trainer = make_trainer(model=make_policy(), shared_base=True, reward_funcs=ensemble, max_steps=2)
    trainer.train()
    assert sorted(trainer.policy.peft_config) == [CRITIC, "default", "ref", "reward_0", "reward_1"]
    separate = RewardModel(apart(scorer), tokenizer)(PROMPTS, COMPLETIONS)
    assert ensemble(PROMPTS, COMPLETIONS) == pytest.approx(separate, rel=1e-6)


def test_what_shares_no_base_is_refused(make_trainer, make_model, make_policy, scorer, base, tokenizer, tmp_path):
    with pytest.raises(InputError, match="needs a policy with an adapter"):
        make_trainer(shared_base=True)
    with pytest.raises(InputError, match="is a whole model: shared_base=True takes the name"):
        whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        make_trainer(model=make_policy(), shared_base=True, value_model=whole)
    with pytest.raises(InputError, match="is no adapter: shared_base takes adapters"):
        make_trainer(model=make_policy(), shared_base=True, reward_funcs=str(base))
    other = get_peft_model(make_model(), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="adapters of the same base"):
        make_trainer(model=other, shared_base=True, reward_funcs=scorer)
    policy = make_policy()
    policy.add_adapter(CRITIC, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="'critic' already"):
        put_critic_on(policy, None)
    several = make_policy()
    several.add_adapter("second", LoraConfig(**LORA, task_type="CAUSAL_LM"))
    several.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="adapters default, second are active: activate one"):
        make_trainer(model=several, shared_base=True, kl_coef=0.0)
    trained_policy = make_policy()
    trained_policy.save_pretrained(tmp_path / "writer")
    with pytest.raises(InputError, match="expected SEQ_CLS"):
        put_critic_on(make_policy(), str(tmp_path / "writer"))


def test_a_pass_under_another_adapter_leaves_what_is_trained(make_policy, scorer):
    policy = make_policy()
    put_critic_on(policy, scorer)
    learns = trained(policy)
    with active(policy, CRITIC):
        assert trained(policy) == learns
    with as_reference(policy):
        pass
    assert trained(policy) == learns and shared_base.CRITIC in policy.peft_config
