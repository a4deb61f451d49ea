"""GPUs and links of a plan: the vendors' figures, and assumptions about them."""

from dataclasses import dataclass

from train.planning.memory import GIB

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """A GPU of a node, and its links. Bytes a second are of one direction and one GPU."""

    name: str
    memory: float
    """Bytes, as CUDA reports them."""
    bandwidth: float
    """Memory bandwidth, the vendor's figure."""
    nvlink: float
    """Bandwidth to the other GPUs of its node, the vendor's figure."""
    network: float
    """Bandwidth to other nodes: one adapter of 400 Gbit/s per GPU, an assumption about the
    cluster."""


MACHINES = {
    "h100": Machine("NVIDIA H100 SXM", 79.2 * GIB, 3352 * GB, 450 * GB, 50 * GB),
    "h200": Machine("NVIDIA H200", 139.8 * GIB, 4800 * GB, 450 * GB, 50 * GB),
}

MEASURED_ON = MACHINES["h200"]
"""The kernels of docs/results. On another GPU what moves bytes scales with the bandwidth of its
memory, and GEMMs and attention do not scale, as both have the same tensor cores."""

COLLECTIVE_SHARE = 0.75
"""Share of a link's bandwidth that NCCL's gather and reduce reach. An assumption."""

ASSUMPTIONS = (
    "NVLink 450 GB/s and the network 50 GB/s a GPU and direction (the vendors' figures, one "
    "adapter of 400 Gbit/s a GPU), of which NCCL reaches 75%",
    "dispatch over NVLink at the speed that was traced, over the network at 75% of it",
    "gathering overlaps with the forward pass and reducing with the backward pass; the rest is "
    "waited for",
    "dispatch by DeepEP v1, so fp8_fused is planned as fp8_direct: by v2 it is some 2 to 4% faster",
    "tensors may take 92% of a GPU's memory: the rest is for CUDA, NCCL, DeepEP and fragmentation",
    "where the router chooses, the most loaded rank of a group gets 1.2 times its share of rows",
)
"""Printed with every plan."""
