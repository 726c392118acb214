"""Flags that name a JSON file of an engine: DeepSpeed's, FSDP's, accelerate's."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfllm.errors import InputError

FLAGS = ("deepspeed", "fsdp_config", "accelerator_config")


def check_json_flags(given: Mapping[str, Any]) -> None:
    """Refuse a file that does not exist or does not hold a JSON object, and an object that cannot be read.

    The libraries complain without the name of the flag.

    Args:
        given: what the user gives, by flag.

    Raises:
        InputError: naming the flag and the file.
    """
    for flag, value in given.items():
        if isinstance(value, str) and value.lstrip().startswith("{"):
            _check_object(flag, value)
    for flag in FLAGS:
        named = given.get(flag)
        # An object may stand there itself, and DeepSpeed's in base64.
        if not isinstance(named, str) or named.lstrip().startswith("{") or _is_encoded(named):
            continue
        path = Path(named)
        if not path.is_file():
            raise InputError(f"--{flag} {named}: no such file; expected a JSON file")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"--{flag} {named}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"--{flag} {named}: expected a JSON object, got {type(values).__name__}")


def _check_object(flag: str, text: str) -> None:
    """Refuse a JSON object that Python cannot hold: libraries say neither which flag it is nor what is wrong."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        # Perhaps a text that only begins so: who reads it says.
        return
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{flag} {text[:60]}...: cannot be read as JSON: {error}") from None


def _is_encoded(text: str) -> bool:
    try:
        return isinstance(json.loads(base64.urlsafe_b64decode(text)), dict)
    except (binascii.Error, ValueError, RecursionError):
        return False
