"""No number moves without its version: every kind of result on tiny models against tests/golden.json."""

import json
import random

import pytest

from blockpruner import versions
from tests.golden import ENTRIES, FILE, World, measure, problem, renew

KEPT = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", ENTRIES)
def test_numbers_are_golden(world, name):
    if reason := problem(name, measure(world, name), KEPT):
        pytest.fail(reason, pytrace=False)


def test_every_version_has_numbers_and_every_number_an_entry():
    assert {entry.version for entry in ENTRIES.values()} == {
        name for name in vars(versions) if name.endswith("_VERSION")
    }
    assert KEPT["numbers"].keys() == ENTRIES.keys()


NAME = "calibration rows, joined, split all"


@pytest.fixture
def reversed_rows(world, monkeypatch):
    """The numbers after a change of what draws them."""
    monkeypatch.setattr(random.Random, "shuffle", lambda chance, values: values.reverse())
    return {NAME: measure(world, NAME)}


def test_a_number_that_moves_names_its_version_and_is_not_written(reversed_rows):
    reason = problem(NAME, reversed_rows[NAME], KEPT)
    assert reason.startswith(f"{NAME} moved: digest (golden '")
    assert reason.endswith(
        f"and CALIBRATION_VERSION is still {KEPT['versions']['CALIBRATION_VERSION']}: raise CALIBRATION_VERSION in "
        "blockpruner/versions.py and run "
        "`python -m tests.golden --write`, or undo the change"
    )
    content, refused = renew(KEPT, reversed_rows)
    assert content["numbers"][NAME] == KEPT["numbers"][NAME] and refused == [reason]


@pytest.mark.parametrize("raised", ["CALIBRATION_VERSION", "FETCH_VERSION"])
def test_a_raised_version_asks_for_a_new_file(reversed_rows, monkeypatch, raised):
    monkeypatch.setattr(versions, raised, 99)
    reason = problem(NAME, reversed_rows[NAME], KEPT)
    assert (
        f"older than {raised} 99 (the file: {KEPT['versions'][raised]}): renew it with `python -m tests.golden --write`"
        in reason
    )
    content, refused = renew(KEPT, reversed_rows)
    assert content["numbers"] == reversed_rows and not refused
    assert problem(NAME, reversed_rows[NAME], content) == ""


def test_a_version_further_on_excuses_nothing(reversed_rows, monkeypatch):
    monkeypatch.setattr(versions, "SCORE_VERSION", 99)
    assert "CALIBRATION_VERSION is still" in problem(NAME, reversed_rows[NAME], KEPT)
