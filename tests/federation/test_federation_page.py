"""The code of docs/reference/federation.md runs, and says what its comments say."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "federation.md"


def test_the_page_runs(capsys):
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
    printed = capsys.readouterr().out
    assert "['1-fact', '2-reading', '3-list']" in printed and "[2.0, 2.0] 2.449" in printed
    assert "epsilon would be 30.1" in printed and "28 organisations of which 6 take part, or 2 rounds" in printed
