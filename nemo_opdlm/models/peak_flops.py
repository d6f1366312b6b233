"""What a device could do at best."""

import re

import torch

#: Name of the device as CUDA tells it -> dense bf16 TFLOP/s by NVIDIA's data sheets; the first match counts.
BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bA(100|800)\b", 312.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH(100|200) NVL\b", 835.0),
    (r"\b(H100|H800|H200|GH200)\b", 989.0),
    (r"\bB200\b", 2250.0),
    (r"\bGB200\b", 2500.0),
)


def peak_tflops(given: float | None, device: torch.device, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s.

    Args:
        given: `model.device_peak_tflops`, which goes first.
        device: where the run computes.
        precision: `trainer.precision`; only of those in bf16 a peak is known.

    Returns:
        None where nothing is known: on a CPU, in fp32, and on GPUs that are not in the table.
    """
    if given is not None or device.type != "cuda" or not precision.startswith("bf16"):
        return given
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """The table's entry for a device of this name."""
    return next((tflops for pattern, tflops in BF16_TFLOPS if re.search(pattern, name)), None)
