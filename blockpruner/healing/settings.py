"""The sections `compensate` and `train`: how the weights that are left make up for what is gone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from blockpruner.core.errors import missing
from blockpruner.core.settings import ALPACA, Frozen, Texts

CompensationMethod = Literal["none", "refit"]


class Compensate(Frozen):
    """How the weights that are left make up for what is gone, without training."""

    method: CompensationMethod | None = None
    """The method; null is the recipe's own, else none."""
    data: Texts | None = None
    """The texts of the fit; null is the run's calibration texts."""
    num_rows: int = Field(default=192, ge=2)
    """The most joined rows that are used."""
    seq_len: int = Field(default=256, ge=2)
    """Tokens in a row; the model's context, where that is shorter."""
    validation: float = Field(default=0.125, gt=0, lt=1)
    """The share of rows on which the strength is chosen; weights that do not help there are left as
    they were."""
    seed: int = 42

    def held_out(self, rows: int) -> int:
        """How many of so many rows these are."""
        return max(1, min(rows - 1, round(self.validation * rows)))


class Train(Frozen):
    """Training after pruning, for targets with `train: true`. The defaults are the paper's LoRA,
    validated; what the paper leaves open is explained in `healing`."""

    data: Texts = ALPACA
    num_samples: int = Field(default=8000, ge=1)
    """Texts, of which each is a row of at most `seq_len` tokens."""
    num_rows: int | None = Field(default=None, ge=1)
    """The number of joined rows of `seq_len` tokens, in place of num_samples."""
    seq_len: int = Field(default=2048, ge=2)
    weights: Literal["lora", "all"] = "lora"
    """What is trained: adapters of the linear layers, or all weights but embeddings and head."""
    rank: int = Field(default=32, ge=1)
    """The rank of the adapters."""
    alpha: float = Field(default=10.0, gt=0)
    distill: float = Field(default=0.0, ge=0, le=1)
    """Weight of the KL divergence from the dense model's predictions; the text's NLL has the rest
    of 1."""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to 0."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """The share of the steps over which the learning rate rises first."""
    batch: int = Field(default=1, ge=1)
    """Rows that are computed at once."""
    accumulation: int = Field(default=4, ge=1)
    """Batches in a step."""
    epochs: int = Field(default=1, ge=1)
    seed: int = 42
    validation: int = Field(default=16, ge=0)
    """Samples, or joined rows, that are held out; the best state on them is kept. 0 keeps the last
    state."""
    validate_every: int = Field(default=100, ge=1)
    """Steps between two validations; the first comes before training, and the last after it."""

    def fitted(self, context: int | None) -> Train:
        """The same with rows of the model's context at most; raises InputError if a package for it
        is missing."""
        if find_spec("accelerate") is None:
            raise missing("accelerate", "")
        if self.weights == "lora" and find_spec("peft") is None:
            raise missing("peft", "train")
        return self.model_copy(update={"seq_len": min(self.seq_len, context or self.seq_len)})

    @property
    def title(self) -> str:
        """The recipe in words."""
        trained = f"LoRA, rank {self.rank}" if self.weights == "lora" else "all weights"
        return trained + (", distilled from the dense model" if self.distill else "")
