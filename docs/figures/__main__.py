"""`python docs/figures`: draws all plots of the documentation into docs/figures/out; with --readme that of the README, too."""

import sys
from pathlib import Path

DOCS = Path(__file__).parents[1]
sys.path[:0] = [str(DOCS), str(DOCS / "figures"), str(DOCS.parent)]  # the last one for bench

import blocks  # noqa: E402
import elbo  # noqa: E402
import gain  # noqa: E402
import likelihoods  # noqa: E402
import start  # noqa: E402
import traffic  # noqa: E402


def main() -> None:
    start.draw_all(blocks.once(DOCS / "getting-started.md").scope)
    elbo.draw_all(blocks.once(DOCS / "elbo.md").scope)
    likelihoods.draw_all()
    traffic.draw_all()
    if "--readme" in sys.argv:
        gain.draw_all()


if __name__ == "__main__":
    main()
