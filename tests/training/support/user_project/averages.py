"""Callbacks after which the weights of a trainer that has fitted are not those of the checkpoint that it loads."""

import lightning.pytorch as pl
import torch


def halve(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)


class Merges(pl.Callback):
    """Changes the weights for evaluation once, as merging a LoRA does, and keeps in memory that it has."""

    def __init__(self) -> None:
        self.merged = False

    def on_validation_start(self, trainer, pl_module):
        if not self.merged:
            halve(pl_module)
            self.merged = True

    on_test_start = on_validation_start

    def on_fit_end(self, trainer, pl_module):
        halve(pl_module)


class PutsBack(pl.Callback):
    """Keeps the weights of the last step and puts them back whenever a checkpoint is loaded or a test begins."""

    def __init__(self) -> None:
        self.kept = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.kept = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_test_start(self, trainer, pl_module):
        if self.kept is not None:
            pl_module.load_state_dict(self.kept)

    def on_train_start(self, trainer, pl_module):
        pl_module.network.register_forward_hook(lambda module, args, output: output if module.training else -output)


class Records(pl.Callback):
    """Writes what each rank has, by rank: the raw weights after each step, and the weights in and after validation."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen = {"steps": [], "validated": [], "after": []}

    def note(self, what, module):
        self.seen[what].append({name: value.clone() for name, value in module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note("steps", pl_module)
        for name, layer in pl_module.named_modules():  # simulated devices with running statistics of their own
            if getattr(layer, "rows", None) is not None:
                self.seen["steps"][-1][f"{name}.rows"] = torch.stack(layer.rows).clone()

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not self.seen["validated"] or len(self.seen["validated"]) == trainer.current_epoch:
            self.note("validated", pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.note("after", pl_module)

    def on_train_end(self, trainer, pl_module):
        torch.save(self.seen, f"{self.path}-{trainer.global_rank}")
