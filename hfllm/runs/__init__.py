"""The common steps of all runs: parse, announce, reuse, report, publish. Nothing here knows a training method."""
