"""Pictures of a flow: a page that plays it, and figures for print.

    sphere(sol)                    plotly       sphere(sol).write_html("flow.html") opens from disk
    summary(sol)                   matplotlib   the panels below on one sheet

    points(mu)                     tokens on the circle or the sphere, coloured by cluster
    inner_product_histogram(sol)   the density of <x_i, x_j> against t
    cluster_staircase(sol)         the number of clusters against t
    energy_curve(sol)              sol.observed["energy"] against t
    attention(field, mu)           the matrix A_ij

Every panel takes and returns a matplotlib `Axes`. Tokens in more than three dimensions are
projected on principal directions: leading eigenvectors of E[x x^T] at the last time. Both
libraries come with `jaxflow[viz]` and are imported where they are used.
"""

import html
import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from ._types import ArrayLike
from .fields import SelfAttention
from .flow import FlowSolution
from .geometry import AbstractGeometry, Sphere
from .measure import Measure
from .observables import attention_matrix, cluster_count, cluster_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as Page
else:  # an annotation imports no extra
    Axes = Figure = Page = Any

System = int | tuple[int, ...] | None

# Okabe and Ito's palette, told apart by colour-blind readers, and grey for tokens without mass.
# Cluster c has the colour c mod 8 and the marker c // 8 mod 5.
_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #F0E442 #999999".split()
_MARKERS = {"circle": "o", "diamond": "D", "square": "s", "cross": "P", "x": "X"}
_FAINT = "#B0B0B0"
_ROUND = [a * 10**b for b in range(9) for a in (1, 2, 5)]


# ------------------------------------------------------------------ the page


def sphere(
    sol: FlowSolution,
    *,
    system: System = None,
    threshold: float = 0.999,
    max_points: int = 5000,
    max_frames: int = 151,
    labels: Sequence[str] | None = None,
) -> Page:
    """An interactive figure that plays a flow: play, pause, a slider of t, colour by cluster.

    `sphere(sol).write_html("flow.html")` writes one self-contained page. A token has the colour of
    the cluster where it ends up. Beside it run the number of clusters and, if observed under that
    name, the energy. The circle or sphere is drawn for flows on [`jaxflow.Sphere`][] alone.

    **Arguments:**

    - `sol`: a flow with `SaveAt(ts=...)`. Times that it did not reach are left out.
    - `system`: which one, for a solution of several (an index, or a tuple for several axes).
    - `threshold`: the least cosine of linked tokens ([`jaxflow.observables.cluster_labels`][]).
    - `max_points`, `max_frames`: how many tokens and times to draw at most, evenly spaced. Clusters
      are counted among all tokens.
    - `labels`: a word a token, shown under the pointer.

    **Returns:** a plotly `Figure`.
    """
    go = _require("plotly.graph_objects")
    run = _run(sol, system, max_frames)
    clusters, directions = run.clusters(threshold), run.directions()
    words = _words(labels, len(clusters))
    shown = _evenly(len(words), max_points)
    hover = [f"{html.escape(words[int(j)])}<br>cluster {clusters[j]}" for j in shown]
    x = run.points[:, shown] @ directions
    names = _axis_names(directions, "x<sub>{}</sub>", "v<sub>{}</sub>")
    panels = {"number of clusters": run.cluster_counts(threshold)}
    panels |= {} if run.energy is None else {"energy": run.energy}

    figure = _still(run, names, panels)
    still = len(figure.data)
    figure.add_trace(_tokens(go, x[0], clusters[shown], hover), row=1, col=1)
    for row, values in enumerate(panels.values(), 1):
        figure.add_trace(_now(go, run.ts, values, 0), row=row, col=2)
    moving = list(range(still, len(figure.data)))
    figure.frames = [
        go.Frame(
            name=str(k),
            data=[_tokens(go, x[k])] + [_now(go, run.ts, v, k) for v in panels.values()],
            traces=moving,
            layout=_window(x[: k + 1]) if run.radius is None else None,
        )
        for k in range(len(run.ts))
    ]
    figure.update_layout(_window(x[:1], run.radius), **_controls(run.ts))
    figure.update_layout(title=_title(run, clusters, threshold, shown))
    # A page waits for its reader, as figure.show() does.
    figure.write_html = partial(figure.write_html, auto_play=False)
    return figure


