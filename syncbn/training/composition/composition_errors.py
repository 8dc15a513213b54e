"""Turns the exceptions by which Hydra refuses a command line into one line: ``setting=value: hint``.

Hydra 1.3 has few classes of exceptions, so this module reads their messages too. An unknown message is printed whole.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException, SearchPathException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.composition import signatures
from syncbn.training.composition.hydra_internals import argument_parser
from syncbn.training.composition.nearest import listed, nearest, suggestion
from syncbn.training.composition.unread_settings import NEEDED
from syncbn.training.config import ranges
from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.errors import SettingError

GROUPS = "hydra/"
WANTED = {  # the types of OmegaConf's messages
    "Integer": "use a whole number",
    "Float": "use a number",
    "Boolean": "use true or false",
    "bool": "use true or false",
    "String": "use a word",
}


class _CommandLine:
    """The arguments of a command, and the settings that exist for it."""

    def __init__(self, arguments: Sequence[str], config_path: str, config_name: str) -> None:
        options, _ = argument_parser().parse_known_args(list(arguments))
        self.overrides: list[str] = options.overrides
        self.config_dir: str | None = options.config_dir
        self._path, self._name = options.config_path or config_path, options.config_name or config_name

    def typed(self, text: str) -> str:
        """The override of the command line that begins with ``text`` or is it; "" without one."""
        for each in self.overrides:
            if each == text or re.match(rf"[+~]*{re.escape(text)}(@[^=]*)?(=|$)", each):
                return each
        return ""

    @cached_property
    def settings(self) -> DictConfig:
        """The settings without the overrides that Hydra refuses: with the choices of groups, or with none."""
        choices = [each for each in self.overrides if re.match(r"\+?[\w/]+=[\w/.-]+$", each)]
        found = OmegaConf.create()
        for overrides in (choices, []):
            try:
                found = self._compose(overrides)
                break
            except Exception:  # of one of the choices, or of a file of the user's
                continue
        return found

    def _compose(self, overrides: list[str]) -> DictConfig:
        if self.config_dir is not None:
            overrides = [*overrides, f"hydra.searchpath=[file://{Path(self.config_dir).absolute()}]"]
        GlobalHydra.instance().clear()
        package = self._path.removeprefix("pkg://")
        begin: Callable[..., Any] = (
            hydra.initialize_config_dir if package == self._path else hydra.initialize_config_module
        )
        where = package if package == self._path else package.replace("/", ".")
        with begin(where, version_base="1.3"):
            return hydra.compose(self._name, overrides, return_hydra_config=True)

    def groups(self) -> list[str]:
        """The config groups of the main file: ``model``, ``norm``."""
        return [str(each) for each in self.settings.hydra.runtime.choices if "/" not in str(each)]


def check_options(arguments: Sequence[str]) -> None:
    """Refuses an option that Hydra does not have, and choices of a user's directory that Hydra would not use.

    argparse would print its whole usage.

    Raises:
        SettingError: ``--norm=sync``, for example, which is a setting with dashes; a file below ``--config-dir`` with
            the name of a built-in choice.
    """
    parser = argument_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]  # argparse's prints the usage and exits
    options, unknown = parser.parse_known_args(list(arguments))
    if options.config_dir is not None:
        _refuse_hidden_choices(Path(options.config_dir))
    if unknown and not unknown[0].startswith("-"):
        hint = "settings before and after an option; put all settings together, before or after the options"
        raise SettingError(*unknown[0].partition("=")[::2], hint)
    if unknown:
        name, _, value = unknown[0].partition("=")
        setting = name.lstrip("-").replace("-", "_")
        works = f"{setting}={value or 'VALUE'}" if unknown[0].startswith("--") else "setting=value"
        raise SettingError(unknown[0], hint=f"there is no such option; a setting has no dashes: {works}")


def _refuse_hidden_choices(directory: Path) -> None:
    """Hydra takes the first file of a name, and those of ``--config-dir`` are last (hydra-core 1.3)."""
    built_in = conf_directory()
    for path in sorted(directory.glob("*/**/*.yaml")):
        name = path.relative_to(directory)
        other = built_in / name
        if other.is_file() and other.read_bytes() != path.read_bytes():
            hint = f"{name} has the name of a built-in choice, which would be used instead; rename the file"
            raise SettingError("--config-dir", str(directory), hint)


def _refuse_option(message: str) -> NoReturn:
    found = re.match(r"argument ([\w-]+)[^:]*: (.*)", message)
    raise SettingError(found[1] if found else "options", hint=found[2] if found else message)


def explained(error: Exception, arguments: Sequence[str], config_path: str, config_name: str) -> SettingError:
    """The error of the setting that Hydra refuses.

    Args:
        error: that Hydra raised before a job began.
        arguments: of the command line.
        config_path: as for :func:`syncbn.training.composition.run_hydra.run_hydra`.
        config_name: the same.
    """
    line = _CommandLine(arguments, config_path, config_name)
    for kind, explain in _KINDS:
        if isinstance(error, kind) and (found := explain(error, line)) is not None:
            return found
    return SettingError("settings", hint=_joined(str(error) or str(error.__cause__)))


def _unreadable(error: OverrideParseException, line: _CommandLine) -> SettingError:
    name, equals, value = error.override.partition("=")
    if not equals:
        known = nearest(name.lstrip("+~"), _names(line.settings))
        works = f"write {known[0] if known else 'setting'}=VALUE"
        return SettingError(error.override, hint=f"there is no = in it; {works}")
    reason = error.message.splitlines()
    said = next((each for each in reason if not each.startswith(("Error parsing", "See http"))), reason[0])
    quoted = value.replace("'", "\\'")
    hint = f"this cannot be read ({said}); close brackets and quotes, or quote the whole: \"{name}='{quoted}'\""
    return SettingError(name, value, hint)


def _missing(error: MissingConfigException, line: _CommandLine) -> SettingError | None:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return SettingError("--config-name", choice, f"there is no {choice}.yaml among the settings")
    within = re.match(r"In '([^']+)'", str(error))
    # Only the main file and the command line name a choice of which the user need not be told where it is.
    where = f" (in {within[1]}.yaml)" if within and within[1] not in ("config", "hydra/config") else ""
    options = [each for each in error.options or () if not each.startswith("schema_")]
    if group == "hydra/sweeper" and choice == "optuna":
        hint = "there is no package hydra-optuna-sweeper here; pip install 'hydra-optuna-sweeper>=1.3' 'sqlalchemy<2'"
        return SettingError(group, choice, hint)
    if not options and group in line.groups():  # of several choices Hydra does not list what there is
        options = sorted(path.stem for path in conf_directory().glob(f"{group}/*.yaml"))
    if not options and group in line.groups():
        return SettingError(group, choice, f"there is no such file{where}")
    if not options:
        known = line.groups()
        return SettingError(
            group, choice, f"there is no such group of settings{where}; {suggestion(group, known, 'group')}"
        )
    found = nearest(choice, options)
    works = f"the nearest is {found[0]} ({listed(options)})" if found else listed(options)
    if Path("conf", group, f"{choice}.yaml").is_file():  # as syncbn init writes it
        works = "the directory conf here has it: add --config-dir conf"
    return SettingError(group, choice, f"there is no such choice{where}; {works}")


def _search_path(error: SearchPathException, line: _CommandLine) -> SettingError | None:
    if line.config_dir is None:
        return None
    return SettingError("--config-dir", line.config_dir, "there is no such directory")


def _composed(error: HydraException, line: _CommandLine) -> SettingError | None:
    text = str(error)
    for pattern, explain in _MESSAGES:
        if found := re.search(pattern, text):
            return explain(found, error, line)
    return None


def _unknown(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError:
    """``Could not override 'optimzer.lr'``: a setting that is not there, or a group that is not in the main file."""
    name = found[1]
    override = line.typed(name)
    value = override.partition("=")[2]
    within = re.match(r"In '([^']+)'", str(error))
    where = f" (in {within[1]}.yaml)" if within and not override else ""
    cfg = line.settings
    if not found.re.pattern.endswith("group") and (works := _argument(name, value, cfg)):
        return SettingError(name, value, works)
    kept = [each for each in _names(cfg) if each.startswith("hydra.") == name.startswith("hydra.")]
    kept += [str(each) for each in cfg.hydra.runtime.choices if "/" in name and "/" in str(each)]
    hint = f"there is no such setting{where}; {suggestion(name, kept)}"
    return SettingError(name, value, hint) if override else SettingError(name, hint=hint)


def _argument(name: str, value: str, cfg: DictConfig) -> str:
    """What works if the setting is an argument of its group's target which no file of settings mentions; else ""."""
    group, _, last = name.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else None
    target = (
        signatures.TRAINER if group == "trainer" else node.get("_target_") if isinstance(node, DictConfig) else None
    )
    names = signatures.arguments(target) if isinstance(target, str) else None
    if names is None or last not in names:
        return ""
    return f"an argument of {target} that the settings do not list; add it: +{name}={value}"


