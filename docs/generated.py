"""What pages have made for them: `<!-- generated: NAME -->` becomes what NAME here returns."""

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gallery
import typer
from errors import errors
from studies import STUDIES, study
from tables import SUITES, markdown, suite
from typer.cli import get_docs_for_click
from typer.main import get_command

from jaxflow.cli import app

PACKAGE = Path(__file__).parents[1] / "jaxflow"
# Commands in the text of a command, each of which Typer makes a paragraph.
EXAMPLES = re.compile(r"(?:^jaxflow .+\n+)+", re.MULTILINE)
# Types of signatures that have a name, by module.
TYPES = {
    "_types": "Points LogWeights Queries Keys Values Scalar ArrayLike ScalarLike",
    "_flow_input": "Observables",
    "geometry": "Vectors AnyVectors AnyBools",
    "fields.attention": "Map",
    "kernels.base": "Window",
    "kernels.expectation": "Described",
    "measure.compression": "Space",
    "models.blocks": "BlockOf NormOf",
    "models.curves": "CurveOf",
    "training.callbacks": "Callback",
    "training.data": "TokenBatch ImageBatch",
    "training.devices": "Devices",
    "training.losses": "Cost",
    "training.tokenizers": "Tokenizer",
}


def command_line() -> str:
    """Each command with its options; Typer's own list of commands cuts their lines short."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="jaxflow")
    return EXAMPLES.sub(_fenced, text[text.index("## ") :])


def _fenced(found: re.Match) -> str:
    lines = [line for line in found[0].splitlines() if line]
    return "\n".join(["```sh", *lines, "```", "", ""])


def types() -> str:
    """What the names of types stand for, as the sources have it; signatures link here."""
    body = []
    for module, names in TYPES.items():
        text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
        assigned = {n.targets[0].id: n.value for n in ast.parse(text).body if _names(n)}
        for name in names.split():
            anchor = f"[](){{#jaxflow.{module}.{name}}}"
            body.append([f"{anchor}`{name}`", f"`{ast.unparse(assigned[name])}`"])
    return markdown(["Name", "Type"], body)


def _names(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


GENERATED: dict[str, Callable[[], str]] = {
    "command line": command_line,
    "types": types,
    "errors": errors,
    "published results": gallery.reproduced,
    "examples": gallery.examples,
    **{name: partial(suite, name) for name in SUITES},
    **{name: partial(study, name) for name in STUDIES},
}
