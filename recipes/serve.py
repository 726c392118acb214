"""Serve a model by OpenAI's API: any client of it talks to a folder, an adapter, an int8 or a merged model.

    hfllm serve outputs/rlhf
    hfllm serve NAME --port 9000 --served_model_name mine
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" --data @request.json
    python recipes/serve.py --model_name_or_path NAME

POST /v1/chat/completions streams where asked, offers the client's tools to the model, reads images of data URLs, and
returns log-probabilities; GET /v1/models names the model. Requests are answered one at a time. Only this machine can
reach it, but with --host, which needs a key in HFLLM_API_KEY. Needs the extra `serve`.
"""

from collections.abc import Sequence

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.recipes import Recipe
from hfllm.stages.serve.flags import ServeArguments, check

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[ServeArguments]:
    """Read the flags; a word before the first one is the model."""
    is_named = argv and not argv[0].startswith("-")
    return parse_recipe(["--model_name_or_path", *argv] if is_named else argv, __doc__, ServeArguments)


@trusts_code_if_asked
def main(script_args: ServeArguments) -> dict[str, float]:
    """Load the model, and answer requests until Ctrl-C."""
    check(script_args)
    if not main_process():
        return {}
    from hfllm.stages.chat.speaker import load_speaker
    from hfllm.stages.serve.build import opened, serve

    listening = opened(script_args)
    serve(script_args, load_speaker(script_args), listening)
    return {}


if __name__ == "__main__":
    run(main, parse)
