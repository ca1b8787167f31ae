"""What `stages.clean` keeps and deletes, against lists written by hand; the stores are files of a few bytes."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from blockpruner.core.errors import InputError
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.store.files import HOST
from blockpruner.store.trials import checksummed
from stages import clean

ROOT = Path(__file__).parents[2]
PARAMS = {
    "runs": ["tiny"],
    "targets": {
        "small": {"run": "tiny", "budget": "2blocks"},
        "x.bad": {"run": "tiny", "budget": "3blocks"},
        "lora.bad-lr": {"run": "tiny", "budget": "4blocks", "recover": True},
    },
    "paper": {"studies": ["study"], "sets": ["ours"]},
}
ROWS = ((1, 2, 3), (4, 5, 6, 7))
PACKAGE, OTHER_PACKAGE = "a" * 64, "b" * 64
OTHER = "0" * 64
"""A model that nobody names."""


def write(path, value=""):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def source(folder, identity):
    write(f"{folder}/blockpruner_source.json", {"identity": identity, "source": {}})


def digest(rows):
    return hashlib.sha256(b"".join(np.array([len(row), *row], "<i4").tobytes() for row in rows)).hexdigest()


def identity(config):
    """Of a checkpoint that is a config only."""
    return hashlib.sha256(f"config.json:{hashlib.sha256(config.encode()).hexdigest()}\n".encode()).hexdigest()


def store(name, model, calibration):
    write(f"data/trials/{name}/fingerprint.json", {"model": model, "calibration": calibration, "metric": "nll"})
    write(f"data/trials/{name}/host-1-2.jsonl")
    write(f"data/trials/{name}.lock", "1")


def similarities(name, model, calibration):
    write(f"data/trials/laco-{name}.jsonl", checksummed({"fields": {"model": model, "calibration": calibration}}))


def evaluation(name, model):
    write(f"data/evaluations/{name}.json", {"key": {"model": model, "task": "piqa"}, "value": {}})
    write(f"data/evaluations/{name}.parquet")


STAYS, GOES, LEFT = "stays", "goes", "not an entry"
TRIALS = {"run": STAYS, "other-rows": GOES, "study": STAYS, "unknown": GOES, "damaged": STAYS, "foreign": STAYS}
SIMILARITIES = {"run": STAYS, "other-rows": GOES, "unknown": GOES, "damaged": GOES, "foreign": GOES, "list": GOES}
EVALUATIONS = {
    "dense": STAYS, "small": STAYS, "x.bad": STAYS, "lora": STAYS, "before-lora": STAYS, "study": STAYS,
    "unknown": GOES, "damaged": GOES, "foreign": GOES, "list": GOES, "keyless": GOES,
}  # fmt: skip
CACHE = {
    f"packages/{PACKAGE}": STAYS, f"packages/{OTHER_PACKAGE}": GOES, f"packages/.{OTHER_PACKAGE}.host-1.tmp": LEFT,
    "models/" + "1" * 16: STAYS, "models/" + "2" * 16: STAYS, "models/" + "3" * 16: GOES, "models/" + "4" * 16: GOES,
    "models/." + "3" * 16 + ".host-1.tmp": LEFT, "models/tmpab12cd34": LEFT, "models/" + "1" * 16 + ".bad": GOES,
}  # fmt: skip
ASIDE = {
    "scores/tiny/s/iteration_001.parquet.bad": GOES, "trials/latency-1.json.bad.12": GOES,
    "trials/run/host-1-2.jsonl.bad": GOES, "scores/tiny/s/a.bad.txt": LEFT, "scores/tiny/s/a.badly": LEFT,
    "scores/tiny/s/a.bad.x": LEFT,
}  # fmt: skip
OUTPUTS = {
    f"{kind}/{name}": fate
    for kinds, names in [
        (("models", "sources", "calibration", "scores"), {"tiny": STAYS, "old": GOES, "old.bad": GOES, "small": GOES}),
        (("plans", "checkpoints", "recovered"), {"small": STAYS, "x.bad": STAYS, "lora.bad-lr": STAYS, "old": GOES}),
        (("results",), {"tiny-dense": STAYS, "x.bad": STAYS, "lora.bad-lr": STAYS, "old-dense": GOES, "tiny": GOES}),
        (("studies",), {"study": STAYS, "of-a-set": STAYS, "old": GOES}),
        (("tables",), {"ours": STAYS, "others": GOES}),
    ]
    for kind in kinds
    for name, fate in names.items()
} | {"scores/.tiny.host-1.tmp": LEFT, "metrics/old": LEFT, "report": LEFT}
KILLED = (
    f"data/cache/models/.3333333333333333.{HOST}-999999999.tmp", f"data/checkpoints/.small.{HOST}-999999999.tmp",
    f"data/trials/.latency-1.json.{HOST}-999999999.tmp",
)  # fmt: skip
"""Temporary files of a process of this machine that does not run."""

ENTRIES = (
    {f"data/trials/{name}": fate for name, fate in TRIALS.items()}
    | {f"data/trials/laco-{name}.jsonl": fate for name, fate in SIMILARITIES.items()}
    | {f"data/evaluations/{name}.json": fate for name, fate in EVALUATIONS.items()}
    | {f"data/{name}": fate for name, fate in (OUTPUTS | ASIDE).items()}
    | {f"data/cache/{name}": fate for name, fate in CACHE.items()}
    | {"data/adapters/1.safetensors": STAYS, "data/adapters/.1.safetensors.host-1.tmp": LEFT}
    | dict.fromkeys(KILLED, GOES)
)


EXPECTED = {path: fate for path, fate in ENTRIES.items() if fate is not LEFT}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Every entry of ENTRIES; in the folder of this test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BLOCKPRUNER_TRIALS", raising=False)
    write("params.yaml", yaml.safe_dump(PARAMS))
    run = yaml.safe_load((ROOT / "runs/smollm2.yaml").read_text())
    run["recover"] = {"data": run["evaluate"]["perplexity"]["data"]}
    run["model"]["sha256"] = PACKAGE
    study = yaml.safe_load((ROOT / "runs/smollm2-paper.yaml").read_text())
    study["model"] = {"source": "hub", "repo": "one/model"}
    for name, settings in {"tiny": run, "study": study, "of-a-set": study}.items():
        write(f"runs/{name}.yaml", yaml.safe_dump(settings))
    write("runs/sets.yaml", "ours: [study, of-a-set]")
    for name, fate in OUTPUTS.items():
        write(f"data/{name}/.keep" if fate is LEFT else f"data/{name}/file")

    source("data/models/tiny", "1" * 64)
    source("data/studies/study/model", "2" * 64)
    CalibrationSet(ROWS).save(Path("data/calibration/tiny/rows.parquet"), "by hand")
    built = {"small": "checkpoints/small", "x.bad": "checkpoints/x.bad", "lora": "recovered/lora.bad-lr",
             "before-lora": "checkpoints/lora.bad-lr"}  # fmt: skip
    for name, folder in built.items():
        write(f"data/{folder}/hf/config.json", name)

    store("run", "1" * 64, digest(ROWS))
    store("other-rows", "1" * 64, digest(ROWS[:1]))
    store("study", "2" * 64, digest(ROWS[:1]))
    store("unknown", OTHER, digest(ROWS))
    similarities("run", "1" * 64, digest(ROWS))
    similarities("other-rows", "1" * 64, digest(ROWS[:1]))
    similarities("unknown", OTHER, digest(ROWS))
    write("data/trials/laco-damaged.jsonl", "00000000 {}")
    write("data/trials/laco-foreign.jsonl", checksummed({"fields": [1]}))
    write("data/trials/laco-list.jsonl", checksummed([1]))
    write("data/trials/damaged/fingerprint.json", '{"mod')
    write("data/trials/foreign/fingerprint.json", "{}")

    for name, model in {"dense": "1" * 64, "study": "2" * 64, "unknown": OTHER}.items():
        evaluation(name, model)
    for name in built:
        evaluation(name, identity(name))
    write("data/evaluations/damaged.json", '{"key')
    write("data/evaluations/foreign.json", "{}")
    write("data/evaluations/list.json", [])
    write("data/evaluations/keyless.json", {"key": {"model": [1]}})
    write("data/adapters/1.safetensors")
    write("data/adapters/.1.safetensors.host-1.tmp")
    for name in CACHE:
        if name.startswith("packages"):
            write(f"data/cache/{name}/file.whl")
        else:
            source(f"data/cache/{name}", name.removeprefix("models/")[0] * 64)
    write("data/cache/models/4444444444444444/blockpruner_source.json", "{}")
    for name in ASIDE:
        write(f"data/{name}")
    for path in KILLED:
        write(f"{path}/{Path(KILLED[0]).name}/file")


def judged():
    notes = []
    found = [(str(entry.paths[0]), STAYS if entry.used else GOES) for entry in clean.entries(notes.append)]
    assert len(found) == len(dict(found)), "an entry of two stores"
    return dict(found), [line for line in notes if "damaged" not in line]


def but(*staying):
    """EXPECTED, where these stay as well."""
    assert all(EXPECTED[path] is GOES for path in staying)
    return EXPECTED | dict.fromkeys(staying, STAYS)


def with_params(**changes):
    write("params.yaml", yaml.safe_dump(PARAMS | changes))


def files():
    return {path for path in Path("data").rglob("*") if path.is_file()}


def of(paths):
    """The files of entries: themselves, what is in them, and an evaluation's items."""
    paths = {Path(path) for path in paths}
    return {file for file in files() if {file, *file.parents} & paths or file.with_suffix(".json") in paths}


