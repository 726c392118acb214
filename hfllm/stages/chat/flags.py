"""The flags of a model that answers, and of a conversation with it in the terminal, and what they refuse."""

from dataclasses import dataclass

from hfllm.errors import InputError
from hfllm.flags import SEED, Fact, Range, at_least, check_flags, flag
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.stages.rlhf.flags import MCP_SERVERS, TOOLS

NO_TOOLS = Fact(lambda flags: not (flags.tools or flags.mcp_servers), "no tools are named")


@dataclass(frozen=True)
class ModelArguments(RemoteCodeArguments):
    """Which model answers, and how it is loaded."""

    model_name_or_path: str | None = flag(None, "The model or adapter: a folder, or an id of the Hub.")
    model_revision: str = flag("main", "Branch, tag or commit on the Hub.")
    max_new_tokens: int = flag(512, "The longest answer, with all that tools say.", takes=at_least(1))
    seed: int = flag(42, "Of the sampling.", takes=SEED)
    dtype: str = flag("auto", "The type that the model is loaded in; auto is the one that it was saved in.")
    attn_implementation: str | None = flag(None, "eager, sdpa, flash_attention_2, ...")
    load_in_8bit: bool = flag(False, "Load the model in 8 bits, by bitsandbytes.")
    load_in_4bit: bool = flag(False, "Load the model in 4 bits, by bitsandbytes.")


@dataclass(frozen=True)
class ChatArguments(ModelArguments):
    """How the conversation goes."""

    system: str | None = flag(None, "What the model is told before the conversation.")
    temperature: float | None = flag(
        None,
        "Of the sampling, 0 is greedy; by default as the model's generation_config.json says.",
        takes=Range("0, or a number from 0.001 on", lambda value: value is None or value == 0 or value >= 1e-3),
    )
    top_p: float | None = flag(
        None,
        "Sample from the likeliest tokens with this probability together; by default as the model says.",
        takes=Range("a number above 0, at most 1", lambda value: value is None or 0 < value <= 1),
    )
    tools: list[str] | None = flag(None, TOOLS)
    mcp_servers: str | None = flag(None, MCP_SERVERS)
    tool_timeout: float = flag(10.0, "Seconds until a call of a tool is given up.", never=NO_TOOLS)


def check(script_args: ChatArguments) -> None:
    """Refuse a conversation without a model, and flags without effect."""
    if script_args.model_name_or_path is None:
        raise InputError("which model? hfllm chat FOLDER_OR_ID, such as hfllm chat outputs/rlhf")
    check_flags(script_args)
