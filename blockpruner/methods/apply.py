"""The pruned model of a plan, in memory.

How a checkpoint is written of it is decided by `checkpoints`, how it is measured by `evaluation`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from blockpruner.core.plan import Plan
from blockpruner.fitting.offload import load_for_fit
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.methods.healed import Healed, load_healed_
from blockpruner.methods.registry import KINDS, model_facts
from blockpruner.model.models import load_model, shared_copy
from blockpruner.scoring.work import Rows
from blockpruner.store.provenance import fingerprint

Note = Callable[[PreTrainedModel], object]
"""Takes down the outputs that a verification compares with. They are of the dense model changed for
a while, if the kind of plan can do that, and the healed weights are among those that it
leaves."""


@dataclass(frozen=True)
class Pruning:
    """A pruned model that is to be made."""

    dense: Path
    """The directory of the dense model."""
    plan: Plan
    rows: CalibrationSet
    """Those of calibration."""
    dtype: str
    device: str
    trust_remote_code: bool = False
    healed: Healed | None = None
    """Weights to put into it."""

    @property
    def identity(self) -> str:
        """The identity of the model before it is compensated."""
        facts = {"model": self._base, "dtype": self.dtype}
        return fingerprint({**facts, **model_facts(self.plan, self.rows.digest)})

    @property
    def _base(self) -> str:
        return checkpoint_identity(self.dense)

    def load(self) -> PreTrainedModel:
        """The dense model."""
        return load_model(self.dense, self.dtype, self.device, self.trust_remote_code)

    def load_for_fit(self) -> PreTrainedModel:
        """The dense model where weights are fitted: layer by layer on a device that does not hold
        it."""
        return load_for_fit(self.dense, self.dtype, self.device, self.trust_remote_code)

    def load_for_export(self) -> PreTrainedModel:
        """The dense model where an export is made of it: on the CPU, as in the process that
        verifies the export. A kind that computes weights takes its device for that."""
        device = "cpu" if KINDS[self.plan.kind].is_reversible else self.device
        return load_model(self.dense, self.dtype, device, self.trust_remote_code)

    def prune_(self, dense: PreTrainedModel, note: Note = lambda reduced: None) -> PreTrainedModel:
        """The pruned model, in place of the dense one."""
        kind = KINDS[self.plan.kind]
        is_reversible = kind.is_reversible
        if self.healed is not None:
            if kind.removes_blocks:
                # Both models share the tensors that are left: healing one heals the other.
                load_healed_(pruned_copy(dense, self.plan, self.rows.rows), self.healed.path)
            else:
                is_reversible = False
        if is_reversible:
            with kind.temporarily_pruned(dense, self.plan) as reduced:
                note(reduced)
        pruned = kind.apply_(dense, self.plan, self.rows.rows)
        if not is_reversible:
            if self.healed is not None:
                load_healed_(pruned, self.healed.path)
            note(pruned)
        return pruned


@dataclass(frozen=True, kw_only=True)
class Loaded(Pruning):
    """A pruned model that is to be made of a dense one in memory."""

    model: PreTrainedModel
    base: str
    """The identity of the dense model."""

    @property
    def _base(self) -> str:
        return self.base

    def load(self) -> PreTrainedModel:
        """The dense model itself."""
        return self.model.requires_grad_(False)

    def prune_(self, dense: PreTrainedModel, note: Note = lambda reduced: None) -> PreTrainedModel:
        return super().prune_(copy.deepcopy(dense), note)


@dataclass(frozen=True, kw_only=True)
class Made(Pruning):
    """A model that is pruned already: what is written of it is verified against itself."""

    model: PreTrainedModel

    def load_for_export(self) -> PreTrainedModel:
        """A copy on the CPU, which the export may change."""
        return copy.deepcopy(self.model).cpu().requires_grad_(False).eval()

    def prune_(self, dense: PreTrainedModel, note: Note = lambda reduced: None) -> PreTrainedModel:
        note(dense)
        return dense


def pruned_copy(dense: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    """The pruned model beside the dense one, which stays whole. They share the tensors that the
    plan leaves alone."""
    kind = KINDS[plan.kind]
    # A kind that is not reversible writes to the tensors themselves.
    model = shared_copy(dense) if kind.is_reversible else copy.deepcopy(dense)
    return kind.apply_(model, plan, rows)
