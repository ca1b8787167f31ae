"""Tests run beside each other: one torch thread each, no hub, nothing that depends on how fast the
machine is.

Property tests draw the same 40 examples where the same modules are imported, and 100 in
`make test-slow`; `pytest --hypothesis-profile=explore` draws others.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
# else all processes copy into one
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="blockpruner-tests-")

import pytest
import torch
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests import forking
from tests.fake_devices import SETUP, start_gradients
from tests.shards import in_shard
from tests.shipped import replace_shipped

replace_shipped(Path(tempfile.mkdtemp(prefix="blockpruner-tests-")))
# A sync takes milliseconds, and only tests/power.py, which counts them, cuts the power.
os.fsync = lambda descriptor: None
torch.set_num_threads(1)
settings.register_profile(
    "explore", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("all", settings.get_profile("explore"), derandomize=True)
settings.register_profile("same", settings.get_profile("all"), max_examples=40)
settings.load_profile("same")

FOLDER = pytest.StashKey[Path]()
"""Where the server of forked processes is, in the process that began the session."""


@pytest.fixture
def true_starts() -> Iterator[None]:
    """Stages and dvc are not forked from a process that has loaded torch."""
    with forking.true_starts():
        yield


@pytest.fixture
def real_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own texts are those that are downloaded."""
    from blockpruner.inputs import sources
    from tests.shipped import REAL

    monkeypatch.setattr(sources, "OURS", REAL)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified in this process."""
    from blockpruner.checkpoints import verification
    from tests.fakes import InProcess

    monkeypatch.setattr(verification, "subprocess", InProcess)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shard", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    """No test sees a GPU, nor do its child processes, unless asked by `-m gpu`."""
    if forking.VARIABLE not in os.environ:
        config.stash[FOLDER] = forking.folder()
    if config.option.markexpr == "slow" and not config.getoption("hypothesis_profile", None):
        settings.load_profile("all")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if SETUP is not None:
            start_gradients()


@cache
def _shares_fixtures(path: str) -> bool:
    return 'scope="module"' in Path(path).read_text()


def _scope(config: pytest.Config, nodeid: str) -> str:
    """The tests that run together: those of a file that shares fixtures, else a test alone."""
    path = nodeid.split("::")[0]
    return path if _shares_fixtures(str(config.rootpath / path)) else nodeid


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    runs = in_shard([_scope(config, item.nodeid) for item in items], config.getoption("shard"))
    config.hook.pytest_deselected(
        items=[item for item, here in zip(items, runs, strict=True) if not here]
    )
    items[:] = [item for item, here in zip(items, runs, strict=True) if here]


class _Scheduling(LoadScopeScheduling):
    """Tests of a file that shares fixtures run in one worker, and all others anywhere.

    xdist's own `loadgroup` does not see its groups with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _scope(self.config, nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    return _Scheduling(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """No collection of garbage looks at what torch and the tests have loaded."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if FOLDER in config.stash:
        shutil.rmtree(config.stash[FOLDER])
    shutil.rmtree(os.environ["HF_MODULES_CACHE"])
