"""runs/sets.yaml: what tables are made of, and what their models shall reach. Only the tables depend on it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, RootModel, model_validator

from blockpruner.core.settings import Frozen


class SetGoal(Frozen):
    """What a model of a set's studies shall reach."""

    method: str
    """As in a study's methods, with its budget and what is done after it."""
    budget: str
    compensate: str = "none"
    train: bool = False
    measure: Literal["heldout", "wikitext2", "peers", "p"] = "heldout"
    """heldout: perplexity, × dense; wikitext2: its × dense over that; peers: perplexity over that of the best other
    method that is healed alike; p: standard errors by which p of the right answer differs from dense."""
    at_most: float


class StudySet(Frozen):
    """What tables are made of."""

    runs: tuple[str, ...]
    goals: tuple[SetGoal, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _runs_alone(cls, value: Any) -> Any:
        return {"runs": value} if isinstance(value, list) else value


class Sets(RootModel[dict[str, StudySet]]):
    """runs/sets.yaml: the sets by name; where a set has no goals, its runs alone."""

    model_config = ConfigDict(frozen=True)
