"""Models whose settings of generation transformers reads and does not write are trained and saved all the same."""

import json

import pytest
import sft
from transformers import AutoModelForCausalLM, GenerationConfig

from hfllm.errors import InputError
from hfllm.models.loading.weights import load_weights_of

OLD = {"temperature": 0.9, "top_p": 0.6, "top_k": 20, "length_penalty": 2.0}


def write(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_a_temperature_without_sampling_does_not_cost_the_training(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(saved, **OLD)
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in ("red", "blue", "one", "two")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "dataset_name": "rows.jsonl",
        "output_dir": "out",
        "max_steps": 1,
        "max_length": 64,
        "save_strategy": "no",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with pytest.warns(UserWarning, match="without effect .* left out: temperature, top_p, top_k, length_penalty"):
        sft.main(*sft.parse(["--model_name_or_path", str(saved), *words, "--use_cpu"]))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    found = GenerationConfig.from_pretrained("out")
    assert not found.do_sample and found.temperature in (None, 1.0)


def test_settings_with_an_effect_stay(saved):
    write(saved, do_sample=True, temperature=0.9, top_p=0.6)
    model, _ = load_weights_of(AutoModelForCausalLM, str(saved))
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.9, 0.6)
    write(saved, num_beams=2, length_penalty=2.0)
    model, _ = load_weights_of(AutoModelForCausalLM, str(saved))
    assert model.generation_config.length_penalty == 2.0


def test_what_cannot_be_saved_at_all_is_refused_before(saved):
    write(saved, pad_token_id=-5, temperature=0.9)
    with pytest.raises(InputError, match=f"model '{saved}': its generation_config.json .*pad_token_id"):
        load_weights_of(AutoModelForCausalLM, str(saved))
