"""No number moves without its version: every kind of result on tiny models against tests/golden."""

import random

import pytest

from blockpruner import versions
from blockpruner.inputs import sources, texts
from tests.golden import CHAIN, ENTRIES, FOLDER, World, current, kept, measure, problem, renew


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # the world has texts of its own
        patch.setattr(texts, "pieces_of_library", texts.pieces_of_library)
        patch.setattr(sources, "OURS", sources.OURS)
        yield World(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize(
    ("constant", "name"), [(c, name) for c, names in ENTRIES.items() for name in names]
)
def test_numbers_are_golden(world, constant, name):
    if reason := problem(constant, name, measure(world, constant, name), kept(constant)):
        pytest.fail(reason, pytrace=False)


def test_every_version_has_numbers_and_every_number_an_entry():
    assert ENTRIES.keys() == set(CHAIN) == {path.stem for path in FOLDER.glob("*.json")}
    assert {name for name in vars(versions) if name.endswith("_VERSION")} == set(CHAIN)
    for constant, entries in ENTRIES.items():
        assert kept(constant)["numbers"].keys() == entries.keys()


OWN, NAME = "CALIBRATION_VERSION", "joined, split all"


@pytest.fixture
def reversed_rows(world, monkeypatch):
    """The numbers after a change of what draws them."""
    monkeypatch.setattr(random.Random, "shuffle", lambda chance, values: values.reverse())
    return measure(world, OWN, NAME)


def test_a_number_that_moves_names_its_version_and_is_not_written(reversed_rows):
    file = kept(OWN)
    reason = problem(OWN, NAME, reversed_rows, file)
    assert (
        reason.startswith(f"{NAME} moved: 0 / ")
        and f"and {OWN} is still {current()[OWN]}: raise {OWN} in" in reason
    )
    content, refused = renew(OWN, file["numbers"] | {NAME: reversed_rows}, file)
    assert content == file and refused == [reason]


@pytest.mark.parametrize("raised", [OWN, "FETCH_VERSION"])
def test_a_raised_version_asks_for_a_new_file(reversed_rows, monkeypatch, raised):
    monkeypatch.setattr(versions, raised, 99)
    file = kept(OWN)
    assert f"is older than {raised}: renew it" in problem(OWN, NAME, reversed_rows, file)
    content, refused = renew(OWN, {NAME: reversed_rows}, file)
    assert content["numbers"] == {NAME: reversed_rows} and not refused
    assert problem(OWN, NAME, reversed_rows, content) == ""


def test_a_version_further_on_excuses_nothing(reversed_rows, monkeypatch):
    monkeypatch.setattr(versions, "SCORE_VERSION", 99)
    assert f"{OWN} is still" in problem(OWN, NAME, reversed_rows, kept(OWN))
