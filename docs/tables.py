"""Tables of measured results, out of benchmarks/results/*.json: nobody types a number.

A table is of one suite: a line a case, a column a rival, the fastest of a line in bold. There is
one for each device that has results, and a sentence where none has.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Row = dict[str, Any]

MEMORY = ("peak_mib", "{:,.0f} MiB")
ERROR = ("error", "error {:.0e}")

# Cases in words, by the names that they have in the results.
CASES = {
    r"two beta (\S+)": "two tokens, beta = {}",
    r"circle beta (\S+)": "16 tokens on the circle, beta = {}",
    r"particles-(\d+)-(\d+)": "{} particles, d = {}",
    r"heads-(\d+)-(\d+)": "one head, {} tokens, d = {}",
    r"language-(\d+)-(\d+)-(\d+)": "{} causal heads, {} tokens, d = {}",
    r"language-(\d+)-(\d+)-(\d+)-w(\d+)": "{} causal heads, {} tokens, d = {}, window {}",
    r"flow-(\d+)-(\d+) to (\S+)": "{} tokens, d = {}, to {}",
    r"flow-(\d+)-(\d+)": "a flow of {} tokens, d = {}",
    r"operation-(\d+)-(\d+)": "the operation, {} tokens, d = {}",
    r"training-(\d+)-(\d+)-(\d+)": "{} texts of {} tokens, dimension {}",
    r"phase-(\d+)-(\d+)-(\d+) beta (\S+)": "{} tokens, d = {}, {} systems, beta = {}",
    r"compressed S\^(\d) beta (\S+)": "tokens on S^{}, beta = {}",
    r"pruned (\w+) d (\d+) spread (\S+) beta (\S+)": "{} in d = {}, blobs of spread {}, beta = {}",
    r"pruned (\w+) d (\d+) beta (\S+)": "{} in d = {}, beta = {}",
}


class Table(NamedTuple):
    """What is shown of a row, and of which rows."""

    cell: Callable[[Row], str]
    shown: Callable[[Row], bool] = lambda row: True


def _time(ms: float) -> str:
    if ms < 1000:
        return f"{ms:.3g} ms"
    return f"{ms / 1000:,.0f} s" if ms >= 1e5 else f"{ms / 1000:.3g} s"


def _with(*parts: tuple[str, str]) -> Callable[[Row], str]:
    """The time, and in brackets what the row holds of the rest; its note where there is no time."""

    def cell(row: Row) -> str:
        if row.get("ms") is None:
            return re.sub("^failed: .*", "failed", row.get("note") or "not measured")
        rest = [form.format(row[name]) for name, form in parts if row.get(name) is not None]
        return _time(row["ms"]) + f" ({', '.join(rest)})" * bool(rest)

    return cell


def _named(prefix: str) -> Callable[[Row], bool]:
    return lambda row: row["shape"].startswith(prefix)


# By suite: its tables, each a part of its rows.
TABLES = {
    "solvers": [Table(_with(("steps", "{:,} steps")))],
    "flow": [Table(_with(("setting", "{}"), ("evaluations", "{} evaluations")))],
    "derivatives": [Table(_with(MEMORY))],
    "kernels": [Table(_with(), lambda row: row["mode"] != "memory")],
    "scaling": [Table(_with(MEMORY))],
    "scale": [Table(_with(ERROR), _named("compressed")), Table(_with(ERROR), _named("pruned"))],
    "training": [Table(_with(MEMORY))],
    "observables": [Table(_with(("setting", "{}")))],
}


def suite(name: str) -> str:
    """The tables of a suite in Markdown, once for each device."""
    reports = [report for report in _reports() if report["suite"] == name]
    found = [_of(report, chosen) for report in reports for chosen in TABLES[name]]
    return "\n".join(found) or missing(f"python -m benchmarks {name}")


def missing(command: str) -> str:
    return f"*Not measured yet: `{command}` does it.*\n"


def _reports() -> Iterator[dict[str, Any]]:
    for file in sorted(RESULTS.glob("*.json")):
        yield from json.loads(file.read_text())


def _of(report: dict[str, Any], chosen: Table) -> str:
    rows = [row for row in report["rows"] if chosen.shown(row)]
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(_case(row), {})[row["rival"]] = row
    body = [[case, *_cells(cells, rivals, chosen.cell)] for case, cells in lines.items()]
    left = f" Left out for want of time: {', '.join(report['skipped'])}." * bool(report["skipped"])
    about = f"The fastest of a line is bold.{left}"
    return markdown(["", *rivals], body) + origin(
        report, f"python -m benchmarks {report['suite']}", about
    )


def _case(row: Row) -> str:
    """The case in words, with the number of tokens and the derivative where its name lacks them."""
    words = next(
        (text.format(*map(_grouped, m.groups())) for pattern, text in CASES.items()
         if (m := re.fullmatch(pattern, row["shape"]))),
        row["shape"],
    )  # fmt: skip
    count = _grouped(str(row.get("n") or ""))
    words += f", n = {count}" if count and count not in words else ""
    return f"{words}: {row['mode']}" if row.get("mode") not in (None, "forward") else words


def _grouped(number: str) -> str:
    return f"{int(number):,}" if number.isdigit() and len(number) > 4 else number


def _cells(cells: dict[str, Row], rivals: list[str], form: Callable[[Row], str]) -> list[str]:
    times = {rival: row["ms"] for rival, row in cells.items() if row.get("ms") is not None}
    best = min(times, key=times.__getitem__, default=None)
    written = {rival: form(row) for rival, row in cells.items()}
    return [f"**{written[r]}**" if r == best else written.get(r, "") for r in rivals]


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [[_escaped(cell) for cell in line] for line in [head, *body]]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def _escaped(cell: str) -> str:
    """A bar would end the cell, but not within code."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", cell)


def origin(report: dict[str, Any], command: str, about: str) -> str:
    """What a table shows, on what it was measured, and by which command."""
    versions = report["versions"]
    with_ = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions)
    place = f"{report['device']}, {with_}, commit {report['commit']}"
    return f"{about} {place}; `{command}`.\n{{ .origin }}\n"
