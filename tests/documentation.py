"""What pages of Markdown print: their code runs, and their commands are understood.

A page is read from its top as a newcomer reads it: its blocks of Python run one after the other
with the names of those before, and a block of `text` right behind one is what it prints. Blocks of
`sh` are parsed, not run: flags of `jaxflow` and of `python -m benchmarks` by their own parsers,
files and targets of make by whether they are there.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

from jaxflow.cli import app

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r"^--8<--\n(.+)\n--8<--\n", re.MULTILINE)
_SETTING = re.compile(r"[A-Z_]+=\S+")


class Block(NamedTuple):
    """A fenced block, and whether it stands right behind the one before."""

    language: str
    text: str
    line: int
    follows: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with the files that they include."""
    text, found, end = page.read_text(), [], 0
    included = lambda match: (ROOT / match[1]).read_text()
    for match in _FENCE.finditer(text):
        code = _INCLUDE.sub(included, match[2])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[1], code, line, not text[end : match.start()].strip()))
        end = match.end()
    return found


def run(page: Path):
    """Runs the Python of a page; what a block prints is the block of text behind it, if any."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = None
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, page, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = out.getvalue()
        elif block.language == "text" and block.follows and printed is not None:
            assert printed == block.text, f"{where}: it printed\n{printed}"
        else:
            printed = None


# ------------------------------------------------------------------ commands


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with where it stands; comments and settings of the environment
    are left out."""
    found = []
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and _SETTING.fullmatch(words[0]):
                    words.pop(0)
                if words:
                    found.append((f"{page.relative_to(ROOT)}, line {block.line}: {line}", words))
    return found


def check(words: Sequence[str]):
    """Raises where a command is none: an unknown flag, a file or a target that is not there."""
    match words:
        case ["srun", *rest]:
            check(rest)
        case ["jaxflow", *rest]:
            parse(typer.main.get_command(app), rest)
        case ["python", "-m", "benchmarks", *rest]:
            from benchmarks.__main__ import app as benchmarks

            command: Any = typer.main.get_command(benchmarks)
            parse(command, rest if rest and rest[0] in command.commands else ["run", *rest])
        case ["python", file, *_] if file.endswith(".py"):
            assert (ROOT / file).is_file(), file
        case ["make", *targets]:
            made = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(made), targets
        case ["pip" | "cd" | "git" | "source" | "export" | "python", *_]:
            pass
        case _:
            raise ValueError(f"no command that could be checked: {words}")


def parse(command: Any, words: list[str]):
    """Reads the arguments of a command of typer, without what it does then."""
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    unknown = hasattr(command, "commands") and words and not words[0].startswith("-")
    assert not unknown, f"there is no command {words[0]}"
    with contextlib.suppress(typer.Exit):  # --help, --version
        command.make_context(command.name or "", list(words))
