"""What a suite has found: tables for people, their columns explained, and CSV.

A report is a dictionary: `suite`, `rows`, perhaps `fits` and `ceilings`, and where and how they
were measured. Nothing here imports JAX.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from . import machine


class Column(NamedTuple):
    """How its numbers are written, and what it means."""

    form: str
    meaning: str


COLUMNS = {
    "shape": Column("{}", "the case"),
    "n": Column("{}", "tokens or particles"),
    "mode": Column("{}", "what is computed: README.md says it for each suite"),
    "rival": Column(
        "{}", "who computes; 'jaxflow NAME' is the backend NAME, '1 thread' has no other thread"
    ),
    "config": Column("{}", "the tiles of a kernel"),
    "setting": Column("{}", "the tolerance or step with which the rival came within the target"),
    "error": Column("{:.0e}", "largest difference from float64 over the largest entry"),
    "evaluations": Column("{}", "of the vector field in a solve"),
    "trace_s": Column("{:.2f}", "seconds in Python before XLA compiles, a part of compile_s"),
    "lower_s": Column("{:.2f}", "seconds from the trace to XLA's text"),
    "compile_s": Column("{:.2f}", "seconds of tracing and compiling, before the first answer"),
    "traces": Column("{}", "how often Python traced the function in four calls: 1 is right"),
    "programs_again": Column("{}", "programs compiled for the later calls: 0 is right"),
    "ms": Column("{:.3g}", "median milliseconds of a call, the rivals timed in turn"),
    "tokens_per_s": Column("{:,.0f}", "tokens generated or trained on, a second"),
    "last_loss": Column("{:.4f}", "of training, the mean over the last tenth of the steps"),
    "validation_loss": Column("{:.4f}", "after the last step"),
    "vs_best": Column("{:.2f}", "ms over that of the fastest other library: below 1 is faster"),
    "vs_jnp": Column("{:.2f}", "ms over that of jnp"),
    "vs_numpy": Column("{:.3f}", "ms over that of numpy"),
    "vs_scan": Column("{:.2f}", "fastest sample over that of 'scan jaxflow'"),
    "compile_vs_scan": Column("{:.2f}", "compile_s over that of 'scan jaxflow'"),
    "vs_forward": Column("{:.1f}", "ms over that of the forward pass of the same rival"),
    "vs_default": Column("{:.2g}", "ms over that of the backend 'blocked', or of the kernel's own"),
    "asked": Column("{:.1%}", "share of the n^2 pairs that are asked one by one"),
    "replaced": Column("{:.1%}", "share of the pairs for which the mean of a ball stands"),
    "skipped": Column("{:.1%}", "share of the pairs that are left out"),
    "registers": Column("{}", "of a thread"),
    "spilled": Column("{}", "bytes of a thread that registers did not hold"),
    "instructions": Column("{:.1f}", "a pair (query, key) in the loop that takes the time"),
    "loads": Column("{:.1f}", "of these, reads of shared memory"),
    "of_floor": Column("{:.0%}", "the least time that the device allows, over ms"),
    "floor": Column("{}", "what sets that least time: exponentials, products or memory"),
    "peak_mib": Column("{:.3g}", "MiB that one call adds at its peak"),
    "steps": Column("{}", "of a solve"),
    "from_n": Column("{}", "the smallest size of the fit"),
    "time_exponent": Column("{:.2f}", "a of time ~ n^a"),
    "memory_exponent": Column("{:.2f}", "b of memory ~ n^b"),
    "load": Column(
        "{:.1f}", "load average of the last minute: above the number of cores, ms are too long"
    ),
    "note": Column("{}", "why there is no number, or what to know of it"),
}
UNITS = {
    "exps": "Gexp/s",
    "flops": "Gflop/s in float32",
    "tensor_flops": "Gflop/s in bfloat16",
    "bytes": "GB/s",
}


def columns(rows: Sequence[Mapping]) -> dict[str, Column]:
    """Those that the rows fill."""
    return {
        name: column
        for name, column in COLUMNS.items()
        if any(row.get(name) is not None for row in rows)
    }


def table(rows: Sequence[Mapping]) -> Table:
    """A Markdown table of the rows, with the columns that they fill."""
    shown = columns(rows)
    out = Table(*shown, box=box.MARKDOWN)
    for row in rows:
        cells = ((row.get(name), column.form) for name, column in shown.items())
        out.add_row(*("" if x is None else form.format(x) for x, form in cells))
    return out


def legend(rows: Sequence[Mapping]) -> str:
    """A line on each column of the table."""
    shown = columns(rows)
    width = max(map(len, shown), default=0)
    return "\n".join(f"  {name:{width}}  {column.meaning}" for name, column in shown.items())


def show(console: Console, report: Mapping):
    """The tables of a report, with where and how it was measured."""

    def say(*lines: str):
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    commit = f"commit {report['commit']}" + " (modified)" * report["modified"]
    say(
        f"\n{report['suite']}: {report['seconds']:.0f} s on {report['device']}, of which "
        f"{report['threads']} may be used",
        f"Python {report['python']}, {versions}; {commit}",
    )
    if rates := report.get("ceilings"):
        say(", ".join(f"{rate / 1e9:.4g} {UNITS[name]}" for name, rate in rates.items()))
    for rows in (report["rows"], report.get("fits", [])):
        if rows:
            console.print(table(rows))
            say(legend(rows), "")
    say(*(f"Skipped: {name}: {reason}" for name, reason in report["skipped"].items()))
    if (words := machine.warning(highest_load(report["rows"]))) is not None:
        say(words)


def highest_load(rows: Iterable[Mapping]) -> float | None:
    return max((row["load"] for row in rows if row.get("load") is not None), default=None)


def write_csv(path: Path, reports: Sequence[Mapping]):
    """All rows in one table: the suite, device and commit, then every number of the row."""
    about = ("suite", "device", "commit")
    rows = [
        {name: report[name] for name in about} | row for report in reports for row in report["rows"]
    ]
    found = dict.fromkeys(name for row in rows for name in row)
    names = [*about, *(n for n in COLUMNS if n in found), *(n for n in found if n not in COLUMNS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(names))
        writer.writeheader()
        writer.writerows(rows)


def failures(reports: Sequence[Mapping]) -> list[str]:
    """The rows of jaxflow that are wrong or failed."""
    return [
        f"{row['shape']} {row.get('mode', '')} {row['rival']}: {row['note']}"
        for report in reports
        for row in report["rows"]
        if row["rival"].split()[0] == "jaxflow"
        and (row.get("note") or "").startswith(("failed", "wrong"))
    ]
