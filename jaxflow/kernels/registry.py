"""Which backends there are, and which of them runs.

A new backend of this package is a file with a subclass of `AbstractBackend`, and an entry here;
one of a user goes through `register_backend`. `REGISTRY` is the one list of names.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._rules import flag
from . import proof
from .base import (
    MODES,
    AbstractBackend,
    AbstractFunctions,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
)
from .blocked import Blocked
from .pruned import Pruned
from .reference import Reference, too_many
from .ring import Ring
from .unbatched import Unbatched


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
    """What makes a backend, the only platform that it runs on, if there is one, and whether it
    takes masks."""

    load: Callable[[], AbstractBackend]
    platform: str | None = None
    masks: bool = False


REGISTRY = {
    "reference": Entry(Reference, masks=True),
    "blocked": Entry(Blocked, masks=True),
    "pallas_gpu": Entry(_pallas_gpu, "cuda"),
    "pallas_tpu": Entry(_pallas_tpu, "tpu"),
    "cudnn": Entry(_cudnn, "cuda"),
    "pruned": Entry(Pruned),
    "ring": Entry(Ring),
}
BACKENDS = REGISTRY.keys()  # as they are at any time: what users register joins them
# In Pallas's interpreter, for tests: the name with ":interpret" behind it.
INTERPRETED = {"pallas_gpu": _pallas_gpu, "pallas_tpu": _pallas_tpu}
# The order in which a platform tries them; the last one refuses nothing and wants no proof.
PREFERENCE = {"cuda": ("cudnn", "pallas_gpu", "blocked"), "tpu": ("pallas_tpu", "blocked")}
OTHERWISE = ("reference", "blocked")


def register_backend(
    name: str, backend: AbstractBackend | Callable[..., Any], *, masks: bool = False
) -> None:
    """Makes a backend of your own usable as `backend=name` wherever a backend is named.

        fn(q, k, v, log_weights, scale) -> (mean, log_partition)
        s_ij = scale <q_i, k_j> + log_weights_j
        log_partition_i = logsumexp_j s_ij,    mean_i = sum_j exp(s_ij - log_partition_i) v_j

    The shortest backend is a function of one system: it is mapped over batches and heads, its
    derivatives in both modes are JAX's own, or those that its `jax.custom_jvp` gives; with a
    `jax.custom_vjp` it has those of reverse mode alone. It is given float32 or float64, also for
    operands of 16 bits, and no query that sees no key. A subclass of
    `jaxflow.kernels.AbstractBackend` instead computes the three functions of `jaxflow.kernels.base`
    for a whole batch, in the operands' own dtype, and says what it refuses; only such a one can be
    what the ring goes around. Second derivatives are the portable backend's for all backends, and
    no backend of yours is chosen unasked. `jaxflow.kernels.check_backend` compares it with the
    definition.

    **Arguments:**

    - `name`: a word that no backend has, without a colon, which separates a name from its options.
      It means this backend until the process ends, for compiled programs hold it.
    - `backend`: a function of the shapes `(m, p)`, `(n, p)`, `(n, r)`, `(n,)` and `()` that returns
      `(m, r)` and `(m,)`, or an instance of a subclass of `jaxflow.kernels.AbstractBackend`.
    - `masks`: whether it takes `causal`, `window` and `mask`. A function then has a sixth argument,
      `visible`, Booleans of shape `(m, n)`: the keys that each query sees.

    **Raises:** `TypeError` for what is no name or no backend, `ValueError` for a name that is taken
    or has a colon. A function whose results have other shapes raises `ValueError` where it is used.

    **Example:**

    ```python
    import jax
    import jax.numpy as jnp
    import jaxflow as jf

    def written_out(q, k, v, log_weights, scale):
        s = scale * q @ k.T + log_weights[None, :]
        return jax.nn.softmax(s, axis=1) @ v, jax.nn.logsumexp(s, axis=1)

    jf.kernels.register_backend("written out", written_out)
    mu = jf.Measure(jnp.eye(3))
    mine, blocked = (
        jf.SelfAttention(beta=4.0, backend=name)(0.0, mu.points, mu)
        for name in ("written out", "blocked")
    )
    assert jnp.allclose(mine, blocked, atol=1e-6)
    ```
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a backend must be a string, got {name!r}.")
    if not name.strip() or ":" in name:
        raise ValueError(
            "the name of a backend must be a word without a colon, which separates a name from its "
            f"options; got {name!r}."
        )
    if name in REGISTRY:
        raise ValueError(
            f"the backend {name!r} is registered already, and compiled programs hold its name: it "
            f"means one backend until the process ends. Take another name than "
            f"{', '.join(BACKENDS)}."
        )
    takes_masks = flag("masks", masks)
    if isinstance(backend, type) or not (isinstance(backend, AbstractBackend) or callable(backend)):
        raise TypeError(
            "backend must be a function of one system or an instance of a subclass of "
            f"jaxflow.kernels.AbstractBackend, got {backend!r}."
        )
    made = backend if isinstance(backend, AbstractBackend) else Unbatched(backend, takes_masks)
    REGISTRY[name] = Entry(lambda: made, masks=takes_masks)


