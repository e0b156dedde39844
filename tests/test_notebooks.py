"""The cells of each notebook run in their order, in one namespace, as a notebook runs them."""

import json
from pathlib import Path

import jax
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code(path: Path) -> list[str]:
    """The code of each cell; a line of a notebook's own (%pip) does nothing here."""
    found = ("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    return [text.replace("%pip", "pass  # %pip") for text in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_begins_with_its_equation(path):
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells(path))
    assert cells(path)[0]["cell_type"] == "markdown" and "$$" in "".join(cells(path)[0]["source"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    for name in ("matplotlib", "sklearn"):
        pytest.importorskip(name)
    names: dict = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for text in code(path):
            exec(compile(text, path.name, "exec"), names)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["limit", "simulate", "train"]
