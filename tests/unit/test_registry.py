"""Registries: lookups, rows that are added for a while, rows of other packages."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from blockpruner.core import registry
from blockpruner.core.errors import InputError
from blockpruner.core.registry import Registry
from tests.errors import refused


@dataclass(frozen=True)
class Pet:
    name: str


@dataclass(frozen=True)
class Plant:
    name: str


PETS, PLANTS = [Pet("cat"), Pet("dog")], [Plant("fern")]
FOREIGN = [Pet("fox"), Plant("moss")]
WORDS, CLASH = ["fox"], [Pet("cat")]


def pets(**words):
    return Registry("owner.pet", Pet, PETS, **words)


@pytest.fixture
def installed(monkeypatch):
    """Make some entry points the only ones."""

    def install(*values):
        points = [EntryPoint(value, value, registry.GROUP) for value in values]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: points if group == registry.GROUP else []
        )
        registry.extension_rows.cache_clear()

    yield install
    registry.extension_rows.cache_clear()


def test_an_unknown_name_is_refused_with_the_valid_ones(installed):
    installed()
    with refused("unknown-name") as error:
        pets(hint="Write one.")["fox"]
    assert str(error.value) == "owner.pet 'fox' is unknown; valid: cat, dog. Write one."
    assert (error.value.key, error.value.value) == ("owner.pet", "fox")


def test_a_row_is_added_for_a_while(installed):
    installed()
    rows = pets()
    with rows.added(Pet("fox")) as fox:
        assert rows["fox"] is fox and list(rows) == ["cat", "dog", "fox"]
    assert "fox" not in rows
    with pytest.raises(InputError, match="'cat' is there already"):
        rows.add(Pet("cat"))


def test_each_registry_takes_the_rows_of_its_class(installed):
    installed(f"{__name__}:FOREIGN")
    assert list(pets()) == ["cat", "dog", "fox"] and pets()["fox"] == Pet("fox")
    assert list(Registry("garden.plant", Plant, PLANTS)) == ["fern", "moss"]


def test_our_own_rows_are_found_without_loading_extensions(installed):
    installed("no_such_package:ROWS")
    assert pets()["cat"] == Pet("cat")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no_such_package:ROWS", "no_such_package:ROWS.*cannot be loaded.*uninstall"),
        (f"{__name__}:WORDS", "'fox', which is no row"),
        (f"{__name__}:CLASH", "'cat' is there already"),
    ],
)
def test_a_broken_extension_is_named(installed, value, words):
    installed(value)
    with pytest.raises(InputError, match=words):
        list(pets())
