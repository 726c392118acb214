"""PPO in environments with a state, with the meaning that `environment_factory` has in TRL."""

import pytest
import torch
from datasets import Dataset
from tool_tokenizer import make
from tools_run import CALLS, LOOKUP, PROMPTS, TOOLS, config_of, letters, opening

import hfllm
from hfllm.environments.tools import calculator
from hfllm.errors import InputError
from hfllm.trainers.ppo.trainer import PPOTrainer


class Desk:
    """What the tools of tools_run.py do, and a count of their calls."""

    def reset(self, **columns):
        self.calls, self.row = 0, columns

    def calculator(self, expression: str) -> str:
        """Work out a sum, such as 12 * (3 + 4).

        Args:
            expression: numbers with + - * / // % ** and parentheses.
        """
        self.calls += 1
        return calculator(expression)

    def lookup(self, key: str, attribute: str) -> str:
        """Look up what is known of something.

        Args:
            key: its name.
            attribute: what to look up of it.
        """
        self.calls += 1
        return LOOKUP(key, attribute)


class Talking(Desk):
    def reset(self, **columns):
        super().reset(**columns)
        return " Be quick."

    def get_reward(self):
        return float(self.calls)


@pytest.fixture(scope="module")
def tokens():
    return make()


@pytest.fixture
def make_agent(make_args, tokens):
    def make(factory=Desk, reward_funcs=letters, trainer_parts=None, train_dataset=None, **settings):
        torch.manual_seed(0)
        trainer = PPOTrainer(
            model=hfllm.HfllmForCausalLM(config_of(tokens)),
            reward_funcs=reward_funcs,
            args=make_args(**{"response_length": 150, "max_tool_calling_iterations": 2, **settings}),
            train_dataset=train_dataset or Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokens,
            environment_factory=factory,
            **(trainer_parts or {}),
        )
        trainer.continue_ids = opening(trainer)
        return trainer

    return make


def rows_of(trainer, count=6):
    return [trainer.train_dataset[row] for row in range(count)]


@pytest.mark.slow
def test_methods_that_do_what_functions_do_train_to_the_same_bits(make_agent):
    """So all that holds of tools holds of environments: what they say is read, and learned by nobody."""
    one = make_agent()
    one.train()
    other = make_agent(None, trainer_parts={"tools": TOOLS})
    other.train()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert (one._rollout.action_mask < one._rollout.response_mask).any()


