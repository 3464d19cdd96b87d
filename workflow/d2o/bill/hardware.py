"""Devices, and the share of their speed that each kind of work reaches: all that the bill assumes of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from d2o.errors import D2OError
from d2o.settings import Compute
from d2o.settings.messages import suggestion


@dataclass(frozen=True)
class Device:
    """A GPU, or a core of a CPU.

    Attributes:
        flops: FLOP/s in bf16, dense.
        bandwidth: bytes/s of memory.
        memory: bytes; 0: the machine's own memory.
        shares: the share of `flops` that each kind of work reaches, without start-up; `decode`: of `bandwidth` too.
        starts: seconds from the start of a job to its first unit of work.
    """

    flops: float
    bandwidth: float
    memory: float
    shares: dict[str, float]
    starts: dict[str, float]


# Assumed for GPUs: a step of 1.5B weights reached 0.29 of an H200's 989 TFLOP/s (docs/measured.md), and larger layers
# reach more. `fp32` is the speed of float32 products over that of bf16 ones. Starts include libraries, weights from
# disk, an engine's compilation, and for a training DeepSpeed on all ranks.
_GPU = {"train": 0.35, "forward": 0.4, "padded": 0.3, "decode": 0.6, "fp32": 0.07}
_GPU_STARTS = {"train": 120.0, "forward": 60.0, "engine": 150.0, "padded": 60.0, "light": 10.0}
# Measured in the demo on two cores of an EPYC with AVX-512, bf16 (docs/measured.md).
_CPU = {"train": 0.6, "forward": 0.6, "padded": 0.55, "decode": 0.25, "fp32": 0.5}
_CPU_STARTS = {"train": 14.0, "forward": 7.0, "engine": 13.0, "padded": 9.0, "light": 1.0}

DEVICES = {
    "H100": Device(989e12, 3.35e12, 80e9, _GPU, _GPU_STARTS),
    "H200": Device(989e12, 4.8e12, 141e9, _GPU, _GPU_STARTS),
    "A100": Device(312e12, 2.04e12, 80e9, _GPU, _GPU_STARTS),
    "L40S": Device(362e12, 0.86e12, 48e9, _GPU, _GPU_STARTS),
    "cpu": Device(210e9, 20e9, 0, _CPU, _CPU_STARTS),
}

# Bytes/s at which checkpoints and models are written, and at which a process reads them.
DISK = 3e9


def named(name: str) -> Device:
    """A device by its name; D2OError where the name is unknown."""
    if name not in DEVICES:
        raise D2OError(f"--device: there is no {name!r}{suggestion(name, DEVICES)}")
    return DEVICES[name]


def of(compute: Compute) -> str:
    """The name of the device that jobs run on: the config's, or an H100 where they take GPUs."""
    return compute.device or ("H100" if compute.gpus else "cpu")
