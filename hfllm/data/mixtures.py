"""Training and held-out texts of one dataset, or of several with weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.data.loading import TextArguments, hash_of, load_texts
from hfllm.data.prepared import Prepared
from hfllm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def mixture_of(script_args: TextArguments) -> list[tuple[str, float | None]]:
    """Return the datasets and their weights; a single dataset has the weight `None`.

    Raises:
        InputError: for an entry that is not NAME:WEIGHT, or a name that comes twice.
    """
    if not script_args.dataset_mixture:
        return [(script_args.dataset_name, None)]
    pairs = []
    for entry in script_args.dataset_mixture:
        name, _, weight = entry.rpartition(":")
        try:
            pairs.append((name, float(weight)))
        except ValueError:
            pairs.append(("", 0.0))
        if not name or not pairs[-1][1] > 0:
            raise InputError(f"--dataset_mixture {entry!r}: expected NAME:WEIGHT with a weight above 0")
    if len({name for name, _ in pairs}) < len(pairs):
        raise InputError(f"--dataset_mixture {' '.join(script_args.dataset_mixture)}: a dataset comes twice")
    return pairs


def load_sources(
    script_args: TextArguments, seed: int, prepared: Prepared
) -> tuple[dict[str, "Dataset"], Sequence[str], list[str]]:
    """Load training texts by source, all of them as one dataset, and held-out texts of all sources.

    In a mixture, any first part of all texts has the sources by weight, as long as each has text left, so that a
    tokenizer or a baseline learns from the same mixture as the model. A text that one source holds out and another
    trains on is removed from the held-out texts.

    Raises:
        InputError: when no held-out text is left.
    """
    from datasets import concatenate_datasets

    sources, held_out, mixture = {}, [], mixture_of(script_args)
    for number, (name, _) in enumerate(mixture):
        of_source = replace(script_args, dataset_name=name)
        sources[name], test = load_texts(of_source, seed, prepared, f"texts-{number}")
        held_out += test
    together = concatenate_datasets(list(sources.values()))
    if len(sources) > 1:
        together = together.select(by_weight(sources.values(), [weight for _, weight in mixture]))
        wanted = {hash_of(text) for text in held_out}
        known = wanted.intersection(hash_of(text) for text in together["text"])
        held_out = [text for text in held_out if hash_of(text) not in known]
        if not held_out:
            raise InputError("every held-out text of the mixture is a training text of another of its datasets")
    return sources, together["text"], held_out


def by_weight(sources: Sequence["Dataset"], weights: Sequence[float]) -> list[int]:
    """Return an order of the concatenated sources' texts in which their bytes follow the weights throughout."""
    import numpy
    import pyarrow.compute

    progress = []
    for source, weight in zip(sources, weights, strict=True):
        batches = source.with_format("arrow").iter(10_000)
        sizes = numpy.concatenate([pyarrow.compute.binary_length(batch["text"]) for batch in batches])
        progress.append(sizes.cumsum() / weight)
    return numpy.concatenate(progress).argsort(kind="stable").tolist()
