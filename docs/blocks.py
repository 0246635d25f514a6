"""The code of the pages: what runs it, compares what it prints, and writes that into the page.

A page is one program. Its ```python blocks run from top to bottom in one namespace, and what a block prints stands in a
```text block right below it. `python docs/blocks.py --write PAGE...` writes those anew. A block that cannot run says why in a
comment above it, `<!-- not run: ... -->`.
"""

import argparse
import contextlib
import functools
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

BLOCK = re.compile(
    r"(?P<aside><!-- not run: (?P<why>.*?) -->\n+)?^```python\n(?P<code>.*?)^```\n(?P<behind>\n```text\n(?P<shown>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Block(NamedTuple):
    line: int  # of its first line of code in the page
    code: str
    shown: str  # what it prints, as the page has it
    printed: str | None  # as it was; None: it did not run, for the reason `why`
    why: str | None
    end: int  # of the code, in the page's text
    last: int  # of what is shown


class Page(NamedTuple):
    blocks: list[Block]
    scope: dict[str, Any]


def run(path: Path) -> Page:
    """All blocks of a page, and the namespace that they leave."""
    text, scope, blocks, dtype = path.read_text(), {"__name__": path.stem}, [], torch.get_default_dtype()
    try:
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code")) + 1
            printed = None if match["why"] else execute(match["code"], path, line, scope)
            end = match.end("code") + len("```\n")
            blocks.append(Block(line, match["code"], match["shown"] or "", printed, match["why"], end, match.end()))
    finally:
        torch.set_default_dtype(dtype)
    return Page(blocks, scope)


once = functools.lru_cache(run)


def execute(code: str, path: Path, line: int, scope: dict[str, Any]) -> str:
    """What it prints. Errors name the line of the page."""
    printed = io.StringIO()
    compiled = compile("\n" * (line - 1) + code, str(path), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(compiled, scope)
    return printed.getvalue()


def is_same(shown: str, printed: str) -> bool:
    """Whether words are the same, and numbers but for one in the last digit that is shown."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(a == b or abs(float(a) - float(b)) <= 1.001 * unit(a) for a, b in pairs)


def unit(number: str) -> float:
    """One in the last digit; of an integer, which is exact, none."""
    digits, _, exponent = number.partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def written(path: Path) -> str:
    """The page with what its blocks print now."""
    text = path.read_text()
    for block in reversed(run(path).blocks):
        if block.printed is not None and not is_same(block.shown, block.printed):
            shown = f"\n```text\n{block.printed.rstrip()}\n```\n" if block.printed.strip() else ""
            text = text[: block.end] + shown + text[block.last :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="write into the pages what their blocks print")
    options = parser.parse_args()
    for path in options.pages:
        if options.write:
            path.write_text(written(path))
        else:
            print(*(block.printed or "" for block in run(path).blocks), sep="\n")


if __name__ == "__main__":
    main()
