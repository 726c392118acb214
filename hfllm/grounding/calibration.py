"""Does a model know when it is wrong? The figures of `hfllm.outputs.statistics`, by their names here too."""

from hfllm.outputs.statistics import (
    Bin,
    Interval,
    as_numbers,
    as_pairs,
    aurc,
    auroc,
    auroc_interval,
    auroc_within,
    check_share,
    ece,
    excess_aurc,
    reliability,
    reliability_plot,
    risk_coverage,
    risk_coverage_plot,
    shuffled_auroc,
    uncertainty_metrics,
)

# Written out, so that a linter does not take the imports for unused.
__all__ = [
    "Bin",
    "Interval",
    "as_numbers",
    "as_pairs",
    "aurc",
    "auroc",
    "auroc_interval",
    "auroc_within",
    "check_share",
    "ece",
    "excess_aurc",
    "reliability",
    "reliability_plot",
    "risk_coverage",
    "risk_coverage_plot",
    "shuffled_auroc",
    "uncertainty_metrics",
]