def load(name: str, platform: str = "cpu") -> AbstractBackend:
    """The backend of a name, on a platform where that makes a difference."""
    backend = entry(name).load()
    if isinstance(backend, Ring):
        return dataclasses.replace(backend, around=Selected(platform, ring_of(name)[1]))
    return backend


def entry(name: str) -> Entry:
    """What is registered by a name, by "pruned:" and a tolerance, or by "ring:" and the name of an
    axis, which that of a backend may follow.

    **Raises:** `KeyError` for an unknown name, `ValueError` for what is no tolerance, and for a
    backend that the ring cannot go around.
    """
    kind, colon, rest = name.partition(":")
    if kind == "pruned" and colon:
        return Entry(partial(Pruned, tolerance_of(rest)))
    if kind == "ring" and colon:
        return Entry(partial(Ring, ring_of(name)[0]))
    if kind in INTERPRETED and rest == "interpret":
        return Entry(partial(INTERPRETED[kind], interpret=True))
    return REGISTRY[name]


def ring_of(name: str) -> tuple[str | None, str | None]:
    """The axis of a ring, and the backend that it goes around; None for what is not said.

    **Raises:** as `jaxflow.kernels.registry.entry`.
    """
    _, _, rest = name.partition(":")
    axis, _, around = rest.partition(":")
    if around:
        if isinstance(entry(around).load(), Reference | Ring | Unbatched):
            raise ValueError(
                f"the ring goes around a backend whose derivatives take the log-partition of all "
                f"keys, which {around!r} finds anew; got {name!r}. Leave it out to take the best "
                "for the platform."
            )
    return axis or None, around or None


def tolerance_of(given) -> float:
    """The number that a tolerance means.

    **Raises:** `ValueError` for what is no number between 0 and 1.
    """
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < 1:
        raise ValueError(
            "the tolerance of the backend 'pruned' must be a number between 0 and 1, as 1e-4 in "
            f"'pruned:1e-4'; got {given!r}."
        )
    return number


def check_known(name):
    """Whether a name is that of a backend.

    **Raises:** `TypeError` for what is no name, `ValueError` for an unknown one.
    """
    known = f"one of {', '.join(BACKENDS)} or None"
    remedy = (
        "Leave it None to take the best for the platform, or register your own by "
        "jaxflow.kernels.register_backend."
    )
    if not isinstance(name, str):
        raise TypeError(f"backend must be the name of {known}, got {name!r}. {remedy}")
    try:
        entry(name)
    except KeyError:
        raise ValueError(f"backend must be {known}, got {name!r}. {remedy}") from None


def check_named(name, shapes: Shapes, problem: Problem):
    """Whether a backend asked for by name can run these operands on its platform.

    **Raises:** as `jaxflow.kernels.registry.check_known`, and `NotImplementedError`
    with the reason where the backend cannot.
    """
    check_known(name)
    for mode in MODES:
        if (reason := refusal(name, mode, shapes, problem)) is not None:
            raise NotImplementedError(
                f"the backend {name!r} cannot do this ({mode}): {reason}. "
                "Leave backend None to take one that can."
            )


