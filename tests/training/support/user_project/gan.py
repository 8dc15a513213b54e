"""A GAN as Lightning's examples write it: manual optimization, two optimizers in turn. And what a hook did."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


def net(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, outputs))


class Gan(pl.LightningModule):
    """The noise is drawn, or, with ``noise: False``, made of the images, so that it is the same on any device."""

    def __init__(self, noise=True, **_) -> None:
        super().__init__()
        self.automatic_optimization, self.noise = False, noise
        self.generator, self.discriminator = net(8, 64), net(64, 1)

    def loss(self, x, real):
        score = self.discriminator(x)
        return binary_cross_entropy_with_logits(score, torch.full_like(score, real))

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)
        z = torch.randn(len(images), 8) if self.noise else images[:, 24:32]
        for optimizer, name in zip(self.optimizers(), ("generator", "discriminator"), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            fake = self.generator(z)
            if name == "generator":
                loss = self.loss(fake, 1.0)
            else:
                loss = self.loss(images, 1.0) + self.loss(fake.detach(), 0.0)
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(f"train/{name}", loss.detach(), sync_dist=True)

    def validation_step(self, batch, batch_idx):
        scores = self.discriminator(batch[0].flatten(1)).sigmoid().mean()
        self.log("val/acc", scores, sync_dist=True, batch_size=len(batch[0]))

    def test_step(self, batch, batch_idx):
        self.log("test/acc", self.discriminator(batch[0].flatten(1)).sigmoid().mean(), sync_dist=True)

    def configure_optimizers(self):
        return [torch.optim.Adam(each.parameters(), 1e-3) for each in (self.generator, self.discriminator)]


class Twice(Gan):
    """Uses a layer in two reentrant checkpoints."""

    def __init__(self, **_) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1).requires_grad_()
        layer = self.discriminator[0]
        return sum(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True).mean() for _ in range(2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.discriminator.parameters(), 0.1)


class Gradients(pl.Callback):
    """Writes down whether float16 holds the gradients of linear layers, and the highest rank that they had."""

    def __init__(self, path) -> None:
        self.path, self.found = Path(path), {"half": True, "rank": 0}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in (layer.weight for layer in pl_module.modules() if isinstance(layer, nn.Linear)):
            gradient = weight.grad
            self.found["half"] = self.found["half"] and torch.equal(gradient, gradient.half().float())
            if trainer.global_step >= 2 and weight.shape == (64, 64):
                self.found["rank"] = max(self.found["rank"], int(torch.linalg.matrix_rank(gradient, rtol=1e-2)))

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(self.found, self.path)
