"""The pages: no dead link, no dead anchor, no page that nothing lists, and no command that is not
one."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser

import blockpruner
from blockpruner.cli.main import app
from blockpruner.methods.recipes import RECIPES, RECOMMENDED
from blockpruner.search.trace import ITERATION

ROOT = Path(__file__).parents[1]
LISTED = [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("plans/*.md"))]
PAGES = [*sorted(ROOT.glob("*.md")), *LISTED]
FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(page):
    """A page without its code blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """As forges name headings: small letters, without punctuation, blanks as hyphens, a number
    where one is there."""
    found = []
    for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


def dead_links(page):
    for target in LINK.findall(prose(page)):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not target.startswith(("http://", "https://")) and (
            not path.exists() or (anchor and anchor not in anchors(path))
        ):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_link_is_dead(page):
    assert [*dead_links(page)] == []


def test_a_dead_link_would_be_seen(tmp_path):
    (tmp_path / "a.md").write_text(
        "# A title: `x`, y\n[](a.md#a-title-x-y) [](b.md) [](#no) [](https://no)\n```\n[](c)\n```\n"
    )
    assert [*dead_links(tmp_path / "a.md")] == ["b.md", "#no"]


def test_every_page_is_listed():
    index = ROOT / "docs/README.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(prose(index))}
    assert {page for page in LISTED if page != index} <= linked
    nav = re.findall(
        r"\S+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    )
    assert set(names(LISTED)) <= set(nav) <= set(names(PAGES)) and len(nav) == len(set(nav))


def commands():
    """Every call of our command in a code block, with the page."""
    for page in PAGES:
        for block in re.findall(
            r"^ *```console\n(.*?)^ *```$",
            page.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("blockpruner "):
                    yield page.name, line.strip()


@pytest.mark.parametrize(("page", "line"), [*commands()], ids=str)
def test_a_command_has_the_options_that_the_page_gives_it(page, line):
    name, *args = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    if name.startswith("--"):
        assert name in {option for parameter in group.params for option in parameter.opts}
    elif args != ["--help"]:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        command.make_context(name, args)  # parses, and runs nothing


PROGRAM = re.compile(r"(?:\.venv/bin/)?(?:python -m|make|dvc) \S")
OTHER_MODULES = {"build", "pytest", "venv", "pip", "vllm.entrypoints.openai.api_server"}
"""Modules of other packages that the pages run."""


def project_commands(text):
    """Calls of modules, of make and of dvc: lines of code blocks, and code within the text."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    for line in lines:
        for command in re.split(r"&&|;|\|", line.partition("  #")[0]):
            if PROGRAM.match(command.strip()):
                yield command.strip()


def missing(command):
    """What a command names that is not there: a module, an option of one of ours, a target, a stage
    or a run."""
    program, *words = shlex.split(command.removeprefix(".venv/bin/"))
    if program == "python":
        return missing_of_module(*words[1:])
    if program == "make":
        rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        # not settings of variables
        targets = {word for word in words if not re.match(r"[A-Z]+=", word)}
        return targets - {target for rule in rules for target in rule.split()}
    try:
        parsed = get_main_parser().parse_args(words)
    except DvcParserError:
        return {command}
    dag = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    names = {"", "<run>", "<run>-<method>", *params["runs"], *params["targets"]}
    stages = [target.partition("@") for target in getattr(parsed, "targets", None) or ()]
    keys = [key.split(".") for key in getattr(parsed, "set_param", None) or ()]
    unknown = {stage for stage, _, name in stages if stage not in dag or name not in names}
    return unknown | {target for section, target, *_ in keys if target not in params[section]}


def missing_of_module(module, *words):
    if module in OTHER_MODULES:
        return set()
    file = ROOT / (module.replace(".", "/") + ".py")
    if not file.exists():
        return {module}
    code = file.read_text()
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    return {option for option in options if f'"{option}"' not in code}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda page: page.name
)
def test_what_a_command_of_a_page_names_is_there(page):
    commands = sorted(set(project_commands(page.read_text(encoding="utf-8"))))
    assert {command: missing(command) for command in commands if missing(command)} == {}


@pytest.mark.parametrize(
    "command",
    [
        "python -m flows.prunes",
        "python -m flows.prune --buget 0.1",
        "make demos",
        "dvc repo",
        "dvc repro fetsh@smollm2",
        "dvc repro fetch@smollm3",
        "dvc exp run -S targets.smollm2-b11.budget=0.05",
    ],
)
def test_a_wrong_command_would_be_seen(command):
    in_text = project_commands(f"First `{command}`.")
    in_block = project_commands(f"```console\nmake setup && {command}   # so\n```\n")
    assert all(map(missing, in_text))
    assert [bool(missing(each)) for each in in_block] == [False, True]


def test_each_short_description_names_what_the_default_removes():
    assert {"narrow", "layers"} < RECIPES[
        RECOMMENDED
    ].searches.keys()  # channels of MLPs, and layers
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    descriptions = {
        "README.md": (ROOT / "README.md").read_text().split("\n\n")[1],
        "pyproject.toml": project["description"],
        "mkdocs.yml": yaml.safe_load((ROOT / "mkdocs.yml").read_text())["site_description"],
        "blockpruner --help": typer.main.get_command(app).help,
        "help(blockpruner)": blockpruner.__doc__,
        "help(blockpruner.prune)": blockpruner.prune.__doc__.split("Args:")[0],
    }
    assert [
        name for name, text in descriptions.items() if not ("channels" in text and "layers" in text)
    ] == []


def test_the_page_describes_every_column_of_a_score_table():
    text = (ROOT / "docs/methods.md").read_text()
    section = text.partition("## Score tables")[2].partition("\n## ")[0]
    assert [name for name in ITERATION.names if f"`{name}`" not in section] == []


def test_the_page_gives_the_rows_that_the_study_gives_to_slicegpt():
    study = yaml.safe_load((ROOT / "studies/seed.yaml").read_text())["experiments"]["slicegpt"]
    run = yaml.safe_load((ROOT / f"runs/{study['run']}.yaml").read_text())["calibration"]
    rows, tokens = study["calibrations"][""]["num_rows"], run["seq_len"]
    assert f"SliceGPT on {rows} rows of {tokens} tokens" in " ".join(
        (ROOT / "docs/methods.md").read_text().split()
    )


def test_the_page_says_how_the_study_accelerates_its_searches():
    run = yaml.safe_load((ROOT / "runs/smollm2-seed.yaml").read_text())
    section = (
        (ROOT / "docs/methods.md")
        .read_text()
        .partition("## How methods are compared")[2]
        .partition("\n## ")[0]
    )
    assert f"`{run['score']['acceleration']}`" in section


def test_every_test_that_the_table_of_attackers_names_is_there():
    """`file::test` names a file, `::test` one of the file before."""
    root = Path(__file__).parents[1]
    named = re.findall(
        r"`([\w/]*(?:\.py)?)::(\w+)`", (root / "SECURITY.md").read_text(encoding="utf-8")
    )
    assert len(named) > 10
    path = root
    for file, test in named:
        path = root / "tests" / file if file else path
        assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
