"""The pages: no dead link, no dead anchor, no page that nothing lists, and no command that is not one."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from blockpruner.cli.main import app

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
    """As forges name headings: small letters, without punctuation, blanks as hyphens, a number where one is there."""
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
    nav = re.findall(r"\S+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert set(names(LISTED)) <= set(nav) <= set(names(PAGES)) and len(nav) == len(set(nav))


def commands():
    """Every call of our command in a code block, with the page."""
    for page in PAGES:
        for block in re.findall(
            r"^ *```console\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
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


def test_every_test_that_the_table_of_attackers_names_is_there():
    """`file::test` names a file, `::test` one of the file before."""
    root = Path(__file__).parents[1]
    named = re.findall(r"`([\w/]*(?:\.py)?)::(\w+)`", (root / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    path = root
    for file, test in named:
        path = root / "tests" / file if file else path
        assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
