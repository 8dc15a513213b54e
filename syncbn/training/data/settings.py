"""Checks the settings of data that need others, and fills in those that are found in a folder: classes and channels."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.data.images import archive_sources, listing
from syncbn.training.data.transforms import augmentation, mixing
from syncbn.training.errors import SettingError
from syncbn.training.vision_packages import install_command

FOLDER = ("syncbn.training.ImageFolder", "syncbn.training.data.image_folder.ImageFolder")
ARCHIVES = {
    f"syncbn.training.{module}{name}": name for name in ("CIFAR", "MNIST") for module in ("", "data.image_archives.")
}
ARCHIVES |= {f"syncbn.training.{module}CIFARMosaics": "CIFAR" for module in ("", "data.segmentation.mosaics.")}
ARCHIVES |= {f"syncbn.training.{module}CIFARViews": "CIFAR" for module in ("", "data.contrastive.cifar_views.")}
WORKS = "use data=folder, cifar10, cifar100, mnist or digits"


def fill(data: Any) -> None:
    """Set ``num_classes`` and ``in_channels`` of ``data=folder``; other data are left as they are.

    Raises:
        SettingError: the folder has no such images, or another number of classes than ``num_classes``; a share for
            validation or the test that leaves nothing.
    """
    try:
        if not isinstance(data, DictConfig) or data.get("_target_") not in FOLDER:
            return
        root, channels, given = data.get("root"), data.get("channels"), data.get("num_classes")
        shares = data.get("val_fraction", 0.1), data.get("test_fraction", 0.1)
    except OmegaConfBaseException:  # an interpolation that cannot be resolved is reported by the check of all settings
        return
    listing.check_fractions(*shares)
    found = listing.facts(root, channels)
    if given not in (None, found["num_classes"]):
        hint = f"{Path(str(root))} has {found['num_classes']} class folders; leave it out"
        raise SettingError("data.num_classes", given, hint)
    with open_dict(data):
        data.num_classes, data.in_channels = found["num_classes"], found["in_channels"]


def check(cfg: DictConfig) -> None:
    """Refuse augmentation, mixing, balance and class weights that cannot work with the other settings.

    Raises:
        SettingError: for the first setting that cannot work.
    """
    _check_archive(cfg.data)
    for group, checked in (("augment", augmentation.check), ("mix", mixing.check)):
        settings = cfg.get(group)
        if settings is None:
            continue
        name = settings.get("name") or "..."
        if group not in cfg.data:
            raise SettingError(group, name, f"these data (data._target_={cfg.data._target_}) do not take it; {WORKS}")
        checked(OmegaConf.to_container(settings, resolve=True))  # type: ignore[arg-type]  # a dict
        if find_spec("torchvision") is None:
            hint = f"it needs torchvision, which is not installed; {install_command()}"
            raise SettingError(group, name, hint)
    mixing.check_batch(cfg.get("mix"), cfg.data.batch_size)
    weights = cfg.module.get("class_weights")
    _check_weights(cfg, weights)
    batches = cfg.trainer.get("accumulate_grad_batches") or 1
    if cfg.get("simulate") is not None and batches != 1:
        for setting, value in (("mix", cfg.get("mix") and cfg.mix.get("name")), ("module.class_weights", weights)):
            if value is not None:
                hint = f"simulate={cfg.simulate} takes {batches} batches at once; use trainer.accumulate_grad_batches=1"
                raise SettingError(setting, value, hint)


def _check_archive(data: DictConfig) -> None:
    """Refuses an archive that does not exist. What is in it is checked when it is read, in the ranks."""
    kind, root = ARCHIVES.get(str(data.get("_target_"))), data.get("root")
    if kind is None or (root is not None and Path(str(root)).exists()):
        return
    source = archive_sources.MNIST if kind == "MNIST" else archive_sources.cifar(data.get("name", "cifar10"))
    missing = "it is missing" if root is None else "there is no such file or directory"
    # conf/data/cifar10.yaml reads it.
    variable = ", or set the environment variable CIFAR10" if root is None and data.get("name") == "cifar10" else ""
    raise SettingError("data.root", root, f"{missing}; use the directory of the archive ({source}){variable}")


def _check_weights(cfg: DictConfig, weights: Any) -> None:
    if weights is None:
        return
    if weights == "balanced":
        if cfg.data.get("balance"):
            hint = "data.balance=true draws all classes equally already; use one of the two"
            raise SettingError("module.class_weights", "balanced", hint)
        return
    classes = OmegaConf.select(cfg, "module.num_classes")
    numbers = OmegaConf.is_list(weights) and all(
        isinstance(each, int | float) and not isinstance(each, bool) and each >= 0 for each in weights
    )
    if not numbers or not any(weights):
        raise SettingError("module.class_weights", weights, "use null, balanced, or a list of numbers, 0 or more")
    if classes is not None and len(weights) != classes:
        raise SettingError("module.class_weights", weights, f"use {classes} numbers, one per class")