def test_every_entry_is_judged():
    found, notes = judged()
    assert found == EXPECTED and notes == []


def test_exactly_what_is_unused_is_deleted():
    before = files()
    goes = of(path for path, fate in EXPECTED.items() if fate is GOES)
    clean.main("")
    assert files() == before
    clean.main("delete")
    assert before - files() == goes
    assert not any(Path(path).exists() for path, fate in EXPECTED.items() if fate is GOES), "an empty folder"
    clean.main("delete")
    assert before - files() == goes


UNKNOWN_TO_A_STUDY = (
    "data/trials/unknown", "data/trials/laco-unknown.jsonl", "data/evaluations/unknown.json",
    "data/cache/models/" + "3" * 16,
)  # fmt: skip


def test_of_a_study_without_a_model_everything_of_unknown_models_is_kept():
    shutil.rmtree("data/studies/study/model")
    found, notes = judged()
    assert found == but(*UNKNOWN_TO_A_STUDY)
    (note,) = notes
    assert "study 'study'" in note and "data/studies/study/model" in note


PYPI = yaml.safe_load((ROOT / "runs/smollm2.yaml").read_text())["model"] | {"sha256": PACKAGE}
HUB = {"source": "hub", "repo": "one/model"}


@pytest.mark.parametrize(
    ("of_run", "of_study", "same"),
    [
        (PYPI, PYPI, True),
        (PYPI, PYPI | {"dtype": "bfloat16"}, False),
        (PYPI, HUB, False),
        (HUB, HUB | {"dtype": "float32", "revision": "main"}, True),
        (HUB, HUB | {"repo": "another/model"}, False),
    ],
)
def test_a_study_without_a_model_may_be_of_the_model_of_a_run(of_run, of_study, same):
    shutil.rmtree("data/studies/study/model")
    for name, model in {"tiny": of_run, "study": of_study}.items():
        settings = yaml.safe_load(Path(f"runs/{name}.yaml").read_text())
        write(f"runs/{name}.yaml", yaml.safe_dump(settings | {"model": model}))
    assert judged()[0]["data/trials/other-rows"] is (STAYS if same else GOES)