def _ambiguous(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError:
    name, _, value = found[1].partition("=")
    return SettingError(
        name, value, f"several values are a sweep, which needs -m; a list has brackets: {name}=[{value}]"
    )


def _exists(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError:
    override = line.typed(found[1])
    hint = f"this setting exists already; leave out the +: {override.lstrip('+') or found[1]}"
    return SettingError(override.partition("=")[0] or found[1], override.partition("=")[2], hint)


def _undeletable(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError:
    name = found[1].partition("=")[0]
    return SettingError(f"~{name}", hint=f"there is no such setting; {suggestion(name, _names(line.settings))}")


def _not_a_group(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError:
    name, _, value = found[1].partition("=")
    return SettingError(name, value, f"there is no group {found[2]}; {suggestion(found[2], line.groups(), 'group')}")


def _merging(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError | None:
    name, _, value = found[1].partition("=")
    cause = error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return None
    said = str(cause).splitlines()[0]
    if "is not a subclass of" in said or "Merge error" in said or "Cannot merge" in said:
        return SettingError(name, value, f"this is a group of settings, not a value; use {name.lstrip('+')}.NAME=...")
    if missing := re.match(r"Key '(\w+)' not in", said):
        kept = [each for each in _names(line.settings) if each.startswith(f"{name.lstrip('+').rpartition('.')[0]}.")]
        full = name.lstrip("+")
        full = full if full.endswith(missing[1]) else f"{full}.{missing[1]}"
        return SettingError(full, value, f"there is no such setting; {suggestion(full, kept)}")
    wanted = re.search(r"could not be converted to (\w+)", said) or re.search(r"is not a valid (\w+)", said)
    choices = re.search(r"expected one of \[(.*)\]", said)
    hint = f"use one of {choices[1]}" if choices else WANTED.get(wanted[1] if wanted else "", said)
    return SettingError(name.lstrip("+"), value, hint)


def _not_a_choice(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError | None:
    """``norm=3``: the choice of a group is not a word."""
    groups = set(line.groups())
    for override in line.overrides:
        name, _, value = override.partition("=")
        if name in groups and value == "null":
            works = "choose one of its files by name"
            works = works if name in NEEDED else f"use ~{name} to leave it out, or {works}"
            return SettingError(name, value, f"{name} is a group of settings: {works}")
    for override in line.overrides:
        name, _, value = override.partition("=")
        is_word = re.match(r"[\w/.-]*[A-Za-z_]", value) and value.lower() not in ("true", "false")
        if name.lstrip("+~") in groups and not is_word:
            return SettingError(name, value, f"{name} is a group of settings: choose one of its files by name")
    return None


def _file(error: yaml.YAMLError, line: _CommandLine) -> SettingError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark else "settings"
    return SettingError(where, hint=f"this is no YAML: {getattr(error, 'problem', None) or _joined(str(error))}")


def _unresolved(error: OmegaConfBaseException, line: _CommandLine) -> SettingError:
    return ranges.unresolved(error)


def _in_file(found: re.Match[str], error: Exception, line: _CommandLine) -> SettingError:
    """A file of the user's has a setting that does not exist, or a value of the wrong type."""
    file, said, name = found[1], found[2], found[3]
    if said.startswith("Key "):
        said = f"there is no such setting; {suggestion(name, _names(line.settings))}"
    return SettingError(name, hint=f"in {file}.yaml: {said}")


_MESSAGES: list[tuple[str, Callable[[re.Match[str], Exception, _CommandLine], SettingError | None]]] = [
    (r"In '([^']+)': \w+ raised while composing config:\n(.*)\n\s*full_key: (\S+)", _in_file),
    (r"Could not override '([^']+)'", _unknown),
    (r"Ambiguous value for argument '(.*)'", _ambiguous),
    (r"Sweep parameters '(.*)' requires", _ambiguous),
    (r"An item is already at '([^']+)'", _exists),
    (r"Multiple values for ([\w/@.]+)\. To override", _exists),
    (r"Could not delete from config. '([^']+)' does not exist", _undeletable),
    (r"Could not delete '([^']+)'", _undeletable),
    (r"Override (\S+) looks like a config group override, but config group '([^']+)'", _not_a_group),
    (r"Error merging override (.*)", _merging),
    (r"Config group override must be a string or a list", _not_a_choice),
]
_KINDS: list[tuple[type[Exception], Callable[[Any, _CommandLine], SettingError | None]]] = [
    (OverrideParseException, _unreadable),
    (MissingConfigException, _missing),
    (SearchPathException, _search_path),
    (HydraException, _composed),
    (yaml.YAMLError, _file),
    (OmegaConfBaseException, _unresolved),
    (ValueError, lambda error, line: _composed(error, line)),
]


def _names(cfg: DictConfig) -> list[str]:
    """The dotted names of all settings and groups."""
    return list(_flat(OmegaConf.to_container(cfg), ""))


def _flat(tree: Any, prefix: str) -> Iterable[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")


def _joined(text: str) -> str:
    """A message of several lines as one."""
    return " ".join(text.split())
