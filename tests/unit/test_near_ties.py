"""Near ties of a 16-bit model: float32 decides, by full forward passes of the same weights in float64."""

import shutil

import pytest
import torch

from blockpruner.core.blocks import BlockKind, all_blocks, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import Task
from blockpruner.search.registry import request
from blockpruner.search.trace import read_trace
from blockpruner.store.trials import trial_key
from tests.builders import scored
from tests.tiny import full_nll, save_tiny, tiny_model

ROWS = CalibrationSet(tuple(tuple(1 + (7 * row + 3 * i * i) % 256 for i in range(12)) for row in range(3)))
MLPS = [frozenset({block}) for block in all_blocks(4) if block.kind is BlockKind.MLP]
WITHIN = 0.05
"""Far more than bfloat16 moves a loss here, and far less than a block that counts."""


def model_of(seed, dtype=torch.bfloat16):
    """Its MLPs say so little that bfloat16 cannot tell which one matters least."""
    model, draw = tiny_model(layers=4, dtype=torch.float64), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5, generator=draw)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 2e-4
    return model.to(torch.bfloat16).to(dtype)


def best_by_brute_force(seed):
    exact, losses = model_of(seed, torch.float64), {}
    for unit in MLPS:
        with masked(exact, unit):
            losses[unit] = sum(full_nll(exact, row) for row in ROWS.rows)
    return min(losses, key=losses.get)


def run(folder, scorer, budget="1blocks", near_ties=None, options=None, **score):
    model = tiny_model(layers=4)
    options = (options or {}) | ({} if near_ties is None else {"near_ties": near_ties})
    given = {"dtype": "bfloat16", "candidates": "mlp", "options": options} | score
    found = scored(folder, scorer, model.config.to_dict(), [budget], ROWS, **given)
    search = found.current.search
    return found, read_trace(folder / "scores" / search, search)


def tables(folder, search):
    return {path.name: path.read_bytes() for path in (folder / "scores" / search).glob("*.parquet")}


def test_float32_decides_where_16_bits_cannot(tmp_path):
    rounded = []
    for seed in range(6):
        engine = Engine(model_of(seed))
        _, (plain,) = run(tmp_path / f"{seed}", engine)
        _, (step,) = run(tmp_path / f"{seed}", engine, near_ties=WITHIN)
        best = best_by_brute_force(seed)
        assert step.removed == best
        assert [score.mask for score in step.wide] == MLPS
        assert [score.row_loss for score in step.scores] == [score.row_loss for score in plain.scores]
        assert step.note == f"{len(step.wide)} near ties are decided in float32"
        rounded.append(plain.removed == best)
    assert not all(rounded), "no tie was decided otherwise in 16 bits"


@pytest.mark.parametrize("option", [{"per": "parameters"}, {}])
def test_prices_are_compared_in_float32_too(tmp_path, option):
    """The first candidates that are no ties are left as they are."""
    _, trace = run(tmp_path, Engine(model_of(0)), "3blocks", near_ties=1e-9, options=option)
    assert not any(step.wide for step in trace)
    _, (step, *_) = run(tmp_path, Engine(model_of(0)), "3blocks", near_ties=WITHIN, options=option)
    assert step.removed == best_by_brute_force(0)


def test_what_is_scored_again_is_stored_and_resumed(tmp_path):
    class Killed(Engine):
        units = 0

        def run(self, tasks, rows):
            for unit in super().run(tasks, rows):
                yield unit
                self.units += 1
                if self.units == self.limit_of_units:
                    raise KeyboardInterrupt

    model = model_of(0)
    first, trace = run(tmp_path / "whole", Engine(model), "3blocks", near_ties=WITHIN)
    undisturbed = tables(tmp_path / "whole", first.current.search)
    assert len(undisturbed) == 3 and sum(len(step.wide) for step in trace) >= 2
    plain, _ = run(tmp_path / "plain", Engine(model), "3blocks")
    assert first.units_computed > plain.units_computed

    computed = 0
    for units in (10, 1, 3):  # of one row each, in float32; the first iteration has 5 in 16 bits
        killed = Killed(model)
        killed.limit_of_units = units
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", killed, "3blocks", near_ties=WITHIN)
        computed += units
    rest, _ = run(tmp_path / "killed", Engine(model), "3blocks", near_ties=WITHIN)
    assert tables(tmp_path / "killed", first.current.search) == undisturbed
    assert computed + rest.units_computed == first.units_computed, "nothing is computed twice"

    shutil.rmtree(tmp_path / "whole" / "trials")
    again, _ = run(tmp_path / "whole", None, "3blocks", near_ties=WITHIN)
    assert again.units_computed == 0, "the tables hold it, too"


def test_trials_of_before_are_reused_and_those_in_float32_are_others(tmp_path):
    model = model_of(0)
    plain, _ = run(tmp_path, Engine(model))
    ties, (step,) = run(tmp_path, Engine(model), near_ties=WITHIN)
    assert ties.current.search != plain.current.search
    assert ties.rows_computed == len(ROWS.rows) * len(step.wide)
    assert trial_key(parse_mask("mlp.1"), wide=True) != trial_key(parse_mask("mlp.1"))
    same, _ = run(tmp_path, None)
    assert (same.units_computed, same.current.search) == (0, plain.current.search)


def test_a_wider_model_has_no_such_ties(tmp_path):
    _, (step,) = run(tmp_path, Engine(model_of(0, torch.float32)), dtype="float32", near_ties=WITHIN)
    assert step.wide == ()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"metric": "block_influence"}, "near_ties compares losses, not block_influence; remove it"),
        ({"method": "floating"}, "near_ties is unknown to method: floating"),
    ],
)
def test_where_it_does_nothing_it_is_refused(score, message):
    with pytest.raises(InputError, match=message):
        request(Score(options={"near_ties": 0.1}, **score))


def test_searches_without_it_are_those_of_before():
    assert request(Score()).fields["options"] == {"per": "none"}
    assert request(Score(options={"near_ties": 0.1})).fields["options"] == {"per": "none", "near_ties": 0.1}


def test_it_is_not_streamed(tmp_path):
    engine = StreamingEngine(save_tiny(tmp_path / "model", layers=1), "bfloat16", device="cpu")
    with pytest.raises(InputError, match="near_ties is for a model in memory"):
        list(engine.run([Task(range(1), (parse_mask("mlp.0"),), wide=True)], [[1, 2, 3]]))
    engine.close()
