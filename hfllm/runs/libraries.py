"""Whether what a flag asks for is installed, or exists at all: trackers, kinds of attention, kernels.

The libraries look when a trainer is built or a model loaded, which may be after the stages before have been trained.
"""

import difflib
import importlib.util
import re
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What to install for a tracker, where that has another name.
PACKAGES = {"azure_ml": "azureml-core mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
# What to install for a version of flash attention.
FLASH_PACKAGES = {"2": "flash-attn", "3": "flash-attn-3", "4": "flash-attn-4"}


def check_libraries(*parsed: "DataclassInstance") -> None:
    """Refuse flags that ask for what is not installed or does not exist.

    Raises:
        InputError: naming the flag, what is there, and what to install.
    """
    for group in parsed:
        if trackers := getattr(group, "report_to", None):
            check_trackers([trackers] if isinstance(trackers, str) else trackers)
        if attention := getattr(group, "attn_implementation", None):
            check_attention(attention)
        if getattr(group, "use_liger_kernel", False) and importlib.util.find_spec("liger_kernel") is None:
            raise InputError("--use_liger_kernel: not installed (pip install liger-kernel)")


def check_trackers(names: list[str]) -> None:
    """Refuse trackers for `--report_to` that transformers does not know, or that are not installed.

    Raises:
        InputError: with the accepted names, or the package to install.
    """
    asked = [name for name in names if name not in ("none", "all")]
    if not asked:
        return
    from transformers.integrations import integration_utils

    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    there = set(integration_utils.get_available_reporting_integrations())
    for name, is_there in (
        ("flyte", integration_utils.is_flytekit_available),
        ("azure_ml", integration_utils.is_azureml_available),
    ):
        there |= {name} if is_there() else set()
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"--report_to {name}: expected none, all or one of {', '.join(known)}{hint}")
        if name not in there:
            installed = ", ".join(sorted(there & set(known))) or "no tracker"
            raise InputError(
                f"--report_to {name}: not installed (pip install {PACKAGES.get(name, name)}); there is {installed}"
            )


def check_attention(name: str) -> None:
    """Refuse an `--attn_implementation` that does not exist or is not installed.

    Raises:
        InputError: with those that are there, and the package to install.
    """
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as FLASH
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # One that the Hub's kernels stand in for, or one of them by its repository.
    has_kernels = importlib.util.find_spec("kernels") is not None
    plain = name.removeprefix("paged|")
    known = {"eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if not each.startswith("paged|"))}
    missing = {
        each
        for each in known
        if (version := re.fullmatch(r"flash_attention_(\d)", each))
        and int(version[1]) in FLASH
        and not FLASH[int(version[1])]["general_availability_check"]()
    }
    there = ", ".join(sorted(known - missing))
    if plain in missing and not has_kernels:
        package = FLASH_PACKAGES.get(plain[-1], "flash-attn")
        raise InputError(
            f"--attn_implementation {name}: not installed (pip install {package}, on a machine with a GPU that it "
            f"supports); there is {there}"
        )
    if "/" in plain and not has_kernels:
        raise InputError(
            f"--attn_implementation {name}: kernels of the Hub need pip install kernels; there is {there}"
        )
    if plain not in known and "/" not in plain:
        raise InputError(f"--attn_implementation {name}: unknown; there is {there}")
