"""The flags of a server, and what they refuse."""

import importlib.util
from dataclasses import dataclass

from hfllm.errors import InputError
from hfllm.flags import Range, at_least, check_flags, flag
from hfllm.stages.chat.flags import ModelArguments

PACKAGES = ("starlette", "uvicorn")


@dataclass(frozen=True)
class ServeArguments(ModelArguments):
    """Where the model answers, and under which name."""

    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in, see HFLLM_API_KEY.")
    port: int = flag(
        8000,
        "Port to listen on; 0 takes a free one.",
        takes=Range("a port, 0 to 65535", lambda value: 0 <= value < 65536),
    )
    served_model_name: str | None = flag(None, "The name that clients use; by default the model's as given.")
    max_waiting: int = flag(64, "Requests that may wait for the model; more are refused.", takes=at_least(1))


def check(script_args: ServeArguments) -> None:
    """Refuse a server without a model, and one whose libraries are not installed."""
    if script_args.model_name_or_path is None:
        raise InputError("which model? hfllm serve FOLDER_OR_ID, such as hfllm serve outputs/rlhf")
    check_flags(script_args)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"hfllm serve needs {package}: pip install 'hfllm[serve]'")
