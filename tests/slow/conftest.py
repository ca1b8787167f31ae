"""What the slow tests run on: SmolLM2 as the pipeline fetches it."""

from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "data/models/smollm2"


@pytest.fixture(scope="session")
def smollm2():
    assert MODEL.exists(), "fetch the model first: dvc repro fetch@smollm2"
    return MODEL
