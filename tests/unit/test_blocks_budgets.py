"""Masks, ratios and budgets against the paper's published numbers and brute force over prefixes."""

from itertools import chain, combinations

import pytest

from blockpruner.core.blocks import (
    BlockId,
    BlockKind,
    all_blocks,
    format_mask,
    pack_layers,
    parse_block,
    parse_mask,
    removable_units,
)
from blockpruner.core.budgets import (
    choose_prefix,
    goal_of,
    is_settled,
    parse_budget,
    require_reachable,
    resources_of,
    share_for,
)
from blockpruner.core.errors import InputError
from blockpruner.core.families import count_kv_cache, count_parameters
from blockpruner.search.space import nearest as nearest_mask
from tests.shapes import SHAPES

LLAMA2_7B = SHAPES["meta-llama/Llama-2-7b-hf"]
COUNTS = count_parameters(LLAMA2_7B)

# The paper's ratios, per cent: model, parameters in billions, (MHA, MLP) removed and ratio, layers
# removed and ratio.
OFFICIAL = [
    (
        "meta-llama/Llama-2-7b-hf",
        6.7384,
        [(12, 5, 21.99), (17, 2, 20.95), (12, 6, 24.00), (14, 8, 30.00)],
        7,
        21.02,
    ),
    ("meta-llama/Llama-2-7b-hf", 6.7384, [(15, 11, 37.02), (17, 13, 43.03)], 7, 21.02),
    ("meta-llama/Llama-2-13b-hf", 13.0159, [(17, 7, 25.12)], 10, 24.37),
    ("baichuan-inc/Baichuan2-7B-Base", 7.5060, [(11, 7, 22.45)], 8, 21.57),
    ("baichuan-inc/Baichuan2-13B-Base", 13.8967, [(12, 10, 24.19), (14, 9, 24.19)], 10, 22.68),
    ("Qwen/Qwen1.5-7B", 7.7213, [(11, 7, 21.83)], 8, 20.97),
    ("Qwen/Qwen1.5-14B", 14.1673, [(16, 8, 23.72), (18, 7, 23.72), (20, 6, 23.72)], 10, 22.25),
    ("mistralai/Mistral-7B-v0.3", 7.2480, [(14, 7, 25.12)], 8, 24.07),
    ("meta-llama/Meta-Llama-3-8B", 8.0303, [(14, 8, 24.86)], 9, 24.45),
]

OFFICIAL_ORDER = (
    "mha25 mha27 mha24 mha23 mha28 mha29 mha8 mlp7 mha19 mha30 mlp22 mha21 mlp27 mha18 mlp21 mlp11"
    " mha12 mha14 mlp14 mlp24"
)
"""BlockPruner's own removal sequence for Llama-2-7B with 64 samples."""


def first(mha, mlp):
    return frozenset(
        [BlockId(BlockKind.MHA, i) for i in range(mha)]
        + [BlockId(BlockKind.MLP, i) for i in range(mlp)]
    )


@pytest.mark.parametrize(("name", "billions", "blocks", "layers", "layer_ratio"), OFFICIAL)
def test_official_ratios(name, billions, blocks, layers, layer_ratio):
    counts = count_parameters(SHAPES[name])
    assert round(counts.total / 1e9, 4) == billions
    for mha, mlp, percent in blocks:
        assert round(100 * counts.ratio(first(mha, mlp)), 2) == percent
    assert round(100 * counts.ratio(first(layers, layers)), 2) == layer_ratio


def prefixes_of(units, count=None):
    return [frozenset().union(*units[: k + 1]) for k in range(count or len(units))]


PREFIXES = prefixes_of([{parse_block(f"{name[:3]}.{name[3:]}")} for name in OFFICIAL_ORDER.split()])
MHA, MLP, BLOCKS = (
    removable_units(32, "block", candidates) for candidates in ("mha", "mlp", "all")
)
LAYERS = removable_units(32, "layer", "all")
LATENCY = {"total": 1_000, "mha": 11, "mlp": 7}
RESOURCES = resources_of(LLAMA2_7B, LATENCY)


