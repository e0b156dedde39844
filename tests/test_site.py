"""The site: it builds without a warning, loads nothing from elsewhere, and no link is dead."""

import html.parser
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from browser import Browser

import jaxflow

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = """
    density density.closures events fields fields.time kernels masks measure models observables
    phase solvers stability training viz
""".split()


class Page(html.parser.HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path):
        html.parser.HTMLParser.__init__(self)
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        if tag == "a" and of.get("href"):
            self.links.append(of["href"] or "")
        if tag == "link" and of.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(of["href"] or "")
        self.loads += [of["src"] or ""] if "src" in of else []
        self.anchors += [of["id"] or ""] if "id" in of else []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; no proxy answers, so that what asks for the network fails."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | nowhere | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path.relative_to(site)} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_links_lead_somewhere(site, pages):
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if path.name == "404.html":  # which may stand anywhere: its links start at the root
                target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)} links to {link}"
            if parts.fragment and target in pages:
                anchors = pages[target].anchors
                assert unquote(parts.fragment) in anchors, f"{path.relative_to(site)}: {link}"


def test_names_link_and_formulas_stay(site, pages):
    links = pages[site / "reference" / "flow.html"].links
    assert "solvers.html#jaxflow.solvers.Geodesic" in links  # of a docstring
    assert "noise.html#jaxflow.Noise" in links  # of a signature
    anchors = {anchor for page in pages.values() for anchor in page.anchors}
    assert anchors.issuperset(documented())
    fields = (site / "reference" / "fields.html").read_text()
    assert "beta &lt;Q(x), K(y)&gt;" in fields and "X[mu](x) = P_x E_{mu_x}[V(y)]" in fields


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


@pytest.mark.parametrize("page", ["index.html", "guides/long.html"])
def test_pages_that_are_opened_from_disk_are_searched(site, browser, page):
    tab = browser.page((site / page).as_uri())
    tab.value("document.querySelector('.md-search__input').focus()")
    tab.call("Input.insertText", text="coarsen")
    tab.wait("document.querySelector('.md-search-result__link') !== null")
    found = "[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
    assert any(f"{site.as_uri()}/reference/long.html" in link for link in tab.value(found))
    assert tab.errors() == []


# ------------------------------------------------------------------ the reference


def public() -> dict[int, str]:
    """The public values by identity, and the shortest name of each."""
    modules = [jaxflow, *(importlib.import_module(f"jaxflow.{name}") for name in MODULES)]
    names = [f"{m.__name__}.{name}" for m in modules for name in getattr(m, "__all__", ())]
    found = {}
    for name in sorted(names, key=lambda name: -name.count(".")):
        found[id(value(name))] = name
    return {i: name for i, name in found.items() if not isinstance(value(name), ModuleType)}


def value(name: str) -> Any:
    """What a dotted name stands for: as an attribute, or else in the module of that name."""
    owner, _, last = name.rpartition(".")
    module = importlib.import_module(owner)
    return getattr(module, last)


def documented() -> list[str]:
    pages = (DOCS / "reference").glob("*.md")
    return [n for p in pages for n in re.findall(r"^::: (\S+)$", p.read_text(), re.MULTILINE)]


def test_each_public_name_is_in_the_reference_once():
    names = {name: value(name) for name in documented()}
    there = Counter(id(v) for v in names.values() if not isinstance(v, ModuleType))
    known = public()
    assert not [name for i, name in known.items() if i not in there], "not in docs/reference"
    assert set(there.values()) == {1} and len(names) == len(documented())
    homes = {"jaxflow.flow.flow", "jaxflow.coarsen.coarsen"}  # modules have their shorter names
    shown = {known.get(id(v), n): n for n, v in names.items() if n not in homes}
    assert all(known_as == name for known_as, name in shown.items())


def test_docstrings_have_no_brackets_of_markdown():
    for file in (ROOT / "jaxflow").rglob("*.py"):
        found = re.findall(r"`\]\[[\w.]*\]", file.read_text())
        assert not found, f"{file.relative_to(ROOT)}: write the name in backticks; it links."
    assert "`jaxflow.Noise`" in (inspect.getdoc(jaxflow.flow) or "")


# ------------------------------------------------------------------ what is generated


def test_a_table_is_made_of_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    tables = importlib.import_module("tables")
    row = {"shape": "circle beta 4", "rival": "Tsit5", "ms": 20.5, "steps": 1415}
    slow = row | {"rival": "Kvaerno5", "ms": 1630.0, "steps": 12}
    none = {"shape": "circle beta 4", "rival": "Euler", "note": "too | slow"}
    report = {
        "suite": "solvers", "device": "a device", "versions": {"jax": "1.2"}, "commit": "abc",
        "skipped": ["two beta 1"], "rows": [row, slow, none],
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps([report]))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    line = r"| 16 tokens on the circle, beta = 4 | — | 20.5 (1415) | 1.63e+03 (12) "
    made = tables.suite("solvers")
    assert line + r"| too \| slow |" in made and "a device, jax 1.2, commit abc" in made
    assert "two beta 1" in made
    assert "python -m benchmarks flow" in tables.suite("flow")  # none there


def test_a_study_shows_mean_and_spread(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    studies = importlib.import_module("studies")
    numbers = {"best": {"mean": 1.88, "spread": 0.01}, "losses": {"2": {"mean": 2, "spread": None}}}
    record = {
        "question": "which loss?", "device": "a device", "versions": {"jax": "1.2"},
        "commit": "abc", "rows": [{"case": "plain", "n": 3, "seeds": [0, 1, 2]} | numbers],
    }  # fmt: skip
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "characters.json").write_text(json.dumps(record))
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    made = studies.study("characters")
    assert "|  | seeds | best |" in made and "| plain | 3 | 1.88 \u00b1 0.01 |" in made
    assert "Losses:" in made and "|  | 2 |\n| --- | --- |\n| plain | 2 |" in made
    assert "benchmarks.studies digits" in studies.study("digits")
