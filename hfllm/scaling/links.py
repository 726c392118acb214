"""Seconds that bytes take between devices: collectives of a group, inside nodes and across them."""

from hfllm.scaling.devices import Device
from hfllm.scaling.layouts import Layout
from hfllm.scaling.shapes import Shape

# Latency of a step of a ring, within a node and over the network: NCCL's own model (ring, protocol Simple).
NEAR_LATENCY, FAR_LATENCY = 3.4e-6, 14e-6


def bandwidth(device: Device, group: int) -> float:
    """Return the bytes per second between neighbors in a group of `group` adjacent devices."""
    return device.near if group <= device.per_node else device.far


def gather_seconds(device: Device, size: float, group: int, stride: int = 1, calls: int = 1) -> float:
    """Return the seconds to gather `size` bytes on each device of a group, or to reduce as many to shares.

    A node receives what it lacks once, over the links of all its devices in the group, which pass it on among
    themselves: each link carries `size` over their number.

    Args:
        size: bytes that each device has in the end.
        group: devices.
        stride: distance between neighbors; devices in between hold other weights (tensor parallelism).
        calls: collectives that the bytes are divided into, each of which takes a ring's latency.
    """
    if group == 1:
        return 0.0
    here = min(group, max(1, device.per_node // stride))
    nodes = -(-group // here)
    near = size * (here - 1) / here / device.near
    far = size * (nodes - 1) / nodes / (here * device.far)
    return max(near, far) + calls * ((group - nodes) * NEAR_LATENCY + (nodes - 1) * FAR_LATENCY)


def exchange_seconds(shape: Shape, layout: Layout, device: Device, states: float) -> float:
    """Return the seconds to send the states of a layer's tokens to their experts, or back.

    To another node a token travels once, however many of its experts are there; with evenly used experts they are on
    n (1 - (1 - 1/n)^k) of n nodes, and on `topk_group` at most.

    Args:
        states: bytes of the tokens of one device.
    """
    devices, chosen = layout.expert, shape.num_experts_per_tok
    near = states * chosen * (devices - 1) / devices / device.near
    nodes = -(-devices * layout.tensor * layout.context // device.per_node)
    if nodes == 1:
        return near
    reached = min(nodes * (1 - (1 - 1 / nodes) ** chosen), shape.topk_group if shape.n_group > 1 else nodes)
    return max(near, states * reached * (nodes - 1) / nodes / device.far)
