"""Saved models load in a Python that has never heard of hfllm, by the code that travels with them."""

import os
import subprocess
import sys

CODE = """
import sys
sys.modules["hfllm"] = None  # not installed
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assistant = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
chat = assistant([{"role": "user", "content": "Say red."}], max_new_tokens=3)[0]["generated_text"]
assert chat[-1]["role"] == "assistant", chat
print("LOGITS", model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item())
"""


def test_loads_without_the_package_from_another_folder(make_model, tokenizer, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    parts = ("attention", "configuration", "layers", "loss", "memory", "modeling")
    code = [*(f"{part}_hfllm.py" for part in parts), "presets.py"]
    assert sorted(path.name for path in (tmp_path / "model").glob("*.py")) == code
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model")],
        cwd=tmp_path,
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected = model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item()
    assert abs(float(result.stdout.split("LOGITS")[1]) - expected) < 1e-3
