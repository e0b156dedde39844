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
import errors  # noqa: E402

PAGES = sorted(DOCS.rglob("*.md"))
CODE = [page for page in PAGES if any(b.language == "python" for b in documentation.blocks(page))]
COMMANDS = {where: words for page in PAGES for where, words in documentation.commands(page)}
name_of = lambda path: str(path.relative_to(DOCS))


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """JAX as a newcomer has it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    wide = jax.config.read("jax_enable_x64")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_enable_x64", wide)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("page", CODE, ids=name_of)
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
    documentation.check(COMMANDS[where])


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
    modules = {"annotations", *(n for n, v in vars(jaxflow).items() if inspect.ismodule(v))}
    rest = {
        "AbstractField",
        "FlowError",
        "enable_compilation_cache",
        "memory_estimate",
        "select_backend",
    }
    names = {f"jf.{name}" for name in set(jaxflow.__all__) - modules - rest}
    for module in (jaxflow.observables, jaxflow.events):
        own = (name for name in module.__all__ if not name.startswith("Abstract"))
        names |= {f"{module.__name__.replace('jaxflow', 'jf')}.{name}" for name in own}
    missing = {name for name in names if not re.search(rf"{re.escape(name)}\b", text)}
    assert not missing, sorted(missing)


# ------------------------------------------------------------------ what is quoted


def texts() -> str:
    """Every text of the package, a line each, with "..." for what is filled in."""
    found = []
    for file in errors.PACKAGE.rglob("*.py"):
        inside: set[ast.AST] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant) and node not in inside:
                inside |= set(ast.walk(node))
                found.append(errors.written(node))
    return "\n".join(found)


def quoted() -> list[str]:
    """The first column of the tables of errors."""
    tables = (DOCS / "guides/failures.md").read_text().split("| error | why | what to do |")[1:]
    return [
        error for table in tables for _, error in re.findall(r"^\| (`+)(.+?)\1 \|", table, re.M)
    ]


def test_errors_that_are_quoted_are_in_the_source():
    source, unknown = texts(), []
    for error in quoted():
        pieces = [re.escape(piece) for piece in error.split("...")]
        if not re.search(".*".join(pieces), source):
            unknown.append(error)
    assert not unknown, "\n".join(unknown)
    assert len(quoted()) > 100
