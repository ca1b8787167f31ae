"""The least memory of a device for each step of a run, counted from the model's shape before
anything is searched."""

from blockpruner.core.budgets import read_budget
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.fitting.memory import fit_bytes, widths_bytes
from blockpruner.healing.settings import Train
from blockpruner.methods.recipes import searches
from blockpruner.methods.registry import kind_of_method
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import BYTES, batch_bytes, inner_size


def step_bytes(
    config: Config, dtype: str, score: Score, compensate: str, train: Train | None, budget: str
) -> dict[str, int]:
    """Bytes by step: search, refit, training. Of training with adapters only the models count,
    which they share."""
    model_bytes = count_parameters(config).total * BYTES[dtype]
    needed = {"search": model_bytes + batch_bytes(config, dtype)}
    measures_widths = any(
        kind_of_method(search.method).uses_fit_rows for search in searches(score).values()
    )
    if measures_widths and FAMILIES[str(config["model_type"])].has_one_mlp:
        needed["search"] += widths_bytes(inner_size(config), int(config["hidden_size"]))
    if compensate == "refit":
        needed["refit"] = fit_bytes(config, dtype, is_offloaded=True)
    if train is not None:
        needed["training"] = _training_bytes(config, dtype, train, budget)
    return needed


def _training_bytes(config: Config, dtype: str, train: Train, budget: str) -> int:
    counts = count_parameters(config)
    amount, unit = read_budget(budget)
    # Of a budget in blocks or in time the share of parameters is a guess.
    removed_share = amount if unit == "" else 0.5
    item = BYTES[dtype]
    pruned_parameters = round((1 - removed_share) * counts.total)
    trained_parameters = 0
    if train.weights == "all":
        embeddings = counts.total - sum(counts.blocks.values())
        trained_parameters = max(0, pruned_parameters - embeddings)
    # Float32 master, gradient and AdamW's two moments; wider weights are their own masters.
    optimizer_item = 16 if item == 2 else 3 * item
    # Adapters leave the dense weights as they are, so a teacher shares them.
    has_own_teacher = train.distill > 0 and trained_parameters > 0
    teacher_bytes = counts.total * item if has_own_teacher else 0
    return (
        pruned_parameters * item
        + teacher_bytes
        + trained_parameters * optimizer_item
        + batch_bytes(config, dtype)
    )
