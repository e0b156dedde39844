"""Pictures of a report, beside it: `python -m benchmarks.plots FILE.json`.

roofline   pairs a second against the dimension, under what the device can do
scaling    time and peak memory against the number of particles, with the slopes of `scaling`
scale      compressed measures against all pairs, and which pairs pruned attention asks for
"""

import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from . import slopes
from .kernels import WORK
from .scale import fits as compressed_fits

# Okabe and Ito's colours, told apart by the colour-blind; the markers serve without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vP*X"
LETTERS = 8.5  # of a title that fit into an inch
KEYS = {"ms": ("ms", "time_exponent"), "peak_mib": ("peak MiB", "memory_exponent")}
STYLE: dict[Any, Any] = {"font.size": 13, "axes.grid": True, "grid.alpha": 0.25, "savefig.dpi": 120}


def draw(json_file: Path) -> list[str]:
    """Writes what the reports hold; a line on each file, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return ["No plots: matplotlib is not installed."]
    matplotlib.use("agg")
    lines = []
    for report in json.loads(json_file.read_text()):
        if plot := PLOTS.get(report["suite"]):
            path = json_file.with_name(f"{json_file.stem}-{plot.__name__}.png")
            with matplotlib.rc_context(STYLE):
                figure = plot(report)
                figure.savefig(path)
            lines.append(f"Wrote {path}")
    return lines


def _looks(rows: list[dict]) -> dict[str, dict]:
    """A colour and a marker for each rival, in order of appearance."""
    names = dict.fromkeys(row["rival"] for row in rows)
    styles = zip(names, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    return {name: {"color": color, "marker": marker} for name, color, marker in styles}


def _figure(rows: int, columns: int, title: str):
    from matplotlib.figure import Figure

    width, height = 2.6 + 4.8 * columns, 0.8 + 4.2 * rows
    figure = Figure(figsize=(width, height), layout="constrained")
    wrap = textwrap.TextWrapper(int(LETTERS * width)).fill
    figure.suptitle("\n".join(map(wrap, title.splitlines())), fontsize=14)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _share_legend(figure, axes):
    """One legend for all panels, each name once."""
    pairs = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    named = {label: handle for handle, label in pairs}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=12)


# ------------------------------------------------------------------ roofline


def roofline(report: dict):
    rows = [row for row in report["rows"] if "ms" in row]
    widths = sorted({row["dtype"] != "float32" for row in rows})
    modes = [mode for mode in WORK if any(row["mode"] == mode for row in rows)]
    title = f"The best of each rival at each dimension\n{report['device']}"
    figure, axes = _figure(max(1, len(widths)), max(1, len(modes)), title)
    looks = _looks(rows)
    for (short, mode), axis in zip(itertools.product(widths, modes), axes.flat, strict=False):
        some = [r for r in rows if (r["dtype"] != "float32", r["mode"]) == (short, mode)]
        axis.set_title(f"{mode}, {'16 bit' if short else 'float32'}")
        if not some:
            axis.set_axis_off()
            continue
        _ceilings(axis, report["ceilings"], mode, short, {row["d"] for row in some})
        _attained(axis, some, looks)
    _share_legend(figure, axes.flat)
    return figure


def _attained(axis, rows: list[dict], looks: dict[str, dict]):
    """The best rate of each rival at each dimension; rivals stand side by side."""
    ticks = sorted({row["d"] for row in rows})
    for i, (name, look) in enumerate(looks.items()):
        best: dict[int, float] = {}
        for row in (row for row in rows if row["rival"] == name):
            best[row["d"]] = max(best.get(row["d"], 0.0), 1e3 * row["pairs"] / row["ms"])
        aside = 1.035 ** (i - (len(looks) - 1) / 2)
        if best:
            x = [aside * d for d in best]
            axis.plot(x, list(best.values()), linestyle="none", label=name, markersize=8, **look)
    axis.set(xscale="log", yscale="log", xlabel="dimension d", ylabel="pairs a second")
    axis.set_xticks(ticks, labels=[str(d) for d in ticks])
    axis.minorticks_off()


def _ceilings(axis, rates: dict[str, float], mode: str, short: bool, dimensions: set[int]):
    """Pairs a second at most by exponentials, and by products and sums, against d."""
    products, others, exps = WORK[mode]
    d = np.geomspace(min(dimensions) / 1.3, max(dimensions) * 1.3, 50)
    lines = {"exponentials": (np.full_like(d, rates["exps"] / exps), "--")}
    if short and "tensor_flops" in rates:
        lines["tensor cores"] = rates["tensor_flops"] / (2 * products * d), ":"
    else:
        lines["multiply-adds"] = rates["flops"] / (2 * (products * d + others)), "-"
    for name, (values, style) in lines.items():
        axis.plot(d, values, style, color="0.3", linewidth=2, label=f"ceiling: {name}")
    lowest = np.min([values for values, _ in lines.values()], axis=0)
    axis.fill_between(d, lowest, lowest.max() * 3, color="0.3", alpha=0.12, linewidth=0)


# ------------------------------------------------------------------ scaling


def scaling(report: dict):
    rows = [row for row in report["rows"] if "ms" in row]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    title = f"Attention of particles on S², float32\n{report['device']}"
    figure, axes = _figure(max(1, len(modes)), 2, title)
    looks = _looks(rows)
    fits = {(fit["mode"], fit["rival"]): fit for fit in slopes.fits(rows)}
    for (mode, key), axis in zip(itertools.product(modes, KEYS), axes.flat, strict=False):
        for name, look in looks.items():
            mine = [row for row in rows if (row["mode"], row["rival"]) == (mode, name)]
            points = [(row["n"], row[key]) for row in mine if row.get(key, 0) > 0]
            if points:
                slope = fits.get((mode, name), {}).get(KEYS[key][1])
                label = name if slope is None else f"{name}: slope {slope:.2f}"
                axis.plot(*zip(*points, strict=True), label=label, **look)
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="particles n")
        axis.set_ylabel(KEYS[key][0])
        axis.set_title(mode)
        if axis.lines:
            axis.legend(fontsize=12)
    return figure


# ------------------------------------------------------------------ scale


def scale(report: dict):
    rows = [row for row in report["rows"] if "ms" in row]
    figure, axes = _figure(1, 2, f"Many tokens, float32\n{report['device']}")
    _against_n(axes[0, 0], rows)
    _against_blocked(axes[0, 1], rows)
    return figure


def _against_n(axis, rows: list[dict]):
    """Time of all velocities by compressed measures, and by all pairs."""
    exponents = {fit["shape"]: fit["time_exponent"] for fit in compressed_fits(rows)}
    some = [r for r in rows if r["mode"] == "forward" and r["shape"] in exponents]
    shapes = dict.fromkeys(row["shape"] for row in some)
    for (shape, rival), color in zip(
        itertools.product(shapes, ("jaxflow blocked", "jaxflow compressed")),
        itertools.cycle(COLORS),
        strict=False,
    ):
        points = [(r["n"], r["ms"]) for r in some if (r["shape"], r["rival"]) == (shape, rival)]
        name = shape.removeprefix("compressed ")
        how = _how(exponents[shape]) if "compressed" in rival else "all pairs"
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=f"{name}: {how}")
    axis.set(xscale="log", yscale="log", xlabel="tokens n", ylabel="ms, all velocities")
    axis.set_title("compressed measures")
    axis.legend(fontsize=11)


def _how(exponent: float | None) -> str:
    return "compressed" if exponent is None else f"compressed, slope {exponent:.2f}"


def _against_blocked(axis, rows: list[dict]):
    """How many times faster than all pairs pruned attention is, a bar a case."""
    cases, times = [], {}
    for row in rows:
        if row["shape"].startswith("pruned"):
            times[row["shape"], row["rival"]] = row["ms"]
            cases += [row["shape"]] if row["shape"] not in cases else []
    rivals = ("jaxflow pruned:1e-4", "jaxflow pruned:1e-6")
    for i, rival in enumerate(rivals):
        found = [
            times.get((case, "jaxflow blocked"), np.nan) / times.get((case, rival), np.nan)
            for case in cases
        ]
        places = np.arange(len(cases)) + 0.4 * i - 0.2
        axis.barh(places, found, 0.38, color=COLORS[i], label=rival.removeprefix("jaxflow "))
    axis.axvline(1, color="0.3", linewidth=2)
    axis.set_yticks(range(len(cases)), [c.removeprefix("pruned ") for c in cases], fontsize=10)
    axis.set(xscale="log", xlabel="times faster than all pairs")
    axis.set_title("pruned attention")
    axis.legend(fontsize=11)


PLOTS = {"kernels": roofline, "scaling": scaling, "scale": scale}

if __name__ == "__main__":
    print(*draw(Path(sys.argv[1])), sep="\n")
