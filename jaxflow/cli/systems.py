"""What `jaxflow simulate` flows: an initial measure, a field and observables, from its settings."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import typer

from .. import events, fields, geometry, measure, observables, solvers
from ..geometry import AbstractGeometry
from ..measure import Measure

INTERACTIONS = {
    "softmax": fields.Softmax(),
    "unnormalised": fields.Unnormalised(),
    "linear": fields.Linear(),
    "hardmax": fields.Hardmax(),
    "sinkhorn": fields.Sinkhorn(),
}
SOLVERS = {
    "tsit5": diffrax.Tsit5(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "heun": diffrax.Heun(),
    "rk4": solvers.RK4(),
    "euler": diffrax.Euler(),
    "geodesic": solvers.Geodesic(),
    "kvaerno3": diffrax.Kvaerno3(),
    "kvaerno5": diffrax.Kvaerno5(),
}
LAWS: dict[str, Callable[[SimpleNamespace, Any], Measure]] = {
    "uniform": lambda s, key: measure.uniform_sphere(s.n, s.d, key=key),
    "gaussian": lambda s, key: measure.gaussian(s.n, s.d, key=key),
    "cap": lambda s, key: measure.von_mises_fisher(s.n, np.eye(s.d)[0], 8.0, key=key),
    "circle": lambda s, key: measure.circle(s.n),
    "simplex": lambda s, key: measure.simplex(s.n, s.d),
}
GEOMETRIES: dict[str, Callable[[int], AbstractGeometry]] = {
    "sphere": lambda d: geometry.Sphere(),
    "euclidean": lambda d: geometry.Euclidean(),
    "rms-norm": lambda d: geometry.Sphere(math.sqrt(d)),
    "layer-norm": lambda d: geometry.Ellipsoid(jnp.ones(d)),
}
# A scheme of normalisation, and the geometries on which it moves tokens.
SCHEMES = {
    "post": tuple(GEOMETRIES),
    "sqrt": tuple(GEOMETRIES),
    "pre": ("euclidean",),
    "peri": ("euclidean",),
    "ngpt": ("sphere",),
}
OBSERVABLES: dict[str, Callable[[SimpleNamespace, fields.AbstractField], Callable]] = {
    "energy": lambda s, field: observables.InteractionEnergy(s.beta or 1.0),
    "clusters": lambda s, field: observables.ClusterCount(s.threshold),
    "diameter": lambda s, field: lambda t, mu: observables.diameter(mu),
    "order": lambda s, field: lambda t, mu: observables.order_parameter(mu),
    "hull-area": lambda s, field: lambda t, mu: observables.hull_area(mu),
    "kinetic": lambda s, field: observables.KineticEnergy(field),
    "entropy": lambda s, field: observables.AttentionEntropy(field),
    "rank": lambda s, field: observables.AttentionRank(_attention(s, field)),
}
EVENTS: dict[str, Callable[[SimpleNamespace], diffrax.Event | None]] = {
    "never": lambda s: None,
    "clustered": lambda s: events.until_clustered(s.clusters, s.threshold),
    "steady": lambda s: events.until_steady(s.speed),
}


def initial_measure(s: SimpleNamespace) -> tuple[Measure, list[str] | None]:
    """mu_0, and the word of each token if it comes from a text."""
    key = jax.random.key(s.seed)
    if s.text is not None and s.image is not None:
        raise typer.BadParameter("take --text or --image, not both.")
    if s.text is not None:
        text = Path(s.text).read_text()
        return measure.from_text(text, s.d, key=key, max_tokens=s.max_tokens)
    if s.image is not None:
        return measure.from_image(read_image(Path(s.image), s.patch), s.patch), None
    if s.law == "circle" and s.d != 2:
        raise typer.BadParameter(f"--law circle needs --d 2, got {s.d}.")
    return LAWS[s.law](s, key), None


def read_image(path: Path, patch: int) -> np.ndarray:
    """An image in [0, 1], cropped at the right and the bottom to whole patches."""
    if path.suffix == ".npy":
        pixels = np.load(path)
    else:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError('images need pillow: pip install "jaxflow[viz]".') from error
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    if pixels.ndim not in (2, 3):
        raise typer.BadParameter(
            f"an image has shape (height, width[, channels]), {path} {pixels.shape}."
        )
    height, width = (side - side % patch for side in pixels.shape[:2])
    if not height or not width:
        raise typer.BadParameter(f"the image {pixels.shape[:2]} is smaller than --patch {patch}.")
    scale = np.iinfo(pixels.dtype).max if np.issubdtype(pixels.dtype, np.integer) else 1
    return pixels[:height, :width].astype(np.float32) / np.float32(scale)


def make_field(s: SimpleNamespace, d: int) -> fields.AbstractField:
    """X, and with it the geometry."""
    allowed = SCHEMES[s.normalisation]
    place = s.geometry or allowed[0]
    if place not in allowed:
        raise typer.BadParameter(
            f"--normalisation {s.normalisation} moves tokens on {', '.join(allowed)}; got "
            f"--geometry {place}."
        )
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
    return fields.SelfAttention(
        value=-jnp.eye(d) if s.repulsive else None,
        beta=s.beta,
        interaction=INTERACTIONS[s.interaction],
        causal=s.causal,
        geometry=place,
    )


def _attention(s, field):
    if not isinstance(field, fields.SelfAttention):
        raise typer.BadParameter(
            f"--observe rank needs --normalisation post, not {s.normalisation}."
        )
    return field
