"""The wheel builds, holds the library alone, and runs the README's example without the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


def test_wheel_alone_runs_the_readme_example(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "blockpruner", source / "blockpruner", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel], check=True)
    assert {path.name.split("-")[0] for path in (tmp_path / "site").iterdir()} == {"blockpruner", "bin"}

    (block,) = re.findall(r"```python\n(.*?blockpruner\.prune.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    save_tiny(tmp_path / "model")
    (tmp_path / "calibration.txt").write_text("\n".join(f"{i} little words and {i * i} more" for i in range(60)))
    script = block.replace("seq_len=2048", "seq_len=32") + "\nprint(blockpruner.__file__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}
    command = [tmp_path / "site/bin/blockpruner", "prune", "model", "--ratio", "0.2", "--texts", "calibration.txt"]
    result = subprocess.run([*command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "4 MHA + 4 MLP" in result.stdout, result.stderr
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout
    assert "removed" in result.stdout
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "pruned").iterdir()}
