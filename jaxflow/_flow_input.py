"""The rules on the arguments of a flow, checked on the host before anything is compiled.

Numbers that are known are checked in NumPy. Numbers that are traced are checked when the program
runs, by callbacks, which keep it from being cached on disk: a flow of known points and times has
none.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from ._types import ScalarLike, is_concrete
from .fields import AbstractField
from .measure import Measure
from .measure import check_measure as check_is_measure

Observables = Mapping[str, Callable[[Any, Measure], Any]]


def check_kinds(field, mu0, solver, controller, saveat, adjoint, event, meter, observe, max_steps):
    """Each argument is of its class."""
    if not isinstance(field, AbstractField):
        raise TypeError(
            f"field must be a jaxflow field, got {type(field).__name__}. Subclass "
            "jaxflow.fields.AbstractField to write your own."
        )
    check_is_measure("mu0", mu0)
    check_policy(solver, controller, saveat, adjoint, event, meter, max_steps)
    if not isinstance(observe, Mapping | None):
        raise TypeError(f"observe must be a dictionary {{name: fn(t, mu)}}, got {observe!r}.")
    for name, fn in (observe or {}).items():
        if not isinstance(name, str) or not callable(fn):
            raise TypeError(f"observe maps names to functions of (t, mu); got {name!r}: {fn!r}.")


def check_policy(solver, controller, saveat, adjoint, event, meter, max_steps):
    """How to solve: each argument is of its class."""
    for name, kind, value in (
        ("solver", diffrax.AbstractSolver, solver),
        ("stepsize_controller", diffrax.AbstractStepSizeController, controller),
        ("saveat", diffrax.SaveAt, saveat),
        ("adjoint", diffrax.AbstractAdjoint, adjoint),
        ("event", diffrax.Event, event),
        ("progress_meter", diffrax.AbstractProgressMeter, meter),
    ):
        optional = value is None and name in ("stepsize_controller", "event")
        if not optional and not isinstance(value, kind):
            raise TypeError(f"{name} must be a diffrax.{kind.__name__} instance, got {value!r}.")
    whole = isinstance(max_steps, int | np.integer) and not isinstance(max_steps, bool)
    if max_steps is not None and not (whole and max_steps >= 1):
        raise ValueError(f"max_steps must be a whole number from 1 on, or None; got {max_steps!r}.")


def check_measure(field: AbstractField, mu0: Measure):
    """What is known of mu0: finite points on the field's geometry, and some mass."""
    if mu0.log_weights is not None and is_concrete(mu0.log_weights):
        most = np.asarray(mu0.log_weights).max(axis=-1)
        if not np.isfinite(most).all():
            raise ValueError(
                "mu0.log_weights must be below inf, with one above -inf in each system, so that "
                f"there is some mass; the largest is {most.min() if most.ndim else most}."
            )
    if not is_concrete(mu0.points):
        return
    points = np.asarray(mu0.points)
    if not np.isfinite(points).all():
        where = _first(~np.isfinite(points))
        raise ValueError(f"mu0.points must be finite, got {points[where]} at index {where}.")
    if not is_concrete(*jtu.tree_leaves(eqx.filter(field.geometry, eqx.is_array))):
        return
    with jax.ensure_compile_time_eval():  # a geometry of the user's own, while a jit is traced
        on_space = np.asarray(field.geometry.contains(points))
    if not on_space.all():
        where = _first(~on_space)
        raise ValueError(
            f"the points must lie on the field's geometry {field.geometry}; the one at index "
            f"{where} has length {np.linalg.norm(points[where]):.6g}. Retract them first "
            "(field.geometry.retract(points)), or pass another geometry to the field."
        )


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])


# ------------------------------------------------------------------ times


class Times(NamedTuple):
    """The times of a flow in the precision of its state.

    `checked`: all of them are known, so that no check is left to the program.
    """

    t0: Array
    t1: Array
    dt0: Array | None
    saveat: diffrax.SaveAt
    controller: diffrax.AbstractStepSizeController
    checked: bool


def times(t0, t1, dt0, saveat, controller, dtype: np.dtype) -> Times:
    """The times, checked where they are known."""
    for name, value in {"t0": t0, "t1": t1, "dt0": 1.0 if dt0 is None else dt0}.items():
        _check_time(name, value)
    if dt0 is not None and is_concrete(dt0) and not 0 < dt0 < np.inf:
        raise ValueError(f"dt0, a step or the first one, must be positive and finite; got {dt0}.")
    subs = jtu.tree_leaves(saveat.subs, is_leaf=_is_sub)
    lists = [sub.ts for sub in subs if sub.ts is not None]
    if isinstance(controller, diffrax.StepTo):
        lists.append(controller.ts)
    checked = is_concrete(t0, t1, dt0, *lists)
    if is_concrete(t0, t1):
        _check_interval(t0, t1, dtype)
    if checked:
        saveat = _clipped(saveat, t0, t1, dtype)
        if isinstance(controller, diffrax.StepTo):
            controller = _check_step_to(controller, t0, t1, dtype)
    else:
        saveat = jtu.tree_map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, saveat)
    start, end = _number(t0, dtype), _number(t1, dtype)
    if not is_concrete(t0, t1):
        end = _check_traced(t0, t1, start, end)
    return Times(
        start, end, None if dt0 is None else _number(dt0, dtype), saveat, controller, checked
    )


def _number(t: ScalarLike, dtype) -> Array:
    return jnp.asarray(np.asarray(t, dtype) if is_concrete(t) else t, dtype)


