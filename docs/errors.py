"""Every error and warning of the package, out of its source: what fails, in the words of a user."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxflow"
RAISED = {"error_where", "eqx.error_if", "warnings.warn"}  # beside the classes of errors


def errors() -> str:
    """A list of all, by module; "..." stands for what a message fills in."""
    lines = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if found := list(dict.fromkeys(messages(ast.parse(file.read_text())))):
            name = file.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
            lines += [f"\n**{name.removesuffix('.__init__')}**\n"]
            lines += [f"- {kind}: ``{text}``" for kind, text in found]
    return "\n".join(lines)


def messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The kind and the text of what is raised or warned of, where the text is written there."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        kind = ast.unparse(call.func)
        if isinstance(node, ast.Raise) or kind in RAISED:
            texts = (written(argument) for argument in call.args)
            if text := max(texts, key=len, default="").strip():
                yield _named(kind), text


def written(text: ast.AST) -> str:
    """A text as a reader sees it, with "..." for what is filled in; of other expressions that."""
    match text:
        case ast.Constant(value=str(value)):
            return " ".join(value.split()) if value.strip() else value
        case ast.JoinedStr(values=parts):
            return "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in parts)
        case ast.BinOp(left=left, right=right):
            return written(left) + written(right)
    return "..."


def _named(kind: str) -> str:
    names = {"error_where": "run-time error", "eqx.error_if": "run-time error"}
    return names.get(kind, "warning" if kind == "warnings.warn" else kind)
