"""What is installed by which name: the library without extras, each extra, the DAG; and what is
imported of it.

The oracle is the metadata of the installed packages: what a package requires, and which modules it
brings.
"""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.shards import in_shard

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DAG_ALONE = {"prefect", "dvc", "ruamel-yaml"}
ENGINES = {"verify_mlx.py", "verify_llama_cpp.py", "vllm_models.py", "mlx_blockpruned.py"}
"""What only an engine, or a script where it is installed, imports."""
NO_MODULES = {"__init__.py", "__main__.py", *ENGINES}
"""What is not imported by its name."""

NOT_WINDOWS = [
    "fork",
    "killpg",
    "getuid",
    "getpgid",
    "setsid",
    "preadv",
    "posix_fadvise",
    "posix_fallocate",
    "statvfs",
]
IMPORT_ALL = """
import builtins, sys, types
from blockpruner.core.errors import MissingPackageError
hidden, absent, modules = map(str.split, sys.argv[1:])
sys.modules.update(dict.fromkeys(hidden))
ours, load = ("blockpruner", "study", "stages", "flows"), builtins.__import__
def load_as_on_windows(name, globals=None, *args, **kwargs):
    if (globals or {}).get("__name__", "").partition(".")[0] in ours:
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "os":
            found = types.ModuleType("os")
            found.__dict__.update({key: value for key, value in vars(load("os")).items() if key not in absent})
            return found
    return load(name, globals, *args, **kwargs)
builtins.__import__ = load_as_on_windows if absent else load
for name in modules:
    try:
        load(name)
    except MissingPackageError as error:
        print(name, error, sep=": ")
"""


