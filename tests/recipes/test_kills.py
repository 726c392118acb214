"""A few of the kills of .ci/kills.py, which kills each process of recipes at random moments.

By hand it kills as many as there is time for: `python .ci/kills.py --kills 60`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Those whose runs have several processes.
CASES = ("curate", "sft_loaders", "federated_processes", "pretrain_launched")


@pytest.mark.slow
@pytest.mark.turn(7)
def test_killed_processes_change_nothing_and_leave_nothing(tmp_path):
    pytest.importorskip("datatrove", reason="needs the extra 'data'")
    command = [sys.executable, str(ROOT / ".ci" / "kills.py"), "--kills", "2", "--folder", str(tmp_path), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Each case and kind has its line.
    for kind in ("curate main", "curate worker", "sft_loaders worker", "pretrain_launched launcher"):
        assert f"{kind}: {{" in done.stdout
