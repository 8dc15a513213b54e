"""On first use make shows what pip installs; the lines of pip are those of versions 23.0 and 26.1."""

from pathlib import Path

import pytest

import install_packages
from install_packages import Report

REPO = Path(__file__).parents[1]
PIP = """\
Obtaining file:///home/me/syncbn
  Preparing editable metadata (pyproject.toml): started
Collecting torch>=2.11 (from syncbn==0.1)
  Downloading torch-2.13.0-cp311-none-manylinux_2_28_x86_64.whl.metadata (29 kB)
Collecting pandas>=2.2
  Using cached pandas-3.1.1-cp311-cp311-manylinux_2_24_x86_64.whl (12.4 MB)
Collecting filelock (from torch)
  Downloading https://files.pythonhosted.org/packages/ab/filelock-4.2.11-py3-none-any.whl (222 kB)
Downloading torch-2.13.0-cp311-none-manylinux_2_28_x86_64.whl (1.2 GB)
Processing LOCAL
Installing collected packages: filelock, torch, pandas, scipy
Successfully installed filelock-4.2.11
"""


@pytest.mark.parametrize("tty", [False, True])
def test_large_files_are_named_and_all_are_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tty: bool
) -> None:
    local = tmp_path / "scipy-1.17.1-cp311-cp311-any.whl"
    with local.open("wb") as file:
        file.truncate(7_000_000)
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed/x").write_bytes(bytes(3_000_000))
    report = Report(tty=tty)
    for line in PIP.replace("LOCAL", str(local)).splitlines():
        report.line(line)
    report.end(tmp_path / "installed")
    out = capsys.readouterr().out
    kept = [line.rsplit("\r\x1b[2K", 1)[-1] for line in out.rstrip("\n").split("\n")]
    assert kept == [
        "  pandas 3.1.1, 12.4 MB, from pip's cache",
        "  torch 2.13.0, 1,200.0 MB",
        "  scipy 1.17.1, 7.0 MB, a local file",
        "  4 files of 1,220 MB together, after 0 s; now unpacking 4 packages",
        "  done in 0 s: installed has 3 MB",
    ]
    assert ("3 packages to resolve so far, now filelock" in out) is tty


def test_the_packages_of_pyproject_are_named_with_their_versions() -> None:
    named = install_packages.asked(["--editable", ".[dev]"])
    assert named.startswith("torch 2.")
    for line in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(("lightning==", "Jinja2==", "pre_commit==")):
            name, version = line.split("==")
            assert f", {name.lower().replace('_', '-')} {version}" in named
    assert "timm" not in named
    assert "timm 1." in install_packages.asked([".[vision,export]"])


def test_all_environments_are_made_so() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert makefile.count("install_packages.py --constraint") == 3
    assert "pip install --quiet" not in makefile


def test_errors_of_pip_are_printed_but_for_the_warning_that_comes_once_per_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = "WARNING: Location 'file:///wheels/torch/' is ignored: it is neither a file nor a directory.\n"
    others = ["WARNING: the cache is disabled\n", "ERROR: No matching distribution found for torch\n", "  more\n"]
    install_packages.pass_on([missing, others[0], missing, *others[1:]])
    assert capsys.readouterr().err == "".join(others)