def _still(run, names, panels):
    """The figure without its tokens: axes, the sphere, and a curve a panel."""
    go = _require("plotly.graph_objects")
    space = {"type": "scene" if len(names) == 3 else "xy", "rowspan": len(panels)}
    figure = _require("plotly.subplots").make_subplots(
        rows=len(panels),
        cols=2,
        specs=[[space, {}], [None, {}]][: len(panels)],
        column_widths=[0.7, 0.3],
        vertical_spacing=0.15,
    )
    for trace in _outline(go, run.radius, run.points.shape[-1]):
        figure.add_trace(trace, row=1, col=1)
    for row, (name, values) in enumerate(panels.items(), 1):
        line = dict(color=_COLOURS[0], shape="hv" if values.dtype.kind == "i" else "linear")
        figure.add_trace(go.Scatter(x=run.ts, y=values, mode="lines", line=line), row=row, col=2)
        figure.update_xaxes(title_text="t", row=row, col=2)
        figure.update_yaxes(title_text=name, row=row, col=2)
    most = np.log10(panels["number of clusters"].max())
    figure.update_yaxes(type="log", range=[-0.1, most + 0.2], tickvals=_ROUND, row=1, col=2)
    axes = [dict(title_text=name, nticks=4) for name in names]
    if len(axes) == 3:
        camera = dict(eye=dict(x=1.1, y=1.1, z=0.6), projection_type="orthographic")
        figure.update_scenes(dict(zip(("xaxis", "yaxis", "zaxis"), axes, strict=True)))
        figure.update_scenes(
            camera=camera, aspectmode="manual", aspectratio=dict(x=1.3, y=1.3, z=1.3)
        )
    else:
        figure.update_xaxes(axes[0], constrain="domain", row=1, col=1)
        figure.update_yaxes(axes[1], constrain="domain", row=1, col=1)
        if run.radius is not None:
            figure.update_yaxes(scaleanchor="x", row=1, col=1)
    return figure.update_layout(
        template="plotly_white",
        font_size=14,
        showlegend=False,
        uirevision="the reader's view outlives a frame",
        margin=dict(l=60, r=60, t=80, b=30),
    )


def _window(x, radius=None):
    """The ranges of the axes: the sphere, or what the tokens have visited so far."""
    limits = zip(("xaxis", "yaxis", "zaxis"), _limits(x, radius).tolist(), strict=False)
    ranges = {axis: dict(range=pair) for axis, pair in limits}
    return dict(scene=ranges) if len(ranges) == 3 else ranges


def _tokens(go, x, clusters=None, hover=None):
    """The tokens; a frame gives their coordinates alone."""
    kind, size = (go.Scatter3d, 5) if x.shape[1] == 3 else (go.Scatter, 9)
    if clusters is None:
        return kind(_place(x))
    colour, marker = _style(clusters)
    symbol = np.array(list(_MARKERS))[marker].tolist()
    look = dict(size=size, color=colour.tolist(), symbol=symbol, line_color="white", line_width=0.5)
    return kind(_place(x), mode="markers", marker=look, text=hover, hoverinfo="text")


def _place(x):
    return dict(zip("xyz", np.round(x.T, 4).astype(np.float32), strict=False))


def _now(go, ts, values, k):
    """A dot at time t_k on its curve, with the value beside it."""
    return go.Scatter(
        x=ts[k : k + 1].tolist(),
        y=values[k : k + 1].tolist(),
        text=[f"{values[k]:.4g}"],
        mode="markers+text",
        marker=dict(color=_COLOURS[1], size=11),
        textposition=f"{'bottom' if values[-1] > values[0] else 'top'} right",
        textfont_color=_COLOURS[1],
        cliponaxis=False,
        hoverinfo="skip",
    )