@pytest.mark.parametrize("folder", ["checkpoints/small", "checkpoints/x.bad/hf", "recovered/lora.bad-lr/hf"])
def test_without_a_targets_checkpoint_no_evaluation_goes(folder):
    path = Path("data") / folder
    shutil.rmtree(path)
    found, notes = judged()
    kept = but("data/evaluations/unknown.json")
    kept.pop(str(path), None)
    assert found == kept
    (note,) = notes
    assert f"target {path.parts[2]!r}" in note and "/".join(path.parts[:3]) in note


def test_a_recovered_target_does_not_need_its_checkpoint():
    shutil.rmtree("data/checkpoints/lora.bad-lr")
    found, notes = judged()
    expected = EXPECTED | {"data/evaluations/before-lora.json": GOES}
    del expected["data/checkpoints/lora.bad-lr"]
    assert found == expected and notes == []


def test_a_store_that_another_process_holds_is_skipped(capsys):
    before, held = files(), of(["data/trials/unknown"])
    goes = of(path for path, fate in EXPECTED.items() if fate is GOES)
    with open("data/trials/unknown.lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        clean.main("delete")
    assert before - files() == goes - held and held
    lines = [line for line in capsys.readouterr().out.splitlines() if "data/trials/unknown" in line]
    assert lines == ["  in use by another process, kept: data/trials/unknown"]
    clean.main("delete")
    assert before - files() == goes
    assert Path("data/trials/unknown.lock").exists()


def test_trials_that_others_share_are_left_alone(tmp_path, monkeypatch):
    Path("data/trials").rename(tmp_path / "shared")
    monkeypatch.setenv("BLOCKPRUNER_TRIALS", str(tmp_path / "shared"))
    before = set((tmp_path / "shared").rglob("*"))
    clean.main("delete")
    assert set((tmp_path / "shared").rglob("*")) == before


def test_adapters_are_used_as_long_as_a_target_is_recovered():
    with_params(targets={name: target | {"recover": False} for name, target in PARAMS["targets"].items()})
    assert judged()[0]["data/adapters/1.safetensors"] is GOES


def test_outputs_are_those_of_the_stages():
    """A stage for a name has its name in the path of its output."""
    stages = [stage for path in ("dvc.yaml", "runs/dvc.yaml")
              for stage in yaml.safe_load((ROOT / path).read_text())["stages"].values()]  # fmt: skip
    outs = [next(iter(out)) if isinstance(out, dict) else out for s in stages for out in s.get("do", s)["outs"]]
    folders = {Path(out).parts[1] for out in outs if "${" in out}
    found = {entry.paths[0].parts[1] for entry in clean.entries(print) if entry.store == "outputs"}
    assert found == folders and "scores" in folders


@pytest.mark.parametrize("path", ["data/models/tiny/blockpruner_source.json", "data/calibration/tiny/rows.parquet"])
def test_a_run_that_is_not_here_ends_it(path):
    Path(path).unlink()
    with pytest.raises(InputError, match="run 'tiny' is not fetched and calibrated here"):
        clean.main("delete")
