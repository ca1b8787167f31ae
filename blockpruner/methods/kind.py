"""A kind of method: how its plans are found, committed and applied, and how it is named.

Each kind is one folder beside this file with one subclass of `Kind`; `registry` lists them. A
method that ends in a mask is a row of `search.registry.SEARCHES` and needs no kind of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockpruner.core.blocks import DENSE, BlockKind, Mask
from blockpruner.core.budgets import Budget, Resources, parse_budget, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.objectives import Counts
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import Rows, Scorer
from blockpruner.search.trace import Current
from blockpruner.store.locks import hold, this_process
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import TrialStore, store_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Material:
    """The dense model, and the places and tools that a method may use to find out what to do with
    it."""

    identity: str
    """The dense checkpoint's `checkpoint_identity`."""
    dtype: str
    config: Config
    trials: Path | None
    """Folder of all trial stores; None keeps trials in memory."""
    scorer: Scorer
    """The scorer of the dense model, which is loaded when a score is needed that no store has."""
    dense: Callable[[], PreTrainedModel]
    """Loads the dense model into this process, once, for a method that has to change its weights to
    compare them."""
    observer: Observer


@dataclass(frozen=True)
class Job:
    """What the stage `score` has to do for one run."""

    material: Material
    calibration: CalibrationSet
    score: Score
    budgets: tuple[str, ...]
    folder: Path
    """The run's folder of scores. Tables present in it seed the trial stores (a clone after `dvc
    pull`)."""
    resources: Resources
    latency: Mapping[str, Any] | None
    """The measurement behind `resources["latency"]`, where there is one."""

    def store_fields(self, loss: str) -> dict[str, Any]:
        """What identifies the trial store of a loss."""
        version = METRICS[loss].version
        named = f"{loss}, version {version}" if version else loss
        return store_fields(
            self.calibration.digest, self.material.identity, self.material.dtype, named
        )

    @contextmanager
    def stores(self, losses: Sequence[str]) -> Iterator[dict[str, TrialStore]]:
        """The trial stores of some losses, locked: another process that computes the same trials is
        waited for."""
        folder = self.material.trials
        note = self.material.observer.note
        stores = dict[str, TrialStore]()

        def note_busy(holder: str) -> None:
            note(f"{holder} computes the same trials; waiting for it, then reusing them")

        with ExitStack() as stack:
            # Locked in one order everywhere, so that two processes cannot wait for each other.
            for loss in sorted(losses):
                fields = self.store_fields(loss)
                if folder is not None:
                    lock = folder / f"{fingerprint(fields)}.lock"
                    stack.enter_context(hold(lock, this_process(), note_busy))
                store = TrialStore(fields, self.calibration.row_keys, folder)
                stack.callback(store.close)
                stores[loss] = store
                if store.trials:
                    note(f"found {store.trials:,} scores of before in {folder}")
            yield stores

    def current(self, kind: str, search: str, nested: bool, options: Options, loss: str) -> Current:
        """What the run's current search is."""
        rows = self.calibration
        return Current(
            kind=kind,
            search=search,
            nested=nested,
            score=self.score.model_copy(update={"options": options.model_dump()}),
            store=self.store_fields(loss),
            calibration={"rows": len(rows.rows), "tokens": rows.tokens, "digest": rows.digest},
            latency=self.latency,
        )


