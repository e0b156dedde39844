"""Tables of measured results, out of benchmarks/results/*.json: nobody types a number.

They are those of `benchmarks.tables`, with the cases in words, once for each device that has
results; and a sentence where none has.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables as measured

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SUITES = tuple(dict.fromkeys(suite for suite, _ in measured.TABLES.values()))

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


def suite(name: str) -> str:
    """The tables of a suite in Markdown, once for each device."""
    makes = [make for of, make in measured.TABLES.values() if of == name]
    found = [
        f"{_in_words(make(report))}\n\n{_about(report)}"
        for report in _reports()
        if report["suite"] == name
        for make in makes
    ]
    return "\n".join(found) or missing(f"python -m benchmarks {name}")


def missing(command: str) -> str:
    return f"*Not measured yet: `{command}` does it.*\n"


def _reports() -> Iterator[dict[str, Any]]:
    """All but those of quick runs, which tell what cases cost."""
    for file in sorted(RESULTS.glob("*.json")):
        if not file.stem.endswith("-quick"):
            yield from json.loads(file.read_text())


def _about(report: dict[str, Any]) -> str:
    left = f"Left out for want of time: {', '.join(report['skipped'])}." * bool(report["skipped"])
    return origin(report, f"python -m benchmarks {report['suite']}", left)


def _in_words(table: str) -> str:
    """The first column, as far as it has names of cases, in words."""

    def words(line: re.Match) -> str:
        for pattern, text in CASES.items():
            if found := re.fullmatch(pattern, line[1]):
                return f"| {text.format(*map(_grouped, found.groups()))} |"
        return line[0]

    return re.sub(r"^\| ([^|]+) \|", words, table, flags=re.MULTILINE)


def _grouped(number: str) -> str:
    return f"{int(number):,}" if number.isdigit() and len(number) > 4 else number


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    return measured.grid(head, body) + "\n\n"


def origin(report: dict[str, Any], command: str, about: str) -> str:
    """What a table shows, on what it was measured, and by which command."""
    versions = report["versions"]
    with_ = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions)
    place = f"{report['device']}, {with_}, commit {report['commit']}"
    return f"{about} {place}; `{command}`.\n{{ .origin }}\n"