def test_rewards_see_the_environments_as_they_end_and_the_prompts_as_they_were_read(make_agent, tokens):
    seen = {}

    def reward(prompts, completions, environments, **columns):
        seen.update(prompts=prompts, environments=environments, calls=[each.calls for each in environments])
        return [0.5] * len(prompts)

    trainer = make_agent(Talking, reward, reward_weights=[2.0])
    rows = rows_of(trainer)
    batch = trainer.sample(rows)
    scores = trainer.score(rows, batch)
    assert seen["calls"] == [1, 1, 0] * 2 and len({*map(id, seen["environments"])}) == 6
    assert [each.row["prompt"] for each in seen["environments"]] == [row["prompt"] for row in rows]
    texts = [row["prompt"][0]["content"] + " Be quick." for row in rows]
    assert [prompt[0]["content"] for prompt in seen["prompts"]] == texts
    read = [tokens.decode(ids[mask > 0]) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    assert all(f"<|user|>{text}<|end|>" in prompt for text, prompt in zip(texts, read, strict=True))
    assert scores.parts["Talking"].tolist() == [1.0, 1.0, 0.0] * 2
    assert scores.total.tolist() == [2.0, 2.0, 1.0] * 2
    assert scores.completions[0]["prompt"][0]["content"] == texts[0]


@pytest.mark.slow
def test_an_environments_own_reward_is_enough(make_agent):
    trainer = make_agent(Talking, None)
    trainer.train()
    logged = [entry["rewards/Talking"] for entry in trainer.state.log_history if "rewards/Talking" in entry]
    assert logged and all(0 <= value <= 2 for value in logged)
    with pytest.raises(InputError, match="reward_funcs is empty"):
        make_agent(Desk, None)


def test_a_reward_that_waits_is_awaited(make_agent):
    class Slow(Talking):
        async def get_reward(self):
            return 3.0

    trainer = make_agent(Slow, None)
    rows = rows_of(trainer, 3)
    assert trainer.score(rows, trainer.sample(rows)).total.tolist() == [3.0] * 3


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(make_agent, tmp_path):
    settings = {"max_steps": 4, "lr_scheduler_type": "cosine", "factory": Talking}
    whole = make_agent(**settings)
    whole.train()
    make_agent(output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=1, **settings).train()
    resumed = make_agent(output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.slow
def test_evaluation_and_training_take_turns(make_agent):
    parts = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:5]})}
    trainer = make_agent(Talking, trainer_parts=parts, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = [entry["eval_rewards/Talking"] for entry in trainer.state.log_history if "eval_rewards/Talking" in entry]
    assert logged == pytest.approx([logged[0]] * 4, abs=0.5) and logged[0] >= 4 / 5


def test_a_prompt_that_grew_too_long_is_refused(make_agent):
    class Endless(Talking):
        def reset(self, **columns):
            return " owl" * 200

    trainer = make_agent(Endless)
    with pytest.raises(InputError, match=r"after reset a prompt has .* the model's context of 256"):
        trainer.sample(rows_of(trainer))


def test_a_rollout_func_beside_it_is_refused(make_agent):
    with pytest.raises(InputError, match="environment_factory and rollout_func: give one of them"):
        make_agent(trainer_parts={"rollout_func": print})


@pytest.mark.parametrize("factory", [Talking, None])
def test_trl_makes_the_same_episodes(make_agent, tokens, tmp_path, factory, monkeypatch):
    """The same class, or functions, data and turns of the policy in GRPOTrainer: same tokens, masks and messages."""
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    twice = CALLS[0].removesuffix("<|end|>") + CALLS[0].removeprefix("See.")
    scripts = [[CALLS[0], "It is 36.<|end|>"], [twice, "So.<|end|>"], [CALLS[2]]]
    rows = Dataset.from_dict({"prompt": PROMPTS[:3], "number": [1, 2, 3]})
    parts = {"tools": None if factory else [TOOLS[0]]}
    ours = make_agent(factory, None if factory else letters, {**parts}, rows, per_device_train_batch_size=3)
    turns = iter([[script[0] for script in scripts], [script[1] for script in scripts[:2]]] * 2)

    def said(*_):
        return [tokens(text)["input_ids"] for text in next(turns)]

    ours.continue_ids = lambda sequences, most: [(ids, True) for ids in said()]
    batch = ours.sample([dict(row) for row in rows])

    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids)
        return [0.0] * len(prompts)

    args = {"max_completion_length": 150, "max_tool_calling_iterations": 2, "report_to": "none", "use_cpu": True}
    args |= {"per_device_train_batch_size": 3, "num_generations": 3, "bf16": False, "gradient_checkpointing": False}
    theirs = GRPOTrainer(
        model=hfllm.HfllmForCausalLM(config_of(tokens)),
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), **args),
        train_dataset=rows,
        processing_class=tokens,
        environment_factory=factory,
        **parts,
    )
    theirs._generate_single_turn = lambda *args, **kwargs: (said(), None)
    generated = theirs._generate_and_score_completions([dict(row) for row in rows])
    assert seen["completions"] == batch["completions"]
    lengths = batch["response_mask"].sum(1).tolist()
    assert seen["ids"] == [ids[:length].tolist() for ids, length in zip(batch["response_ids"], lengths, strict=True)]
    assert torch.equal(generated["tool_mask"] * generated["completion_mask"], batch["action_mask"])
    assert torch.equal(generated["prompt_ids"], batch["prompt_ids"])
    if factory:
        assert seen["prompts"] == batch["prompts"]
        assert [each.calls for each in theirs.environments] == [each.calls for each in ours.environment.states.current]
