"""What is timed: for each case its contenders, functions to call again and again on the same inputs.

The naive code is that of `fastelbo.reference`. Where inputs have fewer than 32 bits, it converts them to float32 first, as
autocast does to these losses.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastelbo
from fastelbo import reference
from fastelbo.likelihoods import MSE, Bernoulli, BernoulliLogits, Gaussian, Likelihood

from . import models
from .cases import DTYPES, SHAPES, Case, sizes
from .traffic import least_bytes

SCALE = 0.5  # of the Gaussian likelihood
FACTORS = (1.0, 0.5, 2.0)  # what mode "varying" multiplies losses with: never the same twice in a row
MAX_SETS = 64  # of inputs; smaller ones than these fill the cache with are bound by launches, not by memory


class Compared(NamedTuple):
    """A result that every contender should have, to `tolerance` of its largest magnitude."""

    value: Tensor
    tolerance: float


class Inputs(NamedTuple):
    """One set of buffers, by their names in the budget, and the gradient that arrives at z from a decoder."""

    tensors: dict[str, Tensor]
    grad_z: Tensor | None

    def clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.grad = None


def likelihood_of(case: Case) -> Likelihood | None:
    """With the scale of a Gaussian, and that of targets of bytes."""
    kinds = {"bernoulli": Bernoulli, "bernoulli_logits": BernoulliLogits, "mse": MSE, "gaussian": partial(Gaussian, SCALE)}
    if case.subject == "sample":
        return None
    _, target = DTYPES[case.dtypes]
    return kinds[case.likelihood](target_scale=1 / 255 if target == torch.uint8 else 1.0)


class Streams:
    """Loss, sample or objective: functions from tensors to `(value to differentiate, z or None, other results)`."""

    def __init__(self, case: Case, device: torch.device, cache_bytes: int) -> None:
        self.case, self.device, self.likelihood = case, device, likelihood_of(case)
        torch.manual_seed(0)
        self.inputs = [self._inputs()]
        tensors = self.inputs[0].tensors
        self.least_bytes = least_bytes(case.subject, case.mode != "forward", tensors)
        read = sum(t.nbytes for t in tensors.values())
        self.copy_bytes = 2 * next(iter(tensors.values())).nbytes
        self.inputs += [self._inputs() for _ in range(min(MAX_SETS, math.ceil(2 * cache_bytes / read)) - 1)]

    def _inputs(self) -> Inputs:
        prediction, target = DTYPES[self.case.dtypes]
        shape = sizes(self.case.shape)
        tensors = {}
        if self.case.subject == "sample":
            latents, latent_dtype = shape, prediction
        else:
            latents, latent_dtype = (shape[0], *SHAPES[self.case.shape]), torch.float32
            x, recon_x = torch.rand(shape, device=self.device), torch.randn(shape, device=self.device)
            tensors["prediction"] = (recon_x.sigmoid() if self.case.likelihood == "bernoulli" else recon_x).to(prediction)
            tensors["target"] = (255 * x).round().to(target) if target == torch.uint8 else x.to(target)
        tensors["mu"], tensors["logvar"] = (torch.randn(latents, device=self.device).to(latent_dtype) for _ in range(2))
        grad_z = None if self.case.subject == "loss" else torch.randn(latents, device=self.device).to(latent_dtype)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name != "target" and self.case.mode != "forward")
        return Inputs(tensors, grad_z)

    def naive(self, **tensors: Tensor) -> tuple:
        subject, mu, logvar = self.case.subject, tensors["mu"], tensors["logvar"]
        z = None if subject == "loss" else reference.reparameterize(mu, logvar)
        if subject == "sample":
            mu, logvar = mu.float(), logvar.float()
            return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()), z
        recon_x, x = tensors["prediction"].float(), tensors["target"].float()
        if tensors["target"].dtype == torch.uint8:
            x = x / 255
        loss, recon, kl = reference.elbo_loss(recon_x, x, mu, logvar, likelihood=self.case.likelihood, scale=SCALE)
        return loss, z, recon, kl

    def fused(self, **tensors: Tensor) -> tuple:
        subject, mu, logvar = self.case.subject, tensors["mu"], tensors["logvar"]
        if subject == "sample":
            z, kl = fastelbo.sample_kl(mu, logvar)
            return kl, z
        recon_x, x = tensors["prediction"], tensors["target"]
        if subject == "loss":
            loss, recon, kl = fastelbo.loss(recon_x, x, mu, logvar, likelihood=self.likelihood)
            return loss, None, recon, kl
        z, kl = fastelbo.sample_kl(mu, logvar)
        loss, recon, kl = fastelbo.loss(recon_x, x, kl=kl, likelihood=self.likelihood)
        return loss, z, recon, kl

    def copies(self) -> list[Callable[[], Tensor]]:
        """Copies of the prediction, or of mu where there is none: the bandwidth that can be had at this size."""
        sources = [next(iter(inputs.tensors.values())).detach() for inputs in self.inputs]
        pairs = [(torch.zeros_like(source), source) for source in sources]
        return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]

    def clear(self) -> None:
        for inputs in self.inputs:
            inputs.clear()

    def bind(self, function: Callable) -> list[Callable[[], tuple]]:
        """`function` as a call for each set of inputs."""
        factors = itertools.cycle(torch.tensor(FACTORS, device=self.device).unbind())
        return [lambda inputs=inputs: self._call(function, inputs, factors) for inputs in self.inputs]

    def _call(self, function: Callable, inputs: Inputs, factors: Iterator[Tensor]) -> tuple:
        inputs.clear()
        value, z, *others = function(**inputs.tensors)
        if self.case.mode != "forward":
            root = value
            if self.case.mode == "scaled":
                root = value / len(inputs.tensors["mu"])
            elif self.case.mode == "varying":
                root = value * next(factors)
            if z is None:
                root.backward()
            else:
                torch.autograd.backward([root, z], [None, inputs.grad_z])
        return value, z, *others

    def results(self, call: Callable[[], tuple]) -> list[Compared]:
        """What the first call on the first set gives, without noise: that stands in z, and by way of z in logvar's gradient."""
        value, z, *others = call()
        tensors, grad_z = self.inputs[0]
        gradients = [t.grad.float() for t in tensors.values() if t.grad is not None]
        if z is not None and gradients:
            gradients[-1] = gradients[-1] - 0.5 * grad_z.float() * (z - tensors["mu"]).detach().float()
        rounding = torch.finfo(DTYPES[self.case.dtypes][0]).eps
        return [
            *(Compared(number.detach(), 1e-5) for number in (value, *others)),
            *(Compared(gradient, 20 * rounding) for gradient in gradients),
        ]


