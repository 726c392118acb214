"""The code of docs/guides/uncertainty.md runs, and docs/reference/uncertainty.md has every measure."""

import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE, REFERENCE = ((DOCS / folder / "uncertainty.md").read_text() for folder in ("guides", "reference"))


@pytest.mark.slow
def test_the_page_runs(make_model, tokenizer, tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    wrong = np.arange(12) % 3 == 0
    prompts = [f"What is {number} plus 1?" for number in range(12)]
    names = {"model": make_model(), "tokenizer": tokenizer, "prompts": prompts, "wrong": wrong, "folder": tmp_path}
    exec("\n".join(blocks).replace("max_new_tokens=40", "max_new_tokens=4"), names)
    assert len(names["rows"]) == 12 and len(names["rows"][0].samples) == 10
    assert names["metrics"]["wrong"] == 1 / 3 and (tmp_path / "risk.png").exists()
    printed = capsys.readouterr().out
    assert "P(answered and wrong) <= 0.1 in expectation, for prompts like the 12 calibration rows" in printed
    assert printed.splitlines()[-1] == "The zorb is blue." and "\nTrue\n" in printed


def test_the_measures_of_the_table_are_those_of_the_package():
    from hfllm.grounding.uncertainty import MEASURES

    table = REFERENCE.split("| name | what it is |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(MEASURES)
