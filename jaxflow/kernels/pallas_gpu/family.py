"""What the families of kernels share: the contract, and what differs between versions of JAX."""

import abc
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..base import AbstractFunctions, Mode, Shapes

# Before jax 0.11, plgpu.load requires an index beside the reference; later it deprecates one.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
NO_INDEX = ((),) if _INDEX is not None and _INDEX.default is _INDEX.empty else ()


class AbstractFamily(AbstractFunctions):
    """The three functions for a kind of operands, with exactly one batch axis."""

    name: ClassVar[str]

    @abc.abstractmethod
    def candidates(self, mode: Mode, shapes: Shapes) -> Sequence[Any]:
        """The configurations that a tuner should try, the family's own choice first."""


def assembly(instruction: str) -> Callable[..., Array]:
    """A PTX instruction on arrays of float32, for kernels on Triton."""

    def apply(*args):
        from jax.experimental.pallas import triton  # JAX will remove it

        (out,) = triton.elementwise_inline_asm(
            f"{instruction} {', '.join(f'${i}' for i in range(len(args) + 1))};",
            args=args,
            constraints=",".join(["=f", *(["f"] * len(args))]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)],
        )
        return out

    return apply


fma = assembly("fma.rn.f32")
exp2 = assembly("ex2.approx.ftz.f32")
