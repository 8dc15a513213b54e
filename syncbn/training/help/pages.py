"""The pages of ``--help``: all groups with the settings of their choices, one group, or settings by name."""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from syncbn.training import import_paths, program
from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.console import print_line
from syncbn.training.help.conf_comments import ConfFile, Default, Setting, files, read

INTERNAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
OPTIONS = (
    ("--help NAME", "the settings of a group, of a choice (norm=ghost), or with this name (lr)"),
    ("-m, --multirun", "a sweep: settings may have several values, a=1,2, and each combination is a job"),
    ("--config-dir DIR", "a directory with your own groups and choices; Python files beside it can be imported"),
    ("--cfg job", "print the settings as they are composed, without running"),
    ("--hydra-help", "the other options, which are Hydra's"),
)


class Conf:
    """The groups and files of ``conf/`` and of ``--config-dir``, and which choice of each group is taken.

    Args:
        arguments: of the command line, without ``--help``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        own = import_paths.config_directory(arguments)
        self.directories = [*([] if own is None else [own]), conf_directory()]
        self.main = read(next(path for each in self.directories if (path := each / "config.yaml").is_file()))
        listed = [each for each in self.main.defaults if _is_group(each) and not each.overrides]
        self.listed = {each.group: each for each in listed}
        self.groups = list(dict.fromkeys([*self.listed, *self._other_groups()]))
        self.chosen = {name: each.choice for name, each in self.listed.items()}
        for argument in arguments:
            name, _, choice = argument.lstrip("+").partition("=")
            if choice and name in self.groups:
                self.chosen[name] = None if choice == "null" else choice

    def _other_groups(self) -> list[str]:
        names = {path.name for each in self.directories for path in each.iterdir() if any(path.glob("*.yaml"))}
        return sorted(names - {"hydra"})

    def choices(self, group: str) -> dict[str, Path]:
        """The files of a group by choice, without those that only hold types or what others share."""
        every = dict(files(self.directories, group))
        shared = {"base"} if group not in self.listed else set()
        return {name: path for name, path in every.items() if not name.startswith("schema") and name not in shared}

    def settings(self, group: str, choice: str) -> list[Setting]:
        """The settings of a choice, with their full names, and those of the files that it is built on."""
        every = dict(files(self.directories, group))
        return list(self._of_file(every, group, choice, is_global=False))

    def _of_file(self, every: dict[str, Path], group: str, choice: str, *, is_global: bool) -> Iterator[Setting]:
        if choice not in every:
            return
        found = read(every[choice])
        is_global = is_global or found.is_global
        for default in found.defaults:
            if default.choice is None and default.group != "_self_":
                yield from self._of_file(every, group, default.group, is_global=is_global)
            elif default.overrides and default.choice is not None:
                yield Setting(default.group, default.choice, "")
        if not (group == "study" and choice != "base"):  # a study's own file holds its conditions, which are long
            yield from _shown(found, "" if is_global else f"{group}.")

    def heading(self, group: str) -> str:
        """What a group is for."""
        if group in self.listed:
            return self.listed[group].comment
        shared = dict(files(self.directories, group)).get("base")
        return read(shared).summary if shared is not None else ""


def _is_group(default: Default) -> bool:
    return default.group not in ("schema", "_self_", "hydra")


def _shown(found: ConfFile, prefix: str) -> Iterator[Setting]:
    for each in found.settings:
        first, _, _ = each.name.partition(".")
        if each.name.rpartition(".")[2] not in INTERNAL and first not in ("hydra", "defaults") and each.value != "???":
            name = each.name.removesuffix(".name") if each.name == "name" else each.name
            if name != "name":  # the name of the choice
                yield each._replace(name=prefix + name)


def show(arguments: Sequence[str]) -> int:
    """Prints the page that the arguments ask for; see :func:`syncbn.training.help.show`."""
    try:
        conf = Conf(arguments)
    except OSError as error:
        own = import_paths.config_directory(arguments)
        wrong = "there is no such directory" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
        print_line(f"error: --config-dir={own}: {wrong}", error=True)
        return 1
    asked = [each for each in _without_options(arguments) if _is_question(each, conf)]
    if not asked:
        _overview(conf)
        return 0
    return max(_answer(conf, each) for each in asked)


def _without_options(arguments: Sequence[str]) -> Iterator[str]:
    skip = False
    for each in arguments:
        if not skip and not each.startswith("-"):
            yield each
        skip = each in ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")


def _is_question(argument: str, conf: Conf) -> bool:
    name, equals, _ = argument.lstrip("+").partition("=")
    return not equals or name in conf.groups


def _answer(conf: Conf, asked: str) -> int:
    group, _, choice = asked.lstrip("+").partition("=")
    if group in conf.groups:
        choices = conf.choices(group)
        if choice and choice not in choices:
            return _refuse(asked, f"{group} has no choice {choice}", choices, choice)
        _group(conf, group, [choice] if choice else list(choices))
        return 0
    every = _every_setting(conf)
    found = [row for setting, row in every if asked in setting.name]
    if not found:
        names = [*conf.groups, *(setting.name for setting, _ in every)]
        return _refuse(asked, "no group or setting has this name", names, asked)
    _rows(found)
    return 0


def _refuse(asked: str, wrong: str, names: Iterable[str], word: str) -> int:
    near = difflib.get_close_matches(word, list(names), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{program.name()} --help lists them"
    print_line(f"error: --help {asked}: {wrong}; {hint}", error=True)
    return 1


def _every_setting(conf: Conf) -> list[tuple[Setting, tuple[str, str]]]:
    """All settings with the row that shows them, which names the choice that has the setting."""
    found = {row: each for each in _shown(conf.main, "") for row in [_row(each)]}
    for group in conf.groups:
        for choice in conf.choices(group):
            for each in conf.settings(group, choice):
                name, comment = _row(each)
                of = "" if group == "study" or choice == conf.chosen.get(group) else f"({group}={choice}) "
                found.setdefault((name, f"{of}{comment}"), each)
    return [(each, row) for row, each in found.items()]


def _overview(conf: Conf) -> None:
    name = program.name()
    print_line(f"Train one network:  {name} [group=choice] [setting=value] ...")
    print_line()
    print_line(f"  {name} norm=local model=mlp data.batch_size=8 trainer.max_epochs=5 seed=1")
    print_line()
    _rows([(option, what) for option, what in OPTIONS])
    for group in conf.groups:
        if conf.choices(group):
            _group(conf, group, [])
    print_line()
    print_line("other settings")
    _table(_shown(conf.main, ""))


def _group(conf: Conf, group: str, choices: Sequence[str]) -> None:
    """Prints a group: its choices, and the settings of those asked for, by default of the choice that is taken."""
    taken = conf.chosen.get(group)
    print_line()
    name = f"{group}={taken or 'null'}" if group in conf.listed else f"+{group}=NAME"
    print_line(f"{name}   {conf.heading(group)}".rstrip())
    every = conf.choices(group)
    if group != "study" and choices:
        for choice in choices:
            _rows([(f"{group}={choice}", read(every[choice]).summary)])
            _table(conf.settings(group, choice), "      ")
        return
    _rows([(f"{group}={each}", read(path).summary) for each, path in every.items() if not choices or each in choices])
    if group == "study" and choices:
        _table(conf.settings(group, choices[0]), "      ")
    elif taken in every:
        _table(conf.settings(group, str(taken)), "      ")


def _table(settings: Iterable[Setting], indent: str = "  ") -> None:
    _rows([_row(each) for each in settings if each.value is not None or each.comment], indent)


def _row(setting: Setting) -> tuple[str, str]:
    return setting.name if setting.value is None else f"{setting.name}={setting.value}", setting.comment


def _rows(rows: Sequence[tuple[str, str]], margin: str = "  ") -> None:
    """Prints names with explanations: one line each in a file or a pipe, and wrapped in a terminal."""
    width = min(max([len(name) for name, _ in rows], default=0), 40)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for name, what in rows:
        line = f"{margin}{name:{width}}  {what}".rstrip()
        indent = margin + " " * (width + 2)
        for each in textwrap.wrap(line, columns, subsequent_indent=indent) if columns > width + 24 else [line]:
            print_line(each)
