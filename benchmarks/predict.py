"""What the machine code of the particles' kernels says about their speed; no device is needed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflow.kernels.base import MODES, Cotangent, Forward, Mode, Problem, Tangent, evaluate
from jaxflow.kernels.pallas_gpu.particles import Particles

from .machine_code import DEVICES, Kernel, kernels

N, DIMENSIONS = 65536, (2, 3, 8, 16)
LANES_PER_EXP = 8  # issue slots of the FP32 pipe in which the other unit takes one exponential
H100 = DEVICES["9.0"]


def run() -> list[dict]:
    """One row a kernel: the particles in all modes, without log-weights, for an H100."""
    return [row for d in DIMENSIONS for mode in MODES for row in _rows(mode, d)]


def floor(mode: str, d: int) -> float:
    """Issue slots that a pair cannot do without: multiply-adds and one exponential.

    forward: the score, sums of v and of weights. tangent: the score, <du, k> + <u, dk>, their
    product with the weight, sums of dv, v and one more. gu: score, <g, v>, product, sum of k;
    gk, gv: score, <g, v>, product, sums of u and g.
    """
    slots = {"forward": 2 * d + 2, "tangent": 5 * d + 3, "gu": 3 * d + 2, "gk, gv": 4 * d + 2}
    return max(LANES_PER_EXP, slots[mode])


def _rows(mode: Mode, d: int) -> list[dict]:
    found = [k for k in kernels(*_program(mode, d), H100) if k.main.count("MUFU.EX2")]
    if mode != "cotangent":
        return [_row(mode, d, kernel) for kernel in found]
    # The one over queries has more sums.
    found = sorted(found, key=lambda kernel: kernel.main.length / kernel.main.pairs)
    return [_row(name, d, kernel) for name, kernel in zip(("gu", "gk, gv"), found, strict=True)]


def _row(name: str, d: int, kernel: Kernel) -> dict:
    loop = kernel.main
    slots = loop.length / loop.pairs
    return {
        "shape": f"particles-{N}-{d}",
        "mode": name,
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "instructions": slots,
        "loads": loop.count("LD") / loop.pairs,
        "of_floor": floor(name, d) / max(LANES_PER_EXP, slots),
    }


def _program(mode: Mode, d: int):
    shape: Any = jax.ShapeDtypeStruct
    matrix, vector = shape((1, N, d), jnp.float32), shape((1, N), jnp.float32)
    primal = Forward(matrix, matrix, matrix, vector, shape((1,), jnp.float32))
    operands = {
        "forward": primal,
        "tangent": Tangent(*primal, matrix, vector, matrix, matrix, matrix, vector),
        "cotangent": Cotangent(*primal, matrix, vector, matrix, vector),
    }[mode]
    return partial(evaluate, Particles(), problem=Problem(weighted=False)), (operands,)
