"""The version of the package: what reports, cards and uploads say."""

__version__ = "0.1.0"