def refusal(name: str, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
    """Why a backend cannot run one of the functions on these operands; None if it can."""
    if problem.mask is not None and not entry(name).masks:
        able = [name for name in BACKENDS if REGISTRY[name].masks]
        return f"it computes all pairs of a band, and masks are for {' and '.join(able)}"
    return load(name).refusal(mode, shapes, problem)


@dataclasses.dataclass(frozen=True)
class Selected(AbstractFunctions):
    """The functions of the backend that a platform selects, for each problem anew."""

    platform: str
    name: str | None

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return self._of("forward", operands, problem).forward(operands, problem)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        return self._of("tangent", operands, problem).tangent(operands, problem)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        return self._of("cotangent", operands, problem).cotangent(operands, problem)

    def _of(self, mode: Mode, operands: Operands, problem: Problem) -> AbstractBackend:
        chosen = choose(mode, self.platform, Shapes(*operands[:3]), problem, self.name)
        return load(chosen, self.platform)


class Candidate(NamedTuple):
    """A backend that a platform may take, what runs there, and what speaks against it."""

    name: str
    kernel: proof.Kernel
    refusal: str | None  # it cannot
    doubt: proof.Doubt | None  # it may be wrong on this device

    @property
    def objection(self) -> str | None:
        return self.refusal if self.doubt is None else self.doubt.reason

    @property
    def verdict(self) -> str:
        """Why it runs, or why not."""
        if self.objection is not None:
            return f"no: {self.objection}"
        if REGISTRY[self.name].platform is None:
            return "runs: portable"
        if proof.all_allowed():
            return f"runs: {proof.SWITCH}=all, proved or not"
        return "runs: of wide use" if self.kernel.name in proof.TRODDEN else "runs: proved"


def candidates(mode: Mode, platform: str, shapes: Shapes, problem: Problem) -> Iterator[Candidate]:
    """The backends that a platform tries, up to the one that runs."""
    for name in PREFERENCE.get(platform, OTHERWISE):
        if name == "reference" and shapes.q.ndim == 2:
            continue  # long flows of few tokens rest on how tiles add up
        found = _candidate(name, mode, platform, shapes, problem)
        if name == "reference" and found.refusal is None:
            found = found._replace(refusal=too_many(shapes))
        yield found
        if found.objection is None:
            return


def _candidate(name: str, mode: Mode, platform: str, shapes: Shapes, problem: Problem) -> Candidate:
    kernel = kernel_of(name, mode, shapes, problem)
    reason = refusal(name, mode, shapes, problem)
    wants_proof = reason is None and entry(name).platform in proof.PLATFORMS
    return Candidate(name, kernel, reason, proof.doubt(platform, kernel) if wants_proof else None)


def kernel_of(name: str, mode: Mode, shapes: Shapes, problem: Problem) -> proof.Kernel:
    """What runs one of the functions by this backend; its name is "backend (kernel)"."""
    words = load(name).kernel(mode, shapes, problem)
    return proof.Kernel(f"{name} ({words})", mode, jnp.dtype(shapes.q.dtype).name)


def choose(mode: Mode, platform: str, shapes: Shapes, problem: Problem, name: str | None) -> str:
    """The backend asked for by name, if it runs on the platform; without a name the first of the
    platform that neither refuses nor has a kernel that is not proved on the device.

    **Raises:** `NotImplementedError` where the backend asked for by name runs elsewhere, or failed
    the check on this device.
    """
    if name is None:
        return _best(mode, platform, shapes, problem)
    home = entry(name).platform
    if home not in (None, platform):
        slow = f", or '{name}:interpret' for a slow run" if name in INTERPRETED else ""
        raise NotImplementedError(
            f"the backend {name!r} runs on {home}, and this program is compiled for {platform}. "
            f"Leave backend None to take the best for the platform{slow}."
        )
    found = _candidate(name, mode, platform, shapes, problem)
    if found.doubt is not None and found.doubt.failed:
        raise NotImplementedError(
            f"the kernel {found.kernel} must not run: {found.doubt.reason}. Leave backend None to "
            f"take one that is right, or set {proof.SWITCH}=all to run it all the same."
        )
    return name


def _best(mode: Mode, platform: str, shapes: Shapes, problem: Problem) -> str:
    *passed, best = candidates(mode, platform, shapes, problem)
    for c in passed:
        if c.doubt is not None and not c.doubt.failed:
            proof.advise(c.kernel, c.doubt, best.name)
    return best.name


def default_platform() -> str:
    """That of JAX's default device, by the name that programs are compiled for."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform
