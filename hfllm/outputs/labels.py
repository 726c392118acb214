"""The names of a head's labels, beside the weights: the config of a whole model has them, that of an adapter not."""

import json
from collections.abc import Sequence
from pathlib import Path

from hfllm.outputs.files import LABELS
from hfllm.outputs.report import write_atomically


def write_labels(folder: str | Path, labels: Sequence[str]) -> None:
    """Write the labels in order, as `id2label` of a config would have them."""
    text = json.dumps({"id2label": dict(enumerate(labels))}, indent=2, ensure_ascii=False)
    write_atomically(Path(folder) / LABELS, text + "\n")
