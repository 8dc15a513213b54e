"""What changes training images: augmentation of a sample, and mixing within a batch."""

from typing import Any

from syncbn.training.errors import SettingError
from syncbn.training.vision_packages import install_command


def torchvision_v2(setting: str, value: Any) -> Any:
    """Import torchvision.transforms.v2 on first use, since it is an optional dependency (the extra ``vision``).

    Raises:
        SettingError: it is not installed; the error names the setting that needs it.
    """
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        hint = f"it needs torchvision, which is not installed; {install_command()}, or leave it out"
        raise SettingError(setting, value, hint) from error
    return v2