def _is_sub(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def check_number(name: str, value: Any):
    """Real numbers: no truth value, text or complex number."""
    dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {value!r}.")


def _check_time(name: str, t: Any):
    check_number(name, t)
    if np.shape(t) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(t)}.")
    if is_concrete(t) and not np.isfinite(t):
        raise ValueError(f"{name} must be finite, got {t}.")


def _check_interval(t0: ScalarLike, t1: ScalarLike, dtype: np.dtype):
    if t1 < t0:
        raise ValueError(f"t1 must not be less than t0, got t0={t0}, t1={t1}; flow along -field.")
    asked = float(t1) - float(t0)
    kept = float(np.asarray(t1, dtype)) - float(np.asarray(t0, dtype))
    if abs(kept - asked) > 1e-3 * asked:
        raise ValueError(
            f"the interval from t0={t0} to t1={t1} is {asked:g} long, and {kept:g} in {dtype}, the "
            'precision of the state. Use float64 points, jax.config.update("jax_enable_x64", '
            "True), or count time from t0=0 where the field does not depend on it."
        )


def _check_traced(t0, t1, start: Array, end: Array) -> Array:
    """The end, once it is known to be after the start when the program runs."""
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    wide = jnp.promote_types(t0.dtype, t1.dtype)
    t0, t1 = t0.astype(wide), t1.astype(wide)
    end = eqx.error_if(end, ~(t0 <= t1), "t1 must not be less than t0: flow along -field instead.")
    one = (start == end) & (t0 < t1)
    return eqx.error_if(
        end, one, "t0 and t1 are one number in the precision of the state: use float64 points."
    )


def _clipped(saveat: diffrax.SaveAt, t0, t1, dtype: np.dtype) -> diffrax.SaveAt:
    """Saved times, which a rounding may have put outside of the interval, back in it."""
    slack = 1e-6 * max(abs(float(t0)), abs(float(t1)))  # of times rounded to float32
    low, high = (np.asarray(t, dtype) for t in (t0, t1))

    def clip(sub: diffrax.SubSaveAt):
        if sub.ts is None:
            return sub
        ts = np.asarray(sub.ts)
        if ts.ndim != 1 or not ts.size or ts.dtype.kind not in "fiu":
            raise ValueError(
                f"SaveAt(ts=...) takes real times of shape (times,), at least one; got {ts.dtype} "
                f"of shape {ts.shape}."
            )
        inside = t0 - slack <= ts.min() and ts.max() <= t1 + slack
        if not inside or (np.diff(ts) < 0).any():
            raise ValueError(
                f"SaveAt(ts=...) must increase within [t0, t1] = [{t0}, {t1}]; got {len(ts)} times "
                f"from {ts.min():g} to {ts.max():g}."
            )
        return eqx.tree_at(lambda s: s.ts, sub, jnp.asarray(np.clip(ts.astype(dtype), low, high)))

    return eqx.tree_at(
        lambda s: s.subs, saveat, jtu.tree_map(clip, saveat.subs, is_leaf=_is_sub),
        is_leaf=lambda x: x is None,
    )  # fmt: skip


def _check_step_to(controller: diffrax.StepTo, t0, t1, dtype: np.dtype) -> diffrax.StepTo:
    ts = np.asarray(controller.ts).astype(dtype)
    if not (np.diff(ts) > 0).all():
        raise ValueError(
            f"StepTo(ts) must increase from each step to the next; got {ts.tolist()} in {dtype}."
        )
    ends = np.asarray([t0, t1], dtype)
    if not np.array_equal(ts[[0, -1]], ends):
        raise ValueError(
            f"StepTo(ts) must begin at t0 and end at t1, [{t0}, {t1}]; it goes from {ts[0]:g} to "
            f"{ts[-1]:g}."
        )
    return diffrax.StepTo(jnp.asarray(ts))


def check_tolerances(controller: diffrax.AbstractStepSizeController):
    """rtol and atol of each PIDController are numbers >= 0, not both 0."""
    is_pid = lambda x: isinstance(x, diffrax.PIDController)
    for pid in filter(is_pid, jtu.tree_leaves(controller, is_leaf=is_pid)):
        both = {"rtol": pid.rtol, "atol": pid.atol}
        for name, value in both.items():
            for one in filter(is_concrete, jtu.tree_leaves(value)):
                if not (np.isfinite(one) & (np.asarray(one) >= 0)).all():
                    raise ValueError(f"{name} must be a finite number >= 0, got {value}.")
        values = [one for value in both.values() for one in jtu.tree_leaves(value)]
        if is_concrete(*values) and not any(np.any(one) for one in values):
            raise ValueError("rtol and atol must not both be 0: no step has no error.")


# ------------------------------------------------------------------ checks of diffrax's own


# How diffrax's messages about dt0, SaveAt(ts=...) and StepTo(ts) begin: what `times` has checked.
ABOUT_TIMES = ("Must have", "saveat.ts must", "`StepTo(ts=...)` must")
_checked = contextvars.ContextVar("times_checked", default=False)


@contextlib.contextmanager
def times_checked(checked: bool) -> Iterator[None]:
    """While a solve is traced: diffrax leaves out its checks of times, which are made already.

    It makes them by callbacks to the host, and a program with a callback cannot be cached on disk.
    Should diffrax come to check in another way, they are made twice and nothing is lost but that.
    """
    token, error_if = _checked.set(checked), eqxi.error_if

    def unless_checked(x, pred, msg, **options):
        known = _checked.get() and msg.startswith(ABOUT_TIMES)
        return x if known else error_if(x, pred, msg, **options)

    eqxi.error_if = unless_checked
    try:
        yield
    finally:
        eqxi.error_if = error_if
        _checked.reset(token)
