"""Talk to a model in the terminal: a folder, an adapter, an int8 or a merged model, or an id of the Hub.

    hfllm chat outputs/rlhf
    hfllm chat NAME --system "Answer in one sentence." --temperature 0
    hfllm chat NAME --tools calculator --mcp_servers servers.json
    python recipes/chat.py --model_name_or_path NAME

Answers appear while they are written; Ctrl-C ends one, Ctrl-D the conversation. /help lists the commands: /undo takes
back the last question, /save writes the conversation as a row that `hfllm sft` reads. Lines of a file or a pipe are
questions too.
"""

from collections.abc import Sequence

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.recipes import Recipe
from hfllm.stages.chat.flags import ChatArguments, check

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[ChatArguments]:
    """Read the flags; a word before the first one is the model."""
    is_named = argv and not argv[0].startswith("-")
    return parse_recipe(["--model_name_or_path", *argv] if is_named else argv, __doc__, ChatArguments)


@trusts_code_if_asked
def main(script_args: ChatArguments) -> dict[str, float]:
    """Load the model, and talk until the end of the input."""
    check(script_args)
    if not main_process():
        return {}
    from hfllm.runs.following import after_chat
    from hfllm.stages.chat.build import load_chat, read_lines

    chat = load_chat(script_args)
    chat.greet()
    for line in read_lines():
        if not chat.take(line):
            break
    if following := after_chat(script_args.model_name_or_path):
        print(f"next: {following}")
    return {}


if __name__ == "__main__":
    run(main, parse)
