"""PPO with tools: what they say is read, what was called is trained, and the rewards see the conversation."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import trl.generation.vllm_generation as trl_generation
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from test_distributed import ROOT, launch, rewards_in, same_weights
from tool_tokenizer import make
from tools_run import CALLS, PROMPTS, TOOLS, config_of, letters, opening
from trl import import_utils

import hfllm
from hfllm.environments.tools import ToolBox, as_content, calculator
from hfllm.errors import InputError
from hfllm.generation.packed.ragged_model import RaggedModel
from hfllm.generation.packed.turns import Turns
from hfllm.outputs.checkpoints import last_complete_checkpoint
from hfllm.trainers.ppo import sampling
from hfllm.trainers.ppo.sampling import SampledLogprobs, TurnCaches
from hfllm.trainers.ppo.trainer import PPOTrainer

RUN = Path(__file__).parent / "tools_run.py"


@pytest.fixture(scope="module")
def tokens():
    return make()


@pytest.fixture
def make_agent(make_args, tokens):
    """A trainer whose policy opens each episode by a call, or an answer, that depends on the prompt."""

    def make(is_scripted=True, tools=TOOLS, train_dataset=None, reward_funcs=letters, trainer_parts=None, **settings):
        torch.manual_seed(0)
        trainer = PPOTrainer(
            model=hfllm.HfllmForCausalLM(config_of(tokens)),
            reward_funcs=reward_funcs,
            args=make_args(**{"response_length": 150, "max_tool_calling_iterations": 2, **settings}),
            train_dataset=train_dataset or Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokens,
            tools=tools,
            **(trainer_parts or {}),
        )
        if is_scripted:
            trainer.continue_ids = opening(trainer)
        return trainer

    return make


def rows_of(trainer, count=6):
    return [trainer.train_dataset[row] for row in range(count)]


def test_rewards_see_the_conversation_and_the_policy_its_tokens(make_agent, tokens):
    seen = {}

    def reward(prompts, completions, completion_ids, action_mask, **columns):
        seen.update(completions=completions, ids=completion_ids, mask=action_mask, columns=columns)
        return [0.0] * len(prompts)

    trainer = make_agent(reward_funcs=reward)
    rows = rows_of(trainer)
    batch = trainer.sample(rows)
    trainer.score(rows, batch)
    assert [message["role"] for message in seen["completions"][0]][:2] == ["assistant", "tool"]
    assert seen["completions"][0][0]["content"] == "See." and seen["completions"][0][1]["content"] == "36"
    assert seen["completions"][2] == [{"role": "assistant", "content": "The owl."}]
    for row, (ids, mask) in enumerate(zip(seen["ids"], seen["mask"], strict=True)):
        length = len(ids)
        assert batch["response_ids"][row, :length].tolist() == ids
        assert batch["action_mask"][row, :length].tolist() == mask and not batch["action_mask"][row, length:].any()
        told = tokens.decode([token for token, chosen in zip(ids, mask, strict=True) if not chosen])
        expected = (
            "<|tool|>36<|end|><|assistant|>",
            "<|tool|>gray<|end|><|assistant|>I am right.<|end|><|assistant|>",
            "",
        )
        assert told == expected[row % 3]
        # The words of a tool are no turns: only the template's own tokens are.
        turns = sum(
            token == tokens.convert_tokens_to_ids("<|assistant|>")
            for token, chosen in zip(ids, mask, strict=True)
            if not chosen
        )
        assert turns == (row % 3 < 2)
    assert seen["columns"]["tools"][0] == trainer.environment.schemas
    assert "tool: 36" in trainer.completions[0]["completion"]
    assert 'assistant calls calculator: {"expression": "12*3"}' in trainer.completions[0]["completion"]
    logged = {name: torch.cat(values).tolist() for name, values in trainer._metrics.items()}
    assert logged["tools/call_frequency"] == [1.0, 1.0, 0.0] * 2 and logged["tools/failed_calls"] == [0.0] * 6


def test_prompts_show_the_tools(make_agent, tokens):
    trainer = make_agent()
    batch = trainer.sample(rows_of(trainer))
    prompt = tokens.decode(batch["prompt_ids"][0][batch["prompt_mask"][0] > 0])
    assert prompt == "<|system|>calculator lookup <|end|><|user|>Say 12 times 3.<|end|><|assistant|>"


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "sequence", "lora"])
def test_it_trains(make_agent, tokens, critic):
    parts = {}
    if critic == "sequence":
        parts["value_model"] = hfllm.HfllmForSequenceClassification(config_of(tokens, num_labels=1))
    if critic == "lora":
        parts["peft_config"] = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    trainer = make_agent(trainer_parts=parts, log_completions=True)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    logged = next(entry for entry in trainer.state.log_history if "tools/call_frequency" in entry)
    assert 0.5 <= logged["tools/call_frequency"] <= 1 and logged["tools/failed_calls"] == 0


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(make_agent, tmp_path):
    settings = {"max_steps": 4, "lr_scheduler_type": "cosine"}
    whole = make_agent(**settings)
    whole.train()
    make_agent(output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=1, **settings).train()
    resumed = make_agent(output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_call_of_a_tool_ends_with_the_same_bits(processes, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    processes.run(RUN, whole, 8, 0)
    processes.run(RUN, cut, 8, 5, code=-signal.SIGKILL)
    assert 1 <= int(Path(last_complete_checkpoint(cut)).name.removeprefix("checkpoint-")) < 6
    processes.run(RUN, cut, 8, 0)
    for file in ("model.safetensors", "value_head.safetensors"):
        one, other = (load_file(folder / file) for folder in (whole, cut))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_two_processes_with_tools_equal_one(processes, tmp_path):
    logged = rewards_in(processes.torchrun(RUN, tmp_path / "one", 12, processes=1))
    assert rewards_in(processes.torchrun(RUN, tmp_path / "two", 6)) == pytest.approx(logged, abs=1e-5)
    assert 0.5 <= logged[1] <= 1
    same_weights(tmp_path / "one", tmp_path / "two", 1e-3, 6)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_two_processes_with_tools_and_zero_equal_one(processes, tmp_path):
    pytest.importorskip("deepspeed")
    logged = rewards_in(processes.torchrun(RUN, tmp_path / "one", 12, processes=1))
    printed = launch(RUN.name, tmp_path / "two", 6, ROOT / "ds_configs" / "zero2.json")
    assert rewards_in(printed) == pytest.approx(logged, abs=1e-5)
    same_weights(tmp_path / "one", tmp_path / "two", 1e-3, 6)


class Engine:
    """In place of vLLM: it calls the prompt's tool in the first turn, and answers in the second."""

    def __init__(self, processing_class, **settings):
        self.tokenizer, self.asked = processing_class, []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.asked.append(texts)
        said = [CALLS[0] if "36" not in text else "It is 36.<|end|>" for text in texts]
        return prompts, [self.tokenizer(text)["input_ids"] for text in said], None, None


