"""The code of docs/guides/grounding.md about passages, retrievers and answers runs."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("bm25s")
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "grounding.md"


def test_the_code_about_retrieval_runs(make_model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    texts = ["The owl lives in the wood.", "The fox lives in a hole.", "The toad is green."]
    texts += [f"Number {number} is even." for number in range(0, 20, 2)]
    Path("texts", "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = make_model()
    model.model.save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    ours = [each for each in sections if each.startswith(("Passages\n", "Retrievers\n", "Answers\n"))]
    names = {"model": model, "tokenizer": tokenizer}
    for section in ours:
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        exec(code, names)
    assert len(ours) == 3 and len(names["passages"]) == 13
    assert names["found"][0][0].passage.text == texts[0]
    assert 2 in [found.place for found in names["both"].retrieve(["green toad"], 3)[0]]
    assert len(names["answers"][0].passages) == 2 and capsys.readouterr().out
