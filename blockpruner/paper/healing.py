"""The models of a study whose weights are healed: one folder each, with the weights and what was done.

Decides which of them are known and which are made anew. How weights are healed is decided in
`healing`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from blockpruner import versions
from blockpruner.core.errors import InputError
from blockpruner.core.progress import Observer
from blockpruner.core.settings import TaskAnswers, Texts
from blockpruner.healing.compensate import compensate
from blockpruner.healing.rows import compensation_rows, training_rows
from blockpruner.healing.settings import Train
from blockpruner.healing.train import train
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import Healed, find_healed, save_healed
from blockpruner.paper.experiments import Cure, cures
from blockpruner.paper.studies import StudyTexts, load_plans
from blockpruner.settings import Run
from blockpruner.store.files import read_json, replace_directory, write_sealed_json
from blockpruner.store.provenance import fingerprint

FACTS = "heal.json"


def healed_of(folder: Path, cure: Cure) -> dict[str, Any] | None:
    """What was done to a model: `digest` of its weights (None: nothing helped), and facts. None: it was not made."""
    path = folder / cure.slug / FACTS
    return read_json(path) if path.exists() else None


@dataclass(frozen=True)
class Healer:
    """Heals the models of a run's study."""

    run: Run
    texts: StudyTexts
    folder: Path
    """Of the study: `model` and `plans` are read, `healed` is written, with a folder for each model."""
    states: Path
    """Of training, from which a killed one goes on."""
    device: str
    observer: Observer

    @property
    def out(self) -> Path:
        return self.folder / "healed"

    @cached_property
    def fit(self) -> CalibrationSet:
        """The rows of compensation."""
        wanted, texts = self.run.compensate, self.texts
        context = read_json(self.folder / "model" / "config.json").get("max_position_embeddings", wanted.seq_len)
        samples = texts.samples(self._data(wanted.data))
        return compensation_rows(samples, texts.tokenizer(), wanted, texts.evaluated(), context)

    @cached_property
    def train(self) -> tuple[CalibrationSet, CalibrationSet | None]:
        """Those of training and of its validation."""
        wanted, texts = self.recipe, self.texts
        return training_rows(
            texts.samples(wanted.data), texts.tokenizer(), wanted, texts.evaluated(), self.observer.note
        )

    @property
    def recipe(self) -> Train:
        assert self.run.train is not None  # `cures` has checked it
        return self.run.train

    def _data(self, own: Texts | None) -> Texts:
        data = own or self.run.calibration.data
        if isinstance(data, TaskAnswers):
            raise InputError("study.heal needs texts, and the run is calibrated on answers; set compensate.data")
        return data

    def heal_all(self) -> None:
        """Heal every model that the study wants; what is there is not made again."""
        wanted, plans = cures(self.run), self.folder / "plans"
        self.out.mkdir(parents=True, exist_ok=True)
        for number, cure in enumerate(wanted, 1):
            self.observer.note(f"healing {number} of {len(wanted)}: {cure.variant.name} at {cure.budget}")
            plan = load_plans(plans, cure.variant).get(cure.budget)
            if plan is not None:
                rows, model = CalibrationSet.load(plans / cure.variant.slug / "rows.parquet"), self.run.model
                trust = model.trust_remote_code
                self._heal(cure, Pruning(self.folder / "model", cure.of(plan), rows, model.dtype, self.device, trust))
        for path in set(self.out.iterdir()) - {self.out / cure.slug for cure in wanted}:
            shutil.rmtree(path)

    def _heal(self, cure: Cure, pruning: Pruning) -> None:
        key, done = self._key(cure, pruning), healed_of(self.out, cure)
        if done is not None and done["key"] == key:
            return
        before: Healed | None = None
        weights: Mapping[str, Tensor]
        facts: Mapping[str, Any]
        if cure.train:
            recipe = self.recipe
            before = find_healed([self.out / replace(cure, train=False).slug], pruning.identity)
            (rows, validation), data = self.train, recipe.data
            words = f"then trained ({recipe.title}, {rows.tokens:,} tokens)"
            start = replace(pruning, healed=before)
            weights, facts = train(start, recipe, rows, validation, self.states, self.observer)
        else:
            rows, data = self.fit, self._data(self.run.compensate.data)
            words = f"compensated without training ({cure.compensate}, {rows.tokens:,} tokens)"
            held_out = self.run.compensate.held_out(len(rows.rows))
            found = compensate(pruning.load(), pruning.plan, rows, held_out, cure.compensate, self.observer)
            weights, facts = found.weights, found.report

        def build(folder: Path) -> None:
            healed = None
            if weights:
                save_healed(folder, weights, pruning.identity, words, data, before)
                healed = find_healed([folder], pruning.identity)
            write_sealed_json(folder / FACTS, {"key": key, "digest": healed.digest if healed else None, **facts})

        replace_directory(self.out / cure.slug, build)

    def _key(self, cure: Cure, pruning: Pruning) -> str:
        """Of all that decides the weights."""
        recipe = [versions.COMPENSATION_VERSION, cure.compensate, self.run.compensate.validation, self.fit.digest]
        if cure.train:
            rows = [part.digest for part in self.train if part is not None]
            recipe += [versions.RECOVERY_VERSION, self.recipe.model_dump(mode="json"), rows]
        return fingerprint({"of": pruning.identity, "recipe": recipe})
