"""Kernels for NVIDIA GPUs, in Pallas: three families behind one contract.

| module         | operands                                                       | device      |
|----------------|----------------------------------------------------------------|-------------|
| `particles`    | float32, at most 16 channels, no band: one head, many tokens   | from Ampere |
| `hopper`       | bfloat16 and float16 at the head dimensions of language models | Hopper      |
| `tensor_cores` | what the others refuse                                         | from Ampere |

JAX has deprecated Pallas on Triton since 0.11 and will remove it, so particles on Hopper and later
and language models on Hopper are built on Mosaic GPU; Triton serves older devices and what those
kernels refuse (float32 heads, bands in float32), and is refused where JAX has it no more.
JAX 0.10 and 0.11 take different compilers by default: every call names its own by compiler_params.

Operands are those of `blocked`, with any number of leading batch axes.
"""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp

from ..reference import Problem
from . import hopper, particles, tensor_cores
from .configs import Config, tuned

DTYPES = "float32", "bfloat16", "float16"
CHANNELS = 256  # that registers hold
FEW = 16  # up to here the particles' kernels win
AMPERE, HOPPER = (8, 0), (9, 0)
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


def refusal(mode: str, q, k, v, problem: Problem) -> str | None:
    """Why these operands cannot be run; None if they can."""
    if (capability := compute_capability()) < AMPERE:
        return f"its kernels need compute capability 8.0, got {'.'.join(map(str, capability))}"
    if (name := jnp.dtype(q.dtype).name) not in DTYPES:
        return f"its kernels are for {', '.join(DTYPES)}, got {name}"
    if (channels := max(q.shape[-1], v.shape[-1])) > CHANNELS:
        return f"its kernels hold at most {CHANNELS} channels, got {channels}"
    on_triton = family(mode, q, k, v, problem, capability) == "tensor_cores" or capability < HOPPER
    if on_triton and importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "its kernels for these operands need Pallas on Triton, which this JAX no longer has"
    return None


def family(mode: str, q, k, v, problem: Problem, capability: tuple[int, int]) -> str:
    """The name of the module that runs these operands on a device of this compute capability."""
    channels, band, weighted = max(q.shape[-1], v.shape[-1]), problem.band, problem.weighted
    if jnp.dtype(q.dtype).itemsize >= 4 and channels <= FEW and band == (None, None):
        return "particles"
    if capability == HOPPER:
        if hopper.refusal(q, k, v, band=band, weighted=weighted, mode=mode) is None:
            return "hopper"
    return "tensor_cores"


def forward(q, k, v, b, scale, *, problem: Problem, config: Config = None, interpret: bool = False):
    return _run("forward", (q, k, v, b, scale), problem, config, interpret)


def tangent(
    q, k, v, b, scale, mean, lse, du, dk, dv, db, *, problem: Problem, config: Config = None,
    interpret: bool = False,
):  # fmt: skip
    operands = q, k, v, b, scale, mean, lse, du, dk, dv, db
    return _run("tangent", operands, problem, config, interpret)


def cotangent(
    q, k, v, b, scale, mean, lse, g, h, *, problem: Problem, config: Config = None,
    interpret: bool = False,
):  # fmt: skip
    return _run("cotangent", (q, k, v, b, scale, mean, lse, g, h), problem, config, interpret)


def _run(mode: str, operands, problem: Problem, config: Config, interpret: bool):
    """Flattens the batch axes and calls the family's function."""
    batch = operands[4].shape
    flat = tuple(a.reshape((math.prod(batch), *a.shape[len(batch) :])) for a in operands)
    q, k, v = flat[:3]
    channels = max(q.shape[-1], v.shape[-1])
    # The interpreter runs the kernels for older devices: the newer ones' copies are not for it.
    capability: tuple[int, int] = AMPERE if interpret else compute_capability()
    name = family(mode, q, k, v, problem, capability)
    if config is None and not interpret:
        config = tuned(_device_kind(), name, mode, q.dtype, channels)
    if config is None and name == "tensor_cores" and capability in SMALL_MEMORY:
        config = tensor_cores.default_config(mode, q.shape[1], k.shape[1], channels, q.dtype)
        if (bytes_of_a_row := channels * q.dtype.itemsize) > 512:
            config = dataclasses.replace(config, stages=1)
        elif bytes_of_a_row > 256:
            config = dataclasses.replace(config, rows=max(16, config.rows // 2))
    options = {"weighted": problem.weighted, "config": config, "interpret": interpret}
    if name == "particles":
        outs = getattr(particles, mode)(*flat, **options, mosaic=capability[0] >= HOPPER[0])
    else:
        module = hopper if name == "hopper" else tensor_cores
        outs = getattr(module, mode)(*flat, **options, band=problem.band)
    return tuple(a.reshape((*batch, *a.shape[1:])) for a in outs)


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
