"""Trains a VAE on digits with PyTorch Lightning, on as many devices as it finds.

python examples/train_lightning.py
"""

import argparse

import lightning
import torch
from digits import VAE, digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastelbo


class LightningVAE(lightning.LightningModule):
    def __init__(self, latent: int, beta: float, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vae = VAE(latent)

    def on_train_start(self) -> None:
        # Lightning gives all processes one seed. Each has data of its own, and so needs noise of its own.
        torch.manual_seed(self.hparams.seed + self.global_rank)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        mu, logvar = self.vae.encode(x)
        # Lightning averages gradients over processes and accumulated batches: "batchmean" and "mean" give the joint batch's.
        terms = fastelbo.elbo(
            self.vae.decode, x, mu, logvar, self.hparams.beta, likelihood="bernoulli_logits", reduction="batchmean"
        )
        self.log_dict(terms._asdict(), on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(x))
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def train(options: argparse.Namespace, **trainer_options) -> LightningVAE:
    lightning.seed_everything(options.seed)
    model = LightningVAE(options.latent, options.beta, options.learning_rate, options.seed)
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(TensorDataset(digits()), options.batch_size, shuffle=True, generator=order)
    trainer = lightning.Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False, **trainer_options)
    trainer.fit(model, batches)
    if trainer.is_global_zero:
        print(", ".join(f"{name} {value.item():.6f}" for name, value in trainer.callback_metrics.items()), "per digit")
    return model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128, help="of each device")
    parser.add_argument("--latent", type=int, default=16, help="dimensions of z")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