class Step:
    """A training step of a model. Every contender trains a copy of its own, from the same parameters."""

    copy_bytes, least_bytes = 0, None

    def __init__(self, case: Case, device: torch.device, cache_bytes: int) -> None:
        self.case, self.device = case, device
        self.optimizers = []

    def naive(self, model: models.VAE, x: Tensor) -> Tensor:
        mu, logvar = model.encode(x)
        z = reference.reparameterize(mu, logvar)
        return reference.elbo_loss(model.decoder(z), x, mu, logvar, likelihood=self.case.likelihood)[0]

    def fused(self, model: models.VAE, x: Tensor) -> Tensor:
        mu, logvar = model.encode(x)
        return fastelbo.elbo(model.decoder, x, mu, logvar, likelihood=self.case.likelihood).loss

    def copies(self) -> list[Callable]:
        return []

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def bind(self, function: Callable) -> list[Callable[[], Tensor]]:
        model, x = models.build(self.case.shape, self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, capturable=self.device.type == "cuda")
        self.optimizers.append(optimizer)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = function(model, x)
            loss.backward()
            optimizer.step()
            return loss

        return [step]

    def results(self, call: Callable[[], Tensor]) -> list[Compared]:
        """The first loss. Each contender draws noise of its own, at which a decoder that is not trained yet hardly looks."""
        return [Compared(call().detach(), 0.01)]
