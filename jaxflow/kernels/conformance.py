"""Whether a backend computes the three functions of base.py, compared with the definition.

check.py asks the same of the kernels of this package in the shapes of their tiles and in a process
of its own, for they may hang; here are small shapes, in this process, for a backend of any kind.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..masks import Blocks
from .base import MODES, Mode, Operands, Problem, Results, evaluate
from .cases import TOLERANCE, Case, difference, line
from .reference import Reference
from .registry import check_known, load, refusal


class Trial(NamedTuple):
    """A case, and the batch axes that its systems are laid out on."""

    case: Case
    axes: tuple[int, ...]


# No axis of the batch, one and two; lengths that no tile divides; what may be refused.
TRIALS = (
    Trial(Case("one token", 1, 1, 1, 1), ()),
    Trial(Case("masked keys", 7, 11, 3, 2, batch=3, weighted=True), (3,)),
    Trial(Case("causal", 8, 8, 4, 4, batch=4, band=(None, 0)), (2, 2)),
    Trial(Case("window", 9, 12, 4, 3, band=(2, 1)), ()),
    Trial(Case("mask", 9, 9, 4, 3, batch=2, weighted=True, mask=Blocks(4)), (2,)),
)


class Finding(NamedTuple):
    """What became of one function on one case: it was right, refused, or is at fault."""

    case: str
    mode: Mode
    dtype: str
    refusal: str | None = None
    fault: str | None = None

    def __str__(self) -> str:
        words = f"wrong: {self.fault}" if self.fault else "right"
        return f"{self.case}, {self.mode}, {self.dtype}: {self.refusal or words}"


class Conformance(NamedTuple):
    """What `jaxflow.kernels.check_backend` found; printed, a line a finding."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are wrong."""
        return tuple(finding for finding in self.findings if finding.fault is not None)

    @property
    def right(self) -> tuple[Finding, ...]:
        """The findings that agree with the definition."""
        return tuple(f for f in self.findings if f.fault is None and f.refusal is None)

    def __str__(self) -> str:
        count = f"{len(self.right)} right, {len(self.faults)} wrong of {len(self.findings)}"
        return "\n".join([f"{self.name}: {count}", *(f"  {f}" for f in self.findings)])


def check_backend(
    name: str, *, dtypes: Sequence[str] = ("float32", "bfloat16"), trials: Sequence[Trial] = TRIALS
) -> Conformance:
    """Compares a backend with the definition: its three functions, in small systems of all kinds.

    The mean and the log-partition, their tangent and their cotangent are those of
    `jaxflow.kernels.base`. The cases are one token, masked keys with a system that has no other,
    causal, a window and a mask, without a batch and with batches of one and two axes. What the
    backend refuses is no fault. It takes some ten seconds for a small function on a CPU.

    **Arguments:**

    - `name`: as in `backend=name`: one of this package, or one that
      `jaxflow.kernels.register_backend` was given.
    - `dtypes`: of queries, keys and values: "float32", "bfloat16" or "float16". The largest
      difference may be 1e-4 of the largest entry in float32, and ten roundings in 16 bits.
    - `trials`: the cases.

    **Returns:** an object with `findings`, of which `right` and `faults` are some; it prints as a
    list of all.

    **Raises:** `ValueError` for an unknown backend or dtype, `TypeError` for what is no name.

    **Example:**

    ```python
    import jaxflow as jf

    found = jf.kernels.check_backend(
        "reference", dtypes=["float32"], trials=jf.kernels.conformance.TRIALS[:1]
    )
    assert len(found.right) == 3 and not found.faults
    ```
    """
    check_known(name)
    if unknown := [dtype for dtype in dtypes if dtype not in tuple(TOLERANCE)]:
        raise ValueError(f"dtypes must be of {', '.join(TOLERANCE)}, got {unknown[0]!r}.")
    pairs = itertools.product(dtypes, trials)
    return Conformance(name, tuple(f for pair in pairs for f in _findings(name, *pair)))


def _findings(name: str, dtype: str, trial: Trial) -> Iterator[Finding]:
    """One for each of the three functions."""
    case, problem = trial.case, trial.case.problem(dtype)
    operands = {mode: _laid_out(case.operands(mode, dtype), trial.axes) for mode in MODES}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), operands)
    expected = _right(wide, dataclasses.replace(problem, constant_scale=None))
    for mode in MODES:
        found = Finding(case.name, mode, dtype)
        if (reason := refusal(name, mode, case.shapes(dtype), problem)) is not None:
            yield found._replace(refusal=f"refused: {reason}")
            continue
        # Without weights their cotangent, the fourth, may be anything.
        right = expected[mode][: None if case.weighted else 3]
        try:
            results = jax.jit(lambda o: evaluate(load(name), o, problem))(operands[mode])
            yield found._replace(fault=_fault(results, right, TOLERANCE[dtype]))
        except Exception as error:  # of a user's function, whatever it raises
            yield found._replace(fault=f"it did not run: {line(error)}")


@functools.partial(jax.jit, static_argnames="problem")
def _right(operands: dict[Mode, Operands], problem: Problem) -> dict[Mode, Results]:
    """By the definition; one program for all dtypes."""
    return {mode: evaluate(Reference(), o, problem) for mode, o in operands.items()}


def _laid_out(operands: Operands, axes: tuple[int, ...]) -> Operands:
    return jax.tree.map(lambda a: a.reshape((*axes, *a.shape[1:])), operands)


def _fault(found: Results, expected: Results, tolerance: float) -> str | None:
    for f, e in zip(found, expected, strict=False):
        if jnp.shape(f) != e.shape:
            return f"it has the shape {jnp.shape(f)} where {e.shape} is right"
        reason = difference(np.asarray(f, np.float64), np.asarray(e, np.float64), tolerance)
        if reason is not None:
            return reason
    return None
