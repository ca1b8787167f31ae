"""Registries: lookups, and rows that are added for a while."""

from dataclasses import dataclass

import pytest

from blockpruner.core.errors import InputError
from blockpruner.core.registry import Registry
from tests.errors import refused


@dataclass(frozen=True)
class Pet:
    name: str


CAT, DOG, FOX = Pet("cat"), Pet("dog"), Pet("fox")


@pytest.fixture
def pets():
    return Registry("owner.pet", Pet, [CAT, DOG], hint="Write one.")


def test_an_unknown_name_is_refused_with_the_valid_ones(pets):
    with refused("unknown-name") as error:
        pets["fox"]
    assert str(error.value) == "owner.pet 'fox' is unknown; valid: cat, dog. Write one."
    assert (error.value.key, error.value.value) == ("owner.pet", "fox")


def test_a_row_is_added_for_a_while(pets):
    with pets.added(FOX):
        assert pets["fox"] is FOX
        assert list(pets) == ["cat", "dog", "fox"]
    with pets.added(CAT):
        pass
    assert list(pets) == ["cat", "dog"]
    with pytest.raises(InputError, match="'cat' is there already"):
        pets.add(Pet("cat"))
