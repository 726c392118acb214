"""The run of test_remote_code.py: what a Python without hfllm loads from the folder `model` of the argument."""

import os
import sys

assert not {"transformers", "hfllm"} & set(sys.modules)
sys.modules["hfllm"] = None  # not installed
os.chdir(sys.argv[1])
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

FOLDER = os.path.join(sys.argv[1], "model")
# transformers replaces itself by a second copy.
transformers = sys.modules["transformers"]
installed, transformers.__version__ = transformers.__version__, "5.23.0"
try:
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    raise SystemExit("loaded by a release that is too old")
except ImportError as error:
    assert "need transformers 5.24.0 or newer, and this is 5.23.0: pip install" in str(error), error
transformers.__version__ = installed
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
assistant = pipeline("text-generation", model=FOLDER, trust_remote_code=True)
chat = assistant([{"role": "user", "content": "Say red."}], max_new_tokens=3)[0]["generated_text"]
assert chat[-1]["role"] == "assistant", chat
model.set_attn_implementation("banded")
with torch.no_grad():
    assert model.model.layers[0].self_attn.sliding_window == 8
    print("BANDED", model(torch.arange(300)[None]).logits.sum().item())
model.set_attn_implementation("sdpa")
print("LOGITS", model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item())
