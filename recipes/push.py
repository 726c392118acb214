"""Publish a finished model on the Hugging Face Hub, with its card, report and plots.

    hfllm push --hub_model_id me/my-model                                    # the model of hfllm rlhf
    hfllm push --hub_model_id me/my-model --dry_run                          # what it would upload; no network
    python recipes/push.py --model_name_or_path outputs/sft --hub_model_id me/my-model --private

Log in first by `hf auth login`, or set HF_TOKEN. Running it again resumes a failed upload, or changes nothing.
"""

from collections.abc import Sequence

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.recipes import Recipe
from hfllm.stages.push import PushArguments, check, following_lines

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[PushArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, PushArguments)


def main(script_args: PushArguments) -> dict[str, int]:
    """Write the card and publish. Return the bytes of each file of the repository."""
    from hfllm.outputs.hub import push_folder, upload_list, upload_sizes

    folder, repo_id = script_args.model_name_or_path, script_args.hub_model_id
    check(folder, repo_id)
    if not main_process():
        return {}
    sizes = upload_sizes(upload_list(folder, repo_id))
    if script_args.dry_run:
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files for {repo_id}; nothing sent")
        return sizes
    push_folder(
        folder,
        repo_id,
        private=script_args.private or None,
        token=script_args.hub_token,
        revision=script_args.revision,
        commit_message=script_args.commit_message,
    )
    for line in following_lines(folder, repo_id):
        print(line)
    return sizes


if __name__ == "__main__":
    run(main, parse)
