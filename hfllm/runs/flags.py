"""Valid values of flags: ranges, JSON values, missing libraries, and trust in remote code.

A learning rate below 0 or NaN, a batch of no rows or an adapter of rank 0 would otherwise train for minutes, or end
somewhere in a library. Flags checked by a stage itself, with reasons of its own, are not here.
"""

import base64
import binascii
import difflib
import importlib.util
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from hfllm.errors import InputError, refuse_if
from hfllm.flags import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, at_least, flag, rules_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# ---- values ----


# Ranges of the libraries' flags; hfllm's flags declare their own.
OF_LIBRARIES = {
    at_least(1): (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("eval_accumulation_steps", "dataset_num_proc", "lora_r", "lora_alpha", "max_length"),
        *("dataloader_prefetch_factor", "ddp_timeout"),
    ),
    Range("at least 1, or -1 for --num_train_epochs", lambda value: value >= 1 or value == -1): ("max_steps",),
    at_least(0): ("dataloader_num_workers",),
    POSITIVE: (
        *("num_train_epochs", "adam_epsilon", "temperature", "logging_steps", "save_steps", "eval_steps"),
        "neftune_noise_alpha",
    ),
    NOT_NEGATIVE: (
        *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"),
        *("center_rewards_coefficient", "router_aux_loss_coef"),
    ),
    SHARE: ("warmup_ratio",),
    BELOW_ONE: ("lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"),
    SEED: ("seed", "data_seed"),
}
OF_LIBRARY = {name: takes for takes, names in OF_LIBRARIES.items() for name in names}
# Where no limit is a wish: gradients are measured, and none is clipped.
MAY_BE_INFINITE = frozenset(("max_grad_norm",))


def check_ranges(*parsed: "DataclassInstance") -> None:
    """Refuse numbers outside their flag's range, including NaN and infinity.

    Args:
        parsed: the flags as parsed.
    """
    # For recipes with another use besides training.
    may_train_nothing = any(getattr(group, "may_train_nothing", False) for group in parsed)
    for group in parsed:
        values = {item.name: getattr(group, item.name) for item in fields(group) if item.init}
        if may_train_nothing and values.get("max_steps") == 0:
            del values["max_steps"]
        check_values(type(group), values)


def check_values(kind: "type[DataclassInstance]", values: Mapping[str, Any]) -> None:
    """Refuse numbers outside the ranges of a class's flags; see `check_ranges`."""
    hints, rules = get_type_hints(kind), rules_of(kind)
    for name, value in values.items():
        _check(name, value, hints[name], (name in rules and rules[name].takes) or OF_LIBRARY.get(name))


def _check(name: str, value: object, kind: object, takes: Range | None) -> None:
    options = {*(get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,))}
    if not {int, float} & options or (value is None and types.NoneType in options):
        return
    accepted = takes.words if takes else "a number"
    refuse_if(value is None, f"--{name} has no value: expected {accepted}")
    # A truth value is a number to Python.
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_bounded = math.isfinite(value) or (name in MAY_BE_INFINITE and value == math.inf)
        refuse_if(not is_bounded or (takes and not takes.holds(value)), f"--{name} {value}: expected {accepted}")
    # A field of several types, such as warmup_steps in words, is left to the library.
    elif options <= {int, float, types.NoneType}:
        raise InputError(f"--{name} {value!r}: expected {accepted}")


# ---- libraries ----
# Whether the request of a flag is installed, or exists at all: trackers, kinds of attention, kernels.
# The libraries look when a trainer is built or a model loaded, possibly after the training of earlier stages.


