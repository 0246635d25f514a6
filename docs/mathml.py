"""Formulas as MathML, which browsers show by themselves: without a script, and without a network."""

import re

from docutils import nodes
from latex2mathml.converter import convert


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))


def mathml(formula: str, display: str) -> str:
    """With the space that stands behind the name of a function."""
    return re.sub(r"<mi>(log|max|min|exp|tanh)</mi>", r'\g<0><mspace width="0.17em" />', convert(formula, display=display))


def inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def display(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode
