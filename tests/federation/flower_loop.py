"""The server's part of the tests between machines: two rounds, whose result is written to a file."""

from pathlib import Path

import torch
from learners import BASE
from safetensors.torch import save_file

from hfllm.federation.rounds import server_optimizer, weighted_average
from hfllm.federation.updates import Failure, Update


def run(make_transport, config):
    """Run as `test_transports.run_rounds` does."""
    transport = make_transport(BASE)
    weights = {"w": torch.zeros(1, 3), "b": torch.zeros(1)}
    names, optimizer, failures = transport.organisations(), server_optimizer("momentum"), []
    for number in (1, 2):
        replies = list(transport.run_round(number, weights, names))
        failures += [each.reason for each in replies if isinstance(each, Failure)]
        weights = optimizer.step(weights, weighted_average(each for each in replies if isinstance(each, Update)))
    said = {"names": " ".join(names), "failures": "\n".join(failures)}
    partial = Path(str(config["result"]) + ".partial")
    save_file(weights, partial, {**said, "bytes": f"{transport.bytes_sent} {transport.bytes_received}"})
    partial.rename(str(config["result"]))
