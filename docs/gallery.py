"""The gallery: each picture with the command that draws it and the numbers that it must show."""

import ast
import json
from pathlib import Path
from typing import Any

from tables import markdown

FOLDER = Path(__file__).parent / "gallery"
REPRODUCED = FOLDER / "reproduce.json"
SCRIPTS = Path(__file__).parents[1] / "examples"
# Which picture an example draws, in runs/.
EXAMPLES = {
    "coarsening": "coarsening.png",
    "million_tokens": "tokens.png",
    "masks": "masks.png",
    "phase_diagram": "phase.png",
    "continuity_equation": "continuity_equation.png",
    "log_density": "log_density.png",
    "noise": "noise.png",
    "steering": "steering.png",
}


def reproduced() -> str:
    """Published results, with what `jaxflow reproduce` measured."""
    return "\n".join(_result(record) for record in json.loads(REPRODUCED.read_text()))


def _result(record: dict[str, Any]) -> str:
    name, arxiv, line = record["name"], record["arxiv"], record["line"]
    rows = [[r["what"], _number(r["measured"]), _number(r["expected"])] for r in record["rows"]]
    steps = [[s["what"], _number(s["published"]), _number(s["exact"])] for s in record["schemes"]]
    off = markdown(["By the published step, h = 0.1", "it gives", "exact"], steps) if steps else ""
    about = f"{line[0].upper()}{line[1:]} ([arXiv {arxiv}](https://arxiv.org/abs/{arxiv}))."
    numbers = markdown(["", "measured", "expected"], rows)
    command = f"jaxflow reproduce {name} --quick"
    return _section(name, about, command, f"{name}.png", f"{numbers}{off}")


def examples() -> str:
    """Examples whose picture is there, with what their docstrings expect."""
    return "\n".join(_example(name) for name in EXAMPLES if (FOLDER / _drawn(name)).exists())


def _example(name: str) -> str:
    text = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text())) or ""
    first, *rest = text.split("\n\n")
    title = name.replace("_", " ")
    return _section(title, first, f"python examples/{name}.py", _drawn(name), "\n\n".join(rest))


def _drawn(name: str) -> str:
    return f"examples/{name}.png"


def _section(title: str, about: str, command: str, picture: str, rest: str) -> str:
    return (
        f"### {title}\n\n{about}\n\n```sh\n{command}\n```\n\n"
        f"![{title}](gallery/{picture})\n\n{rest}\n"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.7g}"
