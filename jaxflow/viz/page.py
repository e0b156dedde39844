"""The interactive page: the tokens of a flow in motion, beside curves that follow."""

import base64
import dataclasses
import html
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._page import film
from .._types import ScalarLike
from ..flow import FlowSolution
from .run import Run, System, evenly, read_run
from .style import axis_names, token_limits, wires, words

_LEVELS = 2**14 - 1  # of a coordinate within its window: finer than the pixels of a screen

_LOWERED = str.maketrans("123", "₁₂₃")


@dataclasses.dataclass(frozen=True)
class Page:
    """An HTML page that needs no other file, and no network.

    A notebook shows it in place. `html` is its text.
    """

    html: str

    def write_html(self, file: str | Path):
        """Writes the page.

        **Arguments:** `file`: its path, in a folder that exists.

        **Raises:** `OSError` where it cannot be written.
        """
        Path(file).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page within that of a notebook, to which it has no access."""
        look = 'width="100%" height="820" style="border:0" sandbox="allow-scripts"'
        return f'<iframe title="jaxflow" {look} srcdoc="{html.escape(self.html)}"></iframe>'


def sphere(
    sol: FlowSolution,
    *,
    system: System = None,
    threshold: ScalarLike = 0.999,
    max_points: int = 5000,
    max_frames: int = 151,
    labels: Sequence[str] | None = None,
) -> Page:
    """A page that plays a flow: play, pause, a slider of t, colour by cluster.

    `sphere(sol).write_html("flow.html")` writes one self-contained page, which any browser opens
    from disk. A token has the colour of the cluster where it ends up, or, where one cluster is
    left, of that at the last time at which there were several. Beside it run the number of clusters
    and, if observed under that name, the energy. The circle or sphere is drawn for flows on
    `jaxflow.Sphere` alone.

    The page plays 20 saved times a second, and moves tokens in a straight line from one to the
    next. Space plays and pauses, the arrows step; dragging, or Shift with the arrows, turns.
    Coordinates have 14 bits; 5,000 tokens at 151 times take 1 to 2 MB, and with noise up to 4 MB.

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

    **Returns:** a `jaxflow.viz.Page`.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.viz.summary`.
    """
    run = read_run(sol, system, max_frames)
    (clusters, when), directions = run.colouring(threshold), run.directions()
    shown = evenly(run.n, max_points)
    named = None if labels is None else [words(labels, run.n)[int(j)] for j in shown]
    x = run.points[:, shown] @ directions
    windows = _windows(x, run.radius)
    title, about = _titles(run, clusters, when, threshold, shown)
    data = {
        "title": title,
        "about": about,
        "ts": run.ts.tolist(),
        "log_time": run.log_time,
        "shape": [*x.shape[1:], len(x)],
        "points": _packed(x, windows),
        "windows": windows.tolist(),
        "radius": run.radius,
        "wires": _wires(run.radius, x.shape[-1]),
        "hollow": run.d > 3,  # tokens project into the ball
        "names": [n.translate(_LOWERED) for n in axis_names(directions, "x{}", "v{}")],
        "tokens": shown.tolist(),
        "clusters": clusters[shown].tolist(),
        "labels": named,
        "panels": _panels(run, threshold),
    }
    return Page(film("jaxflow: a flow of tokens", data))


def _windows(x: np.ndarray, radius: float | None) -> np.ndarray:
    """The ranges of the axes (times or 1, k, 2): the sphere, or what the tokens have visited."""
    if radius is not None:
        return token_limits(x, radius)[None]
    low = np.minimum.accumulate(x.min(axis=1))
    high = np.maximum.accumulate(x.max(axis=1))
    return np.array([token_limits(np.stack(ends), None) for ends in zip(low, high, strict=True)])


def _packed(x: np.ndarray, windows: np.ndarray) -> str:
    """Coordinates (t, n, k) within their windows, as _page/points.js reads them.

    Differences in time are small where tokens move slowly: with their sign last and their low bytes
    apart from the high ones, they deflate to half a byte each.
    """
    low, high = np.moveaxis(windows[:, None], -1, 0)
    levels = np.round(_LEVELS * ((x - low) / (high - low))).astype(np.int32).transpose(1, 2, 0)
    change = np.diff(levels, axis=-1, prepend=0)
    signed = np.where(change < 0, -2 * change - 1, 2 * change).astype("<u2")
    planes = signed.reshape(-1, 1).view(np.uint8).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _wires(radius: float | None, k: int) -> list[Any]:
    """The circle, or meridians and parallels, as lines of points."""
    if radius is None:
        return []
    return np.round(radius * wires(k).transpose(1, 2, 0), 4).tolist()


def _panels(run: Run, threshold: ScalarLike) -> list[dict[str, Any]]:
    """Curves over time. Counts are a staircase, with dots where few were counted."""
    panels = {"number of clusters": run.cluster_counts(threshold)}
    panels |= {} if run.energy is None else {"energy": (run.ts, run.energy)}
    return [
        {
            "name": name,
            "t": ts.tolist(),
            "y": [value if np.isfinite(value) else None for value in values.tolist()],
            "step": values.dtype.kind == "i",
            "dots": len(ts) < len(run.ts),
            "log": name == "number of clusters",
        }
        for name, (ts, values) in panels.items()
    ]


def _titles(
    run: Run, clusters: np.ndarray, when: int, threshold: ScalarLike, shown: np.ndarray
) -> tuple[str, str]:
    drawn = "" if len(shown) == run.n else f" ({len(shown)} of them drawn)"
    view = ", projected on principal directions v of the last measure" if run.d > 3 else ""
    return (
        f"{run.n} tokens{drawn} in dimension {run.d}{view}",
        f"Colour: the cluster at t = {run.ts[when]:.4g}, {clusters.max() + 1} in all, linked where "
        f"cos ≥ {threshold}.",
    )
