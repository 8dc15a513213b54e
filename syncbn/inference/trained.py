"""Opens a trained run: its network with the weights of its best checkpoint, its settings, classes and preprocessing."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from syncbn.inference import network as networks
from syncbn.inference import run_settings, weights
from syncbn.inference.locate import located
from syncbn.inference.preprocessing import Preprocessing, class_names, preprocessing
from syncbn.training.checkpoint.usable_checkpoint import load_checkpoint
from syncbn.training.errors import SettingError
from syncbn.training.network.channels_last import store_channels_last
from syncbn.training.run_directory.paths import short

SHOWN = 3  # weights that a line lists


@dataclass(frozen=True)
class Trained:
    """A trained network and what is known of it.

    Attributes:
        network: in evaluation mode, on the CPU.
        settings: the run's ``config.yaml`` as plain data; empty for a checkpoint outside of run directories.
        classes: the names of the classes, in the order of the outputs; None if the data module has saved none.
        preprocessing: makes an input of an image file; None if the data module does not say how.
        checkpoint: the file of the weights.
        run_dir: the run directory; None for a checkpoint outside of run directories.
        unused: names of weights of the user's LightningModule that are outside of the network; empty if a part was
            chosen.
    """

    network: nn.Module
    settings: dict[str, Any]
    classes: list[str] | None
    preprocessing: Preprocessing | None
    checkpoint: Path
    run_dir: Path | None
    unused: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """A line about ``unused`` for the user; "" if there are none."""
        if not self.unused:
            return ""
        more = f" and {len(self.unused) - SHOWN} more" if len(self.unused) > SHOWN else ""
        return (
            f"the module has weights outside of its network {type(self.network).__name__}, which are not used: "
            f"{', '.join(self.unused[:SHOWN])}{more}"
        )


def open_run(
    run_or_checkpoint: str | os.PathLike[str],
    *,
    trust: bool = False,
    network: nn.Module | None = None,
    part: str | None = None,
    as_trained: bool = True,
) -> Trained:
    """Build the network of a run and load its best checkpoint.

    The settings come from the ``config.yaml`` of the run, and the weights from a file that is loaded with
    ``weights_only=True``. So a run directory from elsewhere runs no code, unless ``trust`` is set.

    Args:
        run_or_checkpoint: a run directory, a checkpoint file, or a directory that holds exactly one run.
        trust: whether to call any class that the run's ``config.yaml`` names, such as a network of the user's own.
        network: the network, built as before training; its weights are replaced. Then no class of the run is called.
        part: the part of the LightningModule to take, where it has several networks: ``"generator"``.
        as_trained: whether weights and inputs have the precision and the memory format of the training
            (``trainer.precision``, ``channels_last``). Otherwise the network is in float32 and contiguous.

    Raises:
        SettingError: there is no checkpoint, it cannot be read, it is of another network, or the run names a class that
            is refused. One line.
        DamagedError: the run's ``config.yaml`` is damaged.
    """
    path, run_dir = located(Path(run_or_checkpoint))
    settings = {} if run_dir is None else run_settings.read(run_dir)
    checkpoint = _loaded(path)
    where = short(path, resolve=False)
    state = weights.state_of(checkpoint, where)
    source = _Source(settings, state, checkpoint, where, run_dir)
    found = _from_settings(source, part, trusted=trust) if network is None else _into(network, source, part)
    data = settings.get("data")
    data = data if isinstance(data, dict) else {}
    return Trained(
        network=_prepared(found, settings, as_trained=as_trained),
        settings=settings,
        classes=class_names(checkpoint, data),
        preprocessing=preprocessing(checkpoint, data),
        checkpoint=path.absolute(),
        run_dir=run_dir,
        unused=source.unused if part is None else (),
    )


@dataclass
class _Source:
    """What a network is made of: the run's settings, the weights by name, the whole checkpoint, its name in errors.

    ``unused`` are the weights that the loaded network leaves over.
    """

    settings: dict[str, Any]
    state: Mapping[str, Tensor]
    checkpoint: dict[str, Any]
    where: str
    run_dir: Path | None
    unused: tuple[str, ...] = ()

    def load(self, network: nn.Module, prefix: str) -> nn.Module:
        weights.load(network, self.state, prefix, self.where, self.versions)
        module = self.settings.get("module")
        target = str(module.get("_target_")) if isinstance(module, dict) else "syncbn."
        if not target.startswith("syncbn."):  # what Classifier has beside its network belongs to the loss
            self.unused = tuple(name for name in self.state if not name.startswith(prefix))
        return network

    @property
    def versions(self) -> str:
        return run_settings.versions(self.run_dir)

    @property
    def file(self) -> str:
        return "config.yaml" if self.run_dir is None else short(self.run_dir / "config.yaml", resolve=False)


def _loaded(path: Path) -> dict[str, Any]:
    try:
        return load_checkpoint(path)
    except SettingError as error:
        raise SettingError(short(path, resolve=False), hint=error.hint) from error


def _into(network: nn.Module, source: _Source, part: str | None) -> nn.Module:
    """Load the weights into a network that the caller has built."""
    networks.apply_norm(network, source.settings.get("norm"))
    return source.load(network, _prefix(network, source, part))


def _from_settings(source: _Source, part: str | None, *, trusted: bool) -> nn.Module:
    settings = source.settings
    if not settings:
        hint = "it lies in no run directory with a config.yaml, which names its network; pass that (network=Net())"
        raise SettingError(source.where, hint=hint)
    if trusted:
        networks.find_own_files(source.run_dir, settings)
    described = networks.described(settings)
    if described is not None:
        name, arguments = described
        network = networks.built(arguments, source.file, "model", trusted=trusted, versions=source.versions)
        networks.apply_norm(network, settings.get("norm"))
        found = weights.prefixes(network, source.state)
        is_other = part is not None and (f"{part}." if part else "") not in found
        if part is None and f"{name}." in found:
            return networks.plain(source.load(network, f"{name}."))
        if not found and not trusted and not (target := str(settings["module"].get("_target_"))).startswith("syncbn."):
            hint = f"{weights.misfit(network, source.state)}; {target} may make its network itself: "
            hint += "pass that (network=), or trust config.yaml (trust=True, --trust)"
            raise SettingError(source.where, hint=hint)
        if (found or not trusted) and not (is_other and trusted):
            return networks.plain(source.load(network, _prefix(network, source, part)))
    # A LightningModule that makes its network itself, or changes the one that it is given.
    module: Any = networks.built(settings["module"], source.file, "module", trusted=trusted, versions=source.versions)
    networks.apply_norm(module, settings.get("norm"))
    if hasattr(module, "on_load_checkpoint"):  # it may rename weights
        module.on_load_checkpoint(source.checkpoint)
    state = weights.state_of(source.checkpoint, source.where)
    _Source(settings, state, source.checkpoint, source.where, source.run_dir).load(module, "")
    return networks.plain(networks.part_of(module, part, source.where))


def _prefix(network: nn.Module, source: _Source, part: str | None) -> str:
    """The prefix of the network's weights in the checkpoint.

    Raises:
        SettingError: the checkpoint has no such part, or several.
    """
    found = weights.prefixes(network, source.state)
    if part is not None:
        return f"{part}." if part else ""
    if "network." in found:
        return "network."
    if len(found) > 1:
        names = ", ".join(each.removesuffix(".") for each in found)
        raise SettingError("part", None, f"{source.where} has several such networks: {names}; choose one of them")
    if not found:
        raise SettingError(source.where, hint=f"{weights.misfit(network, source.state)}{source.versions}")
    return found[0]


def _prepared(network: nn.Module, settings: Mapping[str, Any], *, as_trained: bool) -> nn.Module:
    trainer = settings.get("trainer")
    if not as_trained:
        network = network.float()
    elif isinstance(trainer, dict):
        weights.take_inputs_in(network, trainer.get("precision"))
    if as_trained and settings.get("channels_last") is True:
        store_channels_last(network)
    return network.eval()
