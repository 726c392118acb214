"""Several GPUs in one process are refused by every trainer, and base models end their turns as the template says."""

from copy import deepcopy

import pytest
from datasets import Dataset
from transformers import TrainingArguments

import hfllm
from hfllm.errors import InputError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    # Before it is asked, `Trainer` would move the model there.
    monkeypatch.setattr(TrainingArguments, "train_batch_size", property(lambda self: self.per_device_train_batch_size))


def test_trainers_refuse_several_gpus_in_one_process(two_gpus, make_trainer, make_model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="one process sees 2 GPUs"):
        make_trainer()
    args = hfllm.DistillationConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InputError, match="one process sees 2 GPUs"):
        hfllm.DistillationTrainer(make_model(1), make_model(0), args, [{"text": "Go on."}], None, tokenizer)


def test_recipes_refuse_them_before_anything_is_written(two_gpus, saved, tmp_path):
    import sft

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Go", "completion": "on"}\n' * 30)
    flags = ["--model_name_or_path", str(saved), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="accelerate launch"):
        sft.main(*sft.parse(flags))
    assert not (tmp_path / "out").exists()


def test_a_response_ends_where_the_template_ends_a_turn(make_args, make_model, tokenizer):
    base = deepcopy(tokenizer)
    base.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.chat_template, base.eos_token = CHATML, "<|endoftext|>"
    policy, end = make_model(vocab_size=len(base)), base.convert_tokens_to_ids("<|im_end|>")
    policy.generation_config.eos_token_id = base.eos_token_id
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go"}]] * 2})
    with pytest.warns(UserWarning, match=r"ends a turn by '<\|im_end\|>', the tokenizer a text by '<\|endoftext\|>'"):
        trainer = hfllm.PPOTrainer(
            model=policy,
            reward_funcs=lambda completions, **columns: [1.0] * len(completions),
            args=make_args(),
            train_dataset=prompts,
            processing_class=base,
        )
    expected = sorted((end, base.eos_token_id))
    assert trainer.eos_token_ids == trainer.sampling_config.eos_token_id == expected
    assert policy.generation_config.eos_token_id == expected
