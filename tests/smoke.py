"""What a wheel is tried with, in an environment that has nothing else: `python smoke.py`, outside of the checkout.

It imports from where packages are installed, and holds what users call first against the naive formula in float64.
"""

import math
import os
import sys
from importlib import metadata, resources
from pathlib import Path

import torch

import fastelbo
from fastelbo.likelihoods import Gaussian


def main() -> None:
    where = Path(fastelbo.__file__)
    assert "site-packages" in where.parts, f"imported from {where}, not from what was installed"
    assert metadata.version("fastelbo") == fastelbo.__version__
    assert resources.files("fastelbo").joinpath("py.typed").is_file()
    assert resources.files("fastelbo").joinpath("kernels/loss.py").is_file()

    torch.manual_seed(0)
    x = torch.rand(33, 50, dtype=torch.float64)
    for likelihood in ("bernoulli", "bernoulli_logits", "mse", "gaussian"):
        inputs = [torch.rand_like(x), torch.randn(33, 5, dtype=torch.float64), torch.randn(33, 5, dtype=torch.float64)]
        naive, fused = (
            value_and_gradients(call, x, inputs, likelihood) for call in (fastelbo.reference.elbo_loss, fastelbo.loss)
        )
        for a, b in zip(naive, fused, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)

    # p(z) = N(0, 1), p(x | z) = N(z, 1/2), x = 1. The interpreter takes some milliseconds for a sample.
    n_samples = 50 if os.environ.get("TRITON_INTERPRET") == "1" else 20_000
    z, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    log_p, error = fastelbo.log_likelihood(
        lambda z: z, one, z, z, likelihood=Gaussian(scale=math.sqrt(0.5)), n_samples=n_samples, chunk=n_samples
    )
    exact = -0.5 * math.log(2 * math.pi * 1.5) - 1 / 3
    assert abs(log_p.item() - exact) < 5 * error.item() < 5 / math.sqrt(n_samples), (log_p, error, exact)
    print(f"fastelbo {fastelbo.__version__} from {where.parent}: ok, triton {'is' if has_triton() else 'is not'} there")


def value_and_gradients(call, x, inputs, likelihood):
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss, recon, kl = call(leaves[0], x, *leaves[1:], 0.5, likelihood=likelihood)
    loss.backward()
    return loss.detach(), recon.detach(), kl.detach(), *(t.grad for t in leaves)


def has_triton() -> bool:
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
