"""The loss of training and its gradient: the text's NLL, and how far the model is from the dense
one on the same text.

Decides the formula, and in which pieces it is computed. The head runs over chunks of tokens, so
neither model's logits ever exist for a whole row. The gradient for a chunk's logits has a closed
form; it goes back to the states at once.

    loss = mean over rows of the mean over the row's predicted tokens of
           (1 - distill) NLL + distill KL(p || q)

p and q are the next-token distributions of the dense model and of the trained one (Hinton et al.,
arXiv 1503.02531).
"""

from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.healing.settings import Train
from blockpruner.model.models import head_of
from blockpruner.scoring.losses import log_probabilities, pieces
from blockpruner.scoring.work import LOGITS_BYTES


@dataclass(frozen=True)
class TrainingLoss:
    """What training minimises. The head has no gradient: it is not trained."""

    model: PreTrainedModel
    """The model that is trained."""
    teacher: PreTrainedModel | None
    """The dense model, if the recipe compares with it."""
    recipe: Train

    def __call__(self, ids: Tensor, lengths: Tensor, count: float) -> tuple[Tensor, Tensor]:
        """The sum over rows of the loss, and of the text's NLL, both divided by `count`. The rows
        `ids` [B, T] are padded behind their `lengths` [B]."""
        # Layers may be on several devices.
        device = self.model.get_output_embeddings().weight.device
        predicts = torch.arange(ids.shape[1] - 1) < (lengths - 1)[:, None]  # [B, T - 1]
        row_weight = (1 / count / (lengths - 1).double())[:, None]  # [B, 1]
        weight = row_weight.expand(predicts.shape)[predicts].to(device)  # [N]
        targets = ids[:, 1:][predicts].to(device)
        has_gradient = torch.is_grad_enabled()
        states = _states(self.model, ids, predicts)
        with torch.no_grad():
            dense_states = [] if self.teacher is None else [_states(self.teacher, ids, predicts)]
        total, nll = torch.zeros(2, dtype=torch.float64, device=device)
        gradients = torch.empty_like(states)
        chunk_size = max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            leaf = states[chunk].detach().requires_grad_(has_gradient)
            logits = head_of(self.model)(leaf)
            with torch.no_grad():
                dense_logits = [
                    head_of(self.teacher)(dense[chunk]).to(device) for dense in dense_states
                ]
                tokens = pieces(logits.detach(), targets[chunk], weight[chunk], *dense_logits)
                results = zip(*starmap(self._of_tokens, tokens), strict=True)
                losses, nlls, slopes = map(torch.cat, results)
            if has_gradient:
                (gradients[chunk],) = torch.autograd.grad(logits, leaf, slopes)
            total = total + losses.double() @ weight[chunk]
            nll = nll + nlls.double() @ weight[chunk]
        if has_gradient:
            # A term of value 0 whose gradient for the states is the one computed above.
            product = (states * gradients).sum()
            total = total + (product - product.detach())
        return total, nll

    def _of_tokens(
        self, logits: Tensor, targets: Tensor, weight: Tensor, *dense: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss and the NLL of some tokens, [N], and the gradient of the weighted loss for their
        logits [N, V]. A cross-entropy's gradient for the logits is q less the distribution that is
        wanted. `dense` are the teacher's logits of these tokens, if there is a teacher."""
        log_q = log_probabilities(logits)
        share = self.recipe.distill if dense else 0.0
        nll = -log_q.gather(-1, targets[:, None])[:, 0]
        # 0 times an infinite NLL would be NaN.
        loss = (1 - share) * nll if share < 1 else torch.zeros_like(nll)
        slope = log_q.exp()
        if dense:
            kl, dense_probabilities = _kl(log_q, *dense)
            loss = loss + share * kl
            slope = slope.sub_(dense_probabilities.mul_(share))
        slope.scatter_add_(-1, targets[:, None], torch.full_like(nll, share - 1)[:, None])
        return loss, nll, slope.mul_(weight[:, None].to(slope.dtype)).to(logits.dtype)


def _kl(log_q: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) of some tokens, [N], and p, [N, V], of the dense model's logits."""
    log_p = log_probabilities(dense)
    p = log_p.exp()
    return log_p.sub_(log_q).mul_(p).sum(-1), p


def _states(model: PreTrainedModel, ids: Tensor, chosen: Tensor) -> Tensor:
    """The states [N, H] of the chosen tokens [B, T - 1] that the head reads; no token sees a pad
    behind it."""
    states: Tensor = model.get_decoder()(
        input_ids=ids.to(model.device), use_cache=False
    ).last_hidden_state
    return states[:, :-1].to(model.get_output_embeddings().weight.device)[chosen.to(states.device)]
