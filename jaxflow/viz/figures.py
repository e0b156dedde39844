"""Curves over time, and one sheet of all that a flow did."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from .._memory import check_fits
from .._rules import count, instance
from .._types import ArrayLike, ScalarLike
from ..flow import FlowSolution
from .run import System, evenly, read_run
from .style import (
    COLOURS,
    ROUND,
    VERBATIM,
    cell_edges,
    limits,
    log_spaced,
    name_legend,
    new_axes,
    require,
    time_axis,
)
from .tokens import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # an annotation imports no extra
    Axes = Figure = Any

_DASHES = ["-", "--", "-.", ":"]


def summary(
    sol: FlowSolution,
    *,
    system: System = None,
    threshold: ScalarLike = 0.999,
    title: str | None = None,
) -> Figure:
    """One sheet: the tokens at the first and last time, then <x_i, x_j>, clusters, energy over t.

    Tokens are coloured by cluster at the last time, or where one cluster is left, at the last time
    at which there were several; of more than 5,000, evenly spaced ones are drawn.

    **Arguments:** `sol`, `system` and `threshold` as in `jaxflow.viz.sphere`; `title`: shown as it
    is written, default the numbers of tokens and dimensions.

    **Returns:** a Matplotlib figure.

    **Raises:** `ValueError` or `TypeError` for a solution without points at two or more times, or
    bad arguments.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 3))
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=2.0, saveat=saveat)
    >>> figure = jaxflow.viz.summary(sol)
    >>> figure.savefig("summary.png")  # doctest: +SKIP

    ```
    """
    run = read_run(sol, system)
    shown = evenly(run.n, 5000)
    clusters, k = run.colouring(threshold)
    clusters = clusters[shown]
    figure = require("matplotlib.figure").Figure(figsize=(11, 8.5), layout="constrained")
    upper, lower = figure.add_gridspec(2, 1, height_ratios=[1.4, 1])
    lower = lower.subgridspec(1, 2 if run.energy is None else 3)
    for end, cell in zip((0, -1), upper.subgridspec(1, 2), strict=True):
        ax = figure.add_subplot(cell, projection="3d" if run.d >= 3 else None)
        ax.set_title(f"$t$ = {run.ts[end]:.4g}")
        points(
            run.measure(end, shown),
            clusters=clusters,
            directions=run.directions(),
            geometry=sol.geometry,
            ax=ax,
        )
    inner_product_histogram(sol, system=system, ax=figure.add_subplot(lower[0]))
    cluster_staircase(sol, system=system, threshold=threshold, ax=figure.add_subplot(lower[1]))
    if run.energy is not None:
        energy_curve(sol, system=system, ax=figure.add_subplot(lower[2]))
    when = "their last cluster" if k == len(run.ts) - 1 else f"cluster at t = {run.ts[k]:.4g}"
    told = f"{run.n} tokens in dimension {run.d}, coloured by {when}"
    figure.suptitle(told if title is None else title, **VERBATIM)
    return figure


def inner_product_histogram(
    sol: FlowSolution,
    *,
    system: System = None,
    bins: int = 80,
    max_points: int = 300,
    ax: Axes | None = None,
) -> Axes:
    """The density of <x_i, x_j>, i != j, against t, a pair weighted by w_i w_j.

    On a sphere of radius R, a cluster is mass at R^2. Of more than `max_points` tokens, or 300
    times, evenly spaced ones are taken.

    **Arguments:** `sol` and `system` as in `jaxflow.viz.sphere`; `bins`: how many, at least 1;
    `max_points`: how many tokens to take at most; `ax`: Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`, and for a single token.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 3))
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=2.0, saveat=saveat)
    >>> axes = jaxflow.viz.inner_product_histogram(sol)

    ```
    """
    bins = count("bins", bins)
    check_fits(8 * bins * 300, f"a histogram of {bins} bins", "Take fewer bins.")
    run = read_run(sol, system, max_frames=300)
    shown = evenly(run.n, max_points)
    if len(shown) < 2:
        raise ValueError("inner products <x_i, x_j>, i != j, need two or more tokens; got one.")
    times = np.flatnonzero(run.ts > 0) if run.log_time else np.arange(len(run.ts))
    i, j = np.triu_indices(len(shown), 1)
    few = np.ix_(times, shown)
    pairs = np.stack([(x @ x.T)[i, j] for x in run.points[few]])
    weights = np.exp(run.log_weights[few][:, i] + run.log_weights[few][:, j])
    [(low, high)] = limits(pairs[..., None], run.radius and run.radius**2, margin=0.0)
    edges = np.linspace(low, high, bins + 1)
    rows = zip(np.clip(pairs, low, high), weights, strict=True)
    density = np.stack([np.histogram(p, edges, weights=w, density=True)[0] for p, w in rows])
    axes = new_axes(ax)
    time_axis(axes, run.log_time)
    image = axes.pcolormesh(
        cell_edges(run.ts[times], run.log_time),
        edges,
        np.ma.masked_equal(density.T, 0),
        norm="log",
        cmap="cividis",
        rasterized=True,
    )
    axes.figure.colorbar(image, ax=axes, label="density")
    axes.set_ylabel(r"$\langle x_i, x_j \rangle$")
    return axes


def cluster_staircase(
    sol: FlowSolution,
    *,
    system: System = None,
    threshold: ScalarLike = 0.999,
    ax: Axes | None = None,
) -> Axes:
    """The number of clusters against t, on a logarithmic scale.

    **Arguments:** `sol`, `system` and `threshold` as in `jaxflow.viz.sphere`, which says where the
    numbers come from; `ax`: Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 3))
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=2.0, saveat=saveat)
    >>> axes = jaxflow.viz.cluster_staircase(sol)

    ```
    """
    run, axes = read_run(sol, system), new_axes(ax)
    ts, counts = run.cluster_counts(threshold)
    marker = "." if len(ts) < len(run.ts) else None
    axes.step(ts, counts, where="post", color=COLOURS[0], marker=marker)
    ticks = [k for k in ROUND if k <= 2 * counts.max()]
    # The limits first: a logarithmic scale finds none where no count is positive.
    axes.set(ylabel="number of clusters", ylim=(0.8, 1.25 * max(1, counts.max())))
    axes.set_yscale("log")
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    time_axis(axes, run.log_time)
    return axes


def energy_curve(sol: FlowSolution, *, system: System = None, ax: Axes | None = None) -> Axes:
    """The energy against t, for a flow with `observe={"energy": InteractionEnergy(beta)}`.

    It is a staircase where clusters are metastable: long plateaus between merges.

    **Arguments:** `sol` and `system` as in `jaxflow.viz.sphere`; `ax`: Matplotlib axes, default new
    ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`, and where no energy was
    observed.

    ```python
    >>> energy = {"energy": jaxflow.observables.InteractionEnergy(beta=4.0)}
    >>> sol = jaxflow.flow(field, mu0, t1=9.0, saveat=saveat, observe=energy)  # doctest: +SKIP
    >>> axes = jaxflow.viz.energy_curve(sol)  # doctest: +SKIP

    ```
    """
    run = read_run(sol, system)
    if run.energy is None:
        raise ValueError(
            "the flow did not observe its energy: pass "
            "observe={'energy': jaxflow.observables.InteractionEnergy(beta)}."
        )
    axes = new_axes(ax)
    axes.plot(run.ts, run.energy, color=COLOURS[0])
    time_axis(axes, run.log_time)
    axes.ticklabel_format(axis="y", useMathText=True)
    axes.set_ylabel("energy")
    return axes


def curves(
    ts_values: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    xlabel: str | None = None,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """One curve a name: energies, numbers of clusters or losses of several runs.

    **Arguments:** `ts_values`: `{name: (ts, values)}`, two sequences of one length; values that
    are not finite are left out. The axis of t is logarithmic where the times of all curves are.
    `xlabel`, `ylabel`: shown as they are written, like the names; default the time. `ax`:
    Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` where these are no curves.

    ```python
    >>> squares = [0.0, 1.0, 2.0], [0.0, 1.0, 4.0]
    >>> axes = jaxflow.viz.curves({"t^2": squares}, xlabel="t")

    ```
    """
    if not instance("curves", ts_values, Mapping, "{name: (ts, values)}"):
        raise ValueError("there is no curve to draw: pass {name: (ts, values)}.")
    drawn = {str(name): _curve(name, pair) for name, pair in ts_values.items()}
    for name, (ts, values) in drawn.items():
        if ts.ndim != 1 or ts.shape != values.shape or not ts.size:
            raise ValueError(
                f"a curve needs as many values as times, in one dimension; {name!r} has "
                f"{ts.shape} times and {values.shape} values."
            )
        if not (np.isfinite(ts) & np.isfinite(values)).any():
            raise ValueError(f"the curve {name!r} has no finite value to draw.")
    axes = new_axes(ax)
    looks = zip(cycle(COLOURS[:-1]), cycle(_DASHES), strict=False)
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_child")]
    for (name, (ts, values)), (colour, dash) in zip(drawn.items(), looks, strict=False):
        kept = np.isfinite(values) & np.isfinite(ts)
        lines += axes.plot(ts[kept], values[kept], color=colour, linestyle=dash, label=name)
    time_axis(axes, all(log_spaced(ts) for ts, _ in drawn.values()))
    if xlabel is not None:
        axes.set_xlabel(xlabel, **VERBATIM)
    axes.set_ylabel(ylabel, **VERBATIM)
    name_legend(axes, lines, frameon=False)
    return axes


def _curve(name: str, pair: tuple[ArrayLike, ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    try:
        ts, values = (np.asarray(numbers, float) for numbers in pair)
    except (TypeError, ValueError):
        raise TypeError(
            f"a curve is a pair (ts, values) of two sequences of numbers; {name!r} is {pair!r:.80}."
        ) from None
    return ts, values


def training_curve(history: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Training and validation loss against the step.

    **Arguments:** `history`: of `jaxflow.training.Fitted`, or the lines of a metrics.jsonl;
    `ax`: Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` or `TypeError` where these are no logged steps, or none has a loss.

    ```python
    >>> history = [{"step": 0, "loss": 4.2}, {"step": 100, "loss": 2.5}]
    >>> axes = jaxflow.viz.training_curve(history)

    ```
    """
    both = {"loss": "training", "validation_loss": "validation"}
    drawn = {name: _logged(history, name) for name in both}
    if not any(drawn.values()):
        raise ValueError("there is no logged step with a loss to draw.")
    axes = new_axes(ax)
    for (name, label), colour in zip(both.items(), COLOURS, strict=False):
        if rows := drawn[name]:
            marker = "o" if name == "validation_loss" else None
            axes.plot(*zip(*rows, strict=True), color=colour, marker=marker, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    return axes


def _logged(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The steps at which something was logged by that name, and its values."""
    try:
        return [(float(row["step"]), float(row[name])) for row in history if name in row]
    except (TypeError, ValueError, KeyError):
        raise TypeError(
            'a history is a list of {"step": number, "loss": number, ...}, such as the lines of a '
            f"metrics.jsonl; got {history!r:.80}."
        ) from None