def closure(requirements):
    """Names of all distributions that these requirements install here, their extras included."""
    found, seen, queue = set(), set(), [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen or (
                requirement.marker and not requirement.marker.evaluate({"extra": ""})
            ):
                continue
            seen.add((name, extra))
            found.add(name)
            if name == "blockpruner":
                queue += map(Requirement, EXTRAS[extra] if extra else [])
                continue
            try:
                needs = [Requirement(text) for text in metadata.requires(name) or ()]
            except metadata.PackageNotFoundError:
                continue
            for need in needs:
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    queue.append(
                        Requirement(
                            f"{need.name}[{','.join(need.extras)}]" if need.extras else need.name
                        )
                    )
    return found - {"blockpruner"}


BASE = closure(PROJECT["dependencies"])
DAG = BASE | closure(EXTRAS["dag"])
MODULES = {
    module: {canonicalize_name(name) for name in names}
    for module, names in metadata.packages_distributions().items()
}


def outside(installed):
    """The modules of this environment that those packages do not bring."""
    ours = {"blockpruner", "study", "stages", "flows", "tests", "benchmarks"}
    return sorted(
        module for module, names in MODULES.items() if not names & installed and module not in ours
    )


def import_all(installed, roots, absent=()):
    """What modules of these folders say when they are imported and nothing else is installed."""
    paths = sorted(path.relative_to(ROOT) for root in roots for path in (ROOT / root).rglob("*.py"))
    modules = [
        ".".join(path.with_suffix("").parts) for path in paths if path.name not in NO_MODULES
    ]
    assert len(modules) > 100
    arguments = map(" ".join, (outside(installed), absent, modules))
    command = [sys.executable, "-c", IMPORT_ALL, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_library_is_small():
    assert not BASE & (DAG_ALONE | {"ray", "matplotlib", "lm-eval", "peft", "gguf", "pytest"})
    assert DAG >= DAG_ALONE and not DAG & {"pytest", "ruff", "mypy", "ray", "mlx-lm", "xllamacpp"}
    assert set(closure(["blockpruner[serve]"])) == closure(["blockpruner[gguf]"]) | closure(
        ["blockpruner[mlx]"]
    )


def test_the_library_alone_trains_all_weights():
    """What transformers' Trainer needs beside torch comes with the package; adapters need an
    extra."""
    extras = map(Requirement, metadata.requires("transformers"))
    needs = next(
        need
        for need in extras
        if need.name == "accelerate" and need.marker.evaluate({"extra": "torch"})
    )
    floors = {need.name: need.specifier for need in map(Requirement, PROJECT["dependencies"])}
    assert str(floors["accelerate"]) == str(needs.specifier)


def test_the_demo_is_pinned_apart_from_the_tools_of_development():
    demo, more = (pinned(ROOT / name) for name in ("constraints/dag.txt", "constraints/dev.txt"))
    needed = closure([*EXTRAS["dev"], *EXTRAS["ray"]])
    # which builds our own package
    assert not demo & more and demo & (needed - DAG) <= {"setuptools"}
    from_torch = ("torch", "nvidia", "cuda", "triton")  # which pins what its build needs
    assert not [name for name in DAG - demo if not name.startswith(from_torch)]
    assert not [name for name in needed - demo - more if not name.startswith(from_torch)]


def pinned(path):
    return set(re.findall(r"^([a-z0-9-]+)==\S+ ", path.read_text(), re.MULTILINE))


def test_committed_metrics_hold_no_timings_and_nothing_of_what_was_known_before():
    for path in (ROOT / "data/metrics").rglob("*.json"):
        keys = json.loads(path.read_text()).keys()
        assert keys and not [
            key for key in keys if re.search("second|speed|per_|computed|reused|tokens", key)
        ], path


def test_every_module_is_imported_without_extras_or_names_one():
    said = import_all(BASE, ["blockpruner"])
    names = {line.partition(":")[0] for line in said}
    assert {"blockpruner.reporting.plots", "blockpruner.evaluation.zero_shot"} <= names
    assert not names & {"blockpruner.api", "blockpruner.cli.pruning", "blockpruner.healing.trainer"}
    for line in said:
        package, extra = re.search(
            r"needs the package (\S+), which .* pip install '\.\[(\w+)\]'$", line
        ).groups()
        assert MODULES[package.partition(".")[0]] & closure(EXTRAS[extra])


def test_the_demo_needs_no_more_than_its_extra_and_nothing_that_windows_lacks():
    assert not import_all(DAG, ["blockpruner", "study", "stages", "flows"], NOT_WINDOWS)


def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())


def test_a_pull_request_runs_all_tests_on_the_oldest_and_the_newest_python():
    job = workflow()["jobs"]["test"]
    shards, pythons = (job["strategy"]["matrix"][name] for name in ("shard", "python"))
    assert "if" not in job and True in workflow()  # YAML reads the key `on` as true
    assert "pull_request" in workflow()[True]
    assert job["steps"][-1]["run"] == "make test SHARD=${{ matrix.shard }}"
    assert shards == [f"{number}/{len(shards)}" for number in range(1, len(shards) + 1)]
    said = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if ":: Python :: 3." in text]
    assert pythons == [said[0], said[-1]] and PROJECT["requires-python"] == f">={said[0]}"


def test_each_test_is_in_one_shard_and_a_file_that_shares_fixtures_is_whole():
    scopes = ["a::1", "b", "b", "a::2", "c::1", "b", "c::2", "c::3"]
    parts = [in_shard(scopes, f"{number}/3") for number in (1, 2, 3)]
    assert [sum(runs) for runs in zip(*parts, strict=True)] == [1] * 8
    assert [sum(part) for part in parts] == [2, 4, 2]
    assert len({tuple(part[place] for part in parts) for place in (1, 2, 5)}) == 1
    for wrong in ("0/3", "4/3", "3", "1/0"):
        with pytest.raises(pytest.UsageError, match=f"--shard {wrong} is not one of 1/N to N/N"):
            in_shard(scopes, wrong)


def test_the_public_workflow_makes_targets_that_the_makefile_has():
    jobs = workflow()["jobs"]
    asked = {"test", *jobs["nightly"]["strategy"]["matrix"]["target"]}
    there = set(
        re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    )
    assert {"test", "test-slow"} <= asked <= there
