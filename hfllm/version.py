"""The version of the package, shown in reports, cards and uploads."""

__version__ = "0.1.0"
