"""Recipes: what one name stands for, behind every door.

A recipe is one search or several, and the compensation that belongs to them. Run files, targets,
the command, the API and the form take the same names: that of a recipe, or that of a plain method,
which is exact and not compensated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockpruner.core.blocks import removable_units
from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.inputs.sources import SHIPPED
from blockpruner.scoring.settings import Score


@dataclass(frozen=True)
class Recipe:
    """The searches whose results compete, and how they are compensated before the best one is
    kept."""

    title: str
    """Its name in tables and figures."""
    searches: Mapping[str, Mapping[str, Any]]
    """What each search sets in the `score` section, by the search's name; of several see
    `proposals`."""
    compensate: str = "none"
    """The value of `compensate.method` where the user sets none."""
    published: tuple[str, ...] = ()
    """The names of its rows in data/paper."""


def _one(title: str, published: tuple[str, ...] = (), /, **score: Any) -> Recipe:
    return Recipe(title, {str(score["method"]): score}, published=published)


RECOMMENDED, BLOCKPRUNER = "recommended", "blockpruner"
OF_MIXTURES = "attentions"
"""The only search of the recommended recipe on a mixture of experts: those are for expert
pruning."""
BI, RM = "block_influence", "relative_magnitude"
LAYERS: Mapping[str, Any] = {"method": "one_shot", "unit": "layer"}
SHIFTED: Mapping[str, Any] = {"method": "greedy", "acceleration": "lazy+race", "unit": "shifted"}
NEAR = 0.1
"""Layers are near a budget that they miss by no more than this share of it."""

RECIPES: Mapping[str, Recipe] = {
    # Narrower MLPs win or are level (docs/methods.md). The layers are those that one pass finds: a
    # search finds none that are better after a refit, and takes longer than all the rest. Floating
    # search is for what neither can reach.
    RECOMMENDED: Recipe(
        "recommended",
        {
            "floating": {"method": "floating", "acceleration": "lazy+race"},
            "narrow": {"method": "narrow", "acceleration": None, "metric": "perplexity"},
            "layers": {**LAYERS, "acceleration": None, "metric": f"{RM}_frobenius"},
            OF_MIXTURES: {"method": "greedy", "acceleration": "lazy+race", "candidates": "mha"},
        },
        "refit",
    ),
    # The search of arXiv 2406.10594; its calibration set is that of `sections`.
    BLOCKPRUNER: _one("BlockPruner", ("blockpruner", "ppl", "block"), method="greedy"),
    # For engines that load whole layers alone.
    "shifted": Recipe("shifted layers", {"greedy-shifted": SHIFTED}, "refit"),
    "slicegpt": _one("SliceGPT", ("slicegpt",), method="slicegpt"),
    "narrow": Recipe(
        "narrower MLPs", {"narrow": {"method": "narrow", "acceleration": None}}, "refit"
    ),
    "laco": _one("LaCo", ("laco",), method="laco"),
    "laco-3": _one("LaCo, 3 layers a merge", ("laco",), method="laco", options={"count": 3}),
    "laco-7": _one("LaCo, 7 layers a merge", ("laco",), method="laco", options={"count": 7}),
    "relative-magnitude": _one("Relative Magnitude", (RM,), **LAYERS, metric=RM),
    "relative-magnitude-frobenius": _one(
        "Relative Magnitude, Frobenius", (RM,), **LAYERS, metric=f"{RM}_frobenius"
    ),
    "shortgpt": _one("ShortGPT", ("shortgpt",), **LAYERS, metric=BI),
    "one-shot-perplexity": _one("one-shot perplexity", ("one_shot_ppl",), method="one_shot"),
    "greedy-layers": _one(
        "greedy layers", ("layer_greedy_ppl", "layer"), method="greedy", unit="layer"
    ),
    "blockpruner-per-parameter": _one(
        "BlockPruner per parameter", method="greedy", options={"per": "parameters"}
    ),
    "blockpruner-by-js": _one("BlockPruner by JS", ("js",), method="greedy", metric="js"),
    "blockpruner-by-bi": _one("BlockPruner by BI", method="greedy", metric=BI),
    "blockpruner-by-rm": _one("BlockPruner by RM", method="greedy", metric=RM),
    "blockpruner-by-rm-frobenius": _one(
        "BlockPruner by RM, Frobenius", method="greedy", metric=f"{RM}_frobenius"
    ),
    "mha-only": _one("MHA only", method="greedy", candidates="mha"),
    "mlp-only": _one("MLP only", method="greedy", candidates="mlp"),
}


def names() -> list[str]:
    """Every name that a method may have: recipes first."""
    # takes a second, which `blockpruner --help` does without
    from blockpruner.methods.registry import (
        method_names,
    )

    return [*RECIPES, *(name for name in method_names() if name not in RECIPES)]


def recipe(name: str) -> Recipe:
    """The recipe of this name, or the one of a plain method; raises InputError if there is
    neither."""
    if name in RECIPES:
        return RECIPES[name]
    if name not in names():
        raise InputError(
            f"method {name!r} is unknown; valid: {', '.join(names())}",
            rule="unknown-method",
            key="score.method",
            value=name,
        )
    from blockpruner.methods.registry import row_of

    return Recipe(row_of(name).title, {name: {"method": name}})


def searches(score: Score) -> dict[str, Score]:
    """The searches of a `score` section, by name: one, or those of its recipe; `proposals` has
    those that compete. An acceleration that the section sets wins over the recipe's. A recipe's
    other searches also change what a step removes, so they are there only if the section leaves
    unit, candidates and options as they are."""
    if score.method not in RECIPES:
        return {score.method: score}
    recipe_searches = list(RECIPES[score.method].searches.items())
    has_default_units = (score.unit, score.candidates, dict(score.options)) == ("block", "all", {})
    if not has_default_units:
        recipe_searches = recipe_searches[:1]
    sections_by_name = {}
    for name, values in recipe_searches:
        # A null in the recipe is for a method without acceleration.
        is_accelerated = values.get("acceleration", "") is not None
        if score.acceleration is not None and is_accelerated:
            values = {**values, "acceleration": score.acceleration}
        sections_by_name[name] = score.model_copy(update=values)
    return sections_by_name


def proposals(score: Score, config: Config, budget: str) -> dict[str, Score]:
    """The searches whose results compete for a budget: narrower MLPs where they reach it, and
    layers where they come near it. Without either the first one searches, as for a budget that is
    not a share of all parameters, or that cannot be met at all, which it refuses with words. See
    also `OF_MIXTURES`."""
    from blockpruner.methods.registry import kind_of_method, require_budgets

    candidates = searches(score)
    mixture_search = candidates.pop(OF_MIXTURES, None)
    if mixture_search is not None and not FAMILIES[str(config["model_type"])].has_one_mlp:
        return {OF_MIXTURES: mixture_search}
    fallback, *names = candidates
    amount, unit = read_budget(budget)
    counts = count_parameters(config)

    def is_near(search: Score) -> bool:
        layers = removable_units(len(counts.blocks) // 2, search.unit, "all")
        layer_share = counts.ratio(layers[0]) if layers else 1.0
        count = round(amount / layer_share)
        return count <= len(layers) and abs(count * layer_share - amount) <= NEAR * amount

    def is_reached(search: Score) -> bool:
        try:
            require_budgets(search, config, (budget,))
        except InputError:
            return False
        return True

    competing = {}
    # Only a share of all parameters can be met without removing blocks.
    if unit == "":
        for name in names:
            search = candidates[name]
            removes_layers = kind_of_method(search.method).removes_blocks
            is_able = is_near(search) if removes_layers else is_reached(search)
            if is_able:
                competing[name] = search
    return competing or {fallback: candidates[fallback]}


def require_reached(score: Score, config: Config, budget: str) -> None:
    """Refuse, before anything is computed, a budget that no search of the section reaches; raises
    UnreachableError."""
    from blockpruner.methods.registry import require_budgets

    name, search = next(iter(proposals(score, config, budget).items()))
    try:
        require_budgets(search, config, (budget,))
    except UnreachableError as error:
        if name != OF_MIXTURES:
            raise
        raise UnreachableError(
            f"{error}; of a mixture only MHA blocks are removed by default; its experts are for"
            f" expert pruning, and --method {BLOCKPRUNER} removes whole mixtures, too"
        ) from None


def compensation(setting: str | None, method: str) -> str:
    """How models are compensated: the `compensate.method` of a run file, else the recipe's."""
    return setting or recipe(method).compensate