def choose(text, prefixes=PREFIXES):
    budget = parse_budget(text, COUNTS)
    return choose_prefix(budget, prefixes, RESOURCES[budget.resource])


def require(text, units):
    budget = parse_budget(text, COUNTS)
    require_reachable(budget, units, RESOURCES[budget.resource])


def test_the_prefix_that_meets_a_budget():
    kinds = [block.kind for block in PREFIXES[choose("0.22") - 1]]
    assert (kinds.count(BlockKind.MHA), kinds.count(BlockKind.MLP)) == (12, 5)
    assert choose("17blocks") == 17
    assert [choose(text, prefixes_of(LAYERS, 31)) for text in ("0.22", "7layers", "14blocks")] == [
        7,
        7,
        7,
    ]
    middle = (COUNTS.ratio(PREFIXES[3]) + COUNTS.ratio(PREFIXES[4])) / 2
    assert choose(repr(middle)) == 5  # a tie goes to the larger


@pytest.mark.parametrize("layers", [10, 30])
def test_a_longer_sequence_never_changes_a_share_of_the_kv_cache(layers):
    """Shares of the KV cache tie often (0.15 between 1 and 2 of 10), and rounding must not
    decide."""
    result = resources_of(LLAMA2_7B | {"num_hidden_layers": layers})
    costs, mha = result["kv"], removable_units(layers, "block", "mha")
    prefixes = prefixes_of(mha)
    for percent in range(5, 100):
        budget = parse_budget(f"0.{percent:02d}kv", result["parameters"])
        nearest = min(range(layers + 1), key=lambda k: (abs(100 * k - percent * layers), -k))
        assert choose_prefix(budget, prefixes, costs) == nearest
        stop = next(
            k for k in range(1, layers + 1) if is_settled(budget, prefixes[:k], costs, mha[k:])
        )
        assert choose_prefix(budget, prefixes[:stop], costs) == nearest
        assert len(nearest_mask(goal_of(budget, mha, costs), prefixes[:stop])) == nearest


BAD = [
    "0",
    "1",
    "1.5",
    "-0.2",
    "0.0",
    "x",
    "0blocks",
    "32layers",
    "blocks",
    "22%",
    "1kv",
    "0.9x",
    "1.0x",
    "0.2 kv",
]


@pytest.mark.parametrize("text", [*BAD, "2.x", "9" * 400 + "x", "1.5blocks"])
def test_bad_budgets_name_the_value(text):
    with pytest.raises(InputError, match=f"budget {text!r}"):
        parse_budget(text, COUNTS)


@pytest.mark.parametrize(
    ("text", "units", "message"),
    [
        ("0.5", MHA, r"0\.5.*largest reachable is 32blocks, ratio 0\.3187"),
        ("40blocks", MHA, r"40blocks.*largest reachable is 32blocks"),
        ("17blocks", LAYERS, "16blocks, 18blocks"),
        ("0.5kv", MLP, r"'0\.5kv' cannot be reached; the largest reachable is 32blocks, 0\.0000kv"),
        ("1.9x", MHA, r"'1\.9x' cannot be reached; the largest reachable is 32blocks, 1\.5432x"),
        ("0.001kv", BLOCKS, r"'0\.001kv' is nearest to removing nothing.*1blocks, 0\.0312kv"),
    ],
)
def test_unreachable_budgets_name_what_is_reachable(text, units, message):
    for reachable in ("0.3187", "32blocks", "0.5kv"):
        require(reachable, MHA)
    with pytest.raises(InputError, match=message):
        require(text, units)


