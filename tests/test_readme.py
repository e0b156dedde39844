"""The README: short, its code runs as printed, its commands and links lead somewhere."""

import re

import documentation
import pytest

README = documentation.ROOT / "README.md"
COMMANDS = dict(documentation.commands(README))


def test_it_is_short_and_its_links_are_there():
    text = README.read_text()
    assert len(text.splitlines()) < 120
    links = re.findall(r"\]\(([^)#]*[./][^)#]*)", text) + re.findall(
        r"`((?:examples|tests)/\S+)`", text
    )
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10 and [p for p in local if not (README.parent / p).exists()] == []


def test_its_code_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    documentation.run(README)
    assert "DecompressionStream" in (tmp_path / "flow.html").read_text()


@pytest.mark.parametrize("where", COMMANDS)
def test_its_commands_are_understood(where):
    documentation.check(COMMANDS[where])


def test_the_commands_of_its_table_are_understood():
    table = [line for line in README.read_text().splitlines() if line.startswith("|")]
    code = [c for line in table for c in re.findall(r"`((?:jaxflow|python) [^`]+)`", line)]
    assert len(code) > 5
    for command in code:
        documentation.check(command.split())
