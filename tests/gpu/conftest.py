"""On what the tests in here run: a GPU, or with ``--device cpu`` Triton's interpreter and torch's CPU kernels."""

import os
import subprocess
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from syncbn.nn.kernels import gpu
from syncbn.testing import force_exchange
from tests.support.ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: Triton's interpreter, and no GPU")
    parser.addoption("--examples", type=int, help="how many cases to draw (default: 40, in the interpreter 20)")


def pytest_configure(config: pytest.Config) -> None:
    """What processes must find in their environment, those that tests start included."""
    if config.option.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.device == "cpu":
        if not gpu.interprets():
            pytest.exit("--device cpu needs Triton, for its interpreter: pip install triton", returncode=1)
    elif not torch.cuda.is_available():
        pytest.exit("no GPU that torch can use; to try these tests on the CPU: --device cpu", returncode=1)


def pytest_report_header(config: pytest.Config) -> str:
    name = torch.cuda.get_device_name() if config.option.device == "cuda" else "Triton's interpreter, on the CPU"
    return f"device: {name}; torch {torch.__version__}"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Ranks with interpreters of their own: the server of the others imports what a GPU machine need not have."""
    pool = Ranks(popen=subprocess.Popen)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.option.device


@pytest.fixture(scope="session")
def examples(request: pytest.FixtureRequest, device: str) -> int:
    return request.config.option.examples or {"cuda": 40, "cpu": 20}[device]


@pytest.fixture
def cuda(device: str) -> torch.device:
    """For what there is on a GPU alone."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def group(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: NCCL's on a GPU."""
    store = tmp_path_factory.mktemp("group") / "store"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def exchanging(group: None) -> Iterator[None]:
    """The layer exchanges with itself, so that what runs is the distributed code."""
    with force_exchange():
        yield
