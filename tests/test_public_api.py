"""What users rely on changes with notice: names, signatures, flags, and what dir() shows."""

import builtins
import difflib

import public_api
import pytest

import jaxflow


def test_names_and_signatures_are_those_that_were_announced():
    announced, found = public_api.FILE.read_text(encoding="utf-8"), public_api.text()
    changed = difflib.unified_diff(announced.splitlines(), found.splitlines(), "before", "now", n=0)
    assert announced == found, (
        "what users rely on has changed. Where that is meant, run `python tests/public_api.py`, "
        "which writes it down, and say it in CHANGELOG.md; docs/stability.md says how a name goes."
        "\n" + "\n".join(changed)
    )


@pytest.mark.parametrize("module", public_api.modules(), ids=lambda m: m.__name__)
def test_dir_shows_public_names_alone(module):
    assert dir(module) == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not any(name.startswith("_") or not hasattr(module, name) for name in module.__all__)


def test_a_star_import_brings_what_is_listed():
    names: dict = {}
    exec("from jaxflow import *", names)
    assert set(names) - {"__builtins__"} == set(jaxflow.__all__)
    assert not set(jaxflow.__all__) & set(dir(builtins))
    assert callable(names["flow"]) and callable(names["coarsen"])
