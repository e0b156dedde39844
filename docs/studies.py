"""Tables of the studies of training, out of benchmarks/results/studies/*.json.

A line is a case, a column one of its numbers, mean and spread over the seeds. Numbers that a case
has at several settings are a table of their own.
"""

import json
from typing import Any

from tables import RESULTS, markdown, missing, origin

STUDIES = ("characters", "digits", "transport", "adjoints")
HIDDEN = {"adjoints": ("flops",)}  # an estimate, of what its runs take


def study(name: str) -> str:
    """The tables of a study in Markdown."""
    command = f"python -m benchmarks.studies {name}"
    file = RESULTS / "studies" / f"{name}.json"
    if not file.exists():
        return missing(command)
    record = json.loads(file.read_text())
    hidden = HIDDEN.get(name, ())
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in record["rows"]]
    rows = [row | {"seeds": row["n"]} for row in shown]
    several = [key for key in _names(rows) if any(_is_several(row.get(key)) for row in rows)]
    tables = [_table([{k: v for k, v in row.items() if k not in several} for row in rows])]
    for key in several:
        have = [row for row in rows if key in row]
        tables.append(f"{key.replace('_', ' ').capitalize()}:\n\n")
        tables.append(_table([{"case": row["case"]} | row[key] for row in have]))
    question = record["question"][0].upper() + record["question"][1:]
    about = f"{question} Mean, and standard deviation over seeds."
    return "".join(tables) + origin(record, command, about)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    apart = "case", "n", "seeds", "seconds"
    return [k for k in dict.fromkeys(k for row in rows for k in row) if k not in apart]


def _is_several(value: Any) -> bool:
    return isinstance(value, dict) and "mean" not in value


def _table(rows: list[dict[str, Any]]) -> str:
    names = _names(rows)
    seeds = ["seeds"] * ("seeds" in rows[0])
    body = [
        [row["case"], *(str(row[key]) for key in seeds), *(_number(row.get(n)) for n in names)]
        for row in rows
    ]
    return markdown(["", *seeds, *(name.replace("_", " ") for name in names)], body)


def _number(of: dict[str, float | None] | None) -> str:
    if of is None:
        return ""
    mean, spread = of["mean"], of["spread"]
    return f"{mean:,.4g}" + (f" \u00b1 {spread:.2g}" if spread else "")
