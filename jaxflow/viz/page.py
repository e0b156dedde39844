"""The interactive page: plotly plays the tokens of a flow, beside curves that follow."""

import html
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .._types import ScalarLike
from ..flow import FlowSolution
from .run import Run, System, evenly, read_run
from .style import (
    COLOURS,
    FAINT,
    MARKERS,
    ROUND,
    axis_names,
    limits,
    require,
    style,
    token_limits,
    wires,
    words,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Page
else:  # an annotation imports no extra
    Page = Any

Panels = dict[str, tuple[np.ndarray, np.ndarray]]  # a name, times and the values at them


def sphere(
    sol: FlowSolution,
    *,
    system: System = None,
    threshold: ScalarLike = 0.999,
    max_points: int = 5000,
    max_frames: int = 151,
    labels: Sequence[str] | None = None,
) -> Page:
    """An interactive figure that plays a flow: play, pause, a slider of t, colour by cluster.

    `sphere(sol).write_html("flow.html")` writes one self-contained page. A token has the colour of
    the cluster where it ends up, or, where one cluster is left, of that at the last time at which
    there were several. Beside it run the number of clusters and, if observed under that
    name, the energy. The circle or sphere is drawn for flows on `jaxflow.Sphere` alone.

    The number of clusters is what the flow observed under the name "clusters" (by the threshold of
    that observable). If it observed none, clusters are counted here, and of n > 7,000 tokens only
    at 2^20 / n of the times, evenly spaced and marked by dots:
    `observe={"clusters": jaxflow.observables.ClusterCount()}` counts at all of them.

    **Arguments:**

    - `sol`: a flow with `SaveAt(ts=...)`. Times that it did not reach are left out. Where times
      are spaced logarithmically, so are the axes of t.
    - `system`: which one, for a solution of several (an index, or a tuple for several axes).
    - `threshold`: the least cosine of linked tokens (`jaxflow.observables.cluster_labels`).
    - `max_points`, `max_frames`: how many tokens and times to draw at most, evenly spaced. Clusters
      are counted among all tokens.
    - `labels`: a word a token, shown under the pointer as it is written.

    **Returns:** a plotly `Figure`.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`.
    """
    go = require("plotly.graph_objects")
    run = read_run(sol, system, max_frames)
    (clusters, when), directions = run.colouring(threshold), run.directions()
    named = words(labels, run.n)
    shown = evenly(run.n, max_points)
    hover = [f"{_escaped(named[int(j)])}<br>cluster {clusters[j]}" for j in shown]
    x = run.points[:, shown] @ directions
    names = axis_names(directions, "x<sub>{}</sub>", "v<sub>{}</sub>")
    panels = {"number of clusters": run.cluster_counts(threshold)}
    panels |= {} if run.energy is None else {"energy": (run.ts, run.energy)}

    figure = _still(run, names, panels)
    still = len(figure.data)
    figure.add_trace(_tokens(go, x[0], clusters[shown], hover), row=1, col=1)
    for row, curve in enumerate(panels.values(), 1):
        figure.add_trace(_now(go, run.ts[0], *curve), row=row, col=2)
    moving = list(range(still, len(figure.data)))
    figure.frames = [
        go.Frame(
            name=str(k),
            data=[_tokens(go, x[k]), *(_now(go, t, *curve) for curve in panels.values())],
            traces=moving,
            layout=_window(x[: k + 1]) if run.radius is None else None,
        )
        for k, t in enumerate(run.ts)
    ]
    figure.update_layout(_window(x[:1], run.radius), **_controls(run.ts))
    figure.update_layout(title=_title(run, clusters, when, threshold, shown))
    # A page waits for its reader, as figure.show() does.
    figure.write_html = partial(figure.write_html, auto_play=False, post_script=_INTERRUPTED)
    return figure


# What plays is a promise, which plotly rejects, without a reason, where a pause or the slider
# ends it.
_INTERRUPTED = """window.addEventListener("unhandledrejection", (event) => {
  if (event.reason === undefined) event.preventDefault();
});"""


def _escaped(word: str) -> str:
    """A word as text: no tag, and no mathematics where a page has MathJax."""
    return html.escape(word).replace("$", "&#36;")


def _still(run: Run, names: list[str], panels: Panels):
    """The figure without its tokens: axes, the sphere, and a curve a panel."""
    go = require("plotly.graph_objects")
    space = {"type": "scene" if len(names) == 3 else "xy", "rowspan": len(panels)}
    figure = require("plotly.subplots").make_subplots(
        rows=len(panels),
        cols=2,
        specs=[[space, {}], [None, {}]][: len(panels)],
        column_widths=[0.7, 0.3],
        vertical_spacing=0.15,
    )
    for trace in _outline(go, run.radius, run.d):
        figure.add_trace(trace, row=1, col=1)
    for row, (name, (ts, values)) in enumerate(panels.items(), 1):
        figure.add_trace(_curve(go, ts, values, len(ts) < len(run.ts)), row=row, col=2)
        figure.update_xaxes(title_text="t", row=row, col=2)
        ends = limits(values[:, None], None, margin=0.15)[0].tolist()  # room for the last value
        figure.update_yaxes(title_text=name, range=ends, exponentformat="power", row=row, col=2)
    if run.log_time:
        decades = dict(exponentformat="power", tickfont_size=12, dtick=_decades(run.ts))
        figure.update_xaxes(type="log", **decades, col=2)
    most = np.log10(max(1, panels["number of clusters"][1].max()))  # none has the least mass
    figure.update_yaxes(type="log", range=[-0.1, most + 0.2], tickvals=ROUND, row=1, col=2)
    _name_axes(figure, names, run.radius)
    return figure.update_layout(
        template="plotly_white",
        font_size=14,
        showlegend=False,
        uirevision="the reader's view outlives a frame",
        margin=dict(l=60, r=60, t=80, b=30),
    )


def _name_axes(figure, names, radius):
    axes = [dict(title_text=name, nticks=4) for name in names]
    if len(axes) == 3:
        camera = dict(eye=dict(x=1.1, y=1.1, z=0.6), projection_type="orthographic")
        figure.update_scenes(dict(zip(("xaxis", "yaxis", "zaxis"), axes, strict=True)))
        figure.update_scenes(
            camera=camera, aspectmode="manual", aspectratio=dict(x=1.3, y=1.3, z=1.3)
        )
        return
    figure.update_xaxes(axes[0], constrain="domain", row=1, col=1)
    figure.update_yaxes(axes[1], constrain="domain", row=1, col=1)
    if radius is not None:
        figure.update_yaxes(scaleanchor="x", row=1, col=1)


def _window(x, radius=None):
    """The ranges of the axes: the sphere, or what the tokens have visited so far."""
    pairs = zip(("xaxis", "yaxis", "zaxis"), token_limits(x, radius).tolist(), strict=False)
    ranges = {axis: dict(range=pair) for axis, pair in pairs}
    return dict(scene=ranges) if len(ranges) == 3 else ranges


def _tokens(go, x, clusters=None, hover=None):
    """The tokens; a frame gives their coordinates alone."""
    kind, size = (go.Scatter3d, 5) if x.shape[1] == 3 else (go.Scatter, 9)
    if clusters is None:
        return kind(_place(x))
    colour, marker = style(clusters)
    symbol = np.array(list(MARKERS))[marker].tolist()
    look = dict(size=size, color=colour.tolist(), symbol=symbol, line_color="white", line_width=0.5)
    return kind(_place(x), mode="markers", marker=look, text=hover, hoverinfo="text")


def _place(x):
    return dict(zip("xyz", np.round(x.T, 4).astype(np.float32), strict=False))


def _curve(go, ts, values, sparse):
    """Counts are a staircase, with dots where they were counted at few of the times."""
    line = dict(color=COLOURS[0], shape="hv" if values.dtype.kind == "i" else "linear")
    return go.Scatter(x=ts, y=values, mode="lines+markers" if sparse else "lines", line=line)


def _now(go, t, ts, values):
    """A dot at time t on a curve, with the value beside it: the last one known by then."""
    value = values[np.searchsorted(ts, t, side="right") - 1]
    return go.Scatter(
        x=[t.item()],
        y=[value.item()],
        text=[f"{value:.4g}"],
        mode="markers+text",
        marker=dict(color=COLOURS[1], size=11),
        textposition=f"{'bottom' if values[-1] > values[0] else 'top'} right",
        textfont_color=COLOURS[1],
        cliponaxis=False,
        hoverinfo="skip",
    )


def _decades(ts):
    """One tick in so many powers of ten that the labels do not touch."""
    return max(1, round(np.log10(ts[-1] / ts[ts > 0][0]) / 4))


def _outline(go, radius, d):
    """The circle; or the sphere's meridians and parallels, and a veil that dims its far side."""
    if radius is None:
        return []
    gaps = np.pad(wires(min(d, 3)), ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    lines = _place(radius * gaps.reshape(len(gaps), -1).T)
    kind = go.Scatter3d if d >= 3 else go.Scatter
    drawn = kind(lines, mode="lines", line_color=FAINT, line_width=1, hoverinfo="skip")
    if d != 3:  # where d > 3, tokens project into the ball
        return [drawn]
    u, v = np.ogrid[0 : np.pi : 25j, 0 : 2 * np.pi : 49j]
    ball = [np.sin(u) * np.cos(v), np.sin(u) * np.sin(v), np.cos(u) + 0 * v]
    x, y, z = np.round(0.98 * radius * np.array(ball, np.float32), 4)
    look = dict(colorscale=["white", "white"], showscale=False, opacity=0.35, hoverinfo="skip")
    return [go.Surface(x=x, y=y, z=z, lighting=dict(ambient=1, diffuse=0), **look), drawn]


def _title(run, clusters, when, threshold, shown):
    drawn = "" if len(shown) == run.n else f" ({len(shown)} of them drawn)"
    view = ", projected on principal directions v of the last measure" if run.d > 3 else ""
    return (
        f"{run.n} tokens{drawn} in dimension {run.d}{view}<br><sup>colour: the cluster at t = "
        f"{run.ts[when]:.4g}, {clusters.max() + 1} in all, linked where cos ≥ {threshold}</sup>"
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