class Kind(ABC):
    """One kind of plan: the base class of the kinds in the folders beside this file."""

    name: str
    """As in a plan's `kind`. For a method that searches no mask it is also the `score.method`."""
    title: str
    """As in reports, for instance "SliceGPT"."""
    options: type[Options] = Options
    """The type of `score.options`."""
    exports: frozenset[str] | None = None
    """The formats that can hold such a model; None: all."""
    removes_blocks = False
    """Its plans are masks, which a search of `search.registry` found."""
    is_reversible = False
    """It has a `temporarily_pruned`, and `apply_` writes to no tensor of the dense model."""
    keeps_weights = False
    """Its models hold a subset of the dense model's weights, unchanged. So they can be fitted to
    the dense model."""
    uses_fit_rows = False
    """Its plans are made from the rows that weights are fitted to, which are more rows than a
    search has."""

    @abstractmethod
    def score(self, job: Job) -> tuple[Current, Counts]:
        """Find what to remove for each budget, and write the trace to the job's folder."""

    @abstractmethod
    def commit(
        self, scores: Path, config: Config, budget: str, current: Current
    ) -> tuple[Plan, Sequence[Path]]:
        """The plan for a budget from a run's folder of scores, and the iteration tables that it
        used, in order."""

    @abstractmethod
    def apply_(self, model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
        """Prune a dense model in place, for good. The rows are the calibration rows."""

    def temporarily_pruned(
        self, model: PreTrainedModel, plan: Plan
    ) -> AbstractContextManager[PreTrainedModel]:
        """The dense model, pruned inside the `with` by another way than that of `apply_`, so that
        each verifies the other."""
        raise NotImplementedError(f"{self.name} cannot restore the dense model")

    @abstractmethod
    def identity(self, plan: Plan, rows: str) -> dict[str, Any]:
        """Everything that the pruned model depends on apart from the dense model; `rows` is the
        digest of the calibration rows."""

    def pruned_parameters(self, plan: Plan, config: Config) -> int | None:
        """The pruned model's parameters, or None if they follow from the removed blocks."""
        return None

    def require(self, budget: Budget, options: Any, config: Config) -> None:
        """Refuse, before anything is computed, a budget that no plan meets; raises
        UnreachableError. The options are of the kind's own type."""
        return

    @abstractmethod
    def method_words(self, plan: Plan, unit: str) -> str:
        """How the plan was made, for instance "one-shot, whole layers, by Block Influence"; `unit`
        names what was removed at once."""

    @abstractmethod
    def removed_words(self, plan: Plan) -> str:
        """What is removed, for instance "3 MHA + 4 MLP"."""

    @abstractmethod
    def card_words(self, plan: Plan) -> str:
        """What was done to the model, as a clause of its model card."""

    def step_words(self, plan: Plan) -> str:
        """What the plan does step by step, for a plan whose steps are in no table of the report."""
        return ""


def make_plan(
    current: Current,
    budget: str,
    config: Config,
    *,
    perplexities: tuple[float | None, float | None],
    gone: Mask = DENSE,
    pruned: int | None = None,
    **fields: Any,
) -> Plan:
    """A plan from a run's current search; `pipeline.commit` adds its target and run.

    Args:
        perplexities: on the calibration set, of the dense and of the pruned model; None is not
            measured.
        gone, pruned: as in `weights.Removed`.
        fields: what else the plan holds: `removed`, `order`, `ratios` and `details`, each empty by
            default.
    """
    fields = {"removed": (), "order": (), "ratios": (), **fields}
    fields |= sizes(known_resources(config, budget, current), gone, pruned)
    dense_perplexity, perplexity = perplexities
    return Plan(
        kind=current.kind,
        target="",
        run="",
        budget=budget,
        method=current.score.method,
        metric=current.score.metric,
        options=current.score.options,
        search=current.search,
        nested=current.nested,
        calibration={
            **current.calibration,
            "dense_perplexity": dense_perplexity,
            "perplexity": perplexity,
        },
        **fields,
    )


def sizes(resources: Resources, gone: Mask, pruned: int | None = None) -> dict[str, Any]:
    """The fields of a plan that follow from the dense model's resources and the blocks that are
    gone."""
    counts = resources["parameters"]
    if pruned is None:
        pruned = counts.total - sum(counts.blocks[block] for block in gone)
    ratio = (counts.total - pruned) / counts.total
    return {
        "layers": len(counts.blocks) // 2,
        "ratio": ratio,
        "removes": (
            {name: costs.ratio(gone) for name, costs in resources.items()} | {"parameters": ratio}
        ),
        "blocks": {kind.value: sum(block.kind is kind for block in gone) for kind in BlockKind},
        "parameters": {"dense": counts.total, "pruned": pruned},
    }


def known_resources(config: Config, budget: str, current: Current) -> Resources:
    """The resources of a run's model; raises InputError where the budget is a speed-up and none was
    measured."""
    resources = resources_of(config, current.latency)
    if parse_budget(budget, resources["parameters"]).resource not in resources:
        raise InputError(
            f"budget {budget!r} is a speed-up, and the run's scores know no times; run its stage"
            " score again"
        )
    return resources
