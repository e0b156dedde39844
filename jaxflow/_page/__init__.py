"""Pages that need no other file: what is shown, its style, its script and its data are within them.

The styles, the scripts and the bodies are files beside this one. A page runs its own scripts alone,
each named by its sha256 in the page's Content-Security-Policy, and fetches nothing.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

_DATA = '<script type="application/json" id="data">'


def assemble(
    title: str,
    body: str,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    data: Any = None,
    policy: str = "",
) -> str:
    """One HTML page.

    **Arguments:** `title`, as text; `body`, as HTML; the names of `styles`, after base.css, and of
    `scripts`; `data`, as JSON, which scripts read from the element of that id; `policy`, what the
    page may do beside running its scripts.
    """
    style = "".join(asset(name) for name in ("base.css", *styles))
    sources = [f"\n{asset(name)}" for name in scripts]
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in sources) or "'none'"
    rules = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}"
    # A < within a string of JSON, so that no text ends the element.
    held = (
        ""
        if data is None
        else f"{_DATA}{json.dumps(data, allow_nan=False).replace('<', chr(92) + 'u003c')}"
    )
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{rules}{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{style}</style></head><body>",
            body,
            *([f"{held}</script>"] if held else []),
            *(f"<script>{source}</script>" for source in sources),
            "</body></html>\n",
        ]
    )


def asset(name: str) -> str:
    """The text of a file of this folder."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def embedded(page: str) -> Any:
    """The data that a page was assembled with.

    **Raises:** `ValueError` for a page without them.
    """
    found = re.search(re.escape(_DATA) + "(.*?)</script>", page, re.DOTALL)
    if found is None:
        raise ValueError("the page holds no data: an older jaxflow, or another program, wrote it.")
    return json.loads(found[1])


def film(title: str, data: Any) -> str:
    """The page that plays tokens; `data` are those of `jaxflow.viz.sphere`."""
    return assemble(
        title,
        asset("film.html"),
        styles=["film.css"],
        scripts=["format.js", "chart.js", "points.js", "scene.js", "film.js"],
        data=data,
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