def test_settled_exactly_when_a_longer_sequence_cannot_change_the_choice():
    """Against brute force: over all next removals, is the chosen prefix always the same?"""

    def choice(text, prefixes):
        try:
            return choose(text, prefixes)
        except InputError:
            return None

    for text in ("0.01", "0.02", "0.05", "0.1", "0.2", "5blocks"):
        for length in range(1, 20):
            now = PREFIXES[:length]
            remaining = [unit for unit in BLOCKS if not unit <= now[-1]]
            chosen = choice(text, now)
            unchanged = chosen is not None and all(
                choice(text, [*now, now[-1] | unit]) == chosen for unit in remaining
            )
            assert is_settled(parse_budget(text, COUNTS), now, COUNTS, remaining) == unchanged, (
                text,
                length,
            )


def test_resources_of_llama2_7b():
    mask = first(8, 4)
    assert RESOURCES["parameters"].ratio(mask) == COUNTS.ratio(mask)
    assert RESOURCES["kv"].total == 2 * 4096 * 32
    assert RESOURCES["kv"].ratio(mask) == 8 / 32
    assert RESOURCES["latency"].ratio(mask) == (8 * 11 + 4 * 7) / 1000
    assert resources_of(LLAMA2_7B).keys() == {"parameters", "kv"}
    grouped = count_kv_cache(SHAPES["meta-llama/Meta-Llama-3-8B"])
    assert grouped.total == 2 * 8 * 128 * 32
    assert grouped.ratio(first(5, 3)) == 5 / 32


@pytest.mark.parametrize("text", ["0.1kv", "0.2kv", "0.234kv", "1.05x", "1.1x", "1.123x"])
def test_a_budget_of_another_resource_is_met_by_the_nearest_prefix(text):
    budget = parse_budget(text, COUNTS)
    costs = RESOURCES[budget.resource]
    expected = float(text[:-2]) if text.endswith("kv") else 1 - 1 / float(text[:-1])
    steps = choose(text)
    distances = [abs(costs.ratio(prefix) - expected) for prefix in PREFIXES]
    assert steps - 1 == distances.index(min(distances))  # no MLP block is removed for nothing
    settled = [
        is_settled(budget, PREFIXES[:k], costs, [u for u in BLOCKS if not u <= PREFIXES[k - 1]])
        for k in range(1, 21)
    ]
    assert settled.index(True) + 1 >= steps
    assert all(settled[settled.index(True) :])


def test_text_forms():
    assert format_mask(parse_mask("mlp.3,mha.12,mha.2")) == "mha.2,mha.12,mlp.3"
    for bad in ("mha", "mha.x", "head.3", "mha.-1", "mha.3.4"):
        with pytest.raises(InputError, match=bad):
            parse_block(bad)


def test_packing_keeps_the_order_in_the_fewest_layers():
    """Against all ways to cut what is left into layers."""
    for removed in map(
        frozenset, chain.from_iterable(combinations(all_blocks(4), n) for n in range(9))
    ):
        remaining = [
            b
            for layer in range(4)
            for kind in BlockKind
            if (b := BlockId(kind, layer)) not in removed
        ]
        packed = pack_layers(removed, 4)
        unpacked = [
            BlockId(kind, layer)
            for parts in packed
            for kind, layer in zip(BlockKind, parts, strict=True)
            if layer is not None
        ]
        assert unpacked == remaining
        assert (None, None) not in packed
        # a new layer must begin at each MHA, and at each MLP that follows no MHA
        starts = [
            b
            for n, b in enumerate(remaining)
            if b.kind is BlockKind.MHA or n == 0 or remaining[n - 1].kind is b.kind
        ]
        assert len(packed) == len(starts)


def test_the_size_that_is_left_is_the_share_that_goes():
    # as the paper counts it
    assert share_for("5.2566B", LLAMA2_7B) == share_for("5256.6M", LLAMA2_7B) == "0.2199"
    assert share_for("0.30kv", LLAMA2_7B) == "0.30kv"
    for text in ("9" * 400, "0." + "1" * 400, "x"):  # would become the name of a folder
        with pytest.raises(InputError, match="is not valid; give"):
            share_for(text, LLAMA2_7B)
    for text in ("7B", "0M"):
        with pytest.raises(
            InputError, match=f"'{text}' is what is left; give less than the model's 6,738.4M"
        ):
            share_for(text, LLAMA2_7B)
