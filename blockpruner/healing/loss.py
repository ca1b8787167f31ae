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
        home = self.model.get_output_embeddings().weight.device  # layers may be on several devices
        predicts = torch.arange(ids.shape[1] - 1) < (lengths - 1)[:, None]  # [B, T - 1]
        # [N]
        weight = (
            (1 / count / (lengths - 1).double())[:, None].expand(predicts.shape)[predicts].to(home)
        )
        targets, train = ids[:, 1:][predicts].to(home), torch.is_grad_enabled()
        states = _states(self.model, ids, predicts)
        with torch.no_grad():
            dense_states = [] if self.teacher is None else [_states(self.teacher, ids, predicts)]
        total, nll = torch.zeros(2, dtype=torch.float64, device=home)
        gradients, chunk = (
            torch.empty_like(states),
            max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size)),
        )
        for part in (slice(start, start + chunk) for start in range(0, len(targets), chunk)):
            leaf = states[part].detach().requires_grad_(train)
            logits = head_of(self.model)(leaf)
            with torch.no_grad():
                dense_logits = [
                    head_of(self.teacher)(dense[part]).to(home) for dense in dense_states
                ]
                tokens = pieces(logits.detach(), targets[part], weight[part], *dense_logits)
                losses, nlls, slopes = (
                    torch.cat(each) for each in zip(*starmap(self._of_tokens, tokens), strict=True)
                )
            if train:
                (gradients[part],) = torch.autograd.grad(logits, leaf, slopes)
            total, nll = total + losses.double() @ weight[part], nll + nlls.double() @ weight[part]
        # its gradient for the states is the one found above
        known = (states * gradients).sum() if train else total
        return total + (known - known.detach()), nll

    def _of_tokens(
        self, logits: Tensor, targets: Tensor, weight: Tensor, *dense: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss and the NLL of some tokens, [N], and the gradient of the weighted loss for their
        logits [N, V]. A cross-entropy's gradient for the logits is q less the distribution that is
        wanted. `dense` are the teacher's logits of these tokens, if there is a teacher."""
        log_q, share = log_probabilities(logits), self.recipe.distill if dense else 0.0
        nll = -log_q.gather(-1, targets[:, None])[:, 0]
        loss, slope = (1 - share) * nll if share < 1 else torch.zeros_like(nll), log_q.exp()
        if dense:
            kl, wanted = _kl(log_q, *dense)
            loss, slope = loss + share * kl, slope.sub_(wanted.mul_(share))
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