def test_vllm_samples_the_turns(make_agent, tokens, monkeypatch):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(trl_generation, "VLLMGeneration", Engine)
    trainer = make_agent(is_scripted=False, use_vllm=True, max_steps=2)
    batch = trainer.sample(rows_of(trainer, 2))
    first, second = trainer.vllm.engine.asked
    reply = "<|tool|>36<|end|><|assistant|>"
    assert second == [f"{asked}{CALLS[0]}{reply}" for asked in first]
    assert [each[-1]["content"] for each in batch["completions"]] == ["It is 36."] * 2
    for ids, mask in zip(batch["response_ids"], batch["action_mask"], strict=True):
        assert tokens.decode(ids[mask > 0]) == f"{CALLS[0]}It is 36.<|end|>" and tokens.decode(ids[mask == 0]) == reply
    trainer.train()
    assert trainer.state.global_step == 2


def test_evaluation_logs_the_calls(make_agent):
    trainer = make_agent(trainer_parts={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:5]})})
    metrics = trainer.evaluate()
    assert metrics["eval_tools/call_frequency"] == pytest.approx(4 / 5)
    assert len(trainer.eval_values["reward"]) == 5


def test_a_policy_that_calls_nothing_samples_as_ever(make_agent, tokens, monkeypatch):
    """With a chat template that does not show the tools, to the bit, where `generate` decodes both."""
    monkeypatch.setattr(sampling, "undecodable_reason", lambda *given: "of this test")
    tokens.chat_template, template = tokens.chat_template.partition("{%- endif -%}")[2], tokens.chat_template
    try:
        rows = [{"prompt": prompt} for prompt in PROMPTS[:6]]
        batches = []
        for tools in (None, TOOLS):
            trainer = make_agent(is_scripted=False, tools=tools, response_length=12)
            torch.manual_seed(5)
            batches.append(trainer.sample(rows))
        for name in ("prompt_ids", "response_ids", "response_mask", "is_ended"):
            assert torch.equal(batches[0][name], batches[1][name]), name
        assert torch.equal(batches[1]["action_mask"], batches[1]["response_mask"])
    finally:
        tokens.chat_template = template


