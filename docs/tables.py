"""Tables of measured results, out of benchmarks/results/*.json: nobody types a number.

A table is of one suite: a line a case, a column a rival, the fastest of a line in bold. There is one
table for each device that has results, and a sentence where none has.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Row = dict[str, Any]

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
    r"phase-(\d+)-(\d+)-(\d+) beta (\S+)": "phase diagram: {} tokens, d = {}, {} systems, beta = {}",
    r"compressed S\^(\d) beta (\S+)": "tokens on S^{}, beta = {}",
    r"pruned (\w+) d (\d+) spread (\S+) beta (\S+)": "{} in d = {}, blobs of spread {}, beta = {}",
    r"pruned (\w+) d (\d+) beta (\S+)": "{} in d = {}, beta = {}",
}


class Table(NamedTuple):
    """Which rows of a suite are shown, and what of each."""

    suite: str
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


TABLES = {
    "solvers": Table("solvers", _with(("steps", "{:,} steps"))),
    "accuracy": Table("flow", _with(("setting", "{}"), ("evaluations", "{} evaluations"))),
    "derivatives": Table("derivatives", _with(("peak_mib", "{:,.0f} MiB"))),
    "backends": Table("kernels", _with(), lambda row: row["mode"] != "memory"),
    "growth": Table("scaling", _with(("peak_mib", "{:,.0f} MiB"))),
    "compressed": Table("scale", _with(("error", "error {:.0e}")), _named("compressed")),
    "pruned": Table("scale", _with(("error", "error {:.0e}")), _named("pruned")),
    "training": Table("training", _with(("peak_mib", "{:,.0f} MiB"))),
    "observables": Table("observables", _with(("setting", "{}"))),
}


def table(name: str) -> str:
    """The table in Markdown, once for each device."""
    chosen = TABLES[name]
    found = [_of(report, chosen) for report in _reports() if report["suite"] == chosen.suite]
    missing = f"*Not measured yet: `python -m benchmarks {chosen.suite}` does it.*\n"
    return "\n".join(found) or missing


def _reports() -> Iterator[dict[str, Any]]:
    for file in sorted(RESULTS.glob("*.json")):
        yield from json.loads(file.read_text())


def _of(report: dict[str, Any], chosen: Table) -> str:
    rows = [row for row in report["rows"] if chosen.shown(row)]
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(_case(row), {})[row["rival"]] = row
    head = ["", *rivals]
    body = [[case, *_cells(cells, rivals, chosen.cell)] for case, cells in lines.items()]
    return f"{_markdown([head, ['---'] * len(head), *body])}\n\n{_origin(report)}\n"


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


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
                     for line in lines)  # fmt: skip


def _origin(report: dict[str, Any]) -> str:
    """On what this was measured, by which command, and what was left out."""
    versions = report["versions"]
    with_ = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions)
    left = f" Left out for want of time: {', '.join(report['skipped'])}." * bool(report["skipped"])
    return (
        f"*The fastest of a line is bold. {report['device']}, {with_}, commit {report['commit']}; "
        f"`python -m benchmarks {report['suite']}`.{left}*"
    )
