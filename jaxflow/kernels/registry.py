"""Which backends there are, and which of them runs.

A new backend is a file with a subclass of `AbstractBackend`, and an entry here.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from .base import MODES, AbstractBackend, Mode, Problem, Shapes
from .blocked import Blocked
from .reference import Reference


def _pallas_gpu(interpret: bool = False) -> AbstractBackend:
    from .pallas_gpu import PallasGPU  # Pallas takes long to import, and few use it.

    return PallasGPU(interpret=interpret)


def _pallas_tpu(interpret: bool = False) -> AbstractBackend:
    from .pallas_tpu import PallasTPU

    return PallasTPU(interpret=interpret)


def _cudnn() -> AbstractBackend:
    from .cudnn import CuDNN

    return CuDNN()


class Entry(NamedTuple):
    """What makes a backend, and the only platform that it runs on, if there is one."""

    load: Callable[[], AbstractBackend]
    platform: str | None = None


BACKENDS = ("reference", "blocked", "pallas_gpu", "pallas_tpu", "cudnn")
REGISTRY = {
    "reference": Entry(Reference),
    "blocked": Entry(Blocked),
    "pallas_gpu": Entry(_pallas_gpu, "cuda"),
    "pallas_tpu": Entry(_pallas_tpu, "tpu"),
    "cudnn": Entry(_cudnn, "cuda"),
    # In Pallas's interpreter, for tests.
    "pallas_gpu:interpret": Entry(partial(_pallas_gpu, interpret=True)),
    "pallas_tpu:interpret": Entry(partial(_pallas_tpu, interpret=True)),
}
# The order in which a platform tries them.
PREFERENCE = {"cuda": ("cudnn", "pallas_gpu", "blocked"), "tpu": ("pallas_tpu", "blocked")}
OTHERWISE = ("blocked",)


def load(name: str) -> AbstractBackend:
    return REGISTRY[name].load()


def check_named(name, shapes: Shapes, problem: Problem):
    """Whether a backend asked for by name can run these operands on its platform.

    **Raises:** `TypeError` for what is no name, `ValueError` for an unknown one,
    `NotImplementedError` with the reason where the backend cannot.
    """
    known = f"one of {', '.join(BACKENDS)} or None"
    remedy = "Leave it None to take the best for the platform."
    if not isinstance(name, str):
        raise TypeError(f"backend must be the name of {known}, got {name!r}. {remedy}")
    if name not in REGISTRY:
        raise ValueError(f"backend must be {known}, got {name!r}. {remedy}")
    backend = load(name)
    for mode in MODES:
        if (reason := backend.refusal(mode, shapes, problem)) is not None:
            raise NotImplementedError(
                f"the backend {name!r} cannot do this ({mode}): {reason}. "
                "Leave backend None to take one that can."
            )


def choose(mode: Mode, platform: str, shapes: Shapes, problem: Problem, name: str | None) -> str:
    """The backend asked for by name, if it runs on the platform; without a name the first of the
    platform that does not refuse."""
    if name is None:
        names = PREFERENCE.get(platform, OTHERWISE)
        return next(n for n in names if load(n).refusal(mode, shapes, problem) is None)
    home = REGISTRY[name].platform
    if home not in (None, platform):
        interpreted = f"{name}:interpret"
        slow = f", or {interpreted!r} for a slow run" if interpreted in REGISTRY else ""
        raise NotImplementedError(
            f"the backend {name!r} runs on {home}, and this program is compiled for {platform}. "
            f"Leave backend None to take the best for the platform{slow}."
        )
    return name


def default_platform() -> str:
    """That of JAX's default device, by the name that programs are compiled for."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform
