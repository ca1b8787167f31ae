"""The sdist and the wheel build, hold the library alone, and run without the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TOP = {
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
    "MANIFEST.in",
    "pyproject.toml",
}
WRITTEN = {"PKG-INFO", "setup.cfg", "blockpruner.egg-info"}
LOAD = """
import sys
sys.modules["blockpruner"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("pruned", trust_remote_code=True)
print(model.num_parameters(), len(model.generate(model.dummy_inputs["input_ids"], max_new_tokens=3)))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it, of a clone in which somebody has worked."""
    source = tmp_path_factory.mktemp("clone")
    for folder in (
        "blockpruner",
        "flows",
        "stages",
        "study",
        "tests",
        "docs",
        "runs",
        "data/metrics",
        "data/paper",
    ):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in TOP:
        shutil.copy(ROOT / name, source)
    for left in (
        "data/models/a/model.safetensors",
        "data/cache/x.py",
        ".venv/bin/python",
        "blockpruner/a.safetensors",
    ):
        (source / left).parent.mkdir(parents=True, exist_ok=True)
        (source / left).write_text("not to be published")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """A new environment with the wheel; what it requires is taken from this one."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "--python",
        place / "bin/python",
    ]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--no-compile", built[1]], check=True
    )
    (site,) = place.glob("lib/python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    return place


@pytest.fixture
def run(environment, tmp_path):
    def run(program, *arguments):
        """Standard output of a program of the environment."""
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [environment / "bin" / program, *map(str, arguments)]
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=variables
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    save_tiny(tmp_path / "models/mine")
    for name in ("calibration.txt", "heldout.txt"):
        (tmp_path / name).write_text(
            "\n".join(f"{i} little words and {i * i} more" for i in range(60))
        )
    return run


def test_the_sdist_holds_the_library_and_nothing_of_anybodys_data(built):
    with tarfile.open(built[0]) as archive:
        names = [
            Path(member.name).relative_to(Path(member.name).parts[0])
            for member in archive
            if member.isfile()
        ]
    assert {name.parts[0] for name in names} == TOP | WRITTEN | {"blockpruner"}
    ours = {path.relative_to(ROOT) for path in (ROOT / "blockpruner").rglob("*.py")}
    extra = {name for name in names if name.parts[0] == "blockpruner"} - ours
    assert ours <= set(names)
    assert {name.name for name in extra} == {
        "py.typed",
        "page.html",
        "page.md",
        "packages.txt",
        "sources.yaml",
    }


def test_the_wheel_holds_the_library_its_licence_and_its_types(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (info,) = {name.partition("/")[0] for name in names} - {"blockpruner"}
        facts = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "blockpruner/py.typed" in names and not [
        name for name in names if name.endswith(".safetensors")
    ]
    assert (
        facts["License-Expression"] == "Apache-2.0"
        and facts["Description-Content-Type"] == "text/markdown"
    )
    assert {"dag", "eval", "gguf", "mlx", "ray", "report", "s3", "serve", "train"} <= set(
        facts.get_all("Provides-Extra")
    )
    assert facts.get_payload() == README


def test_the_command_prunes_and_transformers_alone_loads_the_result(run, tmp_path):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("blockpruner", "--version"))
    options = [
        "--budget",
        "0.2",
        "--texts",
        "calibration.txt",
        "--seq-len",
        32,
        "--method",
        "blockpruner",
    ]
    assert "4 MHA + 4 MLP" in run("blockpruner", "prune", "models/mine", *options, "--dry-run")
    run("blockpruner", "prune", "models/mine", *options, "--out", "pruned")
    parameters, rows = map(int, run("python", "-c", LOAD).split())
    plan = json.loads((tmp_path / "pruned/blockpruner_plan.json").read_text())
    assert rows and parameters == plan["parameters"]["pruned"] < plan["parameters"]["dense"]


def test_the_readmes_example_runs(run, environment, tmp_path):
    (block,) = re.findall(r"```python\n(.*?blockpruner\.prune.*?)```", README, re.DOTALL)
    said = run(
        "python",
        "-c",
        block.replace("seq_len=2048", "seq_len=32") + "\nprint(blockpruner.__file__)",
    )
    assert str(environment) in said and re.search(r"perplexity \d+\.\d+", said)
    assert re.search(
        r"removed (channels of \d+ MLPs|\d+ MHA \+ \d+ MLP) - \d+\.\d% of all parameters", said
    )
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "pruned").iterdir()
    }
