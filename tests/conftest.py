"""Tests run beside each other: one torch thread each, no hub, nothing that depends on how fast the machine is.

Property tests draw the same examples where the same modules are imported; `pytest --hypothesis-profile=explore` draws
others.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="blockpruner-tests-")  # else all processes copy into one

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.fake_devices import SETUP, start_gradients

torch.set_num_threads(1)
settings.register_profile("explore", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified in this process."""
    from blockpruner.checkpoints import verification
    from tests.plans import InProcess

    monkeypatch.setattr(verification, "subprocess", InProcess)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_configure(config: pytest.Config) -> None:
    """No test sees a GPU, nor do its child processes, unless asked by `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if SETUP is not None:
            start_gradients()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"])
