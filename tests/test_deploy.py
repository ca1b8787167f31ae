"""What the recipe for work pools names is there: flows, pools, files, the target of make. No Docker
is run."""

import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.serve import FLOWS

ROOT = Path(__file__).parents[1]
RECIPE = (ROOT / "docs/operations.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("name", ["process", "docker"])
def test_each_pool_has_every_flow_that_is_served(name):
    """By module: a path of a file would put flows/ first on sys.path, and flows/dvc.py in the place
    of DVC."""
    own = [deployment for deployment in DEPLOYMENTS if deployment["name"] == name]
    assert [pkgutil.resolve_name(each["entrypoint"]) for each in own] == [*FLOWS]
    (pool,) = {each["work_pool"]["name"] for each in own}
    for line in (
        f"work-pool create {pool} --type {name}",
        f"worker start --pool {pool}",
        f"deploy --name '*/{name}'",
    ):
        assert line in RECIPE, line


def test_the_image_is_built_of_files_that_are_there(tmp_path):
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, tmp_path / (target if len(sources) == 1 else source))
    (command,) = re.findall(r"\bmake VENV.*$", DOCKERFILE, re.MULTILINE)
    made = subprocess.run(
        [*command.split(), "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "/opt/venv/bin/python -m pip install" in made.stdout and "--editable ." in made.stdout
    assert {*re.findall(r"--build-arg (\w+)", RECIPE)} <= {
        *re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    }
