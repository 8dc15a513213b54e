"""Each file of settings is parsed once by Hydra in a process and its forks: a quarter of what it takes to compose."""

import pickle
from functools import cache
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult, ConfigSource

_register = SourcesRegistry.register


def install() -> None:
    """Also where Hydra has not loaded its plugins yet, of which the class that reads files is one: a copy of ours."""
    SourcesRegistry.register = register  # type: ignore[method-assign]
    if known := SourcesRegistry.instance().types.get("file"):
        known.load_config = load_config  # type: ignore[method-assign]


def register(registry: SourcesRegistry, kind: type[ConfigSource]) -> None:
    if kind.scheme() == "file":
        kind.load_config = load_config  # type: ignore[method-assign]
    _register(registry, kind)


def load_config(source: ConfigSource, config_path: str) -> ConfigResult:
    """For ``FileConfigSource.load_config``: a file that is as it was is not parsed again."""
    path = Path(source.path, f"{config_path.removesuffix('.yaml')}.yaml")
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    found: ConfigResult = pickle.loads(parsed(source.provider, source.path, config_path, changed))  # Hydra changes it
    return found


@cache
def parsed(provider: str, directory: str, config_path: str, changed: int) -> bytes:
    return pickle.dumps(FileConfigSource(provider, directory).load_config(config_path))
