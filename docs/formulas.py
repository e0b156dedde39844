"""Formulas in prose as they are typed: <x, y> is no tag of HTML, and X_t[mu](x) no link."""

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.util import ETX, STX

BRACKET = f"{STX}{ord(']')}{ETX}"  # as it is where a backslash is before it
# What follows ] is no address: those have a dot, a slash, a colon or a fragment.
ARGUMENT = r"\](?=\([^)./#:]+\))"


class Formulas(Extension):
    def extendMarkdown(self, md: Markdown):
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")
        md.inlinePatterns.register(_Bracket(ARGUMENT, md), "formula", 185)


class _Bracket(InlineProcessor):
    def handleMatch(self, m, data):
        return BRACKET, m.start(0), m.end(0)
