"""What data sheets say about accelerators, and where they say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DEVICES", "PEAK_SHARE", "PEAK_SHARE_WHY", "WIRE_SHARE", "DataSheet"]

PEAK_SHARE = 0.4
"""The share of the peak that a block's kernels are assumed to reach."""
PEAK_SHARE_WHY = (
    "assumed: a published Triton kernel of the sigmoid loss takes 48.8 ms on an H100 at 65,536 pairs in bf16 "
    "(pypi.org/project/siglip-kernel/0.1.1), which is 41 % of the peak if its three products are of 768 channels"
)
WIRE_SHARE = 0.8
"""The share of a link's bandwidth that a message is assumed to reach."""


@dataclass(frozen=True)
class DataSheet:
    """The figures of one accelerator.

    Args:
        name: for people.
        flops: FLOP a second of dense matrix products, by dtype; of float32 without tensor cores, as our kernels.
        memory_bytes: of memory.
        memory_rate: bytes a second of memory.
        link_rate: bytes a second, in one direction, to the accelerators of the same machine.
        network_rate: bytes a second, in one direction, to those of other machines.
        per_machine: accelerators of one machine.
        source: where the figures stand.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_rate: float
    link_rate: float
    network_rate: float
    per_machine: int
    source: str


def _sheet(
    name: str, half: float, single: float, memory: tuple[float, float], link: float, network: float, source: str
) -> DataSheet:
    """Takes TFLOP/s (of 16 bits and float32), GB and GB/s; the link's in both directions, the network's in one."""
    size, rate = memory
    flops = {"fp32": single * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}
    return DataSheet(name, flops, size * 1e9, rate * 1e9, link / 2 * 1e9, network * 1e9, 8, source)


DEVICES = {
    "a100": _sheet(
        "NVIDIA A100 SXM 80 GB", 312, 19.5, (80, 2039), 600, 25,
        "NVIDIA A100 data sheet (312 TFLOP/s bf16, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s in both directions); "
        "DGX A100 data sheet (one 200 Gb/s port a GPU)",
    ),
    "h100": _sheet(
        "NVIDIA H100 SXM", 989, 67, (80, 3350), 900, 50,
        "NVIDIA H100 data sheet (1,979 TFLOP/s bf16 with sparsity, so 989 dense, 67 fp32, 3.35 TB/s, NVLink 900 GB/s "
        "in both directions); DGX BasePOD reference architecture (one 400 Gb/s port a GPU)",
    ),
    "h200": _sheet(
        "NVIDIA H200 SXM", 989, 67, (141, 4800), 900, 50,
        "NVIDIA H200 data sheet (1,979 TFLOP/s bf16 with sparsity, so 989 dense, 67 fp32, 141 GB, 4.8 TB/s, NVLink "
        "900 GB/s in both directions); DGX BasePOD reference architecture (one 400 Gb/s port a GPU)",
    ),
    "b200": _sheet(
        "NVIDIA B200 (HGX)", 2250, 80, (180, 8000), 1800, 50,
        "NVIDIA Blackwell architecture technical brief, HGX B200 (2,250 TFLOP/s bf16 dense, 80 fp32, NVLink 1.8 TB/s "
        "in both directions); DGX B200 data sheet (1,440 GB and 64 TB/s of 8 GPUs); DGX BasePOD reference architecture "
        "(one 400 Gb/s port a GPU)",
    ),
}  # fmt: skip
"""By the name that ``--device`` takes."""
