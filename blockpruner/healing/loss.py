"""The loss of training and its gradient: the text's NLL, and how far the model is from the dense one on the same text.

Decides the formula, and in which pieces it is computed. The head runs over chunks of tokens. A chunk's gradient goes
back to its states before the next chunk has logits, so neither model's logits ever exist for a whole row.

    loss = mean over rows of the mean over the row's predicted tokens of
           (1 - distill) NLL + distill T^2 KL(p || q) + hidden * MSE

T is `temperature`; p and q are the next-token distributions of the dense model and of the trained one, with logits
divided by T (Hinton et al., arXiv 1503.02531). With `top_k`, the outcomes are the dense model's k likeliest tokens and
all others together. This KL is at most that of the whole vocabulary, and 0 for the same predictions. MSE compares the
state s after a layer with the dense model's state d at the same depth: the mean over layers of ||s - d||^2 / ||d||^2.
Each token has its own norm, since the first of a row is often hundreds of times larger and would decide alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from blockpruner.healing.settings import Train
from blockpruner.model.models import decoder_layers, head_of
from blockpruner.scoring.losses import token_kl
from blockpruner.scoring.work import LOGITS_BYTES


@dataclass(frozen=True)
class TrainingLoss:
    """What training minimises."""

    model: PreTrainedModel
    """The model that is trained."""
    teacher: PreTrainedModel | None
    """The dense model, if the recipe compares with it."""
    recipe: Train
    depths: Sequence[int] = ()
    """For each layer of `model`, the layer of `teacher` after which states are compared; none if they are not."""

    def accumulate_(self, rows: Sequence[Sequence[int]], share: float) -> float:
        """Add the gradient of `share` times the sum of the rows' losses to the weights' gradients; returns that sum."""
        return self._run(rows, share, train=True)[0]

    def measure(self, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
        """The mean over rows of the loss, and of the text's NLL, whatever its weight in the loss."""
        losses, nlls = zip(*(self._run([row], 1 / len(rows), train=False) for row in rows), strict=True)
        return sum(losses), sum(nlls)

    def _run(self, rows: Sequence[Sequence[int]], share: float, train: bool) -> tuple[float, float]:
        device = self.model.get_output_embeddings().weight.device  # layers may lie on several
        lengths = torch.tensor([len(row) - 1 for row in rows])
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # [B, T]; no token sees a pad
        predicts = torch.arange(ids.shape[1] - 1) < lengths[:, None]  # [B, T - 1]
        weight = (share / lengths.double())[:, None].expand(predicts.shape)[predicts].to(device)  # [N]
        targets, predicts = ids[:, 1:][predicts].to(device), predicts.to(device)
        ids = ids.to(self.model.device)
        with torch.set_grad_enabled(train):
            states, inner = _states(self.model, ids, predicts, range(len(self.depths)))
        with torch.no_grad():
            dense, goals = _states(self.teacher, ids, predicts, self.depths) if self.teacher else (states, [])
        total, nll, gradients = 0.0, 0.0, torch.empty_like(states)
        chunk = max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
        for part in (slice(start, start + chunk) for start in range(0, len(targets), chunk)):
            leaf = states[part].detach().requires_grad_(train)
            with torch.set_grad_enabled(train):
                losses, nlls = self._token_losses(leaf, dense[part], targets[part])
                loss = losses.double() @ weight[part]
            if train:
                (gradients[part],) = torch.autograd.grad(loss, leaf)
            total, nll = total + loss.item(), nll + (nlls.detach().double() @ weight[part]).item()
        ends, slopes = [states], [gradients]
        if inner:
            with torch.set_grad_enabled(train):
                apart = torch.stack([_distances(s, d) for s, d in zip(inner, goals, strict=True)]).mean(dim=0)
                loss = self.recipe.hidden * (apart.double() @ weight)
            total += loss.item()
            ends, slopes = [states, loss], [gradients, torch.ones_like(loss)]
        if train:
            torch.autograd.backward(ends, slopes)
        return total, nll

    def _token_losses(self, states: Tensor, dense: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads make of final states [N, H]: the weighted loss without states, and the NLL, [N]."""
        logits, share, T = _wide(head_of(self.model)(states)), self.recipe.distill, self.recipe.temperature
        nll = F.cross_entropy(logits, targets, reduction="none")
        if self.teacher is None or not share:
            return (1 - share) * nll, nll
        with torch.no_grad():
            p = _wide(head_of(self.teacher)(dense)).to(logits.device)
        if self.recipe.top_k is not None:
            p, logits = _lump(p / T, logits / T, self.recipe.top_k)
        else:
            p, logits = p / T, logits / T
        kl = token_kl(logits, targets, p)
        return share * T**2 * kl + ((1 - share) * nll if share < 1 else 0.0), nll


def _states(model: PreTrainedModel, ids: Tensor, chosen: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The states [N, H] of the chosen tokens [B, T - 1] that the head reads, and those after each of some layers."""
    inner: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for number in set(layers):
            hook = decoder_layers(model)[number].register_forward_hook(
                lambda layer, given, output, number=number: inner.update({number: output})
            )
            stack.callback(hook.remove)
        last = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    home = model.get_output_embeddings().weight.device
    states, *others = (
        state[:, :-1].to(home)[chosen.to(home)] for state in (last, *(inner[number] for number in layers))
    )
    return states, others


def _distances(states: Tensor, dense: Tensor) -> Tensor:
    """||s - d||^2 / ||d||^2 of each token, [N]."""
    s, d = _wide(states), _wide(dense.to(states.device))
    return (s - d).square().sum(dim=-1) / d.square().sum(dim=-1)


def _lump(dense: Tensor, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both models' logits [N, V] over k + 1 outcomes: the dense model's k likeliest tokens, and all others."""
    likeliest = dense.topk(k, dim=-1).indices

    def lump(z: Tensor) -> Tensor:
        others = z.scatter(-1, likeliest, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return torch.cat([z.gather(-1, likeliest), others], dim=-1)

    return lump(dense), lump(logits)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
