"""Runs the Dockerfile's steps without Docker, as root: make test-image.

Each stage gets a root directory of its own: an overlay over this machine's, in a mount namespace that ends with this
process, so nothing of it stays. There its RUN, COPY, ENV, USER and WORKDIR are carried out as they are written, and
then the entry point is called as the image's user. What was not run, and what stood in for it, is listed at the end:

- the base image: this machine's system, with this Python as ``python``;
- ``apt-get``: it only checks that it would install these packages;
- downloads of pip (not with ``--download``): the packages of ``.venv`` and ``.venv-extras`` are seen by the image's
  environment, so pip only installs what is missing there, and syncbn, which it builds from the copied files.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support import dockerfile
from tests.support.dockerfile import Stage, Step

REPO = Path(__file__).resolve().parents[2]
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
APT = """#!/bin/sh
case $1 in
update) [ -n "$(ls -A /var/lib/apt/lists)" ] || exec /usr/bin/apt-get -qq update ;;
install) exec /usr/bin/apt-get -qq -o Dir::State::lists=/host-lists --simulate "$@" >/dev/null ;;
*) exec /usr/bin/apt-get "$@" ;;
esac
"""
DEVICES = ("null", "zero", "full", "random", "urandom")
TRAIN = ("train", "model=mlp", "trainer.max_epochs=1", "logger=csv", "run.id=a")


class Builder:
    """The stages' root directories in ``place``, a file system of its own."""

    def __init__(self, place: Path, *, download: bool) -> None:
        self.place, self.download = place, download
        self.checked: list[str] = []
        self.layers: dict[str, list[Path]] = {}
        self.context = dockerfile.context(REPO, (REPO / ".dockerignore").read_text(encoding="utf-8"))

    def build(self, stage: Stage, stages: dict[str, Stage]) -> Path:
        if stage.base in stages and stage.base not in self.layers:
            self.build(stages[stage.base], stages)
        root = self.mount(stage)
        if stage.base not in stages:
            self.checked.append(f"FROM {stage.base}")
            self.stand_in(root)
        for step in stage.steps:
            begin = time.monotonic()
            self.take(step, root, stages)
            print(f"{stage.name}: {step.what} {step.rest[:100]}  {time.monotonic() - begin:.1f} s", flush=True)
        return root

    def mount(self, stage: Stage) -> Path:
        upper, work, root = (self.place / f"{stage.name}-{name}" for name in ("upper", "work", "root"))
        for path in (upper, work, root):
            path.mkdir()
        below = self.layers.get(stage.base, [])
        lower = ":".join(map(str, [*below, "/"]))
        call("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", root)
        self.layers[stage.name] = [upper, *below]
        call("mount", "-t", "proc", "proc", root / "proc")
        for name in ("tmp", "dev"):
            call("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / name)
        for name in DEVICES:  # and no others of this machine's
            (root / "dev" / name).touch()
            call("mount", "--bind", f"/dev/{name}", root / "dev" / name)
        (root / "dev/shm").mkdir(mode=0o1777)
        (root / "dev/shm").chmod(0o1777)
        return root

    def stand_in(self, root: Path) -> None:
        """The base image: Python as ``python``, which its users may execute, and no caches of ours."""
        local = root / "usr/local/bin"
        for name in ("python", "python3"):
            (local / name).unlink(missing_ok=True)
            (local / name).write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 "$@"\n', encoding="utf-8")
            (local / name).chmod(0o755)
        for path in Path(sys.base_prefix).parents:
            (root / path.relative_to("/")).chmod(0o755)
        for name in ("passwd", "group"):  # without this machine's users
            lines = (root / "etc" / name).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if not 1000 <= int(line.split(":")[2]) < 65534]
            (root / "etc" / name).write_text("".join(kept), encoding="utf-8")
        for name in ("root/.cache", "home"):
            shutil.rmtree(root / name, ignore_errors=True)  # in the overlay
        shutil.copytree("/var/lib/apt/lists", root / "host-lists")
        (root / "usr/local/sbin/apt-get").write_text(APT, encoding="utf-8")
        (root / "usr/local/sbin/apt-get").chmod(0o755)

    def take(self, step: Step, root: Path, stages: dict[str, Stage]) -> None:
        if step.what == "WORKDIR":
            (root / step.where.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.what == "COPY":
            self.copy(step, root)
        elif step.what == "RUN":
            if "apt-get install" in step.rest:
                self.checked.append(step.rest.split("&&")[1].strip())
            self.execute(step, root, "sh", "-c", step.rest)
            if not self.download:
                self.lend_packages(root)

    def copy(self, step: Step, root: Path) -> None:
        *sources, target = step.words()
        target = os.path.join(step.where, target) + "/" * target.endswith("/")  # noqa: PTH118  # keeps the last slash
        if sources[0].startswith("--from="):
            (source,) = sources[1:]
            other = self.place / f"{sources[0].removeprefix('--from=')}-root"
            shutil.copytree(other / source.lstrip("/"), root / target.lstrip("/"), symlinks=True)
            return
        for source in sources:
            files = [path for path in self.context if path.relative_to(REPO).is_relative_to(source)]
            assert files, f"COPY {source}: no such file, or .dockerignore leaves it out"
            for path in files:
                inside = path.relative_to(REPO / source) if (REPO / source).is_dir() else Path(path.name)
                place = root / target.lstrip("/") / inside
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)

    def lend_packages(self, root: Path) -> None:
        """New environments see the packages of .venv and .venv-extras, as by a line of a .pth file."""
        ours = [path for name in (".venv", ".venv-extras") for path in REPO.glob(f"{name}/lib/python3*/site-packages")]
        lines = [str(path.resolve()) for path in ours]
        lines += [line for path in ours for file in path.glob("*.pth") for line in file.read_text("utf-8").split("\n")]
        kept = [line for line in lines if line.startswith("/") and line != str(REPO)]
        for path in root.glob("opt/*/lib/python3*/site-packages"):
            (path / "lent.pth").write_text("\n".join(dict.fromkeys(kept)) + "\n", encoding="utf-8")

    def execute(self, step: Step, root: Path, *command: str, **options: object) -> None:
        ours = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        environment = {"PATH": PATH, "HOME": "/root", **ours, "PYTHONDONTWRITEBYTECODE": "1"} | step.environment
        environment["PATH"] = environment["PATH"].replace("${PATH}", PATH)
        user = [f"--userspec={step.user}:{step.user}"] if step.user != "root" else []
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', step.where, *command]
        call("chroot", *user, root, *inside, env=environment, timeout=900, **options)


