"""The tables of results in the documents, from the reports in benchmarks/results.

A document holds a table between two lines of comment,

    <!-- table NAME -->
    <!-- end of table -->

and `python -m benchmarks tables` writes what is between them anew: with numbers of the reports for
the names in `TABLES`, with words of the code for `columns` and `suites`. Nothing here imports JAX.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import SUITES
from .pace import RESULTS
from .report import COLUMNS
from .slopes import fits

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/**/*.md")
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NONE = "—"

Report = Mapping[str, Any]
Cell = Callable[[Mapping[str, dict]], str]  # of the rows of one case, by rival


# ------------------------------------------------------------------ cells


def number(rival: str, key: str, form: str = "{:.3g}") -> Cell:
    """One number of one rival."""

    def cell(rows: Mapping[str, dict]) -> str:
        value = rows.get(rival, {}).get(key)
        return NONE if value is None else form.format(value)

    return cell


def times(rival: str, ours: str = "jaxflow", form: str = "{:.2f}") -> Cell:
    """How many times longer a rival takes."""

    def cell(rows: Mapping[str, dict]) -> str:
        theirs, mine = (rows.get(name, {}).get("ms") for name in (rival, ours))
        return NONE if theirs is None or mine is None else form.format(theirs / mine)

    return cell


def time_or_error(rival: str) -> Cell:
    """Milliseconds, or how near the rival came."""

    def cell(rows: Mapping[str, dict]) -> str:
        row = rows.get(rival, {})
        if "ms" in row:
            return f"{row['ms']:.3g}"
        return f"error {row['error']:.0e}" if "error" in row else NONE

    return cell


def seconds(rival: str) -> Cell:
    def cell(rows: Mapping[str, dict]) -> str:
        return f"{rows[rival]['ms'] / 1e3:.3g} s" if "ms" in rows.get(rival, {}) else NONE

    return cell


# ------------------------------------------------------------------ tables


def grid(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(_escaped(str(cell)) for cell in line) + " |" for line in lines
    )


def _escaped(cell: str) -> str:
    """A bar would end the cell, but not within code."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", cell)


