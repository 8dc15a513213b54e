"""Reads a Dockerfile, with arguments and variables put in, and a .dockerignore."""

import fnmatch
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = ("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "VOLUME", "WORKDIR")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass
class Step:
    """One instruction.

    Attributes:
        what: its name.
        rest: what stands after it; of RUN as the shell gets it.
        environment: the variables there: ENV of the stage, and ARG on RUN.
        user: who runs it.
        where: its directory.
    """

    what: str
    rest: str
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    where: str = "/"

    def words(self) -> list[str]:
        """The words of COPY, ENTRYPOINT, CMD or VOLUME, of which the second and third may be JSON."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


@dataclass
class Stage:
    """The steps from one FROM to the next; ``base`` is another stage's name, or an image's."""

    name: str
    base: str
    steps: list[Step]
    environment: dict[str, str]
    user: str = "root"
    where: str = "/"

    def last(self, what: str) -> list[str]:
        """The words of its last step of this kind."""
        return [step for step in self.steps if step.what == what][-1].words()


def parse(text: str, arguments: Mapping[str, str] | None = None) -> dict[str, Stage]:
    """The stages by name, in order.

    Args:
        text: of the Dockerfile.
        arguments: values of ``--build-arg``; one that no ARG declares is an error.
    """
    given, declared = dict(arguments or {}), set()
    before: dict[str, str] = {}  # the first FROM's ARGs
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for what, rest in _instructions(text):
        if what == "FROM":
            base, _, name = _put(rest, before).partition(" AS ")
            above = stages.get(base)
            kept = (dict(above.environment), above.user, above.where) if above else ({}, "root", "/")
            stage, arguments_here = Stage(name or str(len(stages)), base, [], *kept), {}
            stages[stage.name] = stage
        elif what == "ARG":
            name, _, default = rest.partition("=")
            declared.add(name)
            (before if stage is None else arguments_here)[name] = given.get(name, _put(default, before))
        else:
            assert stage is not None, f"{what} before FROM"
            _add(stage, what, rest, arguments_here)
    assert given.keys() <= declared, f"no ARG: {given.keys() - declared}"
    return stages


def _add(stage: Stage, what: str, rest: str, arguments: dict[str, str]) -> None:
    known = {**arguments, **stage.environment}
    rest = rest if what == "RUN" else _put(rest, known)
    if what == "ENV":
        stage.environment.update(word.split("=", 1) for word in shlex.split(rest))  # type: ignore[arg-type]
    elif what == "USER":
        stage.user = rest
    elif what == "WORKDIR":
        stage.where = str(Path(stage.where) / rest)
    environment = known if what == "RUN" else dict(stage.environment)
    stage.steps.append(Step(what, rest, environment, stage.user, stage.where))


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [(what, rest.strip()) for what, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]
    assert {what for what, _ in found} <= {*INSTRUCTIONS}, found
    return found


def _put(text: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return values.get(match[1] or match[2], "")

    # A variable of the base image that the Dockerfile does not set, PATH, stays as it is written.
    return VARIABLE.sub(lambda match: match[0] if match[1] == "PATH" and "PATH" not in values else value(match), text)


def context(repo: Path, ignore: str) -> list[Path]:
    """The files that a build sends, by the patterns of a .dockerignore: the last one that fits decides."""
    patterns = [line for line in ignore.splitlines() if line and not line.startswith("#")]
    tops = [path for path in repo.iterdir() if not _ignored(path.relative_to(repo), patterns)]
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]
    return [path for path in files if not _ignored(path.relative_to(repo), patterns)]


def _ignored(path: Path, patterns: list[str]) -> bool:
    ignored = False
    for pattern in patterns:
        if any(_fits(each, pattern.removeprefix("!")) for each in (path, *path.parents[:-1])):
            ignored = not pattern.startswith("!")
    return ignored


def _fits(path: Path, pattern: str) -> bool:
    """``**/`` stands for any number of directories, and ``*`` for a part of one name."""
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.name, pattern.removeprefix("**/"))
    names = pattern.split("/")
    return len(names) == len(path.parts) and all(map(fnmatch.fnmatch, path.parts, names))