def _outline(go, radius, d):
    """The circle; or the sphere's meridians and parallels, and a veil that dims its far side."""
    if radius is None:
        return []
    gaps = np.pad(_curves(min(d, 3)), ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    lines = _place(radius * gaps.reshape(len(gaps), -1).T)
    kind = go.Scatter3d if d >= 3 else go.Scatter
    wires = kind(lines, mode="lines", line_color=_FAINT, line_width=1, hoverinfo="skip")
    if d != 3:  # where d > 3, tokens project into the ball
        return [wires]
    u, v = np.ogrid[0 : np.pi : 25j, 0 : 2 * np.pi : 49j]
    ball = [np.sin(u) * np.cos(v), np.sin(u) * np.sin(v), np.cos(u) + 0 * v]
    x, y, z = np.round(0.98 * radius * np.array(ball, np.float32), 4)
    look = dict(colorscale=["white", "white"], showscale=False, opacity=0.35, hoverinfo="skip")
    return [go.Surface(x=x, y=y, z=z, lighting=dict(ambient=1, diffuse=0), **look), wires]


def _title(run, clusters, threshold, shown):
    n, d = run.points.shape[1:]
    drawn = "" if len(shown) == n else f" ({len(shown)} of them drawn)"
    view = ", projected on principal directions v of the last measure" if d > 3 else ""
    return (
        f"{n} tokens{drawn} in dimension {d}{view}<br><sup>colour: the cluster at t = "
        f"{run.ts[-1]:.4g}, {clusters.max() + 1} in all, linked where cos ≥ {threshold}</sup>"
    )


def _controls(ts):
    """The play and pause buttons, and the slider of t."""
    at_once = dict(mode="immediate", transition=dict(duration=0))
    jump, hold = (at_once | dict(frame=dict(duration=0, redraw=redraw)) for redraw in (True, False))
    play = at_once | dict(frame=dict(duration=50, redraw=True), fromcurrent=True)
    control = lambda label, *args: dict(label=label, method="animate", args=args)
    buttons = [control("▶ Play", None, play), control("❚❚ Pause", [None], hold)]
    steps = [control(f"{t:.4g}", [str(k)], jump) for k, t in enumerate(ts)]
    place = dict(y=0, yanchor="top", xanchor="left", pad=dict(t=55))
    menu = dict(type="buttons", direction="left", buttons=buttons, showactive=False, x=0)
    slider = dict(steps=steps, currentvalue=dict(prefix="t = ", font_size=16), x=0.22, len=0.78)
    return dict(updatemenus=[menu | place], sliders=[slider | place])


# ------------------------------------------------------------------ figures


def summary(
    sol: FlowSolution, *, system: System = None, threshold: float = 0.999, title: str | None = None
) -> Figure:
    """One sheet: the tokens at the first and last time, then <x_i, x_j>, clusters, energy over t.

    Arguments as in [`jaxflow.viz.sphere`][]. Tokens are coloured by cluster at the last time.
    """
    run = _run(sol, system)
    n, d = run.points.shape[1:]
    figure = _require("matplotlib.figure").Figure(figsize=(11, 8.5), layout="constrained")
    upper, lower = figure.add_gridspec(2, 1, height_ratios=[1.4, 1])
    lower = lower.subgridspec(1, 2 if run.energy is None else 3)
    for k, cell in zip((0, -1), upper.subgridspec(1, 2), strict=True):
        ax = figure.add_subplot(cell, projection="3d" if d >= 3 else None)
        ax.set_title(f"$t$ = {run.ts[k]:.4g}")
        points(
            run.measure(k),
            clusters=run.clusters(threshold),
            directions=run.directions(),
            geometry=sol.geometry,
            ax=ax,
        )
    inner_product_histogram(sol, system=system, ax=figure.add_subplot(lower[0]))
    cluster_staircase(sol, system=system, threshold=threshold, ax=figure.add_subplot(lower[1]))
    if run.energy is not None:
        energy_curve(sol, system=system, ax=figure.add_subplot(lower[2]))
    figure.suptitle(title or f"{n} tokens in dimension {d}, coloured by their last cluster")
    return figure


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

    - `clusters`: a cluster a token; default [`jaxflow.observables.cluster_labels`][].
    - `directions`: the columns on which tokens are projected, shape `(d, 2)` or `(d, 3)`; default
      the coordinates or, where d > 3, the principal directions.
    - `labels`: a word a token, written beside it.
    - `geometry`: a `Sphere` is drawn behind the tokens.
    """
    x, log_weights = _arrays(mu)
    run = _Run(np.zeros(1), x[None], log_weights[None], None, _radius(geometry))
    colour, marker = _style(run.clusters(0.999) if clusters is None else np.asarray(clusters))
    directions = np.asarray(run.directions() if directions is None else directions)
    axes = _axes(ax, "3d" if directions.shape[1] == 3 else None)
    x = x @ directions[:, : 3 if axes.name == "3d" else 2]
    for line in [] if run.radius is None else _curves(x.shape[1]).swapaxes(0, 1) * run.radius:
        axes.plot(*line, color=_FAINT, linewidth=0.5, zorder=0)
    for m, shape in enumerate(_MARKERS.values()):
        own = marker == m
        look = dict(c=colour[own], marker=shape, s=36, edgecolors="white", linewidths=0.4)
        axes.scatter(*x[own].T, **look)
    for word, place in zip(_words(labels, mu.n), x, strict=True) if labels is not None else ():
        axes.text(*place, f" {word}")
    names = _axis_names(directions, "$x_{}$", r"$\langle x, v_{} \rangle$")
    for axis, name, limits in zip("xyz", names, _limits(x, run.radius), strict=False):
        axes.set(**{f"{axis}label": name, f"{axis}lim": limits})
        axes.locator_params(axis, nbins=4)
    axes.grid(False)
    if run.radius is not None:
        axes.set_aspect("equal")
    return axes


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
    """
    run = _run(sol, system, max_frames=300)
    shown = _evenly(run.points.shape[1], max_points)
    if len(shown) < 2:
        raise ValueError("inner products <x_i, x_j>, i != j, need two or more tokens; got one.")
    i, j = np.triu_indices(len(shown), 1)
    pairs = np.stack([(x @ x.T)[i, j] for x in run.points[:, shown]])
    weights = np.exp(run.log_weights[:, shown[i]] + run.log_weights[:, shown[j]])
    [(low, high)] = _limits(pairs[..., None], run.radius and run.radius**2, margin=0.0)
    edges = np.linspace(low, high, bins + 1)
    rows = zip(np.clip(pairs, low, high), weights, strict=True)
    density = np.stack([np.histogram(p, edges, weights=w, density=True)[0] for p, w in rows])
    density = np.ma.masked_equal(density, 0)
    axes = _axes(ax)
    centres = (edges[1:] + edges[:-1]) / 2
    image = axes.pcolormesh(run.ts, centres, density.T, norm="log", cmap="cividis")
    axes.figure.colorbar(image, ax=axes, label="density")
    axes.set(xlabel="$t$", ylabel=r"$\langle x_i, x_j \rangle$")
    return axes


def cluster_staircase(
    sol: FlowSolution, *, system: System = None, threshold: float = 0.999, ax: Axes | None = None
) -> Axes:
    """The number of clusters against t, on a logarithmic scale."""
    run, axes = _run(sol, system), _axes(ax)
    counts = run.cluster_counts(threshold)
    axes.step(run.ts, counts, where="post", color=_COLOURS[0])
    ticks = [k for k in _ROUND if k <= 2 * counts.max()]
    axes.set_yscale("log")
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set(xlabel="$t$", ylabel="number of clusters", ylim=(0.8, 1.25 * counts.max()))
    return axes


def energy_curve(sol: FlowSolution, *, system: System = None, ax: Axes | None = None) -> Axes:
    """The energy against t, for a flow with `observe={"energy": InteractionEnergy(beta)}`."""
    run = _run(sol, system)
    if run.energy is None:
        raise ValueError(
            "the flow did not observe its energy: pass "
            "observe={'energy': jaxflow.observables.InteractionEnergy(beta)}."
        )
    axes = _axes(ax)
    axes.plot(run.ts, run.energy, color=_COLOURS[0])
    axes.set(xlabel="$t$", ylabel="energy")
    return axes


def training_curve(history: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Training and validation loss against the step.

    **Arguments:** `history`: of [`jaxflow.training.Fitted`][], or the lines of a metrics.jsonl;
    `ax`: Matplotlib axes, default new ones.
    """
    if not history:
        raise ValueError("there is no logged step to draw.")
    axes = _axes(ax)
    both = {"loss": "training", "validation_loss": "validation"}
    for (name, label), colour in zip(both.items(), _COLOURS, strict=False):
        rows = [(row["step"], row[name]) for row in history if name in row]
        if rows:
            marker = "o" if name == "validation_loss" else None
            axes.plot(*zip(*rows, strict=True), color=colour, marker=marker, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    return axes


def attention(
    field: SelfAttention,
    mu: Measure,
    *,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The matrix A_ij, the weight of token j for token i; `labels` is a word a token."""
    matrix, axes = np.asarray(attention_matrix(field, mu)), _axes(ax)
    image = axes.imshow(matrix, vmin=min(0, matrix.min()), cmap="cividis")
    axes.figure.colorbar(image, ax=axes, label="$A_{ij}$")
    axes.set(xlabel="token $j$", ylabel="token $i$")
    if labels is not None:
        axes.set_xticks(range(mu.n), _words(labels, mu.n), rotation=90)
        axes.set_yticks(range(mu.n), labels)
    return axes


# ------------------------------------------------------------------ one system, in numpy


class _Run(NamedTuple):
    ts: np.ndarray  # (t,)
    points: np.ndarray  # (t, n, d)
    log_weights: np.ndarray  # (t, n)
    energy: np.ndarray | None  # (t,)
    radius: float | None  # of the sphere to draw

    def measure(self, k: int) -> Measure:
        return Measure(self.points[k], self.log_weights[k])

    def clusters(self, threshold: float) -> np.ndarray:
        """The cluster of each token at the last time."""
        return np.asarray(cluster_labels(self.measure(-1), threshold))

    def cluster_counts(self, threshold: float) -> np.ndarray:
        """The number of clusters, one time after the other: O(n * block) memory."""
        times = range(len(self.ts))
        return np.array([_cluster_count(self.measure(k), np.asarray(threshold)) for k in times])

    def directions(self) -> np.ndarray:
        """The columns to project on, (d, 2 or 3).

        What the last measure does not span is decided by the first.
        """
        d = self.points.shape[-1]
        if d <= 3:
            return np.eye(d, max(2, d))
        vectors = np.linalg.eigh(self._moment(-1) + 1e-6 * self._moment(0))[1][:, :-4:-1]
        return vectors * np.sign(vectors[abs(vectors).argmax(axis=0), range(3)])

    def _moment(self, k):
        """E[x x^T], of trace 1."""
        x = self.points[k].astype(float) * np.exp(self.log_weights[k, :, None] / 2)
        return x.T @ x / (x**2).sum()


_cluster_count = eqx.filter_jit(cluster_count)


def _run(sol: FlowSolution, system: System = None, max_frames: int | None = None) -> _Run:
    """One system of a solution, at the times that it reached."""
    if not isinstance(sol.measures, Measure):
        raise ValueError(
            "a picture needs the points: flow with saveat=diffrax.SaveAt(ts=...), and neither fn "
            "nor subs."
        )
    index = () if system is None else tuple(np.atleast_1d(system).tolist())
    ahead = np.ndim(sol.ts) - 1  # systems of jax.vmap(flow); those within one flow follow the times
    shape = tuple(np.delete(sol.measures.points.shape[:-2], ahead).tolist())
    if len(index) != len(shape):
        choose = f"choose one, such as system={(0,) * len(shape)}" if shape else "drop system"
        raise ValueError(f"the solution holds systems of shape {shape}: {choose}.")
    tree = sol.ts, sol.measures, sol.observed.get("energy")
    ts, mu, energy = jtu.tree_map(lambda a: np.asarray(a)[index[:ahead]], tree)
    within = (slice(None), *index[ahead:])
    x, log_weights = (a[within] for a in _arrays(mu))
    reached = np.isfinite(ts) & np.isfinite(x).all(axis=(1, 2))
    if reached.sum() < 2:
        raise ValueError(
            f"a picture over time needs two or more saved times, got {reached.sum()}: flow with "
            "saveat=diffrax.SaveAt(ts=...)."
        )
    keep = np.flatnonzero(reached)
    keep = keep if max_frames is None else keep[_evenly(len(keep), max_frames)]
    energy = None if energy is None else energy[within][keep]
    return _Run(ts[keep], x[keep], log_weights[keep], energy, _radius(sol.geometry))


def _arrays(mu: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Points and log w in single precision or better, both with the leading axes of the points."""
    x = np.asarray(mu.points)
    return x.astype(np.promote_types(x.dtype, np.float32)), np.asarray(mu.log_probabilities)


def _radius(geometry: AbstractGeometry) -> float | None:
    return float(np.ravel(geometry.radius)[0]) if isinstance(geometry, Sphere) else None


def _evenly(n: int, at_most: int) -> np.ndarray:
    """At most so many of the indices 0, ..., n - 1, with both ends."""
    if at_most < 2:
        raise ValueError(f"max_points and max_frames must be at least 2, got {at_most}.")
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(int)


def _limits(x: np.ndarray, radius: float | None, margin: float = 0.05) -> np.ndarray:
    """The ends of each axis, (k, 2): those of the sphere, or else of the points."""
    x = x.reshape(-1, x.shape[-1])
    low, high = x.min(axis=0), x.max(axis=0)
    if radius is not None:
        low, high = np.full_like(low, -radius), np.full_like(high, radius)
    wider = np.maximum(margin * (high - low), 1e-6 * np.abs(x).max() + 1e-12)
    return np.stack([low - wider, high + wider], axis=1)


def _style(clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour of each token and the number of its marker."""
    cycle = len(_COLOURS) - 1
    colour = np.where(clusters < 0, cycle, clusters % cycle)
    return np.array(_COLOURS)[colour], np.maximum(clusters, 0) // cycle % len(_MARKERS)


def _axis_names(directions: np.ndarray, coordinate: str, projection: str) -> list[str]:
    d, k = directions.shape
    return [(coordinate if d <= 3 else projection).format(i) for i in range(1, k + 1)]


def _words(labels: Sequence[str] | None, n: int) -> Sequence[str]:
    if labels is None:
        return [f"token {j}" for j in range(n)]
    if len(labels) != n:
        raise ValueError(f"labels must have one string a token: {n}, got {len(labels)}.")
    return labels


def _curves(k: int) -> np.ndarray:
    """The unit circle (k = 2), or meridians and parallels of the sphere: (k, curves, points)."""
    turn = np.linspace(0, 2 * np.pi, 73)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    if k == 2:
        return circle[:, None]
    a, b = np.linspace(0, np.pi, 7)[:-1, None], np.linspace(-np.pi / 2, np.pi / 2, 7)[1:-1, None]
    meridians = np.cos(a) * circle[0], np.sin(a) * circle[0], np.ones_like(a) * circle[1]
    parallels = np.cos(b) * circle[0], np.cos(b) * circle[1], np.sin(b) * np.ones_like(turn)
    return np.concatenate([meridians, parallels], axis=1)


# ------------------------------------------------------------------ optional libraries


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(f'pictures need {library}: pip install "jaxflow[viz]".') from error


def _axes(ax: Any, projection: str | None = None) -> Any:
    """The axes given, or those of a new figure; without pyplot, so of no window."""
    if ax is not None:
        return ax
    figure = _require("matplotlib.figure").Figure(figsize=(5, 4), layout="constrained")
    return figure.add_subplot(projection=projection)