def is_judged(method: str, compensate: str) -> bool:
    """Whether models are judged on texts that nothing else has seen: where proposals compete, or
    weights are fitted."""
    return compensate != "none" or len(recipe(method).searches) > 1


OWN_TEXTS = ("path", "hub")
"""Sources that are texts of one's own."""

DRAWN: Mapping[str, Any] = {"split": "all", "num_rows": 64, "seq_len": 256}
"""Calibration but for methods of the paper: joined rows, and of instructions only the responses are
scored."""

PAPERS: Mapping[str, Any] = {"split": "all", "num_rows": 16}
"""Calibration of the paper's methods on texts of one's own: about as many rows as the paper's 256
samples fill."""


def mixed(data: Mapping[str, Any] | None, method: str, only_texts: bool) -> dict[str, Any]:
    """The source of calibration texts: ours, or as much of them as of texts of one's own. These are
    alone where that is wanted, and for a method of the paper."""
    if data is None:
        return {"source": SHIPPED}
    if only_texts or recipe(method).published or data.get("source") not in OWN_TEXTS:
        return dict(data)
    return {"source": "mix", "of": [dict(data), {"source": SHIPPED}]}


# both measured once, the results are not kept
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "all": {
        "weights": "all",
        "learning_rate": 3e-4,
    },
    "lora": {"weights": "lora", "learning_rate": 1e-3},
}
"""Recipes of training by the weights that are trained: values of `train` in a run file, with those
below."""

