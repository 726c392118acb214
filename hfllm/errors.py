"""The exception for errors fixable by the user, and the removal of secrets from printed or written text."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Access tokens of the Hub by their form, and credentials in URLs.
_LOOKS_SECRET = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|\bhf_(?:oauth|jwt)_[\w.-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
HIDDEN = "[hidden]"
# Keys of nested flags, such as `--model_init_kwargs`, whose values are secrets, whatever they look like.
CREDENTIALS = frozenset(
    (
        *("token", "hub_token", "hf_token", "push_to_hub_token", "use_auth_token", "auth_token", "access_token"),
        *("api_token", "api_key", "apikey", "secret", "secret_key", "secret_access_key", "aws_secret_access_key"),
        *("client_secret", "password", "passwd", "authorization", "proxy_authorization", "cookie"),
    )
)
# Messages of allocators, in errors of any class.
OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"),
    # Of a loaded library.
    "failed to map segment",
)


class InputError(ValueError):
    """Bad input: recipes print its message as a single line and stop.

    The message names the file, row, field or flag, the value seen and the accepted values; secrets in it are hidden.
    Any function reading user input may raise it. A docstring mentions it only where its cause is not clear from the
    purpose of the function.
    """

    def __init__(self, message: str):
        super().__init__(redact(message))


class MachineError(InputError):
    """A run ends for lack of memory or disk: its message, one line, is printed by the affected process."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training: recipes print its message, which says how to resume, as a single line and stop."""


def refuse(condition: bool, flag: str, reason: str) -> None:
    """Refuse a flag without effect, rather than ignore it.

    Raises:
        InputError: if `condition` holds.
    """
    refuse_if(condition, f"{flag} cannot be used here: {reason}")


def refuse_if(condition: object, message: str) -> None:
    """Refuse input by this message, which is made in any case: not for inner loops.

    Raises:
        InputError: if `condition` holds.
    """
    if condition:
        raise InputError(message)


def first_line(error: BaseException, most: int | None = None) -> str:
    """Return the first line of an error's message, or the name of an error without one.

    Args:
        most: its most characters; by default all.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was short, on a GPU or in the machine; also as the cause of an error."""
    kinds = (RuntimeError, OSError, ImportError)
    is_reported = isinstance(error, kinds) and any(words in str(error) for words in OUT_OF_MEMORY)
    is_caused = error.__cause__ is not None and is_out_of_memory(error.__cause__)
    return isinstance(error, MemoryError) or is_reported or is_caused


def one_line(message: object, most: int | None = 200) -> str:
    """Return an error's message, or another text, in one line of at most `most` characters."""
    return " ".join(str(message).split())[:most]


def check_positive(**numbers: int) -> None:
    """Refuse arguments below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")


def redact(text: str, *secrets: str | None) -> str:
    """Return `text` without `secrets`, the tokens in the environment, and anything similar to a token."""
    for secret in (*secrets, *map(os.environ.get, TOKEN_VARIABLES)):
        # Anything shorter is no secret, and hiding it would remove ordinary words.
        if secret and len(secret.strip()) >= 8:
            text = text.replace(secret.strip(), HIDDEN)
    return _LOOKS_SECRET.sub(HIDDEN, text)


def without_credentials(value: Any) -> Any:
    """Return a value of nested flags fit for saving or showing, with values of `CREDENTIALS` keys, and tokens, hidden.

    Mappings, lists, tuples and JSON objects as text are searched; all other contents stay unchanged.
    """
    if isinstance(value, Mapping):
        secret = {name for name in value if str(name).lower().replace("-", "_") in CREDENTIALS}
        return {name: HIDDEN if each and name in secret else without_credentials(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_credentials, value))
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return redact(value)
        hidden = without_credentials(parsed)
        value = value if hidden == parsed else json.dumps(hidden)
    return redact(value)
