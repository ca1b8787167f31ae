"""The shape of the project: the deps of the pipelines are the import closures, and stages are small."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PIPELINES = ("dvc.yaml", "runs/dvc.yaml")
STAGES = {
    re.search(r"-m stages\.(\w+)", definition.get("do", definition)["cmd"])[1]: definition.get("do", definition)
    for pipeline in PIPELINES
    for definition in yaml.safe_load((ROOT / pipeline).read_text())["stages"].values()
}
"""By module."""


def module_file(name: str) -> Path | None:
    path = ROOT / Path(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imports_of(path: Path) -> set[Path]:
    """Files of this project that a file imports, also inside functions, but not under `if TYPE_CHECKING`;
    importing a module runs its packages too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    names |= {name.rsplit(".", k)[0] for name in names for k in range(1, name.count(".") + 1)}
    return {found for name in names if (found := module_file(name))}


def closure(stage: str) -> set[str]:
    done: set[Path] = set()
    todo = {ROOT / "stages" / f"{stage}.py", ROOT / "stages" / "__init__.py"}
    while todo:
        path = todo.pop()
        done.add(path)
        todo |= imports_of(path) - done
    return {path.relative_to(ROOT).as_posix() for path in done}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage):
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    wanted = closure(stage)
    assert listed == wanted, "its deps should be:\n" + "\n".join(f"    - {p}" for p in sorted(wanted))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_small(stage):
    body = (ROOT / "stages" / f"{stage}.py").read_text().splitlines()
    main = body.index(next(line for line in body if line.startswith("def main(")))
    assert len(body) - main <= 40


def test_stages_depend_on_their_inputs_only():
    """Nothing but commit may depend on the score tables: their hash depends on history."""
    users = [name for name, s in STAGES.items() if any("/scores" in d for d in s["deps"])]
    assert users == ["commit"]
