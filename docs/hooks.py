"""What the site has that its pages do not hold: links of names, and what is generated.

`jaxflow.flow`               links to the reference; a name that is not there is a warning
<!-- generated: solvers -->  is replaced by what `generated.py` makes of measured results
"""

import re

from formulas import Formulas
from generated import GENERATED
from mkdocs.exceptions import PluginError

MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
# What holds links already, or is no prose, passes first.
NAME = re.compile(
    r"<(h[1-6]|a|pre)\b.*?</\1>|<code>(?:jaxflow|jf)((?:\.\w+)+)(?:\([^<]*\))?</code>", re.DOTALL
)

HISTORY = ("changelog.md",)  # has names that are gone


def on_config(config):
    config.markdown_extensions.append(Formulas())


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    return MARK.sub(lambda mark: _made(mark[1], page.file.src_uri), markdown)


def _made(name: str, where: str) -> str:
    if name not in GENERATED:
        raise PluginError(
            f"{where}: nothing is generated as {name!r}; take {', '.join(GENERATED)}."
        )
    return GENERATED[name]()


def on_page_content(html: str, page, **kwargs) -> str:
    optional = "optional " * (page.file.src_uri in HISTORY)
    return NAME.sub(lambda found: _linked(found, optional), html)


def _linked(found: re.Match, optional: str) -> str:
    if found[2] is None:
        return found[0]
    return f'<autoref {optional}identifier="jaxflow{found[2]}">{found[0]}</autoref>'
