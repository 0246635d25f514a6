"""Links: how a decoder's output becomes the mean and the inverse dispersion of counts.

In Torch a block's parameters are linked in memory that stays in cache, the likelihood computes from them, and its derivatives
are pulled back: no mean is ever stored for the whole of a target. The kernels have links of their own: `kernels/links.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..basics.numerics import softplus
from ..basics.records import canonical, check_choice
from .base import Likelihood
from .values import NONNEGATIVE, Range

OF_MEAN = ("identity", "log", "softplus", "softmax")
OF_DISPERSION = ("identity", "log")


def linked(link: str, given: Tensor, library: Tensor | None = None) -> Tensor:
    """A parameter, of operations that autograd can differentiate as often as it likes."""
    if library is not None:
        return library * torch.softmax(given, -1)
    return given if link == "identity" else torch.exp(given) if link == "log" else softplus(given)


class Block(NamedTuple):
    """A block's parameters, once linked, and where the derivatives by those go."""

    links: tuple[str, ...]
    parameters: list[Tensor]
    out: list[Tensor | None]
    shares: Tensor | None  # softmax of the logits
    own: Sequence[Tensor | None]  # where the derivatives by the parameters as they came go

    def pull_back(self) -> None:
        """Turn the former derivatives into the latter, in place."""
        for link, value, slope in zip(self.links, self.parameters, self.out, strict=False):
            if slope is None or link == "identity":
                continue
            if link == "softplus":  # whose derivative is 1 - exp(-softplus)
                value = torch.neg(value).expm1_().neg_()
            if link != "softmax":
                slope.mul_(value)
                continue
            to_logits, to_library = self.own[0], self.own[-1]
            assert self.shares is not None
            if to_library is not None:  # of each element
                torch.mul(slope, self.shares, out=to_library)
            if to_logits is not None:
                slope.mul_(value)
                slope.addcmul_(self.shares, slope.sum(-1, keepdim=True), value=-1)


def link_block(
    links: tuple[str, ...], parameters: Sequence[Tensor], out: Sequence[Tensor | None], memory: Callable[[str, Tensor], Tensor]
) -> Block:
    """Link a block of whole rows. `memory(name, like)` is of the shape of `like`, and the next block may take it."""
    first, found, to, shares = parameters[0], list(parameters), list(out), None
    for i, (link, given) in enumerate(zip(links, parameters, strict=False)):
        if link == "identity":
            continue
        own = memory(f"linked {i}", first) if given.shape == first.shape else torch.empty_like(given)  # with its own strides
        if link == "log":
            found[i] = torch.exp(given, out=own)
        elif link == "softplus":
            found[i] = torch.logaddexp(given, given.new_zeros(()), out=own)
        else:
            shares = torch.softmax(given, -1, out=memory("shares", given))
            found[i] = torch.mul(shares, found.pop(), out=own)
            to_library = to.pop()
            to[i] = to_library if to[i] is None else to[i]
    return Block(links, found, to, shares, out)


class Linked(Likelihood):
    """A likelihood whose first parameter has the link `mean`, and whose second may have `inverse_dispersion`.

    Its `nll` and `at_zero` take what comes from a decoder, and `link` it; its `one_pass` takes what `link_block` makes of it.
    """

    mean: str
    unlinked: tuple[str, ...]
    """What its parameters are without links."""
    unlinked_ranges: tuple[Range | None, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        canonical(self, "mean", lambda name, value: check_choice(name, value, OF_MEAN))
        if len(self.unlinked) > 1:
            canonical(self, "inverse_dispersion", lambda name, value: check_choice(name, value, OF_DISPERSION))

    @property
    def links(self) -> tuple[str, ...] | None:  # type: ignore[override]
        found = self.mean, getattr(self, "inverse_dispersion", "identity")
        return None if found == ("identity", "identity") else found

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.mean == "softmax"

    @property
    def parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """The library, which changes at every call, comes last."""
        if not self.by_rows:
            return self.unlinked
        return ("logits of the mean" if len(self.unlinked) > 1 else "logits", *self.unlinked[1:], "library")

    @property
    def ranges(self):
        links = self.links
        if links is None:
            return self.unlinked_ranges
        found = [r if link == "identity" else None for r, link in zip(self.unlinked_ranges, links, strict=False)]
        return (*found, *self.unlinked_ranges[2:], *([NONNEGATIVE] if self.by_rows else []))

    def check(self, name, parameters, x) -> None:
        super().check(name, parameters, x)
        if not self.by_rows:
            return
        first, library = parameters[0], parameters[-1]
        if first.dim() < 2:
            raise ValueError(
                f"{name}[0] must be [B, G] or have more dimensions for the link 'softmax', which is taken over the last one:"
                f" got {tuple(first.shape)}"
            )
        if library.dim() and library.shape[-1] != 1:  # [B] would be taken for one of each gene, where there are as many
            raise ValueError(
                f"{name}[{len(parameters) - 1}], the library, must have one number for each row, [B, 1], or be 0-d:"
                f" got {tuple(library.shape)}"
            )

    def link(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the formula takes."""
        if self.links is None:
            return parameters
        found = list(parameters)
        library = found.pop() if self.by_rows else None
        for i, (link, value) in enumerate(zip(self.links, found, strict=False)):
            found[i] = linked(link, value, library if i == 0 else None)
        return found

    def constants(self, parameters, x):
        links = self.links or ()
        named = tuple(None if link == "identity" else link for link in links)
        return super().constants(parameters, x) | ({"links": named} if named else {})

    def sparse_nll(self, parameters, x):
        if self.links is None:
            return super().sparse_nll(parameters, x)
        plain: dict[str, Any] = dict.fromkeys(("mean", "inverse_dispersion")[: len(self.unlinked)], "identity")
        return replace(self, **plain).sparse_nll(self.link(parameters), x)
