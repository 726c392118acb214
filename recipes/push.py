"""Publish a finished model on the Hugging Face Hub, with its card, report and plots.

    accelerate launch recipes/push.py --hub_model_id me/my-model             # what recipes/rlhf.py made
    python recipes/push.py --model_name_or_path outputs/sft --hub_model_id me/my-model --private
    python recipes/push.py --hub_model_id me/my-model --dry_run              # what it would upload; no network

Log in first by `hf auth login`, or set HF_TOKEN. Running it again resumes a failed upload, or changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hfllm.runs.command_line import main_process, parse_recipe, run


@dataclass
class PushArguments:
    """What to publish, and where."""

    model_name_or_path: str = field(
        default="outputs/rlhf", metadata={"help": "The output folder of a finished run, or any saved model."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The repository: owner/name, or a name of your own account. Made if missing."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private; an existing one must be."})
    revision: str | None = field(default=None, metadata={"help": "The branch, made if missing (default: main)."})
    commit_message: str = field(default="Upload model", metadata={"help": "The commit's first line."})
    hub_token: str | None = field(
        default=None,
        metadata={
            "help": "Access token. Better: HF_TOKEN or `hf auth login`, since command lines are seen by others."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Write the card and list the files, without a network."})


def parse(argv: Sequence[str]) -> tuple:
    return parse_recipe((PushArguments,), argv, None, __doc__)


def main(script_args: PushArguments) -> dict[str, int]:
    """Write the card and publish. Returns the bytes of each file of the repository."""
    from hfllm.errors import InputError
    from hfllm.outputs.hub import push_folder, upload_list, upload_sizes

    folder = Path(script_args.model_name_or_path)
    if not folder.is_dir():
        raise InputError(
            f"--model_name_or_path {folder}: no such folder; run recipes/rlhf.py first, or name another run's"
        )
    if script_args.hub_model_id is None:
        raise InputError("--hub_model_id is needed: where to publish, for example --hub_model_id me/my-model")
    if not main_process():
        return {}
    sizes = upload_sizes(upload_list(folder, script_args.hub_model_id))
    if script_args.dry_run:
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files for {script_args.hub_model_id}; nothing sent")
        return sizes
    push_folder(
        folder,
        script_args.hub_model_id,
        private=script_args.private or None,
        token=script_args.hub_token,
        revision=script_args.revision,
        commit_message=script_args.commit_message,
    )
    return sizes


if __name__ == "__main__":
    run(main, parse)
