"""Targets as runs of a tracker: Trackio itself where it is installed (the extra `trackio`), else a stand-in for it."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockpruner.core.errors import MissingPackageError
from blockpruner.store.files import write_json
from blockpruner.store.plans import save_plan
from flows import tracking
from tests.plans import plan_of
from tests.tiny import tiny_model

REAL = importlib.util.find_spec("trackio") is not None


class StandIn(SimpleNamespace):
    """Keeps what it is given, by the signatures of trackio 0.43."""

    def init(self, project, name=None, group=None, *, config=None, auto_log_gpu=None, auto_log_cpu=None):
        self.open = {"project": project, "name": name, "group": group, "config": config, "metrics": []}

    def log(self, metrics, step=None):
        self.open["metrics"].append(metrics)

    def finish(self):
        self.runs.append(self.open)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Reads the runs of project `ours`: their names, groups, settings and logged metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tracking.VARIABLE, "ours")
    if REAL:
        from trackio import Api, utils
        from trackio.sqlite_storage import SQLiteStorage

        for module in (utils, sys.modules[SQLiteStorage.__module__]):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")

        def read():
            for run in Api().runs("ours"):
                logs = SQLiteStorage.get_logs("ours", run.name)
                yield (
                    run.name,
                    run.config,
                    [{k: v for k, v in row.items() if k not in ("timestamp", "step")} for row in logs],
                )
    else:
        stand_in = StandIn(runs=[])
        monkeypatch.setitem(sys.modules, "trackio", stand_in)
        monkeypatch.setattr(tracking, "find_spec", lambda name: name == "trackio")

        def read():
            return ((run["name"], run["config"], run["metrics"]) for run in stand_in.runs if run["project"] == "ours")

    return lambda: sorted(read(), key=lambda run: run[0])


@pytest.fixture
def built(recorded):
    """Two targets of a run, benchmarked, of which one was timed here."""
    targets = {f"tiny-{n}": {"run": "tiny", "budget": f"{n}blocks"} for n in (1, 2)}
    values = {"runs": ["tiny"], "targets": targets | {"tiny-3": {"run": "tiny", "budget": "3blocks"}}}
    for name, content in {"params.yaml": values, "runs/tiny.yaml": {"model": {"source": "hub", "repo": "a/b"}}}.items():
        write_json(Path(name), content)  # JSON is YAML
    write_json(tracking.METRICS / "tiny-dense.json", {"perplexity": 20.0, "average": None})
    for number, name in enumerate(targets, 1):
        plan = plan_of(tiny_model().config.to_dict(), [f"mha.{layer}" for layer in range(number)], run="tiny")
        save_plan(plan, tracking.PLANS / name / "plan.json")
        write_json(tracking.METRICS / f"{name}.json", {"perplexity": 20.0 + number, "average": 0.5})
    write_json(tracking.EVIDENCE / "tiny-1" / "speed.json", {"speed": {"speedup_generation": 1.25, "dense": {}}})
    return recorded


def test_every_built_target_is_one_run_once(built, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flows.tracking", "ours"])
    assert tracking.main() == 0
    (first, config, metrics), (second, _, others) = built()
    assert first.rpartition("-")[0] == "tiny-1" and second.rpartition("-")[0] == "tiny-2"
    assert config["run"] == "tiny" and config["removed"] == "mha.0" and config["model"]["repo"] == "a/b"
    assert config["calibration"]["num_samples"] == 256
    assert [{k: v for k, v in row.items() if k != "ratio"} for row in metrics] == [
        {"dense/perplexity": 20.0, "perplexity": 21.0, "average": 0.5, "speedup_generation": 1.25}
    ]
    assert 0 < metrics[0]["ratio"] < others[0]["ratio"] and "speedup_generation" not in others[0]
    assert tracking.main() == 0 and len(built()) == 2  # the same again
    write_json(tracking.METRICS / "tiny-2.json", {"perplexity": 22.5})
    assert tracking.main() == 0
    assert sorted(row["perplexity"] for name, _, (row,) in built() if name.startswith("tiny-2")) == [22.0, 22.5]


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.delenv(tracking.VARIABLE, raising=False)
    assert tracking.project() == ""
    monkeypatch.setenv(tracking.VARIABLE, "ours")
    with pytest.raises(MissingPackageError, match=r"pip install 'blockpruner\[trackio\]'"):
        tracking.project()
