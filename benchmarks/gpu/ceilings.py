"""What this GPU can do at best: copying memory, multiplying matrices, and starting kernels of a graph."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.gpu.device import Device

COPY_BYTES = 2 << 30
MATRIX = 8192
NODES = 512
ROUNDS = 15


def ceilings(device: Device) -> dict[str, float]:
    """Copy bandwidth in GB/s, bytes read and written; 16-bit matrix rate in TFLOP/s; microseconds a graph node."""
    size, side, nodes = min(COPY_BYTES, device.free_bytes() // 8), MATRIX, NODES
    if device.rehearsal:
        size, side, nodes = 1 << 16, 64, 2
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    copied = _median(device, lambda _: target.copy_(source), 1)
    a = torch.randn(side, side, device=device.name).to(device.dtype)
    b = torch.randn(side, side, device=device.name).to(device.dtype)
    product = torch.empty_like(a)
    multiplied = _median(device, lambda _: torch.matmul(a, b, out=product), 1)
    one = torch.zeros(1, device=device.name)
    started = _median(device, lambda _: one.add_(1), nodes)
    return {
        "copy_gb_s": float(f"{2 * size / copied / 1e9:.4g}"),
        "matrix_tflop_s": float(f"{2 * side**3 / multiplied / 1e12:.4g}"),
        "graph_node_us": float(f"{1e6 * started:.3g}"),
    }


def _median(device: Device, run: Any, calls: int) -> float:
    sample = device.sample(run, [None] * calls)
    return statistics.median(sample() for _ in range(ROUNDS))