@pytest.fixture
def make_talker(make_agent, tokens, monkeypatch):
    """A trainer with turns of a few sampled tokens, which an environment answers by words of different lengths."""

    def reply(turn):
        turn.episode.messages.append({"role": "assistant", "content": tokens.decode(turn.ids)})
        has_more = turn.is_ended and turn.episode.place % 3 and len(turn.episode.response_ids) < 16
        return tokens("owl " * (1 + len(turn.ids) % 3))["input_ids"] if has_more else None

    def make(**parts):
        trainer = make_agent(is_scripted=False, response_length=24, trainer_parts=parts)
        trainer.sampling_config.eos_token_id = list(range(0, len(tokens), 5))
        if trainer.actor.value_model is None:
            torch.nn.init.normal_(trainer.actor.value_head.weight)
        monkeypatch.setattr(trainer.environment, "replies", lambda turns: list(map(reply, turns)))
        return trainer

    return make


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "sequence", "lora"])
def test_what_sampling_saw_of_each_turn_is_not_asked_again(make_talker, tokens, monkeypatch, critic):
    parts = {}
    if critic == "sequence":
        parts["value_model"] = hfllm.HfllmForSequenceClassification(config_of(tokens, num_labels=1))
    if critic == "lora":
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        parts["peft_config"] = config
    trainer = make_talker(**parts)
    torch.manual_seed(7)
    batch = trainer.sample(rows_of(trainer, 12))
    turns = (batch["action_mask"].diff(prepend=torch.zeros(12, 1)) == 1).sum(1)
    assert {1, 3} <= set(turns.tolist()) and len(batch["response_mask"].sum(1).unique()) > 3
    assert not batch["is_ended"].all()
    plain = trainer.evaluate_tokens({**batch, "witness": None})
    # Sampling sums in another order: one value of 288 was 1.1e-5 away.
    near = {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(trainer.evaluate_tokens(batch), plain, **near)
    assert trainer._trusted == {"padded": True} and trainer._recorder is None
    calls, forward = [], trainer.actor.forward
    monkeypatch.setattr(trainer.actor, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    torch.testing.assert_close(trainer.evaluate_tokens(batch), plain, **near)
    assert not calls
    trainer.train()
    assert trainer.state.global_step == 4


def test_later_turns_read_what_is_new_alone(make_talker, monkeypatch):
    trainer, fed = make_talker(), []
    trainer.policy.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    batches, read = [], []
    for is_kept in (True, False):
        if not is_kept:
            monkeypatch.setattr(TurnCaches, "before", lambda *args: None)
        torch.manual_seed(7)
        batches.append(trainer.sample(rows_of(trainer, 12)))
        read.append(sum(fed))
        fed.clear()
    for name in ("response_ids", "action_mask", "is_ended"):
        assert torch.equal(batches[0][name], batches[1][name]), name
    # Without it the prompts are read three times.
    prompts = int(batches[0]["prompt_mask"].sum())
    assert read[1] - read[0] > prompts and batches[0]["witness"].caches is None


def test_later_turns_over_packed_weights_read_what_is_new_alone(make_talker, monkeypatch):
    trainer, read, batches = make_talker(), [], []
    call = RaggedModel.__call__

    def counted(self, tokens, *args, **kwargs):
        read[-1] += tokens.numel()
        return call(self, tokens, *args, **kwargs)

    monkeypatch.setattr(RaggedModel, "__call__", counted)
    for is_kept in (True, False):
        if not is_kept:
            monkeypatch.setattr(Turns, "known", lambda *args: None)
        torch.manual_seed(7)
        read.append(0)
        batches.append(trainer.sample(rows_of(trainer, 12)))
    for name in ("response_ids", "action_mask", "is_ended"):
        assert torch.equal(batches[0][name], batches[1][name]), name
    kept, again = (batch["witness"] for batch in batches)
    actions = batches[0]["action_mask"] > 0
    for one, other in ((kept.logprobs, again.logprobs), (kept.values, again.values)):
        torch.testing.assert_close(one[:, : actions.shape[1]][actions], other[:, : actions.shape[1]][actions])
    assert read[1] - read[0] > int(batches[0]["prompt_mask"].sum()) and kept.caches is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
    ],
)
def test_later_turns_take_every_setting_of_generation(make_talker, monkeypatch, settings):
    trainer = make_talker()
    for name, value in settings.items():
        setattr(trainer.sampling_config, name, value)
    batches = []
    for is_kept in (True, False):
        if not is_kept:
            monkeypatch.setattr(TurnCaches, "before", lambda *args: None)
        torch.manual_seed(7)
        batches.append(trainer.sample(rows_of(trainer, 6)))
    assert torch.equal(batches[0]["response_ids"], batches[1]["response_ids"])
    assert (batches[0]["action_mask"] < batches[0]["response_mask"]).any()


