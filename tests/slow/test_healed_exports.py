"""Every format of a refitted and of a trained SmolLM2, verified by its own engine."""

import json

import pytest

from blockpruner.checkpoints.registry import EXPORTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", [row.name for row in EXPORTS.values()])
def test_healed_models_in_every_format(tmp_path, healed, form):
    for name, made in healed.items():
        EXPORTS[form].write(made, tmp_path / name)
        report = json.loads((tmp_path / name / "verification.json").read_text())
        print(form, name, {key: value for key, value in report.items() if key != "manifest"})
        assert report["ok"], "verified by its engine, which is installed"
