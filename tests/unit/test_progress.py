import io

import pytest
from rich.console import Console

from blockpruner.core import progress
from blockpruner.core.progress import ConsoleObserver


@pytest.fixture
def log(monkeypatch):
    """A clock that stands still, an output that is no terminal, and the observer that writes to it."""
    clock, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=out, width=200, highlight=False, soft_wrap=True)
    return clock, out, ConsoleObserver(console, interval=5.0)


def test_phase_and_stage_eta_are_computed_from_computed_phases_only(log):
    """Iterations of 100 s, each a tenth of the way; two cached ones before must not count."""
    clock, out, show = log
    for seconds, name, *arguments in [
        (0, "begin", "iteration 0", 0.0),
        (1, "end", "cached one", (), True),
        (0, "begin", "iteration 1", 0.1),
        (100, "end", "computed"),
        (0, "begin", "iteration 2", 0.2),
        (25, "advance", 1, 4, "candidate mha.1"),
        (1, "advance", 2, 4, "candidate mha.2"),
        (74, "end", "computed"),
    ]:
        clock[0] += seconds
        getattr(show, name)(*arguments)
    assert out.getvalue().splitlines() == [
        "iteration 0: cached one [cached]",
        "iteration 1: computed [1m40s]",
        "  iteration 2: 1/4 (candidate mha.1), 1m15s left, stage 20% done, 13m20s left",
        "iteration 2: computed [1m40s]",
    ]


def test_where_more_may_follow_no_time_left_is_shown(log):
    clock, out, show = log
    show.begin("budget 0.1, step 5, removed 4.1 of 10 %")
    clock[0] += 65
    show.advance(6, None, "candidate mha.1")
    clock[0] += 65
    show.advance(6, 12, "")
    assert out.getvalue().splitlines() == [
        "  budget 0.1, step 5, removed 4.1 of 10 %: candidate mha.1, 1m05s so far",
        "  budget 0.1, step 5, removed 4.1 of 10 %: 6/12, 2m10s left",
    ]


def test_a_resumed_phase_goes_at_the_pace_of_what_it_computes(log):
    clock, out, show = log
    show.begin("narrow")
    for seconds, done in ((10, 13), (10, 14), (10, 15)):
        clock[0] += seconds
        show.advance(done, 30, f"mlp.{done - 1}")
    assert [line.partition("), ")[2] for line in out.getvalue().splitlines()][1:] == [
        "2m40s left",
        "2m30s left",
    ]


def test_a_terminal_gets_a_bar_that_goes_away():
    out = io.StringIO()
    show = ConsoleObserver(
        Console(file=out, width=120, force_terminal=True, color_system=None), interval=0.0
    )
    show.begin("iteration 0", 0.5)
    show.advance(3, 4, "candidate mha.1")
    show.end("removed mha.1")
    assert "candidate mha.1" in out.getvalue()
    assert out.getvalue().splitlines()[-1].endswith("iteration 0: removed mha.1 [0s]")