def call(*command: object, **options: object) -> None:
    done = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", check=False, **options,
    )  # type: ignore[call-overload]  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed with exit code {done.returncode}: {' '.join(map(str, command))}")


def check(builder: Builder, stage: Stage, root: Path) -> None:
    """What a user of the image finds."""
    entry = stage.last("ENTRYPOINT")
    end = Step("RUN", "", stage.environment, stage.user, stage.where)
    builder.execute(end, root, *entry, *stage.last("CMD"))
    where = "import syncbn, syncbn.nn.native as native; assert native.load(); print(syncbn.__file__)"
    builder.execute(end, root, "sh", "-c", f"python -c '{where}' | grep ^/opt/")
    begin = time.monotonic()
    builder.execute(end, root, *entry, *TRAIN)
    print(f"{' '.join([*entry, *TRAIN])}  {time.monotonic() - begin:.1f} s")
    (volume,) = stage.last("VOLUME")
    results = root / volume.lstrip("/") / "outputs/a"
    assert (results / "result.json").exists()
    assert results.stat().st_uid == 1000, "the run does not belong to the image's user"
    caches = [path for name in ("root", "home/syncbn") for path in (root / name).glob(".cache/pip")]
    assert not caches, f"pip's cache is in the image: {caches}"
    assert not list(root.glob("opt/syncbn/**/tests/soak")), "the tests are in the image"


def build(place: Path, arguments: dict[str, str], *, download: bool) -> None:
    """Builds all stages in this directory, in which file systems are mounted and stay so."""
    stages = dockerfile.parse((REPO / "Dockerfile").read_text(encoding="utf-8"), arguments)
    call("mount", "-t", "tmpfs", "tmpfs", place)
    builder = Builder(place, download=download)
    roots = {name: builder.build(stage, stages) for name, stage in stages.items() if name not in builder.layers}
    *_, last = stages.values()
    check(builder, last, roots[last.name])
    lent = [] if download else ["pip's downloads of packages that .venv or .venv-extras has"]
    print("only checked, or stood in for:", *builder.checked, *lent, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", action="store_true", help="install all packages, as a build does")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.place is not None:
        build(options.place, dict(each.split("=", 1) for each in options.build_arg), download=options.download)
        return
    # What is mounted, and what is started, ends with the namespaces. Nothing is removed by name: the roots show this
    # machine's files.
    place = tempfile.mkdtemp(prefix="image-")
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, "-m", "tests.soak.image", "--place", place, *sys.argv[1:]]
    code = subprocess.run(command, cwd=REPO, check=False).returncode
    Path(place).rmdir()
    print(f"{int(not code)} passed, {int(code != 0)} failed")
    sys.exit(code)


if __name__ == "__main__":
    main()
