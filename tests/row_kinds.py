"""Rows as recipes train on them, and their fingerprints, which it prints: what test_fingerprint.py starts."""

import datetime
import json

import numpy as np
from PIL import Image

from hfllm.data.world.pictures import CAPTIONS, DrawnWorld
from hfllm.fingerprint import fingerprint


def rows_by_kind():
    """Drawn ones, with images in memory, of token ids, of texts and sets, and of what `datasets` decodes."""
    words = {f"word {number}" for number in range(50)}
    return {
        "vision from nothing": [*DrawnWorld(0, 3), *DrawnWorld(0, 3, CAPTIONS)],
        "images": [{"prompt": [{"role": "user", "content": "What?"}], "images": [Image.new("RGB", (3, 2), "red")]}],
        "token ids": [{"input_ids": list(range(40)), "labels": [-100] * 40, "weight": 0.5}],
        "sets": [{"words": words, "by word": dict.fromkeys(sorted(words, key=hash), 1)}],
        "scores": [{"scores": np.arange(6, dtype=np.float32).reshape(2, 3), "at": datetime.date(2026, 1, 2)}],
    }


def found():
    return {name: fingerprint(rows, name) for name, rows in rows_by_kind().items()}


if __name__ == "__main__":
    print(json.dumps(found()))