DISTILLATION: Mapping[str, Any] = {
    "distill": 1.0,
    "num_rows": 450,
    "seq_len": 512,
    "batch": 2,
    "accumulation": 1,
    "schedule": "cosine",
    "warmup": 0.05,
    "validation": 8,
}


def training(name: str) -> dict[str, Any]:
    """Values of `train` for a recipe of training; raises InputError for a name that is none."""
    if name not in TRAINING:
        raise InputError(
            f"train {name!r} is unknown; valid: {', '.join(TRAINING)}",
            rule="unknown-training",
            key="train",
            value=name,
        )
    return {**DISTILLATION, **TRAINING[name]}


def sections(
    method: str,
    *,
    data: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any],
    score: Mapping[str, Any],
    only_texts: bool = False,
    compensate: str | None = None,
    train: str | None = None,
) -> dict[str, Any]:
    """Sections of a run file in a few words, as the command, the API and the form ask for them.
    Sources may be named.

    `data` is the source of texts of one's own, beside which ours are drawn (`mixed`). A method of
    the paper has the paper's calibration set, or these texts alone. The others are what differs
    from the defaults and from the recipe, and a recipe of training.
    """
    calibration = dict(calibration)
    is_papers = bool(recipe(method).published)
    # Without texts of the user, a method of the paper has the paper's calibration set, which is
    # the default of the section.
    if data is not None or not is_papers:
        rows = dict(PAPERS if is_papers else DRAWN)
        # Rows of single samples are as many as the samples.
        if "num_samples" in calibration or calibration.get("packing") == "per_sample":
            del rows["num_rows"]
        calibration = {"data": mixed(data, method, only_texts), **rows, **calibration}
    values: dict[str, Any] = {"calibration": calibration, "score": {"method": method, **score}}
    if compensate is not None:
        values["compensate"] = {"method": compensate}
    if train is not None:
        values["train"] = training(train)
        if "data" in calibration:
            values["train"]["data"] = calibration["data"]
    return values


def completed(
    values: Mapping[str, Any], data: Mapping[str, Any] | None = None, only_texts: bool = False
) -> dict[str, Any]:
    """The values of a run file. If it names no texts, they are those of `data` and ours (see
    `mixed`), or those that belong to its method."""
    calibration = values.get("calibration", {})
    # What is no mapping is refused with the other mistakes of the file, when it is read.
    if not isinstance(calibration, Mapping) or "data" in calibration:
        return dict(values)
    score = values.get("score")
    method = score.get("method") if isinstance(score, Mapping) else None
    if method not in names():
        method = RECOMMENDED
    defaults = sections(method, data=data, only_texts=only_texts, calibration=calibration, score={})
    return {**values, "calibration": defaults["calibration"]}