def by_case(rows: Iterable[dict], keys: Sequence[str], cells: Mapping[str, Cell]) -> str:
    """A line for each case, which `keys` name, and a column for each cell."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in keys), {})[row["rival"]] = row
    names = ["case" if key == "shape" else key for key in keys]
    lines = ([*case, *(cell(some) for cell in cells.values())] for case, some in cases.items())
    return grid([*names, *cells], lines)


def plain(rows: Iterable[dict], forms: Mapping[str, str]) -> str:
    """The rows as they are, with some of their columns."""
    rows = list(rows)
    show = lambda row, name: NONE if row.get(name) is None else forms[name].format(row[name])
    titles = ("case" if name == "shape" else name for name in forms)
    return grid(titles, ([show(row, name) for name in forms] for row in rows))


def kernels(report: Report) -> str:
    cells = {
        "jaxflow ms": number("jaxflow", "ms"),
        "torch / jaxflow": times("torch"),
        "torch 1 thread / jaxflow": times("torch 1 thread"),
        "KeOps / jaxflow": times("keops"),
        "jnp / jaxflow": times("jnp"),
        "of floor": number("jaxflow", "of_floor", "{:.0%}"),
        "peak MiB": number("jaxflow", "peak_mib"),
    }
    rates = report["ceilings"]
    ceilings = (
        f"Ceilings measured in the run: {rates['flops'] / 1e9:.3g} GFLOP/s, "
        f"{rates['exps']:.2g} exp/s, {rates['bytes'] / 1e9:.2g} GB/s."
    )
    return f"{ceilings}\n\n{by_case(report['rows'], ('shape', 'mode'), cells)}"


def flow(report: Report) -> str:
    rivals = ("jaxflow adaptive", "jaxflow fixed", "diffrax", "torchdiffeq", "torchdiffeq 1 thread")
    cells = {f"{name} ms": time_or_error(name) for name in (*rivals, "numpy")}
    return by_case(report["rows"], ("shape",), cells)


def derivatives(report: Report) -> str:
    cells = {
        "jaxflow ms": number("jaxflow", "ms"),
        "jnp / jaxflow": times("jnp"),
        "custom_vjp / jaxflow": times("custom_vjp"),
        "peak MiB": number("jaxflow", "peak_mib"),
        "of jnp": number("jnp", "peak_mib"),
    }
    return by_case(report["rows"], ("shape", "mode"), cells)


def scaling(report: Report) -> str:
    cells = {
        "jaxflow ms": number("jaxflow", "ms"),
        "jnp / jaxflow": times("jnp"),
        "torch / jaxflow": times("torch"),
        "torch 1 thread / jaxflow": times("torch 1 thread"),
        "peak MiB": number("jaxflow", "peak_mib"),
        "of jnp": number("jnp", "peak_mib"),
    }
    return by_case(report["rows"], ("mode", "n"), cells)


def slopes(report: Report) -> str:
    names = ("mode", "rival", "from_n", "time_exponent", "memory_exponent", "note")
    return plain(fits(report["rows"]), {name: COLUMNS[name].form for name in names})


def compile(report: Report) -> str:
    names = ("shape", "rival", "trace_s", "lower_s", "compile_s", "traces", "programs_again")
    return plain(report["rows"], {n: "{:.2g}" if n.endswith("_s") else "{}" for n in names})


def training(report: Report) -> str:
    names = ("shape", "mode", "rival", "ms", "evaluations", "vs_scan", "compile_s")
    names += ("compile_vs_scan", "peak_mib")
    return plain(report["rows"], {name: COLUMNS[name].form for name in names})


def generation(report: Report) -> str:
    rivals = "jaxflow without cache", "torch", "torch 1 thread"
    cells = {"jaxflow tokens a second": number("jaxflow", "tokens_per_s", "{:,.0f}")}
    cells |= {f"{name} / jaxflow": times(name) for name in rivals}
    return by_case(report["rows"], ("shape",), cells)


def precision(report: Report) -> str:
    names = ("shape", "rival", "tokens_per_s", "last_loss", "validation_loss")
    return plain(report["rows"], {name: COLUMNS[name].form for name in names})


def _phases(report: Report) -> list[dict]:
    return [row for row in report["rows"] if row["shape"].startswith("phase")]


def phases(report: Report) -> str:
    cells = {
        "jaxflow ms": number("jaxflow", "ms"),
        "diffrax ms": number("diffrax", "ms"),
        "numpy ms": number("numpy", "ms"),
        "its step": number("numpy", "setting", "{}"),
        "numpy / jaxflow": times("numpy", form="{:.0f}"),
        "as published ms": number("numpy as published", "ms"),
        "its error": number("numpy as published", "error", "{:.0e}"),
    }
    return by_case(_phases(report), ("shape",), cells)


def functions(report: Report) -> str:
    rows = [row for row in report["rows"] if row not in _phases(report)]
    cells = {
        "jaxflow": seconds("jaxflow"),
        "peak MiB": number("jaxflow", "peak_mib"),
        "scipy": seconds("scipy"),
        "numpy": seconds("numpy"),
    }
    return by_case(rows, ("shape",), cells)


def solvers(report: Report) -> str:
    rows = report["rows"]

    def cell(name: str) -> Cell:
        def written(some: Mapping[str, dict]) -> str:
            row = some.get(name, {})
            return f"{row['ms']:.3g} ({row['steps']})" if "ms" in row else row.get("note", NONE)

        return written

    def found(some: Mapping[str, dict]) -> str:
        ends = [row["setting"] for row in some.values() if "setting" in row]
        return ends[-1].removeprefix("t = ") if ends else NONE

    names = dict.fromkeys(row["rival"] for row in rows)
    cells = {"time found": found} | {name: cell(name) for name in names}
    return by_case(rows, ("shape",), cells)


def compressed(report: Report) -> str:
    rows = [
        row
        for row in report["rows"]
        if row["shape"].startswith("compressed") and row["mode"] == "forward"
    ]
    ours = "jaxflow compressed"
    cells = {
        "blocked": seconds("jaxflow blocked"),
        "torch": seconds("torch"),
        "`Compressed`": seconds(ours),
        "times blocked": times("jaxflow blocked", ours, "{:,.0f}"),
        "error": number(ours, "error", "{:.0e}"),
    }
    return by_case(rows, ("shape", "n"), cells)


def pruned(report: Report) -> str:
    rows = [row for row in report["rows"] if row["shape"].startswith("pruned")]
    ours = "jaxflow pruned:1e-4"
    cells = {
        "blocked": seconds("jaxflow blocked"),
        "torch": seconds("torch"),
        "pruned:1e-4": seconds(ours),
        "times blocked": times("jaxflow blocked", ours, "{:.2g}"),
        "pruned:1e-6": seconds("jaxflow pruned:1e-6"),
        "asked at 1e-4": number(ours, "asked", "{:.1%}"),
        "replaced": number(ours, "replaced", "{:.1%}"),
    }
    return by_case(rows, ("shape",), cells)


def quick_costs() -> str:
    """What the cases of a quick run cost."""
    reports = _reports("cpu-quick.json").values()
    lines = []
    for report in reports:
        cost = sum(case["cpu_s"] for case in report["cases"].values())
        done = f"{len(report['cases'])} of {len(report['cases']) + len(report['skipped'])}"
        lines.append([report["suite"], done, f"{cost:.0f}", f"{report['seconds']:.0f}"])
    return grid(["suite", "cases that ran", "their CPU seconds", "seconds of the suite"], lines)


# The suite whose report a table is made of, and how.
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "kernels": ("kernels", kernels),
    "flow": ("flow", flow),
    "derivatives": ("derivatives", derivatives),
    "scaling": ("scaling", scaling),
    "slopes": ("scaling", slopes),
    "compile": ("compile", compile),
    "training": ("training", training),
    "generation": ("generation", generation),
    "precision": ("precision", precision),
    "phases": ("observables", phases),
    "functions": ("observables", functions),
    "solvers": ("solvers", solvers),
    "compressed": ("scale", compressed),
    "pruned": ("scale", pruned),
}
WORDS: dict[str, Callable[[], str]] = {
    "suites": lambda: grid(["suite", "question"], SUITES.items()),
    "columns": lambda: grid(["column", ""], ((n, c.meaning) for n, c in COLUMNS.items())),
    "quick-costs": quick_costs,
}


# ------------------------------------------------------------------ documents


def rendered(name: str) -> str:
    """A table by its name, with where its numbers come from.

    **Raises:** `KeyError` for a name that no table has.
    """
    if name in WORDS:
        return WORDS[name]()
    suite, make = TABLES[name]
    report = _reports("cpu.json").get(suite)
    if report is None:
        return f"Not measured yet: `python -m benchmarks {suite}` does it."
    loads = [row["load"] for row in report["rows"] if row.get("load") is not None]
    crowd = f", load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    origin = f"Commit {report['commit']}{', modified' * report['modified']}{crowd}."
    return f"{origin} {make(report)}" if name == "kernels" else f"{origin}\n\n{make(report)}"


def _reports(file: str) -> dict[str, Report]:
    return {report["suite"]: report for report in json.loads((RESULTS / file).read_text())}


def documents() -> list[Path]:
    return sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


def updated(text: str) -> str:
    """The text of a document with its tables as they should be."""
    return MARKED.sub(lambda m: f"{m[1]}\n{rendered(m[2])}\n\n{m[3]}", text)


def update(*, write: bool) -> list[str]:
    """The documents whose tables differ from the results; they are written anew if `write`."""
    changed = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            changed.append(str(path.relative_to(ROOT)))
            if write:
                path.write_text(new, encoding="utf-8")
    return changed
