"""The mlx export: mlx-lm's own models with holes say what the masked model in transformers says."""

import json

import pytest

from blockpruner.checkpoints import verification
from blockpruner.checkpoints.mlx import export_mlx
from blockpruner.checkpoints.registry import MLX, WINDOWED, require_families
from blockpruner.core.errors import InputError
from blockpruner.model.classes import MLX_CODE, has_our_code
from tests.cells import seen
from tests.engines import with_mlx
from tests.fakes import InProcess
from tests.plans import fetch_tiny, narrow_plan, plan_of, pruning

pytestmark = with_mlx

HOLES = ["mha.0", "mha.2", "mlp.0", "mlp.3", "mlp.4"]
"""Of six layers the first is gone, so that layers have other numbers than in the dense model."""

TAKEN = {
    "exaone4": {
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma3_text": {"hidden_size": 64},  # its root is exact in bfloat16, to which mlx-lm rounds it
}
"""What mlx-lm takes of a family, dense or not."""


def fetched(folder, family, **more):
    own = {} if family in WINDOWED else {"sliding_window": None, "use_sliding_window": False}
    return fetch_tiny(folder, family, 6, **own | TAKEN.get(family, {}) | more)


@pytest.mark.parametrize("family", MLX)
def test_every_family(tmp_path, family, monkeypatch):
    """Logits, the same token by token through the cache, and how many caches there are; a narrower
    MLP too."""
    if family != "qwen3":  # one has a fresh process
        monkeypatch.setattr(verification, "subprocess", InProcess)
    dense = fetched(tmp_path, family)
    export_mlx(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["ok"] and report["cache_layers"] == 4 and report["greedy_tokens_equal"]
    seen(
        "mlx-lm", family, max(report["max_logit_difference"], report["max_logit_difference_cached"])
    )
    assert (
        max(report["max_logit_difference"], report["max_logit_difference_cached"])
        <= report["tolerance"]
    )
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {MLX_CODE.name}
    assert has_our_code(tmp_path / "out")
    assert "--trust-remote-code" in (tmp_path / "out" / "README.md").read_text()
    export_mlx(
        pruning(dense, narrow_plan(dense, {"mlp.1": range(16), "mlp.3": range(20)})),
        tmp_path / "narrow",
    )


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("family", "more"),
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
def test_configs_as_they_are_published(tmp_path, family, more):
    """Rotary tables of two kinds with scaling; no window; a window as long as the context."""
    dense = fetched(tmp_path, family, **more)
    export_mlx(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["ok"]


@pytest.mark.usefixtures("in_process")
def test_a_wrong_checkpoint_fails_and_leaves_nothing(tmp_path, monkeypatch):
    dense = fetched(tmp_path, "qwen3")
    wrong = tmp_path / MLX_CODE.name
    wrong.write_text(MLX_CODE.read_text().replace("mx.zeros_like(x)", "0.1 * x"))
    monkeypatch.setattr("blockpruner.checkpoints.mlx.MLX_CODE", wrong)
    with pytest.raises(InputError, match="holds or names code"):
        export_mlx(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    monkeypatch.setattr("blockpruner.model.classes.MLX_CODE", wrong)
    with pytest.raises(InputError, match=r"does not reproduce .* \(mlx_lm\)"):
        export_mlx(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
def test_whole_layers_need_no_code(tmp_path):
    dense = fetched(tmp_path, "qwen3")
    export_mlx(pruning(dense, plan_of(dense, ["mha.2", "mlp.2"])), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["ok"]
    assert not has_our_code(tmp_path / "out")
    assert "mlx_blockpruned.py" not in (tmp_path / "out" / "README.md").read_text()
    for name, scaled in (
        ("base", {"rope_type": "default"}),
        ("linear", {"rope_type": "linear", "factor": 4.0}),
    ):
        llama = fetched(tmp_path / name, "llama", rope_parameters=scaled | {"rope_theta": 5e5})
        # it is verified
        export_mlx(pruning(llama, plan_of(llama, ["mha.2", "mlp.2"])), tmp_path / f"out-{name}")
        assert (
            json.loads((tmp_path / f"out-{name}" / "config.json").read_text())["rope_theta"] == 5e5
        )
    gemma = fetched(tmp_path / "gemma", "gemma3_text")
    with pytest.raises(InputError, match="attend in another order"):
        export_mlx(pruning(gemma, plan_of(gemma, ["mha.1", "mlp.1"])), tmp_path / "other")


def test_what_it_cannot_hold(tmp_path):
    dense = fetch_tiny(tmp_path, "phi3", 6)
    with pytest.raises(InputError, match="sliding_window 6"):
        export_mlx(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    with pytest.raises(InputError, match="for mlx-lm name mlx"):
        require_families(["nas"], {"model_type": "qwen3"})
    with pytest.raises(InputError, match="leave it out"):
        require_families(["nas", "mlx"], {"model_type": "gpt_neox"})
