"""Tables of the studies of training, out of benchmarks/results/studies/*.json.

A line is a case, a column one of its numbers, mean and spread over the seeds.
"""

import json
from typing import Any

from tables import RESULTS, markdown, missing, origin

STUDIES = ("characters", "digits", "transport", "adjoints")


def study(name: str) -> str:
    """The table of a study in Markdown."""
    command = f"python -m benchmarks.studies {name}"
    file = RESULTS / "studies" / f"{name}.json"
    if not file.exists():
        return missing(command)
    record = json.loads(file.read_text())
    rows = [_flat(row) for row in record["rows"]]
    columns = list(dict.fromkeys(number for row in rows for number in row))
    body = [[row.get(column, "") for column in columns] for row in rows]
    about = f"{record['question'].capitalize()} Mean, and standard deviation over seeds."
    return markdown([column.replace("case", "") for column in columns], body) + origin(
        record, command, about
    )


def _flat(row: dict[str, Any]) -> dict[str, str]:
    """The numbers of a row, those of dictionaries under the names of both."""
    cells = {"case": row["case"], "seeds": str(row["n"])}
    for name, value in row.items():
        if isinstance(value, dict):
            parts = {"": value} if "mean" in value else value
            cells |= {
                f"{name} {part}".replace("_", " ").strip(): _number(v) for part, v in parts.items()
            }
    return cells


def _number(of: dict[str, float | None]) -> str:
    mean, spread = of["mean"], of["spread"]
    return f"{mean:,.4g}" + (f" \u00b1 {spread:.2g}" if spread else "")
