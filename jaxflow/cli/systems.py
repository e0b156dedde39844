"""What `jaxflow simulate` flows: an initial measure, a field and observables, from its settings."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from .. import events, fields, geometry, measure, observables
from .._files import Stored, decoded, npy, read_image
from .._memory import check_fits
from ..geometry import AbstractGeometry
from ..measure import Measure
from .simulation import SCHEMES, Simulation

MEGABYTES = 64  # of a text, at most: words enough for any flow

INTERACTIONS = {
    "softmax": fields.Softmax(),
    "unnormalised": fields.Unnormalised(),
    "linear": fields.Linear(),
    "hardmax": fields.Hardmax(),
    "sinkhorn": fields.Sinkhorn(),
    "l2": fields.L2(),
}
LAWS: dict[str, Callable[[Simulation, Any], Measure]] = {
    "uniform": lambda s, key: measure.uniform_sphere(s.n, s.d, key=key),
    "gaussian": lambda s, key: measure.gaussian(s.n, s.d, key=key),
    "cap": lambda s, key: measure.von_mises_fisher(s.n, _first_axis(s.d), 8.0, key=key),
    "circle": lambda s, key: measure.circle(s.n),
    "simplex": lambda s, key: measure.simplex(s.n, s.d),
}
GEOMETRIES: dict[str, Callable[[int], AbstractGeometry]] = {
    "sphere": lambda d: geometry.Sphere(),
    "euclidean": lambda d: geometry.Euclidean(),
    "rms-norm": lambda d: geometry.Sphere(math.sqrt(d)),
    "layer-norm": lambda d: geometry.Ellipsoid(jnp.ones(d)),
}
OBSERVABLES: dict[str, Callable[[Simulation, fields.AbstractField], Callable]] = {
    "energy": lambda s, field: observables.InteractionEnergy(
        s.beta or 1.0, query=_matrix(field, "query"), key=_matrix(field, "key")
    ),
    "clusters": lambda s, field: observables.ClusterCount(s.threshold, min_mass=s.min_mass),
    "diameter": lambda s, field: lambda t, mu: observables.diameter(mu),
    "order": lambda s, field: lambda t, mu: observables.order_parameter(mu),
    "hull-area": lambda s, field: lambda t, mu: observables.hull_area(mu),
    "kinetic": lambda s, field: observables.KineticEnergy(field),
    "entropy": lambda s, field: observables.AttentionEntropy(field),
    "rank": lambda s, field: observables.AttentionRank(cast(fields.SelfAttention, field)),
}
EVENTS: dict[str, Callable[[Simulation], diffrax.Event | None]] = {
    "never": lambda s: None,
    "clustered": lambda s: events.until_clustered(s.clusters, s.threshold, min_mass=s.min_mass),
    "steady": lambda s: events.until_steady(s.speed),
}


def initial_measure(s: Simulation) -> tuple[Measure, list[str] | None]:
    """mu_0, and the word of each token if it comes from a text."""
    key = jax.random.key(s.seed)
    if s.image is not None:
        image = whole_patches(read_image(s.image), s.patch)
        check_size(s, image.size // (size := image[0, 0].size * s.patch**2), size)
        return measure.from_image(image, s.patch), None
    if s.points is not None:
        stored = _stored(s.points, "--points", "an array (n, d), a row a token")
        check_size(s, *stored.shape)
        return Measure(_real(s, "--points", stored)), None
    if s.text is None:
        check_size(s, s.n, s.d)
        return LAWS[s.law](s, key), None
    text = "".join(itertools.islice(decoded(s.text), MEGABYTES))
    if not text.strip():
        raise ValueError(f"{s.text} has no word that could be a token.")
    check_size(s, min(s.max_tokens, len(text)), s.d)
    return measure.from_text(text, s.d, key=key, max_tokens=s.max_tokens)


def check_size(s: Simulation, n: int, d: int):
    """Raises MemoryError for tokens and times that do not fit, before the first is made."""
    number = 8 if s.double else 4
    states = n * d * number * (2 * s.frames + 24)  # what is saved, once to draw; and the stages
    matrices = d * d * number * s.repulsive + 3 * n * n * number * (s.law == "simplex")
    check_fits(
        states + matrices + 1000 * s.frames,
        f"a flow of {n} tokens in R^{d}, saved at {s.frames} times,",
        "Take fewer tokens (--n), dimensions (--d) or times (--frames).",
    )


def read_matrix(s: Any, name: str, d: int) -> np.ndarray | None:
    """The matrix of a flag, of d columns, or None where it is not given."""
    path = getattr(s, name)
    if path is None:
        return None
    stored = _stored(path, f"--{name}", f"a matrix of {d} columns, the dimension of the tokens")
    if stored.shape[1] != d:
        raise ValueError(
            f"--{name} {path} must have {d} columns, the dimension of the tokens; got shape "
            f"{stored.shape}."
        )
    return _real(s, f"--{name}", stored)


def _stored(path: Path, flag: str, what: str) -> Stored:
    """The header of an array of two axes in a .npy file."""
    stored = npy(path)
    if len(stored.shape) != 2 or 0 in stored.shape:
        raise ValueError(f"{flag} {path} must hold {what}, got shape {stored.shape}.")
    return stored


def _real(s: Any, flag: str, stored: Stored) -> np.ndarray:
    """Its numbers, in the precision of the run, which must be finite."""
    values = stored.read().astype(np.float64 if s.double else np.float32)
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"{flag} {stored.name} must be finite, got {values[where]} at {where}.")
    return values


def whole_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """An image cropped at the right and the bottom to whole patches."""
    height, width = (side - side % patch for side in pixels.shape[:2])
    if not height or not width:
        raise ValueError(f"the image {pixels.shape[:2]} is smaller than --patch {patch}.")
    return pixels[:height, :width]


def make_field(s: Any, d: int) -> fields.AbstractField:
    """X, and with it the geometry."""
    place = s.geometry or SCHEMES[s.normalisation][0]
    flat, unit = _self_attention(s, d, geometry.Euclidean()), fields.UnitNorm()
    match s.normalisation:
        case "pre":
            return fields.PreNorm(flat, unit)
        case "peri":
            return fields.PeriNorm(fields.PreNorm(flat, unit), unit)
        case "ngpt":
            return fields.NGPT(flat, s.alpha)
    field = _self_attention(s, d, GEOMETRIES[place](d))
    return fields.SqrtScaling(field) if s.normalisation == "sqrt" else field


def _self_attention(s, d, place):
    query, key, value = (read_matrix(s, name, d) for name in ("query", "key", "value"))
    return fields.SelfAttention(
        query,
        key,
        -jnp.eye(d) if s.repulsive else value,
        beta=s.beta,
        interaction=INTERACTIONS[s.interaction],
        causal=s.causal,
        geometry=place,
    )


def _matrix(field: fields.AbstractField, name: str) -> Any:
    """The matrix of that name of the attention in a field that `make_field` made."""
    while not isinstance(field, fields.SelfAttention):
        assert isinstance(field, fields.AbstractWrapper)
        field = field.field
    return getattr(field, name)


def _first_axis(d):
    return np.concatenate([[1.0], np.zeros(d - 1)])
