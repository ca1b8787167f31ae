"""The shape of the project: stages depend on data, settings and versions, and are small."""

import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from blockpruner import versions

ROOT = Path(__file__).parents[1]
VERSIONS = "blockpruner/versions.py"
STAGES = {
    re.search(r"-m stages\.(\w+)", definition.get("do", definition)["cmd"])[1]: definition.get(
        "do", definition
    )
    for definition in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
}
"""By module."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_versions_and_on_no_code(stage):
    assert not [dep for dep in STAGES[stage].get("deps", []) if dep.endswith(".py")]
    entries = [entry for entry in STAGES[stage]["params"] if isinstance(entry, dict)]
    named = [name for entry in entries for name in entry.get(VERSIONS, [])]
    assert named or stage in ("settings", "local")
    assert set(named) <= {name for name in vars(versions) if name.endswith("_VERSION")}


@pytest.mark.parametrize("stage", STAGES)
def test_no_shell_reads_a_name_of_params(stage):
    """DVC puts names into commands before anything checks them."""
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_small(stage):
    body = (ROOT / "stages" / f"{stage}.py").read_text().splitlines()
    main = body.index(next(line for line in body if line.startswith("def main(")))
    assert len(body) - main <= 40


def test_only_settings_depends_on_files_of_settings():
    """The others depend on resolved sections, `commit` also on its target and `tables` on its
    study."""
    for stage, definition in STAGES.items():
        files = {file for entry in definition["params"] for file in entry} - {VERSIONS, "dag.yaml"}
        if stage not in ("settings", "report"):
            own = {"commit": {"params.yaml"}, "tables": {"studies/${key}.yaml"}}
            own["experiment"] = {"studies/${item.study}.yaml"}
            assert files == own.get(stage, set()), stage
    assert {"params.yaml": ["targets.${key}"]} in STAGES["commit"]["params"]


def test_stages_depend_on_their_inputs_only():
    """Nothing but commit may depend on the score tables: their hash depends on history."""
    users = [name for name, s in STAGES.items() if any("/scores" in d for d in s.get("deps", []))]
    assert users == ["commit"]


def test_constraints_pin_all_that_setup_installs():
    """torch alone is pinned by the Makefile. `make constraints` renews what is stale."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    wanted = [Requirement(text) for text in (*project["dependencies"], "blockpruner[dag,dev,ray]")]
    for each in wanted:  # grows while it is read: an extra may name others
        if each.name == "blockpruner":
            wanted += [Requirement(text) for extra in each.extras for text in groups[extra]]
    wanted = [each for each in wanted if each.name != "blockpruner"]
    assert {"prefect", "pytest", "ray", "gguf"} <= {each.name for each in wanted}
    text = "".join(
        (ROOT / name).read_text()
        for name in ("constraints/dag.txt", "constraints/dev.txt", "Makefile")
    )
    pins = re.findall(r"^(?:TORCH := )?([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    assert not [
        str(each)
        for each in wanted
        if not any(
            canonicalize_name(name) == canonicalize_name(each.name) and pin in each.specifier
            for name, pin in pins
        )
    ]


def test_setup_installs_by_digest_and_builds_with_nothing_that_is_not_pinned():
    """Some packages have no wheel. For these pip would fetch a build backend, which no hash of
    theirs covers."""
    commands = subprocess.run(
        ["make", "-Bn", "setup"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installs = [line for line in commands.splitlines() if "pip install" in line]
    assert len(installs) == 5 and installs[0].startswith("sed -n '/^setuptools==/,")
    for line in installs:
        assert "--no-build-isolation" in line or "--only-binary :all:" in line
        assert (
            "--require-hashes" in line
            or line.endswith("--editable .")
            or re.search(r" torch==[\d.]+$", line)
        )
    for name in ("constraints/dag.txt", "constraints/dev.txt", "constraints/docs.txt"):
        text = re.sub(r" \\\n +", " ", (ROOT / name).read_text())
        pins = [line for line in text.splitlines() if not line.startswith("#")]
        assert pins and all(
            re.match(r"[\w.-]+==[^#]* --hash=sha256:[0-9a-f]{64}( |$)", line) for line in pins
        )


def test_no_class_name_is_used_twice():
    files = [
        path
        for folder in ("blockpruner", "study", "stages", "flows")
        for path in (ROOT / folder).rglob("*.py")
    ]
    names = Counter(
        name
        for path in files
        for name in re.findall(r"^class (\w+)", path.read_text(), flags=re.MULTILINE)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_no_environment_variable_of_ours_changes_a_result():
    """They name a store of exact trials, who watches, and which process started another."""
    paths = [
        path
        for folder in ("blockpruner", "study", "stages", "flows")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {name for path in paths for name in re.findall(r"BLOCKPRUNER_(\w+)", path.read_text())}
    assert found == {"TRIALS", "OBSERVER", "REPORT_PAGES", "DVC_PARENT", "PREFECT_PARENT"}
