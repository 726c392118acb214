"""What a device allows, with devices that stand for those that are not there."""

from types import SimpleNamespace

import pytest
import torch

from hfllm.data.tokenizer import end_tokens, plain_chat_template, turn_end
from hfllm.errors import InputError
from hfllm.evaluation.perplexity import text_likelihood
from hfllm.generation.scoring import batches_of_like_length, pass_precision
from hfllm.models import devices
from hfllm.rewards.models import RewardModel
from hfllm.runs.command_line import machine_defaults
from hfllm.trainers.ppo.sampling import most_cached_rows

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("vocab_size", "gibibytes", "tokens"),
    [(151_936, 80, 4416), (151_936, 16, 883), (32_000, 80, 20_971), (10**9, 1, 1)],
)
def test_logits_of_a_pass_take_an_eighth_of_the_memory_at_most(vocab_size, gibibytes, tokens):
    found = devices.tokens_that_fit(vocab_size, gibibytes * 2**30)
    assert found == tokens
    assert tokens == 1 or found * vocab_size * 16 <= gibibytes * 2**30 / 8 < (found + 1) * vocab_size * 16


def test_a_cpu_has_no_limit(make_model):
    assert devices.device_memory(torch.device("cpu")) is None
    assert devices.most_logits(make_model(), torch.device("cpu")) is None
    assert devices.most_tokens(make_model(), torch.device("cpu")) is None
    assert most_cached_rows(make_model(), 10, torch.device("cpu")) is None


def test_sequences_are_sampled_together_while_their_caches_fit(make_model, monkeypatch):
    from hfllm.generation.caches import bytes_per_token

    model = make_model()
    of_a_row = 30 * bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(devices, "device_memory", lambda device: 4 * 7 * of_a_row)
    assert most_cached_rows(model, 30, torch.device("cuda:0")) == 7
    assert most_cached_rows(model.bfloat16(), 30, torch.device("cuda:0")) == 14
    assert most_cached_rows(model, 10**9, torch.device("cuda:0")) == 1


def test_random_numbers_inside_leave_no_trace():
    torch.manual_seed(0)
    with devices.forked_random(torch.device("cpu")):
        torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def test_the_pass_of_a_reward_model_and_of_the_perplexity_fit(make_model, tokenizer, monkeypatch):
    import hfllm

    # Room for 40 tokens of 3 x 32 values, and 12 of the logits.
    monkeypatch.setattr(devices, "most_tokens", lambda model, device: 40)
    monkeypatch.setattr("hfllm.generation.scoring.most_tokens", lambda model, device: 40)
    monkeypatch.setattr("hfllm.generation.scoring.most_logits", lambda model, device: 12)
    reward = RewardModel(make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1), tokenizer)
    batches = list(batches_of_like_length(reward.model, [10, 12, 11, 9, 40, 50, 3], reward.batch_size))
    assert batches == [[5], [4], [1, 2, 0], [3, 6]]
    model, widths = make_model(), []
    whole = text_likelihood(model, tokenizer, ["The fox.", "A red owl.", "Go"], 64)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert text_likelihood(model, tokenizer, ["The fox.", "A red owl.", "Go"], 64).nats == pytest.approx(whole.nats)
    hook.remove()
    assert max(widths) <= 12 and len(widths) > 1


