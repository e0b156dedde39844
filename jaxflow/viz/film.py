"""A film of the tokens: one frame a saved time, by ffmpeg (.mp4) or pillow (.gif).

A frame is a picture of the axes, drawn anew only where tokens leave them, with the tokens drawn
over it at their pixels: most of the time of a figure goes into axes, which seldom move.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .._rules import function, instance, positive, real
from .._types import ScalarLike
from ..flow import FlowSolution
from .run import System, evenly, read_run
from .style import COLOURS, MARKERS, require, style
from .tokens import dress

SIZE = 5, 4.5  # inches
FADED = 0.7  # of the colour of a token, at the far end of three axes
ROOM = 0.25  # of the width, between the axes and a token that has left them


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

    Away from the sphere the axes stand still until a token leaves them, and then make room.

    **Arguments:**

    - `sol`, `system`, `threshold`: as in `jaxflow.viz.sphere`.
    - `path`: a file .mp4, for which ffmpeg must be installed, or .gif. Without an ending it is a
      film .mp4 where there is ffmpeg, and .gif elsewhere.
    - `fps`, `seconds`: frames a second, and the longest duration. Of more than `fps * seconds`
      saved times, evenly spaced ones are taken.
    - `max_points`: how many tokens to draw at most, evenly spaced.
    - `dpi`: dots an inch, of 5 x 4.5 inches.
    - `progress`: called with the number of frames that are done, and that of all.

    **Returns:** the path. A frame takes about 0.01 s.

    **Raises:** `ValueError` or `TypeError` for bad arguments, and as `jaxflow.viz.summary`;
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
    path, write = _writer(path, float(fps))
    run = read_run(sol, system, max_frames=max(2, round(float(fps) * float(seconds))))
    shown, directions = evenly(run.n, max_points), run.directions()
    clusters = run.colouring(threshold)[0][shown]
    x = run.points[:, shown] @ directions
    boxes = _boxes(x) if run.radius is None else [x[0]] * len(x)
    stage = _Stage(*style(clusters), directions, run.radius, float(dpi))
    write(_frames(stage, run.ts, x, boxes, progress), path)
    return path


def _writer(path: Path, fps: float) -> tuple[Path, Callable[[Iterator[np.ndarray], Path], None]]:
    """The path with its ending, and who writes frames (height, width, 4) to such a file."""
    animation = require("matplotlib.animation")
    ffmpeg = animation.FFMpegWriter.isAvailable()
    if not path.suffix:
        path = path.with_suffix(".mp4" if ffmpeg else ".gif")
    if path.suffix == ".gif":
        return path, partial(_write_gif, fps)
    if path.suffix != ".mp4":
        raise ValueError(f"a film is a file .mp4 or .gif, got {path}.")
    if not ffmpeg:
        raise RuntimeError(
            f"{path.name} needs ffmpeg, which is not on the path: install it, or write "
            f"{path.with_suffix('.gif').name}."
        )
    return path, partial(_write_mp4, animation.FFMpegWriter.bin_path(), fps)


def _write_gif(fps: float, frames: Iterator[np.ndarray], path: Path):
    """With one palette, to which frames are reduced while they are written."""
    image = require("PIL.Image")
    palette = image.new("P", (1, 1))
    palette.putpalette(_palette().tobytes())
    pictures = (image.fromarray(frame).convert("RGB") for frame in frames)
    reduced = (one.quantize(palette=palette, dither=image.Dither.NONE) for one in pictures)
    look = dict(save_all=True, append_images=reduced, duration=round(1000 / fps), loop=0)
    next(reduced).save(path, format="GIF", **look)


def _palette() -> np.ndarray:
    """From white to black, and to the colours of tokens: bytes, (184, 3).

    Pillow looks a colour up as the one of multiples of 4 below it, white as 252: nothing is nearer
    to that than white, with so few steps.
    """
    colours = np.array([require("matplotlib.colors").to_rgb(c) for c in ("black", *COLOURS)])
    blends = [
        1 - np.linspace(0, 1, n)[:, None] * (1 - c)[None]
        for n, c in zip([40] + 9 * [16], colours, strict=True)
    ]
    return np.round(255 * np.concatenate(blends)).astype(np.uint8)


def _write_mp4(ffmpeg: str, fps: float, frames: Iterator[np.ndarray], path: Path):
    first = next(frames)
    height, width = first.shape[:2]
    given = f"-f rawvideo -pix_fmt rgba -s {width}x{height} -r {fps} -i -"
    wanted = "-c:v libx264 -pix_fmt yuv420p -f mp4"  # which every browser plays
    command = [ffmpeg, "-y", "-loglevel", "error", *given.split(), *wanted.split(), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    with suppress(BrokenPipeError), process:  # what ended it, it has said
        assert process.stdin is not None
        for frame in chain([first], frames):
            process.stdin.write(frame.tobytes())
    if process.returncode:
        raise RuntimeError(f"ffmpeg ended with code {process.returncode}: {path} is no film.")


# ------------------------------------------------------------------ frames


def _frames(
    stage: "_Stage",
    ts: np.ndarray,
    x: np.ndarray,
    boxes: Sequence[np.ndarray],
    progress: Callable[[int, int], Any],
) -> Iterator[np.ndarray]:
    """The pictures of times (t,), tokens (t, n, k) and what the axes hold, (points, k)."""
    shown = None
    for k, t in enumerate(ts.tolist()):
        if boxes[k] is not shown:
            shown = boxes[k]
            stage.set_up(shown)
        yield stage.frame(t, x[k])
        progress(k + 1, len(ts))


def _boxes(x: np.ndarray) -> list[np.ndarray]:
    """What the axes hold at each time, the least and the largest coordinates (2, k).

    A box stays until a token leaves it; the next one has room around all that was visited.
    """
    low, high = x[0].min(axis=0), x[0].max(axis=0)
    boxes = [np.stack([low, high])]
    for points in x[1:]:
        low, high = np.minimum(points.min(axis=0), low), np.maximum(points.max(axis=0), high)
        room = ROOM * (high - low)
        inside = (boxes[-1][0] <= low).all() and (high <= boxes[-1][1]).all()
        boxes.append(boxes[-1] if inside else np.stack([low - room, high + room]))
    return boxes


class _Stage:
    """A figure of axes, and over them tokens, which are drawn by themselves."""

    def __init__(self, colours, markers, directions, radius, dpi: float):
        size = np.maximum(2 * np.round(np.array(SIZE) * dpi / 2), 2)  # even, as ffmpeg wants it
        figure = require("matplotlib.figure").Figure(size / dpi, dpi=dpi)
        self.canvas = require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        self.axes = figure.add_subplot(projection="3d" if directions.shape[1] == 3 else None)
        self.dress = lambda box: dress(self.axes, box, directions, radius)
        pane = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(0, size[1]))
        pane.set_axis_off()
        figure.text(0.17, 0.9, "$t$ = ", ha="right", size="large")
        self.time = figure.text(0.17, 0.9, "", size="large", animated=True)
        self.rgba = require("matplotlib.colors").to_rgba_array(colours)
        look = dict(s=36, edgecolors="white", linewidths=0.4, animated=True)
        kinds = [(shape, markers == m) for m, shape in enumerate(MARKERS.values())]
        self.tokens = [
            (pane.scatter([], [], marker=shape, **look), own) for shape, own in kinds if own.any()
        ]

    def set_up(self, box: np.ndarray):
        """Draws axes that hold these points, (points, k)."""
        self.axes.clear()
        self.dress(box)
        self.canvas.draw()
        self.empty = self.canvas.copy_from_bbox(self.canvas.figure.bbox)

    def frame(self, t: float, x: np.ndarray) -> np.ndarray:
        """The picture of tokens (n, k) at time t, (height, width, 4)."""
        self.canvas.restore_region(self.empty)
        places, depth = self.project(x)
        self.rgba[:, 3] = 1 - FADED * depth
        order = np.argsort(-depth)
        for tokens, own in self.tokens:
            mine = order[own[order]]
            tokens.set(offsets=places[mine], facecolors=self.rgba[mine])
            self.canvas.figure.draw_artist(tokens)
        self.time.set_text(f"{t:.4g}")
        self.canvas.figure.draw_artist(self.time)
        return np.array(self.canvas.buffer_rgba())

    def project(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of points, (n, 2), and how deep they lie, from 0 to 1 across the axes."""
        pixels = self.axes.transData.transform
        if x.shape[1] == 2:
            return pixels(x), np.zeros(len(x))
        project = require("mpl_toolkits.mplot3d.proj3d").proj_transform
        corners = np.meshgrid(*(getattr(self.axes, f"get_{axis}lim")() for axis in "xyz"))
        ends = project(*(a.ravel() for a in corners), self.axes.get_proj())[2]
        u, v, depth = project(*x.T, self.axes.get_proj())
        return pixels(np.stack([u, v], axis=1)), (depth - ends.min()) / np.ptp(ends)
