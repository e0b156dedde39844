"""`jaxflow reproduce`: published results, each beside what theory expects of it.

The run folder holds config.json, for each result NAME.json and NAME.png, and index.html, a page of
all results in the folder. A record states its sha256 and that of its picture, so that one that is
damaged, or cut off, is computed again. Without matplotlib there are no pictures.
"""

import hashlib
import inspect
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import typer

from .. import __version__
from .._folder import claim, json_object, sealed, write_bytes, write_settings, write_text
from ..reproduce import RESULTS, Result, Row, Scheme
from ..reproduce.page import number, page
from .boundary import FAILED, interruptible
from .console import progress, say, table
from .device import prepare
from .optional import available, figures
from .reproduction import Reproduction
from .settings import to_json

KIND = "reproduce"
PAGE = "index.html"


def reproduce(s: Reproduction):
    """Lists the results, or computes those that are asked for."""
    if s.list_:
        table("results", [(r.name, f"arXiv {r.arxiv}", r.line) for r in RESULTS.values()])
        return
    results = _chosen(s.names or [])
    drawn = available(figures, "pictures")  # now, not after the solves
    prepare()
    with claim(s.out, KIND, going_on=None) as folder:
        write_settings(folder, KIND, to_json(s) | {"jaxflow": __version__})
        passed = _run(folder, results, s, drawn)
    if not passed:
        raise typer.Exit(FAILED)


def _chosen(names: list[str]) -> list[Result]:
    """The results of these names, in the order of the list."""
    if unknown := [name for name in names if name not in (*RESULTS, "all")]:
        raise ValueError(
            f"there is no result {unknown[0]!r}; take all, or some of {', '.join(RESULTS)}."
        )
    return [r for name, r in RESULTS.items() if name in names or "all" in names]


def _run(folder: Path, results: list[Result], s: Reproduction, drawn: bool) -> bool:
    """Computes what is not there, writes the page, and says whether all passed."""
    there = {} if s.again else {r.name: _read(folder, r, s.quick) for r in results}
    kept = {name: record for name, record in there.items() if record and not record["error"]}
    _announce(folder, [r for r in results if r.name not in kept], len(kept), s.quick)
    found = []
    with progress("results", len(results)) as show:
        for done, result in enumerate(results):
            show(done, f"{result.name} ({done + 1} of {len(results)})")
            record = kept.get(result.name) or _compute(folder, result, s.quick, drawn)
            found.append(record)
            _tell(record, result.name in kept)
            _write_page(folder, s.quick)
    failed = [r["name"] for r in found if not r["passed"]]
    say(f"{len(found) - len(failed)} of {len(found)} pass. Page: {folder / PAGE}")
    if failed:
        say(f"Failed: {', '.join(failed)}.")
    return not failed


def _announce(folder: Path, left: list[Result], kept: int, quick: bool):
    if kept:
        say(f"{kept} of the results were there already.")
    if left:
        costs = ", ".join(f"{r.name} {r.cost(quick):.0f} s" for r in left)
        total = sum(r.cost(quick) for r in left)
        say(f"About {total:.0f} s on two cores: {costs}.")
        say(f"If it is cut off, --out {folder} goes on.")


def _tell(record: dict[str, Any], kept: bool):
    """What a result gave, in a table."""
    verdict = "pass" if record["passed"] else "FAIL"
    took = "kept" if kept else f"{record['seconds']:.1f} s"
    rows = [("", "measured", "expected", "tolerance")]
    for row in record["rows"]:
        what = row["what"] if row["passed"] else f"FAIL {row['what']}"
        tolerance = number(row["tolerance"], 2)
        rows.append((what, number(row["measured"]), number(row["expected"]), tolerance))
    for scheme in record["schemes"]:
        numbers = number(scheme["published"]), number(scheme["exact"])
        rows.append((f"published step: {scheme['what']}", *numbers, ""))
    if record["error"] is not None:
        say(f"\n{record['name']} failed: {record['error']}")
    else:
        table(f"{record['name']}: {verdict} ({took}, arXiv {record['arxiv']})", rows)


# ------------------------------------------------------------------ one result


class _Found(NamedTuple):
    rows: Sequence[Row] = ()
    schemes: Sequence[Scheme] = ()
    picture: bytes | None = None
    error: str | None = None


def _compute(folder: Path, result: Result, quick: bool, drawn: bool) -> dict[str, Any]:
    """Runs a result and writes its picture and its record; an error is its result."""
    start = time.perf_counter()
    found = _attempt(result, quick, drawn)
    record = _about(result, quick) | {
        "seconds": time.perf_counter() - start,
        "passed": found.error is None and all(row.passed for row in found.rows),
        "error": found.error,
        "rows": [_finite(row._asdict() | {"passed": row.passed}) for row in found.rows],
        "schemes": [_finite(scheme._asdict()) for scheme in found.schemes],
        "picture": None,
    }
    if found.picture is not None:
        write_bytes(_picture(folder, result.name), found.picture)
        record["picture"] = hashlib.sha256(found.picture).hexdigest()
    _write(folder, record)
    return record


def _attempt(result: Result, quick: bool, drawn: bool) -> _Found:
    try:
        with jax.enable_x64(True):
            outcome = interruptible(result.run, quick)
            picture = _png(outcome.draw()) if drawn else None
        return _Found(outcome.rows, outcome.schemes, picture)
    except Exception as error:  # the others go on
        return _Found(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return content.getvalue()


def _about(result: Result, quick: bool) -> dict[str, Any]:
    """What a record has to say to be of this result, this version and these settings."""
    source = hashlib.sha256(Path(inspect.getfile(result.run)).read_bytes()).hexdigest()
    about = {"name": result.name, "arxiv": result.arxiv, "line": result.line}
    about["parameters"] = result.parameters
    return about | {"quick": quick, "jaxflow": __version__, "source": source}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold: None for a number that is not finite."""
    known = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    return {k: known(v) for k, v in values.items()}


# ------------------------------------------------------------------ what is in the folder


def _picture(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def _write(folder: Path, record: dict[str, Any]):
    sealed_record = record | {"sha256": sealed(record)}
    write_text(folder / f"{record['name']}.json", json.dumps(sealed_record, indent=2) + "\n")


def _read(folder: Path, result: Result, quick: bool) -> dict[str, Any] | None:
    """A record that is whole, of the same version and settings; else None."""
    path = folder / f"{result.name}.json"
    try:
        record = json_object(path.read_text(encoding="utf-8"), str(path))
        stated = record.pop("sha256", None)
        drawn = _drawn(folder, record)
    except (OSError, ValueError):
        return None
    same = all(record.get(k) == v for k, v in _about(result, quick).items())
    picture = None if drawn is None else hashlib.sha256(drawn).hexdigest()
    return record if same and stated == sealed(record) and record["picture"] == picture else None


def _drawn(folder: Path, record: dict[str, Any]) -> bytes | None:
    """The picture of a record; one with an error has none."""
    return None if record.get("picture") is None else _picture(folder, record["name"]).read_bytes()


def _write_page(folder: Path, quick: bool):
    """The page of all results in the folder that are whole."""
    found = [record for r in RESULTS.values() if (record := _read(folder, r, quick))]
    shown = [(record, _drawn(folder, record)) for record in found]
    about = f"jaxflow {__version__}{', quick' if quick else ''}, float64"
    write_text(folder / PAGE, page(shown, about))