# The package to install for a tracker, if its name differs.
PACKAGES = {"azure_ml": "azureml-core mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
# The package to install for a version of flash attention.
FLASH_PACKAGES = {"2": "flash-attn", "3": "flash-attn-3", "4": "flash-attn-4"}


def check_libraries(*parsed: "DataclassInstance") -> None:
    """Refuse flags asking for uninstalled or nonexistent options."""
    for group in parsed:
        if trackers := getattr(group, "report_to", None):
            check_trackers([trackers] if isinstance(trackers, str) else trackers)
        if attention := getattr(group, "attn_implementation", None):
            check_attention(attention)
        if getattr(group, "use_liger_kernel", False) and importlib.util.find_spec("liger_kernel") is None:
            raise InputError("--use_liger_kernel: not installed (pip install liger-kernel)")


def check_trackers(names: list[str]) -> None:
    """Refuse trackers for `--report_to` unknown to transformers, or not installed."""
    for name in (name for name in names if name not in ("none", "all")):
        supported, there = _trackers()
        if name not in supported:
            near = difflib.get_close_matches(name, supported, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"--report_to {name}: expected none, all or one of {', '.join(supported)}{hint}")
        if name not in there:
            package, others = PACKAGES.get(name, name), ", ".join(there) or "no tracker"
            raise InputError(f"--report_to {name}: not installed (pip install {package}); there is {others}")


def _trackers() -> tuple[list[str], list[str]]:
    """Return the names of all trackers of transformers, and of the installed ones."""
    from transformers.integrations import integration_utils as utils

    supported = sorted(utils.INTEGRATION_TO_CALLBACK)
    others = {"flyte": utils.is_flytekit_available, "azure_ml": utils.is_azureml_available}
    there = {*utils.get_available_reporting_integrations(), *(name for name, is_there in others.items() if is_there())}
    return supported, [name for name in supported if name in there]


def check_attention(name: str) -> None:
    """Refuse a nonexistent or uninstalled `--attn_implementation`."""
    plain, (supported, there) = name.removeprefix("paged|"), _attention()
    package, complaint = FLASH_PACKAGES.get(plain[-1:], "flash-attn"), None
    # Replaced by the Hub's kernels, or one of them by its repository.
    has_kernels = importlib.util.find_spec("kernels") is not None
    if plain in supported and plain not in there and not has_kernels:
        complaint = f"not installed (pip install {package}, on a machine with a GPU that it supports)"
    elif "/" in plain and not has_kernels:
        complaint = "kernels of the Hub need pip install kernels"
    elif plain not in supported and "/" not in plain:
        complaint = "unknown"
    refuse_if(complaint is not None, f"--attn_implementation {name}: {complaint}; there is {', '.join(there)}")


def _attention() -> tuple[list[str], list[str]]:
    """Return the names of all kinds of attention in transformers, and of the installed ones."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as FLASH
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {"eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if not each.startswith("paged|"))}
    checks = {f"flash_attention_{version}": each["general_availability_check"] for version, each in FLASH.items()}
    return sorted(names), sorted(name for name in names if name not in checks or checks[name]())


# ---- json flags ----
# Flags with a JSON file of an engine: DeepSpeed's, FSDP's, accelerate's.


FLAGS = ("deepspeed", "fsdp_config", "accelerator_config")


def check_json_flags(values: Mapping[str, Any]) -> None:
    """Refuse a missing file or one without a JSON object, and an unreadable object.

    The libraries complain without the name of the flag.

    Args:
        values: the user's values, by flag.
    """
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    for name, text in texts.items():
        if text.lstrip().startswith("{"):
            _check_object(name, text)
    for name in FLAGS:
        # An object may stand there itself, and DeepSpeed's in base64.
        if name in texts and not texts[name].lstrip().startswith("{") and not _is_encoded(texts[name]):
            _check_file(name, texts[name])


def _check_file(flag: str, name: str) -> None:
    refuse_if(not Path(name).is_file(), f"--{flag} {name}: no such file; expected a JSON file")
    try:
        values = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--{flag} {name}: not JSON: {error}") from None
    refuse_if(not isinstance(values, dict), f"--{flag} {name}: expected a JSON object, got {type(values).__name__}")


def _check_object(flag: str, text: str) -> None:
    """Refuse a JSON object beyond Python's limits: libraries report neither its flag nor the error."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        # Perhaps a text with only such a beginning: its reader reports it.
        return
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{flag} {text[:60]}...: cannot be read as JSON: {error}") from None


def _is_encoded(text: str) -> bool:
    try:
        return isinstance(json.loads(base64.urlsafe_b64decode(text)), dict)
    except (binascii.Error, ValueError, RecursionError):
        return False


# ---- remote code ----
# The flag for trust in the code of models, and its recipes.


Given, Made = ParamSpec("Given"), TypeVar("Made")


@dataclass(frozen=True)
class RemoteCodeArguments:
    """The flag, for recipes whose trainer's arguments do not have it."""

    trust_remote_code: bool = flag(
        False, "Run the code that models bring along, and the kernels that their configs name."
    )


def trusts_code_if_asked(main: Callable[Given, Made]) -> Callable[Given, Made]:
    """Return a recipe's `main` that runs code of models if its own or an outer recipe's flags trust it."""

    @wraps(main)
    def trusting(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        is_trusted = any(getattr(group, "trust_remote_code", False) is True for group in args)
        if not is_trusted:
            return main(*args, **kwargs)
        from hfllm.models.loading.saved import trusting_remote_code

        with trusting_remote_code(is_trusted):
            return main(*args, **kwargs)

    return trusting
