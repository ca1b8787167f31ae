"""The mlx export: mlx-lm's own models with holes give the logits of transformers' masked model."""

import pytest

from blockpruner.checkpoints import verification
from blockpruner.checkpoints.mlx import export_mlx
from blockpruner.checkpoints.registry import MLX, WINDOWED, require_families
from blockpruner.core.errors import InputError
from blockpruner.model.classes import MLX_CODE, has_our_code
from blockpruner.store.files import read_json
from tests.cells import seen
from tests.engines import with_mlx
from tests.fakes import InProcess
from tests.plans import fetch_tiny, narrow_plan, plan_of, pruning

pytestmark = with_mlx

HOLES = ["mha.0", "mha.2", "mlp.0", "mlp.3", "mlp.4"]
"""Of six layers the first is gone, so that layers have other numbers than in the dense model."""

SUPPORTED_FIELDS = {
    "exaone4": {
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    # The root of this size is exact in bfloat16, to which mlx-lm rounds it.
    "gemma3_text": {"hidden_size": 64},
}
"""Fields of a family that mlx-lm needs, also for the dense model."""


def fetched(folder, family, **fields):
    """A dense tiny model that mlx-lm can run."""
    if family not in WINDOWED:
        fields = {"sliding_window": None, "use_sliding_window": False, **fields}
    return fetch_tiny(folder, family, 6, **SUPPORTED_FIELDS.get(family, {}) | fields)


def export(dense, folder, blocks=HOLES):
    """The verification report of an export."""
    export_mlx(pruning(dense, plan_of(dense, blocks)), folder)
    return read_json(folder / "verification.json")


@pytest.mark.parametrize("family", MLX)
def test_every_family(tmp_path, family, monkeypatch):
    """Logits, the same token by token through the cache, and how many caches there are; a narrower
    MLP too."""
    if family != "qwen3":  # one has a fresh process
        monkeypatch.setattr(verification, "subprocess", InProcess)
    dense = fetched(tmp_path, family)
    out = tmp_path / "out"
    report = export(dense, out)
    difference = max(report["max_logit_difference"], report["max_logit_difference_cached"])
    assert report["ok"]
    assert report["cache_layers"] == 4
    assert report["greedy_tokens_equal"]
    assert difference <= report["tolerance"]
    seen("mlx-lm", family, difference)
    assert has_our_code(out)
    assert [path.name for path in out.glob("*.py")] == [MLX_CODE.name]
    assert "--trust-remote-code" in (out / "README.md").read_text()
    narrow = narrow_plan(dense, {"mlp.1": range(16), "mlp.3": range(20)})
    export_mlx(pruning(dense, narrow), tmp_path / "narrow")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e2},
                }
            },
        ),
        (
            "exaone4",
            {
                "sliding_window": None,
                "sliding_window_pattern": None,
                "layer_types": ["full_attention"] * 6,
            },
        ),
        ("phi3", {"sliding_window": 128}),
    ],
)
def test_configs_as_they_are_published(tmp_path, family, fields):
    """Rotary tables of two kinds with scaling; no window; a window as long as the context."""
    assert export(fetched(tmp_path, family, **fields), tmp_path / "out")["ok"]


@pytest.mark.usefixtures("in_process")
def test_a_wrong_checkpoint_fails_and_leaves_nothing(tmp_path, monkeypatch):
    dense = fetched(tmp_path, "qwen3")
    wrong_code = tmp_path / MLX_CODE.name
    wrong_code.write_text(MLX_CODE.read_text().replace("mx.zeros_like(x)", "0.1 * x"))
    monkeypatch.setattr("blockpruner.checkpoints.mlx.MLX_CODE", wrong_code)
    with pytest.raises(InputError, match="holds or names code"):
        export(dense, tmp_path / "out")
    monkeypatch.setattr("blockpruner.model.classes.MLX_CODE", wrong_code)
    with pytest.raises(InputError, match=r"does not reproduce .* \(mlx_lm\)"):
        export(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "linear", "factor": 4.0}])
def test_full_layers_need_no_code(tmp_path, scaling):
    out = tmp_path / "out"
    if scaling is None:
        dense = fetched(tmp_path, "qwen3")
    else:
        rope = {"rope_type": "default", "rope_theta": 5e5, **scaling}
        dense = fetched(tmp_path, "llama", rope_parameters=rope)
    assert export(dense, out, ["mha.2", "mlp.2"])["ok"]
    assert not has_our_code(out)
    assert MLX_CODE.name not in (out / "README.md").read_text()
    assert scaling is None or read_json(out / "config.json")["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("family", "fields", "blocks", "message"),
    [
        ("phi3", {}, HOLES, "sliding_window 6"),
        ("gemma3_text", {"hidden_size": 64}, ["mha.1", "mlp.1"], "attend in another order"),
    ],
)
def test_models_that_mlx_cannot_hold(tmp_path, family, fields, blocks, message):
    dense = fetch_tiny(tmp_path, family, 6, **fields)
    with pytest.raises(InputError, match=message):
        export(dense, tmp_path / "out", blocks)


@pytest.mark.parametrize(
    ("forms", "family", "message"),
    [(["nas"], "qwen3", "for mlx-lm name mlx"), (["nas", "mlx"], "gpt_neox", "leave it out")],
)
def test_families_that_a_form_does_not_have(forms, family, message):
    with pytest.raises(InputError, match=message):
        require_families(forms, {"model_type": family})
