"""The text of a kernel as a list of instructions."""

import dataclasses
import re
from collections.abc import Iterator

COMMENT = re.compile(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", re.MULTILINE)
LABEL = re.compile(r"\s*(\$?\w+):\s*")
# Names of inline assembly, whose scope is its braces: those without % that follow no dot.
LOCAL = re.compile(r"(?<![\w.%$:])(?:P1|p|LAB_WAIT|DONE)\b(?!\.)")
ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*)\n\}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;` where the guard is a predicate that lets a lane take part."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    unless: bool = False  # the guard is negated
    text: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    shared: tuple[str, ...]  # names of arrays in shared memory
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # to the instruction that follows


def parse(text: str) -> Program:
    """The only kernel in a text."""
    text = COMMENT.sub("", text)
    entry = ENTRY.search(text)
    assert entry is not None, "the text holds no kernel"
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", directives)
    assert threads is not None, f"{name} does not say how many threads it has"
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(body):
        while label := LABEL.match(statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    return Program(
        name,
        tuple(re.findall(r"(\w+_param_\d+)", parameters)),
        int(threads[1]),
        tuple(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)", text)),
        tuple(instructions),
        labels,
    )


def _statements(body: str) -> Iterator[str]:
    """Statements in order. Labels and registers of a scope in braces get names of their own."""
    scopes: list[str] = []
    for number, piece in enumerate(re.split(r"(?<=[;{}])", _mark_vectors(body))):
        piece = " ".join(piece.split())
        if statement := piece.rstrip(";{} "):
            if scopes:
                statement = LOCAL.sub(rf"\g<0>{scopes[-1]}", statement)
            yield statement.replace("<", "{").replace(">", "}")
        if piece.endswith("{"):
            scopes.append(f"__{number}")
        elif piece.endswith("}"):
            scopes.pop()


def _mark_vectors(body: str) -> str:
    """Vectors of operands in angle brackets: the braces left over enclose scopes."""
    body = re.sub(r"\.reg[^;]*;", "", body)
    return re.sub(r"\{([^{};]*)\}", r"<\1>", body)


def _instruction(statement: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w$]+)\s+)?(\S+)\s*(.*)$", statement)
    assert found is not None, statement
    negated, guard, opcode, rest = found.groups()
    return Instruction(opcode, tuple(_split(rest)), guard, negated == "!", statement)


def _split(operands: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    for part in re.findall(r"(?:[^,\[\]{}]|\[[^\]]*\]|\{[^}]*\})+", operands):
        if part.strip():
            yield part.strip()


def vector(operand: str) -> list[str]:
    """The registers of `{a, b, ...}`, or of one register alone."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
