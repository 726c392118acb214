"""What an organisation sends after a round, and what a server accepts.

The tensors of an update are *changes*: the trained weights minus the weights that the organisation received, in their
precision. Only `lora.stacked` reads factors of adapters themselves, which begin at zero in each round.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfllm.errors import InputError


@dataclass(frozen=True)
class Update:
    """The change of one organisation in one round.

    Args:
        organisation: its name.
        tensors: the change of each trained tensor by name, on the CPU.
        num_tokens: target tokens that it trained on in this round, each time that one was seen: the weight of the
            average.
        num_rows: rows that it trained on in this round.
        base_sha256: `weights_sha256` of the model that it began from before the first round.
        round: the round that it answers; by default what sends it says so (`wire.to_bytes`).
    """

    organisation: str
    tensors: dict[str, Tensor]
    num_tokens: int
    num_rows: int
    base_sha256: str
    round: int | None = None


@dataclass(frozen=True)
class Failure:
    """An organisation that a round goes on without, and why, in one line."""

    organisation: str
    reason: str


@dataclass(frozen=True)
class Form:
    """Shape and precision of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Expected:
    """What a server accepts of every organisation.

    Args:
        forms: shape and precision of each tensor by name.
        base_sha256: of the base model.
        any_rank: accept LoRA factors of other ranks, which `lora.stacked` adds up.
        max_tokens: most target tokens, and rows, that an organisation may have learned in a round: they are its weight
            in the mean. By default any number.
        round: that updates answer; one of another round, late or sent again, is refused. By default any.
    """

    forms: Mapping[str, Form]
    base_sha256: str
    any_rank: bool = False
    max_tokens: int | None = None
    round: int | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], base_sha256: str, any_rank: bool = False) -> "Expected":
        """Return what fits these weights."""
        forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        return cls(forms, base_sha256, any_rank)

    def check(self, update: Update) -> None:
        """Refuse an update that cannot be averaged.

        Raises:
            InputError: in one line that names the organisation.
        """
        whose = f"organisation {update.organisation!r}"
        self.check_round(update.round, update.organisation)
        if update.base_sha256 != self.base_sha256:
            raise InputError(
                f"{whose} began from another base model: sha256 {update.base_sha256[:12]!r}; "
                f"expected {self.base_sha256[:12]!r}"
            )
        found = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in update.tensors.items()}
        self.check_forms(found, update.organisation)
        check_counts(update, self.max_tokens)
        for name, tensor in update.tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{whose} sent {name} with NaN or infinite values; expected finite ones")

    def check_round(self, found: int | None, organisation: str) -> None:
        """Refuse an update of another round, or without a round; see `check`."""
        if self.round is not None and found != self.round:
            sent = "an update of no round" if found is None else f"an update of round {found}"
            raise InputError(f"organisation {organisation!r} sent {sent}; expected one of round {self.round}")

    def check_forms(self, found: Mapping[str, Form], organisation: str) -> None:
        """Refuse other names, shapes or precisions; see `check`."""
        whose = f"organisation {organisation!r}"
        for name in self.forms:
            if name not in found:
                raise InputError(f"{whose} sent no {name}, one of {len(self.forms)} tensors that are averaged")
        for name, form in found.items():
            if name not in self.forms:
                raise InputError(
                    f"{whose} sent {name!r:.200}, which is none of the {len(self.forms)} averaged tensors"
                )
            wanted = self.forms[name]
            if form == wanted or (self.any_rank and _differ_in_rank_alone(name, form, wanted)):
                continue
            axis = rank_axis(name)
            if axis is not None and _differ_in_rank_alone(name, form, wanted):
                raise InputError(
                    f"{whose} sent an adapter of rank {form.shape[axis]}; expected rank {wanted.shape[axis]}, or the "
                    "average 'stacked', which takes any"
                )
            raise InputError(f"{whose} sent {name} as {form}; expected {wanted}")


def check_counts(update: Update, most: int | None = None) -> None:
    """Refuse an update of no tokens or rows, or of more than `most`.

    Raises:
        InputError: naming the organisation.
    """
    for field in ("num_tokens", "num_rows"):
        value = getattr(update, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"organisation {update.organisation!r}: {field} is {value!r:.40}; expected at least 1")
        if most is not None and value > most:
            raise InputError(
                f"organisation {update.organisation!r}: {field} is {value:,}; a round has at most {most:,}"
            )


def rank_axis(name: str) -> int | None:
    """Return the axis of a LoRA factor that is its rank; `None` for other tensors.

    PEFT names factors of linear layers `lora_A`, shape (rank, in), and `lora_B`, (out, rank).
    """
    parts = name.split(".")
    return 0 if "lora_A" in parts else 1 if "lora_B" in parts else None


def changes(trained: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what training changed of the weights that an organisation received, on the CPU, in their precision."""
    return {name: (trained[name].detach() - received[name].to(trained[name].device)).cpu() for name in received}


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all weights: names in order, shapes, precisions and every byte.

    Organisations compare it before they train. Take it of the base model before an adapter is put on it: PEFT renames
    the weights.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _differ_in_rank_alone(name: str, form: Form, wanted: Form) -> bool:
    axis = rank_axis(name)
    if axis is None or form.dtype != wanted.dtype or len(form.shape) != 2 or len(wanted.shape) != 2:
        return False
    return form.shape[1 - axis] == wanted.shape[1 - axis] and form.shape[axis] > 0
