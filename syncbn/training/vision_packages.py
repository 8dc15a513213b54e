"""How torchvision and timm are installed, which are optional."""

from importlib.metadata import PackageNotFoundError, version


def install_command() -> str:
    """The command that installs both and keeps the installed torch, which torchvision alone would replace."""
    try:
        return f"pip install timm torchvision torch=={version('torch')}"
    except PackageNotFoundError:  # torch is on the path without having been installed
        return "pip install timm torchvision"
