"""A film of the tokens: one frame a saved time, by ffmpeg (.mp4) or pillow (.gif)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._rules import function, instance, positive, real
from .._types import ScalarLike
from ..flow import FlowSolution
from .run import System, evenly, read_run
from .style import require, token_limits
from .tokens import points


def film(
    sol: FlowSolution,
    path: str | os.PathLike[str],
    *,
    system: System = None,
    threshold: ScalarLike = 0.999,
    fps: ScalarLike = 20,
    seconds: ScalarLike = 15,
    max_points: int = 2000,
    dpi: ScalarLike = 120,
    progress: Callable[[int, int], Any] = lambda done, frames: None,
) -> Path:
    """Writes a film of the tokens, coloured by the cluster where they end up, and the time.

    **Arguments:**

    - `sol`, `system`, `threshold`: as in [`jaxflow.viz.sphere`][].
    - `path`: a file .mp4, for which ffmpeg must be installed, or .gif. Without an ending it is a
      film .mp4 where there is ffmpeg, and .gif elsewhere.
    - `fps`, `seconds`: frames a second, and the longest duration. Of more than `fps * seconds`
      saved times, evenly spaced ones are taken.
    - `max_points`: how many tokens to draw at most, evenly spaced.
    - `dpi`: dots an inch, of 5 x 4.5 inches.
    - `progress`: called with the number of frames that are done, and that of all.

    **Returns:** the path. A frame takes about 0.1 s.

    **Raises:** `ValueError` or `TypeError` for bad arguments, and as [`jaxflow.viz.summary`][];
    `RuntimeError` for a film .mp4 without ffmpeg. All before a frame is drawn.
    """
    rule = "positive and at most 1000"
    for name, value in (("fps", fps), ("dpi", dpi)):
        real(name, value, rule, lambda v: (0 < v) & (v <= 1000))
    real("seconds", seconds, "positive", positive)
    function("progress", progress)
    path = Path(instance("path", path, (str, os.PathLike), "'flow.gif'"))
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"a film is a file in a folder that exists, got {path}.")
    path, writer = _writer(path, float(fps))
    run = read_run(sol, system, max_frames=max(2, round(float(fps) * float(seconds))))
    shown, directions = evenly(run.n, max_points), run.directions()
    clusters = run.colouring(threshold)[0][shown]
    x = run.points[:, shown] @ directions
    figure = require("matplotlib.figure").Figure(figsize=(5, 4.5))
    axes = figure.add_subplot(projection="3d" if x.shape[-1] == 3 else None)
    with writer.saving(figure, path, dpi):
        for k, t in enumerate(run.ts):
            axes.clear()
            points(
                run.measure(k, shown),
                clusters=clusters,
                directions=directions,
                geometry=sol.geometry,
                ax=axes,
            )
            ends = token_limits(x[: k + 1], run.radius)  # what the tokens have visited so far
            axes.set(**{f"{axis}lim": pair for axis, pair in zip("xyz", ends, strict=False)})
            axes.set_title(f"$t$ = {t:.4g}", loc="left")
            writer.grab_frame()
            progress(k + 1, len(run.ts))
    return path


def _writer(path: Path, fps: float) -> tuple[Path, Any]:
    """The path with its ending, and who writes such a file."""
    animation = require("matplotlib.animation")
    ffmpeg = animation.FFMpegWriter.isAvailable()
    if not path.suffix:
        path = path.with_suffix(".mp4" if ffmpeg else ".gif")
    if path.suffix == ".gif":
        return path, animation.PillowWriter(fps=fps)
    if path.suffix != ".mp4":
        raise ValueError(f"a film is a file .mp4 or .gif, got {path}.")
    if not ffmpeg:
        raise RuntimeError(
            f"{path.name} needs ffmpeg, which is not on the path: install it, or write "
            f"{path.with_suffix('.gif').name}."
        )
    return path, animation.FFMpegWriter(fps=fps)
