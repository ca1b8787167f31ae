"""LaCo's merges in a live model, for a while or for good, and how similar the model stays.

Decides the parameters of merged layers, and the similarity of a merged model to the dense one.
Which merges are tried and accepted is decided in `walk`. A merged model is a plain model of its own
family with fewer layers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE
from blockpruner.core.errors import InputError
from blockpruner.methods.laco.walk import Merge, Merges, layers_after
from blockpruner.model.models import (
    decoder_layers,
    keep_layers_,
    model_family,
    replace_parameters_,
    restored,
)
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Rows, Task

Layers = Sequence[nn.Module]
"""Decoder layers l, l+1 .. l+m that are merged into the first."""


def merge_(model: PreTrainedModel, merges: Sequence[Merge], variant: str) -> PreTrainedModel:
    """Merge layers of the model in place, for good, in the order of `merges`; `variant` is a key of
    `VARIANTS`. Raises InputError if the model has no layers for a merge; it is unchanged. Class and
    config stay the family's own, so that transformers needs no code of ours. A merged layer keeps
    its own type (sliding window or full)."""
    layers = decoder_layers(model)
    merged_sources = layers_after(merges, len(layers))
    for sources in merged_sources:
        layouts = {
            frozenset(name for name, _ in layers[source].named_parameters()) for source in sources
        }
        # Parameters can be added only if each layer has the same ones.
        if len(layouts) > 1:
            raise InputError(
                f"LaCo's merges {', '.join(map(str, merges))} are of layers of different kinds"
                " (dense MLPs and experts, or linear and full attentions), whose parameters cannot"
                " be added; keep to layers of one kind (score.options: lowest, highest), or choose"
                " another method"
            )
    remaining = list(layers)
    for merge in merges:
        group = remaining[merge.layer : merge.layer + merge.count + 1]
        del remaining[merge.layer + 1 : merge.layer + merge.count + 1]
        values = VARIANTS[variant](group)
        new = {
            old: nn.Parameter(values[name].detach().to(old.device), requires_grad=old.requires_grad)
            for name, old in group[0].named_parameters()
            if name in values
        }
        replace_parameters_(group[0], new)
    keep_layers_(model, [(sources[0], sources[0]) for sources in merged_sources])
    return model


@contextmanager
def merged(
    model: PreTrainedModel, merges: Sequence[Merge], variant: str
) -> Iterator[PreTrainedModel]:
    """The model after `merge_`, restored on exit. Only parameters that a merge computes take
    memory."""
    with restored(model):
        yield merge_(model, merges, variant)


class Similarity:
    """How similar a model stays to itself after merges.

        s(merges) = mean over rows of cos(flat(X), flat(X_merges))

    X, X_merges [T, H]: a row's last hidden states in the dense and in the merged model, after the
    final norm, as in LaCo's public notebook (`hidden_states[-1]`). A row is one vector of T x H
    numbers, without pads; the cosine is taken in float64. The dense states of all rows are held in
    memory, in the model's dtype. A call raises InputError for a merge that is not possible, or
    hidden states that are not finite. Meanwhile `advance` receives the rows done, their number, and
    the candidate's last merge.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        variant: str,
        advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
        batch_tokens: int | str = "auto",
    ) -> None:
        self._model, self._rows, self._variant, self._advance = model, rows, variant, advance
        self._decoder: nn.Module = attrgetter(model_family(model).decoder)(model)
        self._batches = Engine(model, batch_tokens).row_batches(rows, range(len(rows)))
        self._dense: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, merges: Merges) -> float:
        if not self._dense:
            self._dense = [states.clone() for states in self._states()]
        values: list[float] = []
        with merged(self._model, merges, self._variant):
            for dense, states in zip(self._dense, self._states(), strict=True):
                values.append(
                    cosine_similarity(
                        dense.double().flatten(), states.double().flatten(), dim=0
                    ).item()
                )
                if not math.isfinite(values[-1]):
                    raise InputError(
                        f"the hidden states of row {len(values) - 1} are not finite, dense or after"
                        f" the merges {', '.join(map(str, merges))}; try a wider dtype"
                        " (model.dtype: float32), or leave the row out. Similarities measured"
                        " before are kept"
                    )
                self._advance(len(values), len(self._rows), str(merges[-1]))
        return fmean(values)

    def _states(self) -> Iterator[Tensor]:
        """Each row's last hidden states [T, H] in the model as it is now. Pads follow every real
        token, so causal attention never sees them."""
        home = self._model.get_input_embeddings().weight.device
        for span in self._batches:
            rows = [self._rows[i] for i in span]
            states = self._decoder(
                input_ids=Batch.of(rows, home).input_ids, use_cache=False
            ).last_hidden_state
            for row, state in zip(rows, states, strict=True):
                yield state[: len(row)]


def merged_nll(model: PreTrainedModel, rows: Rows, merges: Merges, variant: str) -> list[float]:
    """The mean NLL of each row after the merges."""
    with merged(model, merges, variant):
        engine = Engine(model)
        tasks = [Task(span, (DENSE,)) for span in engine.row_batches(rows, range(len(rows)))]
        batches = sorted(engine.run(tasks, rows), key=lambda scored: scored.span[0])
    losses: list[float] = []
    for batch in batches:
        losses += batch.loss
    return losses


def _last_linears(layers: Layers) -> dict[str, Tensor]:
    """LaCo's public notebook: theta* = theta_{l+m} for the linear modules, while norms stay those
    of layer l.

    The notebook adds theta_{l+k} minus the base as updated so far, and all terms but the last
    cancel. It does so for the weights of linear modules only. Its models have no biases; here a
    bias goes with its module, and the matrices of experts and of their router are linear, too.
    """
    return {
        f"{path}.{name}": parameter
        for path, module in layers[-1].named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def _sum_of_differences(layers: Layers) -> dict[str, Tensor]:
    """theta* = theta_l + sum_k (theta_{l+k} - theta_l), k = 1..m, for all parameters of the layer,
    norms included. This is the equation of arXiv 2402.11187, section 2, in float32 at least and
    rounded once."""
    base, *following = (dict(layer.named_parameters()) for layer in layers)
    result = {}
    for name, parameter in base.items():
        theta = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        total = theta.clone()
        # The sum runs over k = 1..m.
        for layer in following:
            total += layer[name].to(theta) - theta
        result[name] = total.to(parameter.dtype)
    return result


VARIANTS: dict[str, Callable[[Layers], dict[str, Tensor]]] = {
    "repo": _last_linears,
    "paper": _sum_of_differences,
}
