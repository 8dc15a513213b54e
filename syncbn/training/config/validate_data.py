"""Compares the network's settings with facts of the data: channels and classes. No image is read for this."""

from omegaconf import DictConfig

from syncbn.training.errors import SettingError

BUILT_IN = "syncbn.training."  # only of these data sets, and of networks by name, is the meaning of the settings known


def check(cfg: DictConfig) -> None:
    """Refuses a network that takes images of other channels, or has fewer outputs than the data has classes.

    Raises:
        SettingError: ``model.in_channels`` or ``model.num_classes``; the hint has the number of the data.
    """
    data, model = cfg.data, cfg.get("model")
    if not isinstance(model, DictConfig) or not str(data.get("_target_")).startswith(BUILT_IN):
        return
    if not str(model.get("_target_")).startswith((BUILT_IN, "torchvision.models.")):
        return
    has, takes = data.get("in_channels"), model.get("in_channels")
    if isinstance(has, int) and isinstance(takes, int) and takes != has:
        hint = f"the images of these data have {has} channel{'s' if has > 1 else ''}; leave it out, or use {has}"
        raise SettingError("model.in_channels", takes, hint)
    has, takes = data.get("num_classes"), model.get("num_classes")
    if isinstance(has, int) and isinstance(takes, int) and takes < has:
        raise SettingError("model.num_classes", takes, f"these data have {has} classes; leave it out, or use {has}")
