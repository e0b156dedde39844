"""One page of results, which needs no other file: tables, and pictures within it."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from .._page import assemble


def page(results: Sequence[tuple[dict[str, Any], bytes | None]], about: str) -> str:
    """The page of records, as `jaxflow reproduce` writes them, and their pictures.

    **Arguments:** `results`: a record and the bytes of its PNG, or `None`, for each; `about`: the
    line below the title.
    """
    passed = sum(record["passed"] for record, _ in results)
    index = "".join(_line(record) for record, _ in results)
    body = (
        f"<h1>Published results</h1><p>{passed} of {len(results)} pass. "
        f'<span class="small">{html.escape(about)}</span></p>'
        f'<div class="wide"><table class="results">{index}</table></div>'
        f"{''.join(_section(*result) for result in results)}"
    )
    return assemble("jaxflow reproduce", body, styles=["results.css"])


def _line(record: dict[str, Any]) -> str:
    name = html.escape(record["name"])
    return (
        f'<tr><td>{_verdict(record["passed"])}<td><a href="#{name}">{name}</a>'
        f"<td>{_paper(record['arxiv'])}<td>{html.escape(record['line'])}"
        f'<td class="number">{record["seconds"]:.1f} s'
    )


def _section(record: dict[str, Any], picture: bytes | None) -> str:
    name = html.escape(record["name"])
    parts = [
        f'<h2 id="{name}">{name} {_verdict(record["passed"])}</h2>',
        f"<p>{html.escape(record['line'])} ({_paper(record['arxiv'])}; parameters: "
        f"{html.escape(record['parameters'])})</p>",
    ]
    if record["error"] is not None:
        parts.append(f'<p class="fail">{html.escape(record["error"])}</p>')
    if record["rows"]:
        parts.append(_rows(record["rows"]))
    if record["schemes"]:
        parts.append(_schemes(record["schemes"]))
    if picture is not None:
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="figure of {name}" src="data:image/png;base64,{data}">')
    return "".join(parts)


def _rows(rows: list[dict[str, Any]]) -> str:
    head = "<tr><th><th>what<th>measured<th>expected<th>tolerance<th>which is"
    body = "".join(
        f"<tr><td>{_verdict(row['passed'])}<td>{html.escape(row['what'])}{_numbers(row)}"
        f'<td class="small">{html.escape(row["why"])}'
        for row in rows
    )
    return f'<div class="wide"><table class="results">{head}{body}</table></div>'


def _numbers(row: dict[str, Any]) -> str:
    cells = (number(row["measured"]), number(row["expected"]), number(row["tolerance"], 2))
    return "".join(f'<td class="number">{cell}' for cell in cells)


def _schemes(schemes: list[dict[str, Any]]) -> str:
    head = "<tr><th>where they differ<th>published step, h = 0.1<th>exact"
    body = "".join(
        f'<tr><td>{html.escape(s["what"])}<td class="number">{number(s["published"])}'
        f'<td class="number">{number(s["exact"])}'
        for s in schemes
    )
    return f'<div class="wide"><table class="results">{head}{body}</table></div>'


def _verdict(passed: bool) -> str:
    return '<span class="pass">pass</span>' if passed else '<span class="fail">FAIL</span>'


def _paper(arxiv: str) -> str:
    return f'<a href="https://arxiv.org/abs/{html.escape(arxiv)}">arXiv {html.escape(arxiv)}</a>'


def number(value: float | None, digits: int = 7) -> str:
    """A number for people; None is one that is not finite."""
    return "not finite" if value is None else f"{value:.{digits}g}"
