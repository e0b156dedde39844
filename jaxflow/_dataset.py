"""A flow as an xarray.Dataset: arrays whose axes have names."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ._types import ArrayLike
from .geometry import AbstractGeometry
from .measure import Measure

OWN = "points", "weight", "time"


def dataset(ts: ArrayLike, mu: Measure, observed: Mapping[str, Any], geometry: AbstractGeometry):
    """Measures at times (t,), those that were reached, and what was observed then.

    Raises ImportError without xarray, and ValueError where something observed has a name of ours.
    """
    if taken := set(OWN) & set(observed):
        raise ValueError(
            f"a dataset has the variables {', '.join(OWN)} of its own: observe {taken.pop()!r} by "
            "another name."
        )
    times = np.asarray(ts)
    reached, points = np.isfinite(times), np.asarray(mu.points)
    shape = points.shape[1:-2]
    systems = ("system",) if len(shape) == 1 else tuple(f"system_{k}" for k in range(len(shape)))
    weights = np.exp(np.asarray(mu.log_probabilities))
    fixed = weights.ndim < points.ndim - 1
    variables = {
        "points": (("time", *systems, "token", "component"), points[reached]),
        "weight": (("token",) if fixed else (*systems, "token"), weights if fixed else weights[0]),
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(observed)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        values = np.asarray(leaf)[reached]
        known = systems if values.shape[1 : 1 + len(shape)] == shape else ()
        others = (f"{name}_{k}" for k in range(values.ndim - 1 - len(known)))
        variables[name] = (("time", *known, *others), values)
    return _xarray().Dataset(
        variables, coords={"time": times[reached]}, attrs={"geometry": type(geometry).__name__}
    )


def _xarray() -> Any:
    try:
        return importlib.import_module("xarray")
    except ImportError as error:
        raise ImportError('a dataset needs xarray: pip install "jaxflow[xarray]".') from error
