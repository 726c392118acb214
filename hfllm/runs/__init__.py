"""How any run goes: parse, announce, reuse, report, publish. Nothing here knows a method."""
