"""The most operations a second that one rank's device can do: the denominator of MFU."""

import re
import time
from dataclasses import dataclass

import torch

# Dense 16-bit tensor-core and plain fp32 TFLOP/s of one device, from NVIDIA's data sheets. Words of the device's name;
# the first line whose words all occur counts.
DATA_SHEETS: tuple[tuple[frozenset[str], float, float], ...] = (
    (frozenset({"B200"}), 2250.0, 75.0),
    (frozenset({"H200", "NVL"}), 835.0, 60.0),
    (frozenset({"H200"}), 989.0, 67.0),
    (frozenset({"H100", "PCIe"}), 756.0, 51.0),
    (frozenset({"H100", "NVL"}), 835.0, 60.0),
    (frozenset({"H100"}), 989.0, 67.0),
    (frozenset({"A100"}), 312.0, 19.5),
    (frozenset({"L40S"}), 362.0, 91.6),
    (frozenset({"L4"}), 121.0, 30.3),
    (frozenset({"A10"}), 125.0, 31.2),
    (frozenset({"V100"}), 125.0, 15.7),
    (frozenset({"T4"}), 65.0, 8.1),
)
REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """flops: operations a second of one rank's device. source: where the number comes from, for people."""

    flops: float
    source: str


def device_peak(device: torch.device, precision: str) -> Peak:
    """From the data sheet of a known GPU; of anything else, a CPU above all, measured with short products of matrices.

    precision: `fp32`, `bf16` or `fp16`. Draws no random number and takes a fraction of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[\s-]+", name))
        for known, half, single in DATA_SHEETS:
            if known <= words:
                return Peak(1e12 * (single if precision == "fp32" else half), f"data sheet of {name}")
    return _measured(device, precision)


def _measured(device: torch.device, precision: str) -> Peak:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 512 if device.type == "cpu" else 8192
    one = torch.full((size, size), 0.5, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = one @ one
        float(result[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return Peak(2 * size**3 / best, f"measured: {precision} products of {size} x {size} matrices")
