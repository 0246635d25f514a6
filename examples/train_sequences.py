"""Trains VAEs on sentences of different lengths, character by character, without and with what keeps latents from collapse.

The sentences are the first lines of the docstrings of Python's own functions and classes, so they differ a little from one
Python version to another. A decoder that sees the characters before the next one can do without z, and with a beta of 1 from
the start it does: the KL vanishes. Against that there are a beta that rises anew in each of four cycles (Fu et al., Cyclical
Annealing Schedule, 2019) and free bits: a dimension's KL counts only beyond a floor (Kingma et al., Improved Variational
Inference with Inverse Autoregressive Flow, 2016). They do not lower the negative ELBO of so small a model, but all of its
latents then say something about the sentence, and the reconstruction is the better for it.

python examples/train_sequences.py
"""

import argparse
import importlib
import inspect
import math

import torch
import torch.nn.functional as F
from options import make_parser
from torch import Tensor, nn

import fastelbo
from fastelbo.diagnostics import Monitor
from fastelbo.likelihoods import Categorical

MODULES = """
    argparse array ast asyncio base64 bisect builtins bz2 calendar collections configparser contextlib csv datetime decimal
    difflib dis email.message enum fractions ftplib functools gettext glob gzip hashlib heapq html http.client http.cookiejar
    http.server imaplib inspect io ipaddress itertools json locale logging.handlers lzma math mimetypes multiprocessing
    numbers operator os os.path pathlib pickle pickletools platform plistlib poplib pprint pydoc queue random re sched secrets
    selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl statistics string struct subprocess sys
    tarfile tempfile textwrap threading time timeit tokenize trace traceback types unittest.mock urllib.parse urllib.request
    uuid weakref xml.dom.minidom xml.etree.ElementTree zipfile
"""
LENGTH = 40  # characters of the longest sentence
END, SYMBOLS = 0, "\0" + "".join(chr(i) for i in range(32, 127) if not chr(i).isupper())
CATEGORICAL = Categorical(dim=-1)
REMEDIES = ("none", "free_bits")


def sentences() -> list[str]:
    """First lines of docstrings, in lower case, each once."""
    found = set()
    for module in map(importlib.import_module, MODULES.split()):
        for owner in (module, *filter(inspect.isclass, vars(module).values())):
            for thing in vars(owner).values():
                if inspect.isroutine(thing) or inspect.isclass(thing) or isinstance(thing, property):
                    line = str(thing.__doc__).strip().partition("\n")[0].strip().lower()
                    if 8 <= len(line) <= LENGTH and line[0].isalpha() and set(line) <= set(SYMBOLS[1:]):
                        found.add(line)
    return sorted(found)


def encoded(lines: list[str]) -> Tensor:
    """Numbers of the characters, each line with its END, and padded with more of it: `[N, LENGTH + 1]`, int64."""
    rows = ([SYMBOLS.index(c) for c in line] + [END] * (LENGTH + 1 - len(line)) for line in lines)
    return torch.tensor(list(rows))


def mask(x: Tensor) -> Tensor:
    """The characters and the first END of each row: `[N, LENGTH + 1]`, bool."""
    return F.pad(x[:, :-1] != END, (1, 0), value=True)


class SequenceVAE(nn.Module):
    def __init__(self, latent: int, embedding: int = 32, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SYMBOLS), embedding)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.to_mu, self.to_logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.to_hidden = nn.Linear(latent, hidden)
        self.decoder = nn.GRU(embedding + latent, hidden, batch_first=True)
        self.to_logits = nn.Linear(hidden, len(SYMBOLS))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.encoder(self.embedding(x))
        last = states[torch.arange(len(x), device=x.device), mask(x).sum(1) - 1]  # where it has read the first END
        return self.to_mu(last), self.to_logvar(last)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits of each character by z and the characters before it, `[B, LENGTH + 1, symbols]`."""
        before = self.embedding(F.pad(x[:, :-1], (1, 0), value=END))
        inputs = torch.cat([before, z.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=2)
        states, _ = self.decoder(inputs, self.to_hidden(z).tanh().unsqueeze(0))
        return self.to_logits(states)


def negative_elbo(model: SequenceVAE, x: Tensor, beta: float = 1.0, free_bits: float | None = None, monitor=None):
    """Nats a sentence, in which the padding does not count; `free_bits` are nats a dimension of z."""
    mu, logvar = model.encode(x)
    return fastelbo.elbo(
        lambda z: model.decode(z, x), x, mu, logvar, beta, likelihood=CATEGORICAL, weight=mask(x), reduction="batchmean",
        weighting=fastelbo.Weighting(free_bits=free_bits, free_bits_per="dimension"), monitor=monitor,
    )  # fmt: skip


def train(options: argparse.Namespace, remedy: str, text: Tensor) -> tuple[SequenceVAE, list[Tensor]]:
    """The model, and the loss of each step."""
    torch.manual_seed(options.seed)
    model = SequenceVAE(options.latent).to(text.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    cycles = fastelbo.schedules.cyclical(period=options.steps / 4)
    losses = []
    for step in range(options.steps):
        x = text[torch.randint(len(text), (options.batch_size,), device=text.device)]
        beta, free_bits = (1.0, None) if remedy == "none" else (cycles(step), options.free_bits)
        terms = negative_elbo(model, x, beta, free_bits)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return model, losses


@torch.no_grad()
def report(remedy: str, model: SequenceVAE, text: Tensor) -> None:
    monitor = Monitor()
    for x in text.split(128):
        negative_elbo(model, x, monitor=monitor)
    recon = monitor.bits_per_dimension * math.log(2)
    kl = monitor.kl * len(text) / mask(text).sum()
    print(f"{remedy}: {recon + kl:.3f} nats a character = {recon:.3f} + KL {kl:.3f}; of {text.shape[0]} held-out sentences")
    print(f"  active latents: {monitor.active_units()} of {len(monitor.kl_per_dimension)}; KL of each in nats:")
    print("  " + " ".join(f"{kl:.2f}" for kl in monitor.kl_per_dimension))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, steps=320, batch_size=64, learning_rate=3e-3)
    parser.add_argument("--remedy", nargs="+", choices=REMEDIES, default=REMEDIES, help="which to train, in turn")
    parser.add_argument("--free-bits", type=float, default=0.5, help="nats for each dimension of z")
    parser.add_argument("--latent", type=int, default=8, help="dimensions of z")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    lines = sentences()
    text = encoded(lines)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))].to(options.device)
    held_out = len(text) // 5
    print(f"{len(lines)} sentences, such as {lines[0]!r} and {lines[-1]!r}")
    for remedy in options.remedy:
        model, _ = train(options, remedy, text[held_out:])
        report(remedy, model, text[:held_out])


if __name__ == "__main__":
    main()
