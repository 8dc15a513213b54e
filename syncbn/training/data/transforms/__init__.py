"""What changes training images: augmentation of a sample, and mixing within a batch."""

from typing import Any

from syncbn.training.errors import SettingError


def torchvision_v2(setting: str, value: Any) -> Any:
    """Import torchvision.transforms.v2 on first use, since it is an optional dependency (the extra ``vision``).

    Raises:
        SettingError: it is not installed; the error names the setting that needs it.
    """
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        hint = "it needs torchvision, which is not installed; pip install '.[vision]', with the build for this torch, "
        raise SettingError(setting, value, f"{hint}or leave it out") from error
    return v2
