"""cuDNN's fused attention, as JAX ships it, behind the contract of the other backends.

Forward and, where only the mean has a cotangent, backward are cuDNN's. It has no tangent and takes
no cotangent of the log-partition h: those are `pallas_gpu`'s kernels, on the same residuals.

Why the private module: `jax.nn.dot_product_attention` rounds the log-partition to the operands' 16
bits, and the weights exp(s - log_partition) of the derivatives would be wrong by per cents.
"""

import contextlib
import dataclasses
import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .base import (
    AbstractBackend,
    Cotangent,
    Forward,
    Mode,
    Problem,
    Results,
    Shapes,
    Tangent,
)
from .pallas_gpu import PallasGPU

fused: Any = None
with contextlib.suppress(ImportError):  # A JAX that has moved it does without.
    from jax._src.cudnn import fused_attention_stablehlo as fused

DTYPES = ("bfloat16", "float16")
OTHERS = PallasGPU()  # for what cuDNN has not


@dataclasses.dataclass(frozen=True)
class CuDNN(AbstractBackend):
    """cuDNN's fused attention."""

    def forward(self, operands: Forward, problem: Problem) -> Results:
        q, k, v, _, scale = operands
        batch = scale.shape
        mean, lse = _attend(problem, *(_heads(a, batch) for a in (q, k, v)))
        return mean.reshape(*batch, *mean.shape[1::2]), lse.reshape(*batch, -1)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        return OTHERS.tangent(operands, problem)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        if not problem.mean_only:
            return OTHERS.cotangent(operands, problem)
        q, k, v, b, scale, *_ = operands
        batch = scale.shape
        heads = (_heads(a, batch) for a in (q, k, v))
        # The same call as the forward pass, which XLA therefore runs once.
        outs, pullback = jax.vjp(partial(_attend, problem), *heads)
        gq, gk, gv = cast(tuple, pullback((_heads(operands.g, batch), jnp.zeros_like(outs[1]))))
        gu = gq.reshape(q.shape).astype(b.dtype) / problem.constant_scale
        return gu, gk.reshape(k.shape), gv.reshape(v.shape), jnp.zeros_like(b)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        q, k, v = shapes
        if (name := jnp.dtype(q.dtype).name) not in DTYPES:
            return f"it takes {' and '.join(DTYPES)}, got {name}"
        if problem.weighted:
            return "its bias is an array of all n^2 scores, so log_weights are not for it"
        if not problem.constant_scale:
            return "it takes the scale as a constant of the program, a Python number other than 0"
        p, r = q.shape[-1], v.shape[-1]
        if p != r or p % 8 or p > 256:
            return (
                f"it takes head dimensions that are equal multiples of 8 up to 256, got {p} and {r}"
            )
        left, right = problem.band
        if right not in (None, 0) or (left is not None and right is None):
            return f"of windows it takes causal ones, got keys from i - {left} to i + {right}"
        if right == 0 and q.shape[-2] != k.shape[-2]:
            return f"causal takes as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}"
        if (reason := _absent(p)) is not None:
            return reason
        return None if _has(mode, problem) else OTHERS.refusal(mode, shapes, problem)

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        if _has(mode, problem):
            return "its fused attention"
        return f"pallas_gpu's {OTHERS.kernel(mode, shapes, problem)}"


def _has(mode: Mode, problem: Problem) -> bool:
    """Whether cuDNN has a kernel for it."""
    return mode == "forward" or (mode == "cotangent" and problem.mean_only)


def _absent(head_dimension: int) -> str | None:
    if fused is None:
        return "this JAX has its cuDNN calls elsewhere"
    try:
        device = jax.local_devices(backend="cuda")[0]
        fused.check_cudnn_version()
    except RuntimeError:
        return "there is no CUDA device with cuDNN on this machine"
    capability = float(device.compute_capability)
    if capability < 8.0:
        return f"it needs compute capability 8.0, the device has {capability}"
    if head_dimension > 128 and capability < 9.0:
        return f"head dimension {head_dimension} needs compute capability 9.0, got {capability}"
    return None


def _attend(problem: Problem, q, k, v) -> tuple[Array, Array]:
    left, right = problem.band
    assert problem.constant_scale is not None  # or the operands are refused
    outs: Any = fused.dot_product_attention(
        q,
        k,
        v,
        scale=problem.constant_scale,
        mask_type=fused.MaskType.NO_MASK if right is None else fused.MaskType.CAUSAL,
        sliding_window_length=None if left is None else left + 1,
        return_residual=True,
    )
    return outs


def _heads(a, batch):
    """(*batch, tokens, channels) as cuDNN's (batch, tokens, heads, channels)."""
    return a.reshape(math.prod(batch), a.shape[-2], 1, a.shape[-1])
