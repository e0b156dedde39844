"""Kernels for NVIDIA GPUs, in Pallas: three families behind one contract.

| module         | operands                                                       | device      |
|----------------|----------------------------------------------------------------|-------------|
| `particles`    | float32, at most 16 channels, no band: one head, many tokens   | from Ampere |
| `hopper`       | bfloat16 and float16 at the head dimensions of language models | Hopper      |
| `tensor_cores` | what the others refuse                                         | from Ampere |

JAX has deprecated Pallas on Triton since 0.11 and will remove it, so particles on Hopper and data
centre Blackwell and language models on Hopper are built on Mosaic GPU; Triton serves other devices
and what those kernels refuse (float32 heads, bands in float32), and is refused where JAX has it no
more.
JAX 0.10 and 0.11 take different compilers by default: every call names its own by compiler_params.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from ..base import (
    AbstractBackend,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
    on_one_batch_axis,
)
from . import hopper
from .configs import Config, tuned
from .hopper import Hopper
from .particles import Particles
from .tensor_cores import TensorCores

Family = Particles | Hopper | TensorCores

DTYPES = "float32", "bfloat16", "float16"
CHANNELS = 256  # that registers hold
FEW = 16  # up to here the particles' kernels win
AMPERE, HOPPER = (8, 0), (9, 0)
# Majors that Mosaic GPU compiles for: it asks more of a GeForce's 12 than that has.
MOSAIC = (9, 10)
SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # 99 KiB a block: smaller tiles where wide
# By what the names of devices contain, the first that fits: for programs lowered without a device.
CAPABILITIES = {
    **dict.fromkeys(("V100",), (7, 0)),
    **dict.fromkeys(("T4", "TITAN RTX", "Quadro RTX", "GeForce RTX 20", "GeForce GTX"), (7, 5)),
    **dict.fromkeys(("GB10", "GeForce RTX 50", "RTX PRO"), (12, 0)),
    **dict.fromkeys(("B200", "B300"), (10, 0)),
    **dict.fromkeys(("A100", "A30"), AMPERE),
    **dict.fromkeys(("A10", "A40", "RTX", "L4"), (8, 6)),
}


@dataclasses.dataclass(frozen=True)
class PallasGPU(AbstractBackend):
    """The kernels of the family that suits the operands and the device.

    `config` are tiles of that family, found by tuning or by its own heuristics where None.
    `interpret` runs the kernels for older devices on any machine, in Pallas's interpreter.
    """

    config: Config = None
    interpret: bool = False

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return on_one_batch_axis(
            self._family("forward", operands, problem).forward, operands, problem
        )

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        return on_one_batch_axis(
            self._family("tangent", operands, problem).tangent, operands, problem
        )

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        family = self._family("cotangent", operands, problem)
        return on_one_batch_axis(family.cotangent, operands, problem)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        if self.interpret:
            return None
        if (capability := compute_capability()) < AMPERE:
            return f"its kernels need compute capability 8.0, got {'.'.join(map(str, capability))}"
        if (name := jnp.dtype(shapes.q.dtype).name) not in DTYPES:
            return f"its kernels are for {', '.join(DTYPES)}, got {name}"
        if shapes.channels > CHANNELS:
            return f"its kernels hold at most {CHANNELS} channels, got {shapes.channels}"
        found = family(shapes, problem, capability)
        on_mosaic = isinstance(found, Hopper) or (isinstance(found, Particles) and found.mosaic)
        if not on_mosaic and _triton_is_gone():
            return (
                "its kernels for these operands need Pallas on Triton, which this JAX no longer has"
            )
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return family(shapes, problem, self._capability()).name

    def _family(self, mode: Mode, operands: Operands, problem: Problem) -> Family:
        shapes = Shapes(*operands[:3])
        found, config = family(shapes, problem, self._capability()), self.config
        if config is None and not self.interpret:
            config = tuned(_device_kind(), found.name, mode, shapes.q.dtype, shapes.channels)
        settings: dict[str, Any] = {"config": config, "interpret": self.interpret}
        return dataclasses.replace(found, **settings)

    def _capability(self) -> tuple[int, int]:
        # The interpreter runs the kernels for older devices: the newer ones' copies are not for it.
        return AMPERE if self.interpret else compute_capability()


def family(shapes: Shapes, problem: Problem, capability: tuple[int, int]) -> Family:
    """The family that runs these operands on a device of this compute capability."""
    narrow = shapes.channels <= FEW and problem.band == (None, None)
    if narrow and jnp.dtype(shapes.q.dtype).itemsize >= 4:
        return Particles(mosaic=capability[0] in MOSAIC)
    if capability == HOPPER and hopper.refusal(shapes, problem) is None:
        return Hopper()
    return TensorCores(small_memory=capability in SMALL_MEMORY)


def _triton_is_gone() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is None


def compute_capability() -> tuple[int, int]:
    """Of the device that a program is lowered for; Hopper's where none is at hand or named."""
    device, named = _local_device(), jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and (named is None or named.device_kind == device.device_kind):
        major, minor = device.compute_capability.split(".")
        return int(major), int(minor)
    kind = "" if named is None else named.device_kind
    return next((known for name, known in CAPABILITIES.items() if name in kind), HOPPER)


def _device_kind() -> str:
    if (named := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return named.device_kind
    return "" if (device := _local_device()) is None else device.device_kind


def _local_device():
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
