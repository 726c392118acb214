"""Publishing a finished model: its flags and checks."""

from dataclasses import dataclass
from pathlib import Path

from hfllm.errors import InputError
from hfllm.flags import flag
from hfllm.outputs.files import CONFIG


@dataclass(frozen=True)
class PushArguments:
    """What to publish, and where."""

    model_name_or_path: str = flag("outputs/rlhf", "The output folder of a finished run, or any saved model.")
    hub_model_id: str | None = flag(
        None, "The repository: owner/name, or a name in your own account. Created if missing."
    )
    private: bool = flag(False, "Make a new repository private; an existing one must be.")
    revision: str | None = flag(None, "The branch, created if missing (default: main).")
    commit_message: str = flag("Upload model", "The commit's first line.")
    hub_token: str | None = flag(
        None, "Access token. Better: HF_TOKEN or `hf auth login`, since other users can see command lines."
    )
    dry_run: bool = flag(False, "Write the card and list the files, without network access.")


def check(model_name_or_path: str, hub_model_id: str | None) -> None:
    """Refuse to publish without a model folder or a repository, or a model whose config nobody could load.

    A model with code of its own is not tried.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        raise InputError(f"--model_name_or_path {folder}: no such folder; run hfllm rlhf first, or name another run's")
    if hub_model_id is None:
        raise InputError("--hub_model_id is needed: where to publish, for example --hub_model_id me/my-model")
    if not (folder / CONFIG).is_file():
        return
    from hfllm.models.loading.saved import reason_of, saved_config

    try:
        saved_config(str(folder))
    except InputError:
        raise
    except Exception as error:
        # Configs of other families end in errors of any type.
        if "trust_remote_code" not in str(error):
            raise InputError(f"{folder / CONFIG} cannot be loaded: {reason_of(error)}") from error


def following_lines(model_name_or_path: str, repo_id: str) -> list[str]:
    """Return what to know after a push: who can load the model, and how to talk to it."""
    import json

    path = Path(model_name_or_path) / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = [f"next: hfllm chat {repo_id}"]
    if config.get("model_type") == "hfllm":
        lines.insert(
            0,
            "others load it with trust_remote_code=True, or after import hfllm; where its config allows, as a family "
            f"that every library knows: hfllm convert --model_name_or_path {model_name_or_path}",
        )
    return lines
