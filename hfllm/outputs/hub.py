"""Publish a finished model on the Hub in one commit."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hfllm.errors import HIDDEN, InputError, redact, refuse_if
from hfllm.outputs.card import check_base, check_publishable, public_report, write_card
from hfllm.outputs.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, WEIGHTS, model_files
from hfllm.outputs.report import REPORT_FILE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from huggingface_hub import HfApi


# Seconds before every new attempt. Requests in an attempt are also retried by huggingface_hub.
WAITS = (2, 8, 30)
PASSING = frozenset((408, 429, 500, 502, 503, 504))
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN to a token with write permission"
Result = TypeVar("Result")


class _WithoutSecrets(logging.Filter):
    """Filter for huggingface_hub's logs of failed requests with URLs signed for uploads."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(re.sub(r"\?\S+", f"?{HIDDEN}", record.getMessage())), ()
        return True


_FILTER = _WithoutSecrets()


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    endpoint: str | None = None,
) -> str:
    """Publish the model in `folder`: weights, config, tokenizer, code, card, report and plots, in one commit.

    Args:
        folder: the output folder of a finished run, or any folder written by `save_pretrained`.
        repo_id: `name` or `owner/name`; created if it does not exist.
        private: whether a new repository is private (default: the owner's setting). With True, an existing public one
            is refused.
        token: an access token; by default HF_TOKEN or the one stored by `hf auth login`.
        revision: a branch, created if it does not exist (default: main).
        commit_message: the commit's first line.
        endpoint: the Hub's URL, if not HF_ENDPOINT or huggingface.co.

    Returns:
        The URL of the commit with the model; there is no new commit if nothing has changed.

    Raises:
        InputError: when the folder holds no complete model, the Hub refuses, or it cannot be reached after retries.
    """
    return Repository(repo_id, private, token, revision, endpoint).push(folder, commit_message)


def upload_list(folder: str | Path, repo_id: str | None = None) -> dict[str, Path | bytes]:
    """Return the files of `folder` to publish, by path in the repository: a file, or its content without local paths.

    It also writes the card.

    Raises:
        InputError: when the folder holds no complete model, or an adapter whose base is local.
    """
    folder = Path(folder)
    names = model_files(folder)
    check_base(folder)
    write_card(folder, repo_id)
    reports = (REPORT_FILE, "report.md")
    return {name: public_report(folder, name) if name in reports else folder / name for name in sorted({*names, CARD})}


def upload_sizes(files: dict[str, Path | bytes]) -> dict[str, int]:
    """Return the bytes of the files of an `upload_list`."""
    return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}


