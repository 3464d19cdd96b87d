"""The number format in which a device computes: bf16 where that saves time."""

from __future__ import annotations

from d2o import devices


def quick_at_bf16() -> bool:
    """Whether bf16 saves time on the device: on GPUs from Ampere on, and on processors with AVX-512.

    Others compute in bf16 several times more slowly than in fp32.
    """
    import torch

    if devices.device() == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def precision(wanted: str) -> str:
    """`bf16` or `fp32`; for `auto` the one that is quicker on the device."""
    if wanted == "auto":
        return "bf16" if quick_at_bf16() else "fp32"
    return wanted


def checkpoint_dtype() -> str:
    """The dtype to load a checkpoint in: its own (`auto`), or `float32` where bf16 is slow."""
    return "auto" if quick_at_bf16() else "float32"
