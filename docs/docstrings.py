"""The docstrings are written to be read in an editor, as Markdown is; Sphinx reads another language."""

import inspect
import re


def connect(app) -> None:
    app.connect("autodoc-process-docstring", translate, priority=400)  # before napoleon makes sections of it
    app.connect("autodoc-process-signature", signature_of_record)


def translate(app, what, name, obj, options, lines: list[str]) -> None:
    """A block that is indented behind an empty line is code; elsewhere nothing outside of backticks has a meaning."""
    found: list[str] = []
    margin, before = None, 0  # that of the text around a block, and the last line's
    for at, line in enumerate(lines):
        if line.strip():
            indent = len(line) - len(line.lstrip())
            if margin is not None and indent <= margin:
                margin = None
            if margin is None and at and not lines[at - 1].strip() and indent >= before + 4:
                margin = before
                found += [" " * before + "::", ""]
            before = indent
        found.append(escaped(line) if margin is None else line)
    lines[:] = found


def escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([|*\\])", r"\\\1", part) for part in parts)


def signature_of_record(app, what, name, obj, options, signature, return_annotation):
    """A record's is that of its fields: its metaclass, which makes equal records one, takes anything."""
    if what != "class" or not hasattr(obj, "__dataclass_fields__"):
        return None
    fields = inspect.signature(obj.__init__)
    parameters = [p for p in fields.parameters.values() if p.name != "self"]
    return str(fields.replace(parameters=parameters, return_annotation=inspect.Signature.empty)), None
