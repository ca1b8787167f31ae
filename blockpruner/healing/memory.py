"""The least memory of a device for each step of a run, counted from the model's shape before
anything is searched."""

from blockpruner.core.budgets import read_budget
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.healing.settings import Train
from blockpruner.methods.recipes import searches
from blockpruner.methods.registry import kind_of_method
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import BYTES, batch_bytes, fit_bytes, inner_size, widths_bytes


def step_bytes(
    config: Config, dtype: str, score: Score, compensate: str, train: Train | None, budget: str
) -> dict[str, int]:
    """Bytes by step: search, refit, training. Of training with adapters only the models count,
    which they share."""
    share, unit = read_budget(budget)
    removed = share if unit == "" else 0.5  # of the parameters, which training does without
    costs, item, batch = count_parameters(config), BYTES[dtype], batch_bytes(config, dtype)
    weights = costs.total * item
    found = {"search": weights + batch}
    has_one_mlp = FAMILIES[str(config["model_type"])].has_one_mlp
    if has_one_mlp and any(kind_of_method(one.method).of_fit for one in searches(score).values()):
        found["search"] += widths_bytes(inner_size(config), int(config["hidden_size"]))
    if compensate == "refit":
        found["refit"] = fit_bytes(config, dtype, visits=True)
    if train is not None:
        kept = round((1 - removed) * costs.total)
        trained = kept - costs.total + sum(costs.blocks.values()) if train.weights == "all" else 0
        teacher = weights if trained and train.distill else 0
        # masters in float32, two moments and the gradient; or without masters
        beside = 16 if item == 2 else 3 * item
        found["training"] = kept * item + teacher + max(0, trained) * beside + batch
    return found