def test_several_turns_of_prompts_without_padding_are_checked_for_themselves(make_talker):
    trainer = make_talker()
    first, *_ = rows_of(trainer)
    alone = trainer.sample([first])
    trainer.evaluate_tokens(alone)
    assert not (alone["prompt_mask"] == 0).any() and trainer._trusted == {"unpadded": True}
    batch = trainer.sample([first] * 3)
    assert (batch["action_mask"] < batch["response_mask"]).any()
    batch["witness"].logprobs += 0.1
    expected = trainer.evaluate_tokens({**batch, "witness": None})
    torch.testing.assert_close(trainer.evaluate_tokens(batch), expected, atol=1e-5, rtol=1e-5)
    assert trainer._trusted == {"unpadded": True, "padded": False}


@pytest.mark.slow
def test_what_was_not_sampled_is_not_taken_for_recorded(make_agent, make_talker, monkeypatch):
    """Where something else than the policy says a turn, or the recorder is at the wrong place."""
    trainer = make_agent()
    assert trainer.sample(rows_of(trainer))["witness"] is None
    talker = make_talker()
    sample = talker.continue_ids
    talker.continue_ids = lambda sequences, most: [sample([ids], most)[0] for ids in sequences]
    assert talker.sample(rows_of(talker, 6))["witness"] is None
    talker.continue_ids = lambda sequences, most: sample([*sequences, *sequences], most)[len(sequences) :]
    assert talker.sample(rows_of(talker, 6))["witness"] is None
    talker.continue_ids = sample
    begin = SampledLogprobs.begin
    monkeypatch.setattr(SampledLogprobs, "begin", lambda self, rows, columns: begin(self, rows, [0] * len(rows)))
    assert talker.sample(rows_of(talker, 6))["witness"] is None


@pytest.mark.slow
def test_calls_that_cannot_be_read_do_not_stop_a_run(make_agent, monkeypatch):
    broken = (
        'See.<tool_call>{"name": "calc</tool_call><|end|>',
        '<tool_call>{"name": "lookup", "arguments": ["owl"]}</tool_call><|end|>',
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call><|end|>',
    )
    trainer = make_agent(is_scripted=False)
    trainer.continue_ids = opening(trainer, broken)
    batch = trainer.sample(rows_of(trainer, 3))
    first, second, third = batch["completions"]
    assert first == [{"role": "assistant", "content": broken[0].removesuffix("<|end|>")}]
    assert "must be an object of names and values" in second[1]["content"]
    assert "Tool fly not found. There are: calculator, lookup." in third[1]["content"]
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("result_length", [10, 10_000])
def test_a_policy_that_never_stops_calling_ends_with_the_room(make_agent, tokens, result_length):
    """By its many calls, or by one result that has no room: never beyond `response_length` or the model's context."""

    def calculator(expression: str) -> str:
        """Say much.

        Args:
            expression: anything.
        """
        return "9 " * (result_length // 2)

    settings = {"max_tool_calling_iterations": None, "max_tool_result_length": 10_000, "missing_eos_penalty": 0.5}
    trainer = make_agent(is_scripted=False, tools=[calculator], **settings)
    call = tokens(CALLS[0])["input_ids"]
    trainer.continue_ids = lambda sequences, most: [(call[:most], most >= len(call)) for _ in sequences]
    rows = rows_of(trainer, 3)
    batch = trainer.sample(rows)
    calls = batch["metrics"]["tools/call_frequency"].tolist()
    assert (min(calls) >= 2) if result_length == 10 else (calls == [1.0] * 3)
    assert not batch["is_ended"].any() and batch["response_mask"].sum(1).max() <= 150
    assert all(each[-1]["role"] == "assistant" for each in batch["completions"])
    expected = [each - 0.5 for each in letters(None, batch["completions"])]
    assert trainer.score(rows, batch).total.tolist() == pytest.approx(expected)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_a_tool_that_fails_in_every_way_does_not_stop_a_run(make_agent):
    outcomes = iter([None, b"\xff", float("nan"), "x" * 10**7, ValueError("no"), SystemExit(1), "<|end|>" * 9] * 9)

    def calculator(expression: str) -> object:
        """Fail.

        Args:
            expression: anything.
        """
        outcome = next(outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    trainer = make_agent(tools=[calculator, TOOLS[1]], max_tool_result_length=60, max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


TEXTS = Dataset.from_dict({"prompt": ["Say 12 times 3."] * 4})
OWN_TOOLS = Dataset.from_list([{"prompt": PROMPTS[0], "tools": '[{"name": "fly"}]'}] * 4)
LONG = Dataset.from_list([{"prompt": [{"role": "user", "content": "owl " * 90}]}] * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_dataset": TEXTS},
            "tools: the dataset's prompts are text; a policy with tools reads lists of messages",
        ),
        ({"train_dataset": OWN_TOOLS}, "tools: the dataset has a column 'tools' of its own"),
        ({"train_dataset": LONG}, "leaves room for 106"),
        ({"trainer_parts": {"rollout_func": print}}, "tools and rollout_func: give one of them"),
        ({"tools": [calculator, calculator]}, "tools: two are named 'calculator'"),
    ],
)
def test_what_does_not_go_with_tools_is_refused(make_agent, settings, message):
    with pytest.raises(InputError, match=message):
        make_agent(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tool_calling_iterations": 0}, "max_tool_calling_iterations must be at least 1"),
        ({"tool_timeout": 0.0}, "tool_timeout must be above 0"),
        ({"max_tool_result_length": 0}, "max_tool_result_length must be at least 1"),
    ],
)
def test_bad_limits_are_refused(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


def test_engines_that_sample_in_step_are_refused(make_agent, monkeypatch):
    from types import SimpleNamespace

    from hfllm.trainers.ppo import episodes

    trainer = make_agent()
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    stub = SimpleNamespace(accelerator=SimpleNamespace(state=state, num_processes=1), vllm=None)
    with pytest.raises(InputError, match="tools do not work with DeepSpeed ZeRO-3"):
        episodes.check_engine(stub, "tools")
    stub.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None), num_processes=2)
    stub.vllm = print
    with pytest.raises(InputError, match="tools with use_vllm=True work in one process"):
        episodes.check_engine(stub, "tools")
    episodes.check_engine(trainer, "tools")