def test_one_process_with_two_gpus_is_refused():
    devices.refuse_data_parallel(SimpleNamespace(n_gpu=1))
    with pytest.raises(InputError, match=r"one process sees 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        devices.refuse_data_parallel(SimpleNamespace(n_gpu=2))


@pytest.fixture
def gpu(monkeypatch):
    """Make torch say that there is an accelerator of this type."""

    def make(kind, bf16=True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: bf16 and kind == "cuda")

    return make


def test_defaults_on_a_gpu(gpu):
    gpu("cuda")
    assert machine_defaults() == {"disable_tqdm": machine_defaults()["disable_tqdm"], "bf16": True, "tf32": True}
    for given in ({"fp16": True}, {"bf16": False}):
        assert "tf32" not in machine_defaults(given)
    assert machine_defaults({"fp16": True})["bf16"] is False
    on_cpu = machine_defaults({"use_cpu": True})
    assert on_cpu["bf16"] is False and on_cpu["use_cpu"] is True
    # A T4 only emulates bf16, as does Metal.
    gpu("cuda", bf16=False)
    assert machine_defaults()["bf16"] is False and "tf32" not in machine_defaults()
    gpu("mps")
    assert machine_defaults()["bf16"] is False and "use_cpu" not in machine_defaults()


@pytest.mark.parametrize("recipe", ["rlhf", "pretrain", "distill", "sft"])
def test_a_users_word_wins_over_them(recipe, gpu, monkeypatch, tmp_path):
    from hfllm.runs.recipes import load_recipe

    gpu("cuda")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", lambda enable: None)
    (tmp_path / "flags.yaml").write_text("bf16: false\n")
    words = ["--model_name_or_path", "x", "--dataset_name", "y.jsonl"] if recipe != "pretrain" else []
    expected = {(): True, ("--bf16", "false"): False, ("--config", str(tmp_path / "flags.yaml")): False}
    for more, bf16 in expected.items():
        assert load_recipe(recipe).parse([*words, *more])[1].bf16 is bf16
    assert load_recipe(recipe).parse([*words, "--fp16"])[1].fp16 is True


# ---- the token that ends a turn ----


def test_a_turn_ends_as_the_chat_template_says(tokenizer, make_model):
    from copy import deepcopy

    assert turn_end(tokenizer) == tokenizer.eos_token_id
    base = deepcopy(tokenizer)
    base.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.chat_template, base.eos_token = CHATML, "<|endoftext|>"
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(base) == end
    model = make_model()
    assert end_tokens(base, model) == {tokenizer.eos_token_id, base.eos_token_id, end}
    base.chat_template = plain_chat_template()
    assert turn_end(base) == base.eos_token_id
    for other in (None, "{{ raise_exception('no') }}", "{{ messages[0].content }}"):
        base.chat_template = other
        assert turn_end(base) is None


# ---- what PPO does with it ----


def test_values_keep_their_precision_under_autocast(make_model):
    import hfllm
    from hfllm.trainers.ppo.actor_critic import ActorCritic

    separate, short = (make_model(1, hfllm.HfllmForTokenClassification, num_labels=1) for _ in range(2))
    for value_model in (None, separate, short.bfloat16()):
        actor = ActorCritic(make_model(), value_model, 1.0, (0,))
        if value_model is None:
            torch.nn.init.normal_(actor.value_head.weight)
        ids = torch.arange(24).view(2, 12) + 10
        parts = (ids[:, :6], torch.ones(2, 6).long(), ids[:, 6:], torch.ones(2, 6).long())
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, values, _ = actor(*parts)
        for found in (logprobs, values):
            assert found.dtype == torch.float32
            assert not torch.equal(found, found.bfloat16().float())


def test_ppo_bounds_the_logits_of_a_pass(make_model, monkeypatch):
    from hfllm.trainers.ppo.rollout import length_groups

    prompts = torch.ones(6, 4).long()
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    mask = (torch.arange(5) < lengths[:, None]).long()
    batch = {"prompt_ids": prompts, "prompt_mask": prompts, "response_ids": mask, "response_mask": mask}
    groups = [rows.tolist() for rows, _ in length_groups(batch, None, most_responses=9)]
    assert groups == [[0], [4, 5], [2, 3, 1]]
    assert all(lengths[rows].sum() <= 9 for rows in groups)
    # A row that is longer than the limit goes alone.
    assert [rows.tolist() for rows, _ in length_groups(batch, None, most_responses=4)] == [[0], [4], [5], [2], [3, 1]]


def test_flash_attention_meets_neither_fp32_nor_the_cpu(make_model, tokenizer, monkeypatch):
    import hfllm
    from hfllm.trainers.ppo.actor_critic import looks_ahead

    model = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
    reward, chosen = RewardModel(model, tokenizer), []
    assert not torch.is_autocast_enabled("cpu") and reward(["The owl"], [" sleeps."])
    monkeypatch.setattr(model, "set_attn_implementation", chosen.append)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pass_precision(reward.model):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(type(model.model), "forward", lambda self, input_ids, **kwargs: States(input_ids))
    assert not looks_ahead(model) and chosen == ["sdpa", "flash_attention_2"]


class States:
    def __init__(self, ids):
        self.last_hidden_state = ids.unsqueeze(-1).float()


def test_packed_weights_stay_on_the_cpu(make_model, monkeypatch):
    from hfllm.generation.packed.model import unsupported_reason

    model = make_model()
    assert unsupported_reason(model) is None
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda:0")))
    assert "it is on cuda" in unsupported_reason(model)
