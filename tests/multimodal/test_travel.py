"""Models that see travel: to a Python without hfllm, to Llava's own class and back, through a pipeline, into TRL."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers
from layouts import HEARING, SEEING, compose
from PIL import Image
from seeing import TEXTS, TOWERS, prompts, seeing

import hfllm
from hfllm.errors import InputError

CODE = """
import sys
sys.modules["hfllm"] = None  # not installed
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
folder = sys.argv[1]
kept = torch.load(folder + "/kept.pt", weights_only=True)
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        assert torch.equal(model(**kept["inputs"]).logits, kept["logits"])
assert torch.equal(model.generate(**kept["inputs"], max_new_tokens=4, do_sample=False), kept["new"])
loss = model.train()(**kept["inputs"], labels=kept["inputs"]["input_ids"])
assert loss.aux_loss > 0 and torch.equal(loss.loss, kept["loss"])
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "HfllmVisionModel"
print("ANSWERED")
"""


@pytest.mark.slow
@pytest.mark.turn(7)
def test_it_answers_where_hfllm_is_not_installed(make_model, tmp_path):
    model, inputs = seeing(make_model(num_local_experts=4, logit_scale=0.5, loss_chunk_size=7)), prompts()
    with torch.no_grad():
        logits = model(**inputs).logits
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss.detach()
    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "logits": logits, "new": new, "loss": loss}, tmp_path / "model" / "kept.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "ANSWERED" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "native_type"), [("dense", "llama"), ("gpt2", "gpt2"), ("experts", "mixtral")])
def test_it_becomes_llava_and_comes_back(make_model, tmp_path, name, native_type):
    values = dict(TEXTS[name])
    if name == "gpt2":
        values |= {"num_key_value_heads": 4, "mlp_bias": True, "hidden_act": "gelu_new", "tie_word_embeddings": False}
    model, inputs = seeing(make_model(**values)), prompts()
    hfllm.to_native(model, tmp_path / "native")
    native = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert type(native) is transformers.LlavaForConditionalGeneration
    assert native.config.text_config.model_type == native_type
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(native(**inputs).logits, logits, atol=1e-5, rtol=0)
    again = hfllm.from_native(tmp_path / "native")
    assert type(again) is hfllm.HfllmForConditionalGeneration
    state = again.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    hfllm.to_native(model, tmp_path / "named", native_type)
    with pytest.raises(InputError, match="exists and is not empty"):
        hfllm.to_native(model, tmp_path / "native")


def test_a_table_that_llava_does_not_find_is_refused(make_model, tmp_path):
    gpt2 = {"num_key_value_heads": 4, "mlp_bias": True, "hidden_act": "gelu_new"}
    with pytest.raises(InputError, match="'gpt2' with tie_word_embeddings=True"):
        hfllm.to_native(seeing(make_model(**TEXTS["gpt2"] | gpt2)), tmp_path / "native")
    native = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400))
    with pytest.raises(InputError, match="'gpt2' with tie_word_embeddings=True"):
        seeing(native)


@pytest.mark.parametrize(
    "values",
    [
        {"logit_scale": 0.5},
        {"embedding_multiplier": 2.0},
        {"lm_head_bias": True},
        {"num_local_experts": 3, "parallel_block": True},
    ],
)
def test_what_llava_would_leave_out_is_not_converted(make_model, tmp_path, values):
    with pytest.raises(InputError, match="|".join(values)):
        hfllm.to_native(seeing(make_model(**values)), tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_pipeline_answers_questions_about_pictures(make_model, tokenizer, tmp_path):
    processor = hfllm.vision_processor(copy.deepcopy(tokenizer), TOWERS["siglip"]())
    model = hfllm.with_vision(make_model(), TOWERS["siglip"](), image_token_id=processor.image_token_id)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assistant = transformers.pipeline("image-text-to-text", model=str(tmp_path))
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (9, 9))}, {"type": "text", "text": "a"}],
        }
    ]
    answer = assistant(text=turns, max_new_tokens=2, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def sft(model, processor, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [{"role": "user", "content": "what?"}], [{"role": "assistant", "content": "red"}]
    rows = [
        {"images": [Image.new("RGB", (20, 20), color)], "prompt": turns[0], "completion": turns[1]}
        for color in ("red", "blue")
    ]
    arguments = SFTConfig(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = model.get_decoder().layers[0].self_attn.q_proj.weight.clone()
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    assert 0 < trainer.train().training_loss < 100
    assert not torch.equal(before, model.get_decoder().layers[0].self_attn.q_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_step_of_trl_trains_it(make_model, tokenizer, tmp_path, text, tower):
    processor = hfllm.vision_processor(copy.deepcopy(tokenizer), TOWERS[tower]())
    model = hfllm.with_vision(make_model(**TEXTS[text]), TOWERS[tower](), image_token_id=processor.image_token_id)
    sft(model, processor, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*SEEING, *HEARING])
def test_a_step_of_a_trainer_trains_each_layout(make_model, tmp_path, layout):
    model, inputs = compose(layout, make_model())
    rows = [inputs | {"labels": inputs["input_ids"]}]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], remove_unused_columns=False, save_strategy="no"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=lambda batch: batch[0])
    before = model.get_decoder().layers[0].self_attn.q_proj.weight.clone()
    trainer.train()
    assert not torch.equal(before, model.get_decoder().layers[0].self_attn.q_proj.weight)