@dataclass
class Repository:
    """A model repository of the Hub; with the arguments of `push_folder`."""

    repo_id: str
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
    revision: str | None = None
    endpoint: str | None = None

    def create(self) -> None:
        """Create the repository and the branch if they do not exist, to show errors before training.

        Raises:
            InputError: without a token, or when the Hub refuses or cannot be reached.
        """
        self._check()
        self._insist(self._create)

    def push(self, folder: str | Path, commit_message: str = "Upload model") -> str:
        """Publish `folder`; see `push_folder`."""
        self._check()
        files = upload_list(folder, self.repo_id if "/" in self.repo_id else None)
        self._insist(self._create)
        # With the owner's name the card can show how to load the model.
        files = upload_list(folder, self.repo_id)
        url, is_new = self._insist(lambda: self._commit(files, commit_message))
        size = sum(upload_sizes(files).values()) / 1e6
        did = f"pushed {len(files)} files, {size:.1f} MB" if is_new else "nothing has changed since the last push"
        print(f"{self.repo_id}: {did}: {url}", flush=True)
        return url

    def _check(self) -> None:
        from huggingface_hub import constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        name = self.repo_id
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"--hub_model_id {name!r}: {error}") from None
        refuse_if(constants.is_offline_mode(), f"cannot push to {name}: HF_HUB_OFFLINE is set; unset it")
        self.token = (self.token or get_token() or "").strip()
        refuse_if(not self.token, f"cannot push to {name} without an access token: {LOG_IN}")
        # The HTTP library would quote such a token in its error message.
        if not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise InputError(f"the access token for {name} has spaces or characters that no token has: {LOG_IN}")

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        from hfllm.version import __version__

        return HfApi(endpoint=self.endpoint, token=self.token, library_name="hfllm", library_version=__version__)

    def _create(self) -> None:
        api = self._api()
        self.repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.private and api.model_info(self.repo_id).private is False:
            raise InputError(f"{self.repo_id} exists and is public: make it private on the Hub or choose another name")
        if self.revision and not self.revision.startswith("refs/"):
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def _commit(self, files: dict[str, Path | bytes], commit_message: str) -> tuple[str, bool]:
        """Commit all differences from the repository. Return the commit's URL and whether it is new."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api = self._api()
        before = api.model_info(self.repo_id, revision=self.revision)
        there = {sibling.rfilename for sibling in before.siblings or []}
        # Remove old weights, to keep them from being loaded instead of the new ones or mixed with them.
        stale = sorted(name for name in there - files.keys() if _is_weights(name))
        commit = api.create_commit(
            self.repo_id,
            operations=[
                *(CommitOperationAdd(name, file) for name, file in files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=self.revision,
        )
        return commit.commit_url, commit.oid != before.sha

    def _insist(self, attempt: Callable[[], Result]) -> Result:
        """Retry after temporary failures. A retry changes nothing twice: an existing commit is recognized."""
        from huggingface_hub.errors import HTTPError

        logging.getLogger("huggingface_hub.utils._http").addFilter(_FILTER)
        for wait in (*WAITS, None):
            try:
                return attempt()
            except InputError:
                raise
            except (AttributeError, KeyError, TypeError) as error:
                # huggingface_hub parses a response without checking it.
                what = f"no {error.args[0]!r} in it" if isinstance(error, KeyError) else redact(str(error), self.token)
                reason = f"the Hub's answer cannot be read ({what}): is {self._api().endpoint} a Hub?"
                raise InputError(f"cannot push to {self.repo_id}: {reason}") from None
            except (OSError, ValueError, RuntimeError, HTTPError) as error:
                cause = _cause(error)
                reason = redact(_reason(cause), self.token)
                if not _may_pass(cause):
                    raise InputError(self._refusal(cause, reason)) from None
                if wait is None:
                    raise InputError(
                        f"pushing to {self.repo_id} failed {len(WAITS) + 1} times ({reason}); the repository is as it "
                        "was, and running the same command again resumes"
                    ) from None
            print(f"{self.repo_id}: {reason}; trying again in {wait} s", flush=True)
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _refusal(self, error: BaseException, reason: str) -> str:
        status = _status(error)
        if status == 401 and "RepositoryNotFound" not in type(error).__name__:
            return f"the Hub does not accept the access token for {self.repo_id} ({reason}): {LOG_IN}"
        if status in (401, 403, 404):
            return f"no permission to write to {self.repo_id} ({reason}): check its name and owner, and {LOG_IN}"
        return f"cannot push to {self.repo_id}: {reason}"


def repository_of(*parsed: "DataclassInstance") -> Repository | None:
    """Return the repository of `--push_to_hub` and the `--hub_...` flags; `None` without them.

    A Trainer's own pushes would upload the whole output folder at every save, with a draft of a card: these flags are
    hidden from it, and the finished model is pushed once.

    Args:
        parsed: the flags of a run as dataclasses; one of them has the flags of the Hub.

    Raises:
        InputError: when a flag asks for something never published, or others could not load the result.
    """
    flags = next((group for group in parsed if getattr(group, "push_to_hub", False)), None)
    if flags is None:
        return None
    strategy = getattr(flags, "hub_strategy", "")
    strategy, is_always = str(getattr(strategy, "value", strategy)), getattr(flags, "hub_always_push", False)
    if strategy in ("checkpoint", "all_checkpoints") or is_always:
        flag = "--hub_always_push" if is_always else f"--hub_strategy {strategy}"
        raise InputError(f"{flag} cannot be used here: the finished model is pushed once, and no checkpoints")
    for group in parsed:
        if hasattr(group, "use_peft"):
            check_publishable(group.use_peft, group.model_name_or_path, group.model_revision)
    name = flags.hub_model_id or Path(flags.output_dir).absolute().name
    return Repository(name, flags.hub_private_repo, flags.hub_token, flags.hub_revision)


def _is_weights(name: str) -> bool:
    numbered = name.startswith(("model-", "adapter_model-")) and name.endswith(".safetensors")
    return numbered or name in (*WEIGHTS, *ADAPTER_WEIGHTS, ADAPTER_CONFIG)


def _cause(error: BaseException) -> BaseException:
    """Return the error of the request behind huggingface_hub's "Error while uploading"."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError

    if (status := _status(error)) is not None:
        return status in PASSING
    # Anything but JSON is a proxy's page instead of the Hub's answer.
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, JSONDecodeError))


def _reason(error: BaseException) -> str:
    """Return the reason in one line; for HTTP errors only status and server message, since URLs may be signed."""
    if (status := _status(error)) is not None:
        return (
            f"HTTP {status}: {' '.join((getattr(error, 'server_message', None) or 'no reason given').split())[:200]}"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
