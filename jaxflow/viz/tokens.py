"""Tokens in their space: where they are, and the paths that they took."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._rules import function, instance, reals
from .._types import ArrayLike, ScalarLike
from ..flow import FlowSolution
from ..geometry import AbstractGeometry, Sphere
from ..measure import Measure, check_measure
from ..observables import hull_vertices
from .run import Run, System, arrays, evenly, radius, read_run
from .style import (
    FAINT,
    MARKERS,
    VERBATIM,
    axis_names,
    new_axes,
    require,
    style,
    time_axis,
    token_limits,
    wires,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # an annotation imports no extra
    Axes = Any


def points(
    mu: Measure,
    *,
    clusters: ArrayLike | None = None,
    directions: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    geometry: AbstractGeometry = Sphere(),
    ax: Axes | None = None,
) -> Axes:
    """The tokens of one measure, coloured by cluster; in three dimensions where d >= 3.

    **Arguments:**

    - `clusters`: a cluster a token; default `jaxflow.observables.cluster_labels`.
    - `directions`: the columns on which tokens are projected, shape `(d, 2)` or `(d, 3)`; default
      the coordinates or, where d > 3, the principal directions.
    - `labels`: a word a token, written beside it as it is.
    - `geometry`: a `Sphere` is drawn behind the tokens.
    - `ax`: Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` for what is not one measure of finite points, and bad
    arguments.

    ```python
    >>> axes = jaxflow.viz.points(jaxflow.measure.circle(8))

    ```
    """
    check_measure("mu", mu)
    instance("geometry", geometry, AbstractGeometry, "jaxflow.Sphere()")
    x, log_weights = arrays(mu)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(
            "points draws one measure of finite points (n, d): index a solution's measures; got "
            f"shape {x.shape}."
        )
    run = Run(np.zeros(1), x[None], log_weights[None], None, None, radius(geometry), False)
    clusters = run.clusters(0.999) if clusters is None else np.asarray(clusters)
    if clusters.shape != (mu.n,) or clusters.dtype.kind not in "iu":
        raise ValueError(
            f"clusters must be integers, one a token, shape ({mu.n},); got {clusters.dtype} "
            f"{clusters.shape}."
        )
    colour, marker = style(clusters)
    directions = np.asarray(run.directions() if directions is None else directions)
    reals("directions", directions)
    if directions.shape not in ((mu.d, 2), (mu.d, 3)):
        raise ValueError(
            f"directions must be columns of shape ({mu.d}, 2) or ({mu.d}, 3); got "
            f"{directions.shape}."
        )
    axes = new_axes(ax, "3d" if directions.shape[1] == 3 else None)
    x = _project(axes, x, directions)
    dress(axes, x, directions, run.radius)
    for m, shape in enumerate(MARKERS.values()):
        own = marker == m
        look = dict(c=colour[own], marker=shape, s=36, edgecolors="white", linewidths=0.4)
        axes.scatter(*x[own].T, **look)
    for word, place in zip(words(labels, mu.n), x, strict=True) if labels is not None else ():
        axes.text(*place, f" {word}", **VERBATIM)
    return axes


def trajectories(
    sol: FlowSolution,
    *,
    system: System = None,
    threshold: ScalarLike = 0.999,
    max_points: int = 200,
    ax: Axes | None = None,
) -> Axes:
    """The path of each token, coloured by the cluster where it ends up.

    On the circle that is its angle theta_i(t) = atan2(x_i2, x_i1) against t, and on the line
    x_i(t) against t; elsewhere a curve in space, with a dot at its end. In three dimensions where
    d >= 3, on principal directions where d > 3.

    **Arguments:** `sol`, `system` and `threshold` as in `jaxflow.viz.sphere`; `max_points`: how
    many tokens to draw at most, evenly spaced; `ax`: Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 3))
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=2.0, saveat=saveat)
    >>> axes = jaxflow.viz.trajectories(sol)

    ```
    """
    run = read_run(sol, system)
    shown = evenly(run.n, max_points)
    colour = style(run.colouring(threshold)[0][shown])[0]
    x = run.points[:, shown]
    circle = run.d == 2 and run.radius is not None
    if run.d > 1 and not circle:
        return _curves_in_space(run, x, colour, ax)
    axes = new_axes(ax)
    for path, own in _angles(x, colour) if circle else zip(x[..., 0].T, colour, strict=True):
        axes.plot(run.ts, path, color=own, linewidth=0.8)
    time_axis(axes, run.log_time)
    axes.margins(x=0)
    if circle:
        axes.set(ylabel=r"$\theta_i$", ylim=(-np.pi, np.pi))
        axes.set_yticks(np.pi * np.linspace(-1, 1, 5), _QUARTER_TURNS)
    else:
        axes.set_ylabel("$x_i$")
    return axes


def hulls(
    sol: FlowSolution,
    *,
    system: System = None,
    rescale: Callable[[Any, np.ndarray], Any] | None = None,
    times: int = 6,
    ax: Axes | None = None,
) -> Axes:
    """The convex hull of the tokens in the plane at a few of the saved times, from light to dark.

    In R^d with V = I the hulls of z = e^{-t} x are nested (arXiv 2305.05465): those of a flow along
    `jaxflow.Rescaled` shrink to a polygon, whose corners are the leaders.

    **Arguments:** `sol` and `system` as in `jaxflow.viz.sphere`; `rescale`: a function of
    (t, points (n, 2)), such as `lambda t, x: jnp.exp(-t) * x`, default the points as they are;
    `times`: how many to draw, evenly spaced among those saved; `ax`: Matplotlib axes, default new
    ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`, and for tokens that are
    not in the plane.

    ```python
    >>> mu0 = jaxflow.measure.gaussian(8, 2, key=jax.random.key(0))
    >>> field = jaxflow.SelfAttention(beta=1.0, geometry=jaxflow.Euclidean())
    >>> sol = jaxflow.flow(field, mu0, t1=1.0, saveat=saveat)  # doctest: +SKIP
    >>> axes = jaxflow.viz.hulls(sol, times=3)  # doctest: +SKIP

    ```
    """
    run = read_run(sol, system)
    if run.d != 2:
        raise ValueError(f"hulls are drawn in the plane, d = 2; the tokens have d = {run.d}.")
    kept = evenly(len(run.ts), times)
    scaled = function("rescale", rescale) if rescale is not None else lambda t, x: x
    x = np.stack([np.asarray(scaled(run.ts[k], run.points[k])) for k in kept])
    axes = new_axes(ax)
    dress(axes, x, np.eye(2), run.radius)
    axes.set_aspect("equal")
    shades = require("matplotlib").colormaps["cividis_r"](np.linspace(0.1, 1, len(kept)))
    for shade, k, points in zip(shades, kept, x, strict=True):
        corners = np.asarray(hull_vertices(Measure(points, run.log_weights[k])))
        ring = points[np.append(corners, corners[0])]
        axes.plot(*ring.T, color=shade, linewidth=1.2, label=f"$t$ = {run.ts[k]:.4g}")
        axes.scatter(*points.T, color=shade[None], s=8, linewidths=0)
    axes.legend(frameon=False, fontsize="small")
    return axes


_QUARTER_TURNS = [r"$-\pi$", r"$-\pi/2$", "0", r"$\pi/2$", r"$\pi$"]


def _curves_in_space(run, x, colour, ax):
    directions = run.directions()
    axes = new_axes(ax, "3d" if directions.shape[1] == 3 else None)
    x = _project(axes, x, directions)
    dress(axes, x, directions, run.radius)
    for j, own in enumerate(colour):
        axes.plot(*x[:, j].T, color=own, linewidth=0.7, alpha=0.8)
    axes.scatter(*x[-1].T, c=colour, s=24, edgecolors="white", linewidths=0.4)
    return axes


def _angles(x, colour):
    """Continuous angles, and copies moved by full turns, so that one is in sight at all times."""
    angles = np.unwrap(np.arctan2(x[..., 1], x[..., 0]), axis=0)
    turns = np.floor((angles + np.pi) / (2 * np.pi)).astype(int)
    for angle, turn, own in zip(angles.T, turns.T, colour, strict=True):
        for k in range(turn.min(), turn.max() + 1):
            yield angle - 2 * np.pi * k, own


def _project(axes, x, directions):
    """Coordinates on the directions, as many as the axes have."""
    return x @ directions[:, : 3 if axes.name == "3d" else 2]


def dress(axes, x, directions, radius):
    """The sphere behind the tokens, and names and limits of the axes."""
    k = x.shape[-1]
    for line in [] if radius is None else wires(k).swapaxes(0, 1) * radius:
        axes.plot(*line, color=FAINT, linewidth=0.5, zorder=0)
    names = axis_names(directions, "$x_{}$", r"$\langle x, v_{} \rangle$")
    for axis, name, ends in zip("xyz", names, token_limits(x, radius), strict=False):
        axes.set(**{f"{axis}label": name, f"{axis}lim": ends})
        axes.locator_params(axis, nbins=4)
    axes.grid(False)
    if radius is not None:
        axes.set_aspect("equal")
