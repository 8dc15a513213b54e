"""Reads the settings in ``config.yaml`` of thousands of runs: text that several files share is parsed once.

libyaml takes 3 ms for the settings of a run, which is 6 s for 2,000 runs. Most of their text is the same. So a file is
split into the blocks of its groups, and a new block into those of its settings. A file that cannot be split so is
parsed as a whole: the result is that of the YAML parser in any case.
"""

import re
from typing import Any

import yaml

from syncbn.training.read_file import out_of_range

# The loader of libyaml is ten times as fast; PyYAML may be built without it. Both are safe loaders.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KEY = [re.compile(f"^(?={'  ' * depth}[A-Za-z_])", re.MULTILINE) for depth in range(6)]  # by depth of nesting
HEAD = re.compile(r" *([A-Za-z_]\w*):\n")
PATH = re.compile(r" *([A-Za-z_]\w*): (/[\w./-]*)\n", re.ASCII)  # always a string; each run has another one

Flat = dict[str, Any]


class _Unsplittable(Exception):  # noqa: N818  # not an error: the file is parsed as a whole
    """The file is not a sequence of blocks that can be parsed one by one."""


class ConfigBlocks:
    """Parses the settings of many runs."""

    def __init__(self) -> None:
        self._known: dict[str, Flat] = {}

    def flat(self, text: str) -> Flat:
        """The settings in a ``config.yaml`` by dotted name; lists are one value.

        Raises:
            ValueError: the text is not YAML, or no object of settings; one line.
        """
        try:
            blocks = [self._block(each, 0) for each in _split(text, 0)]
            found: Flat = {}
            for each in blocks:
                found.update(each)
            if len(found) == sum(map(len, blocks)):
                return found
        except _Unsplittable:
            pass
        return flattened(_parsed(text))

    def _block(self, text: str, depth: int) -> Flat:
        """The settings in the lines of one key: ``data:`` with its settings, or one setting."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = self._new_block(text, depth)
        return found

    def _new_block(self, text: str, depth: int) -> Flat:
        if path := PATH.fullmatch(text):
            return {path[1]: path[2]}
        head = HEAD.match(text)
        if head and depth + 1 < len(KEY) and KEY[depth + 1].match(text, head.end()):
            within = [self._block(each, depth + 1) for each in _split(text[head.end() :], depth + 1)]
            return {f"{head[1]}.{name}": value for each in within for name, value in each.items()}
        try:
            tree = _parsed(text)
        except ValueError as error:
            raise _Unsplittable from error
        if len(tree) != 1:
            raise _Unsplittable
        return flattened(tree)


def flattened(tree: Any, prefix: str = "") -> Flat:
    """Nested settings by dotted name: ``{"data": {"batch_size": 2}}`` is ``{"data.batch_size": 2}``."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, each in tree.items() for name, value in flattened(each, f"{prefix}{key}.").items()}


def _split(text: str, depth: int) -> list[str]:
    """The lines of each key at this depth, with what is nested in it."""
    blocks = KEY[depth].split(text)
    if blocks[0].strip():
        raise _Unsplittable
    return blocks[1:]


def _parsed(text: str) -> dict[Any, Any]:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError:  # libyaml rejects surrogates, which represent undecodable bytes of a path
        try:
            tree = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(" ".join(str(error).split())[:100]) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:100]) from error
    if not isinstance(tree, dict) or (wrong := out_of_range(tree)):
        raise ValueError("it is no object" if not isinstance(tree, dict) else wrong)
    return tree
