"""The guides: their code runs as printed, their commands exist, and what they quote is there."""

import ast
import inspect
import re
import sys

import documentation
import jax
import pytest

import jaxflow

DOCS = documentation.ROOT / "docs"
sys.path.append(str(DOCS))  # as MkDocs does for its hooks
import errors  # noqa: E402  # pyright: ignore[reportMissingImports]

PAGES = sorted(DOCS.rglob("*.md"))
CODE = [page for page in PAGES if any(b.language == "python" for b in documentation.blocks(page))]
LONG = {"guides/limit.md", "guides/long.md", "guides/training.md"}
COMMANDS = {where: words for page in PAGES for where, words in documentation.commands(page)}
name_of = lambda path: str(path.relative_to(DOCS))


def of_page(page):
    marks = [pytest.mark.slow] if name_of(page) in LONG else []
    return pytest.param(page, id=name_of(page), marks=marks)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """JAX as a newcomer has it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    wide = jax.config.read("jax_enable_x64")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_enable_x64", wide)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("page", [of_page(page) for page in CODE])
def test_code_runs_as_printed(page):
    documentation.run(page)


@pytest.mark.parametrize("file", sorted((DOCS / "extend").glob("*.py")), ids=name_of)
def test_parts_of_ones_own_are_short_and_proved(file):
    text = file.read_text()
    assert len(text.splitlines()) < 30 and text.splitlines()[-1].startswith("assert ")
    shown = [
        b.text for b in documentation.blocks(file.with_suffix(".md")) if b.language == "python"
    ]
    assert shown == [text]


@pytest.mark.parametrize("where", COMMANDS)
def test_commands_exist(where):
    documentation.check(list(COMMANDS[where]))


def test_a_command_that_is_none_is_found():
    for wrong in ("jaxflow simulate --m 3", "jaxflow simulat", "make tes", "python examples/a.py"):
        with pytest.raises((AssertionError, ValueError, documentation.typer.TyperException)):
            documentation.check(wrong.split())


# ------------------------------------------------------------------ names


def resolved(dotted: str):
    """What a name such as jf.events.merges names."""
    value = jaxflow
    for name in dotted.split(".")[1:]:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_prose_exist(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`(?:jf|jaxflow)(?:\.[A-Za-z_]\w*)+", prose):
        resolved(name.strip("`"))


def test_the_dictionary_has_every_concept():
    text = (DOCS / "guides/dictionary.md").read_text()
    modules = {name for name in jaxflow.__all__ if inspect.ismodule(getattr(jaxflow, name))}
    rest = {
        "AbstractField",
        "FlowError",
        "enable_compilation_cache",
        "memory_estimate",
        "select_backend",
    }
    names = {f"jf.{name}" for name in set(jaxflow.__all__) - modules - rest}
    own = (name for name in jaxflow.observables.__all__ if not name.startswith("Abstract"))
    names |= {f"jf.observables.{name}" for name in own}
    missing = {name for name in names if not re.search(rf"{re.escape(name)}\b", text)}
    assert not missing, sorted(missing)


# ------------------------------------------------------------------ what is quoted


def texts() -> list[str]:
    """Every text of the package, with "..." for what is filled in."""
    found = []
    for file in errors.PACKAGE.rglob("*.py"):
        inside: set[ast.AST] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant) and node not in inside:
                inside |= set(ast.walk(node))
                found.append(errors.written(node))
    return found


def quoted() -> list[str]:
    """The first column of the tables of errors."""
    tables = (DOCS / "guides/failures.md").read_text().split("| error | why | what to do |")[1:]
    return [
        error for table in tables for _, error in re.findall(r"^\| (`+)(.+?)\1 \|", table, re.M)
    ]


def has(text: str, pieces: list[str]) -> bool:
    """Whether the pieces are in the text, one after the other."""
    start = 0
    for piece in pieces:
        if (at := text.find(piece, start)) < 0:
            return False
        start = at + len(piece)
    return True


def test_errors_that_are_quoted_are_in_the_source():
    source = texts()
    unknown = [e for e in quoted() if not any(has(text, e.split("...")) for text in source)]
    assert not unknown, "\n".join(unknown)
    assert len(quoted()) > 100
