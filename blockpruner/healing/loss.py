"""The loss of training and its gradient: the text's NLL, and how far the model is from the dense one on the same text.

Decides the formula, and in which pieces it is computed. The head runs over chunks of tokens. A chunk's gradient goes
back to its states before the next chunk has logits, so neither model's logits ever exist for a whole row.

    loss = mean over rows of the mean over the row's predicted tokens of
           (1 - distill) NLL + distill KL(p || q)

p and q are the next-token distributions of the dense model and of the trained one (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.healing.settings import Train
from blockpruner.model.models import head_of
from blockpruner.scoring.losses import token_kl
from blockpruner.scoring.work import LOGITS_BYTES


@dataclass(frozen=True)
class TrainingLoss:
    """What training minimises. The head has no gradient: it is not trained."""

    model: PreTrainedModel
    """The model that is trained."""
    teacher: PreTrainedModel | None
    """The dense model, if the recipe compares with it."""
    recipe: Train

    def __call__(self, ids: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The sum over rows of the loss, and of the text's NLL, both divided by `count`.

        Args:
            ids: rows [B, T], padded behind their ends.
            lengths: of the rows, [B].
        """
        home = self.model.get_output_embeddings().weight.device  # layers may be on several devices
        predicts = torch.arange(ids.shape[1] - 1) < (lengths - 1)[:, None]  # [B, T - 1]
        weight = (1 / count / (lengths - 1).double())[:, None].expand(predicts.shape)[predicts].to(home)  # [N]
        targets, train = ids[:, 1:][predicts].to(home), torch.is_grad_enabled()
        states = _states(self.model, ids, predicts)
        with torch.no_grad():
            dense = states if self.teacher is None else _states(self.teacher, ids, predicts)
        total, nll = torch.zeros(2, dtype=torch.float64, device=home)
        gradients, chunk = torch.empty_like(states), max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
        for part in (slice(start, start + chunk) for start in range(0, len(targets), chunk)):
            leaf = states[part].detach().requires_grad_(train)
            losses, nlls = self._token_losses(leaf, dense[part], targets[part])
            loss = losses.double() @ weight[part]
            if train:
                (gradients[part],) = torch.autograd.grad(loss, leaf)
            total, nll = total + loss.detach(), nll + nlls.detach().double() @ weight[part]
        known = (states * gradients).sum() if train else total  # its gradient for the states is the one found above
        return total + (known - known.detach()), nll

    def _token_losses(self, states: Tensor, dense: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads make of final states [N, H]: the loss and the NLL, [N]."""
        logits, share = _wide(head_of(self.model)(states)), self.recipe.distill
        nll = F.cross_entropy(logits, targets, reduction="none")
        if self.teacher is None:
            return nll, nll
        with torch.no_grad():
            p = _wide(head_of(self.teacher)(dense)).to(logits.device)
        kl = token_kl(logits, targets, p)
        return share * kl + ((1 - share) * nll if share < 1 else 0.0), nll


def _states(model: PreTrainedModel, ids: Tensor, chosen: Tensor) -> Tensor:
    """The states [N, H] of the chosen tokens [B, T - 1] that the head reads; no token sees a pad behind it."""
    states: Tensor = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return states[:, :-1].to(model.get_output_embeddings().weight.device)[chosen.to(states.device)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
