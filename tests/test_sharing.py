"""The files that others share and release syncbn by: image, dev container, workflows, citation, changelog.

``make test-image`` runs the Dockerfile's steps.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import syncbn
from tests.support import dockerfile

REPO = Path(__file__).parents[1]
DOCKERFILE = (REPO / "Dockerfile").read_text(encoding="utf-8")
IGNORE = (REPO / ".dockerignore").read_text(encoding="utf-8")
WORKFLOWS = sorted((REPO / ".github/workflows").glob("*.yml"))
# GitHub's documentation, "Workflow syntax for GitHub Actions".
KEYS = {
    "workflow": {"name", "run-name", "on", "permissions", "env", "defaults", "concurrency", "jobs"},
    "job": {
        *("name", "permissions", "needs", "if", "runs-on", "environment", "concurrency", "outputs", "env", "defaults"),
        *(
            "steps",
            "timeout-minutes",
            "strategy",
            "continue-on-error",
            "container",
            "services",
            "uses",
            "with",
            "secrets",
        ),
    },
    "step": {
        *("id", "if", "name", "uses", "run", "working-directory", "shell", "with", "env"),
        *("continue-on-error", "timeout-minutes"),
    },
    "container": {"image", "credentials", "env", "ports", "volumes", "options"},
    "events": {"push", "pull_request", "workflow_dispatch"},
}


def steps(text: str) -> list[dockerfile.Step]:
    return [each for stage in dockerfile.parse(text).values() for each in stage.steps]


def test_the_image_is_small_and_has_a_user_an_entry_point_and_a_volume() -> None:
    stages = dockerfile.parse(DOCKERFILE, {"PYTHON": "3.13"})
    *_, last = stages.values()
    assert stages["base"].base == "python:3.13-slim-bookworm"
    assert (last.base, last.user, last.where) == ("base", "syncbn", "/runs")
    assert (last.last("ENTRYPOINT"), last.last("VOLUME")) == (["syncbn"], ["/runs"])
    assert last.environment["PATH"] == "/opt/syncbn/bin:${PATH}"
    for each in steps(DOCKERFILE):
        if "apt-get install" in each.rest:
            assert "--no-install-recommends" in each.rest
            assert "rm -rf /var/lib/apt/lists/*" in each.rest
        if "pip install" in each.rest:
            assert each.environment["PIP_NO_CACHE_DIR"] == "1"
            assert "--constraint constraints.txt" in each.rest


@pytest.mark.parametrize("index", ["", "INDEX"])
def test_one_argument_chooses_torch_for_the_cpu_or_for_cuda(index: str) -> None:
    (torch,) = [
        each
        for each in dockerfile.parse(DOCKERFILE, {"TORCH_INDEX": index})["build"].steps
        if each.what == "RUN" and each.rest.endswith(" torch torchvision")
    ]
    assert torch.environment["TORCH_INDEX"] == index
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in torch.rest


def test_what_is_copied_is_sent_and_nothing_else() -> None:
    sent = {path.relative_to(REPO) for path in dockerfile.context(REPO, IGNORE)}
    copied = [each.words() for each in steps(DOCKERFILE) if each.what == "COPY" and "--from=" not in each.rest]
    sources = {Path(source) for words in copied for source in words[:-1]}
    assert {Path(path.parts[0]) for path in sent} == sources
    assert Path("syncbn/nn/kernels/cpu.c") in sent
    assert not [path for path in sent if path.suffix in (".so", ".pyc")]


@pytest.mark.parametrize(
    ("path", "left_out"),
    [("a/b.so", True), ("b.so", True), ("kept", False), ("kept/x", False), ("kept/y.so", True), ("other/kept", True)],
)
def test_patterns_of_dockerignore(path: str, left_out: bool) -> None:
    assert dockerfile._ignored(Path(path), ["*", "!kept", "**/*.so"]) == left_out


def test_a_dockerfile_is_read_with_arguments_variables_and_continued_lines() -> None:
    text = "ARG A=1\nFROM x:${A} AS one\nENV B=2 C='3 4'\n"
    text += "FROM one\nARG D=d\n# no step\nRUN a \\\n  # nor this\n && b ${D}\n"
    first, second = dockerfile.parse(text, {"A": "9"}).values()
    assert (first.base, second.base, second.name) == ("x:9", "one", "1")
    (run,) = second.steps
    assert (run.rest, run.environment) == ("a && b ${D}", {"B": "2", "C": "3 4", "D": "d"})
    with pytest.raises(AssertionError, match="no ARG"):
        dockerfile.parse(text, {"E": ""})


def test_the_dev_container_is_a_stage_of_the_dockerfile() -> None:
    about = json.loads((REPO / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert about.keys() <= {
        *("name", "build", "remoteUser", "init", "runArgs", "hostRequirements", "containerEnv", "postCreateCommand"),
        "customizations",
    }
    stage = dockerfile.parse(DOCKERFILE)[about["build"]["target"]]
    assert (REPO / ".devcontainer" / about["build"]["dockerfile"]).resolve() == REPO / "Dockerfile"
    assert about["remoteUser"] == stage.user
    needed = re.findall(r"missing\+=\(([\w+-]+)\)", (REPO / ".ci/run").read_text(encoding="utf-8"))
    installed = " ".join(each.rest for each in stage.steps).split()
    assert {*needed} - {"python3-dev"} <= {*installed}  # the base image has Python's headers


def workflow(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8").replace("\non:\n", '\n"on":\n')  # YAML 1.1 reads the word as true
    return yaml.safe_load(text)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_keys_that_github_knows_and_limits(path: Path) -> None:
    about = workflow(path)
    assert about.keys() <= KEYS["workflow"]
    assert about["on"].keys() <= KEYS["events"]
    assert about["permissions"] == {"contents": "read"}
    assert about["concurrency"].keys() == {"group", "cancel-in-progress"}
    for job in about["jobs"].values():
        assert job.keys() <= KEYS["job"]
        assert 0 < job["timeout-minutes"] <= 90
        assert "latest" not in job["runs-on"]
        assert job.get("container", {}).keys() <= KEYS["container"]
        assert {*job.get("needs", "").split()} <= about["jobs"].keys()
        for each in job["steps"]:
            assert each.keys() <= KEYS["step"]
            assert ("uses" in each) != ("run" in each)
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", each.get("uses", f"a/b@{'0' * 40}"))
            if "checkout" in each.get("uses", ""):
                assert each["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_version_of_a_pinned_action_stands_beside_it(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    assert [line for line in lines if not re.search(r"@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line)] == []


def test_ci_runs_on_each_version_of_python() -> None:
    (job,) = workflow(REPO / ".github/workflows/ci.yml")["jobs"].values()
    assert job["strategy"] == {"fail-fast": False, "matrix": {"python": ["3.11", "3.12", "3.13"]}}
    assert job["container"]["image"] == "python:${{ matrix.python }}-bookworm"
    assert job["env"]["PYTHON"] == "python3"
    (cache,) = [each["with"] for each in job["steps"] if "/cache@" in each.get("uses", "")]
    assert cache["path"] == job["env"]["PIP_CACHE_DIR"]
    assert all(f"'{name}'" in cache["key"] and (REPO / name).exists() for name in ("constraints.txt", "pyproject.toml"))
    assert job["steps"][-1]["run"] == "bash .ci/run"


def test_only_the_upload_of_a_release_gets_a_token() -> None:
    jobs = workflow(REPO / ".github/workflows/release.yml")["jobs"]
    assert "permissions" not in jobs["build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert (jobs["publish"]["needs"], jobs["publish"]["environment"]) == ("build", "release")
    assert not [each for each in jobs["publish"]["steps"] if "run" in each]
    assert "secrets." not in (REPO / ".github/workflows/release.yml").read_text(encoding="utf-8")


def test_the_citation_is_valid_and_of_this_version() -> None:
    """By the schema of the Citation File Format 1.2.0, as far as its fields are used."""
    about = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert about.keys() >= {"cff-version", "message", "title", "authors"}  # those that it requires
    optional = {"abstract", "type", "version", "date-released", "license", "keywords", "doi", "url", "repository-code"}
    assert about.keys() - {"cff-version", "message", "title", "authors"} <= optional
    assert (about["cff-version"], about["type"], about["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert all(
        each.keys() <= {"name", "family-names", "given-names", "orcid", "affiliation"} for each in about["authors"]
    )
    assert len({*about["keywords"]}) == len(about["keywords"])
    assert about["version"] == syncbn.__version__


def test_the_changelog_has_a_section_for_this_version() -> None:
    text = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d|unreleased))?$", text, re.MULTILINE)
    assert len(sections) == text.count("\n## ")
    assert syncbn.__version__ in dict(sections)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    assert {*re.findall(r"^### (.+)$", text, re.MULTILINE)} <= kinds
