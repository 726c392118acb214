"""What every run does: parse, announce, reuse, report, publish. Nothing here knows a training method."""
