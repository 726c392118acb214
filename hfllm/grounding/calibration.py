"""Does a model know when it is wrong? The figures of `hfllm.outputs.calibration`, by their names here too."""

__all__ = [
    *("Bin", "Interval", "as_numbers", "as_pairs", "aurc", "auroc", "auroc_interval", "auroc_within", "check_share"),
    *("ece", "excess_aurc", "reliability", "reliability_plot", "risk_coverage", "risk_coverage_plot"),
    *("shuffled_auroc", "uncertainty_metrics"),
]