@pytest.mark.slow
def test_the_documentations_code_runs(make_agent, make_args, tokens, tmp_path, monkeypatch):
    docs = Path(__file__).parent.parent.parent / "docs"
    text = "".join((docs / folder / "tools.md").read_text() for folder in ("guides", "reference"))
    tool, first, image, after, servers, game, of_others, episodes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"policy": hfllm.HfllmForCausalLM(config_of(tokens)), "output_dir": str(tmp_path), "tokenizer": tokens}
    names |= {"right_answer": letters, "prompts": Dataset.from_dict({"prompt": PROMPTS})}
    settings = "output_dir, report_to='none', use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=2, "
    exec(first.replace("output_dir, ", settings), names)
    assert names["trainer"].state.global_step == 2
    exec(tool, names)
    assert make_agent(tools=[names["double"]]).environment.schemas[0]["function"]["name"] == "double"
    exec(image, names)
    (part, words), reads = as_content(names["look"]("left"), reads_images=True), ToolBox([names["look"]]).schemas
    assert part["image"].size == (64, 64) and words["text"] == "to the left" and reads[0]["function"]["name"] == "look"
    exec(game, names)
    rows = Dataset.from_dict({"prompt": PROMPTS, "secret": range(len(PROMPTS))})
    trainer = make_agent(
        tools=None, reward_funcs=None, train_dataset=rows, trainer_parts={"environment_factory": names["Game"]}
    )
    assert trainer.environment.schemas[0]["function"]["name"] == "guess"
    trainer.train()
    exec(after, {**names, "model": names["policy"]})
    monkeypatch.chdir(tmp_path)
    server = {"command": sys.executable, "args": [str(docs.parent / "tests" / "environments" / "mcp_server.py")]}
    Path("servers.json").write_text(json.dumps({"mcpServers": {"test": server}}))
    exec(servers, names)
    assert "add" in [tool.__name__ for tool in names["tools"]]
    # It needs a package that is not installed here.
    compile(of_others, "docs", "exec")
    exec(episodes, names)
    texts = Dataset.from_dict({"prompt": ["Say red.", "Wait."] * 2})
    parts = {"rollout_func": names["told_twice"]}
    trainer = make_agent(is_scripted=False, tools=None, train_dataset=texts, trainer_parts=parts, max_steps=2)
    trainer.train()
    assert (trainer._rollout.action_mask < trainer._rollout.response_mask).any()
