"""The guides: their code runs as printed, their commands exist, and what they quote is there."""

import documentation
import jax
import pytest

DOCS = documentation.ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
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
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs_as_printed(page):
    documentation.run(page)


@pytest.mark.parametrize("where", COMMANDS)
def test_commands_exist(where):
    documentation.check(COMMANDS[where])


def test_a_command_that_is_none_is_found():
    for wrong in ("jaxflow simulate --m 3", "jaxflow simulat", "make tes", "python examples/a.py"):
        with pytest.raises((AssertionError, ValueError, documentation.typer.TyperException)):
            documentation.check(wrong.split())
