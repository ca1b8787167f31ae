"""The loss of training and its gradient: the text's NLL, and how far the model is from the dense one on the same text.

Decides the formula, and in which pieces it is computed. The head runs over chunks of tokens. A chunk's gradient goes
back to its states before the next chunk has logits, so neither model's logits ever exist for a whole row.

    loss = mean over rows of the mean over the row's predicted tokens of
           (1 - distill) NLL + distill KL(p || q)

p and q are the next-token distributions of the dense model and of the trained one (Hinton et al., arXiv 1503.02531).
With `likeliest` they are those of the tokens that the dense model finds likeliest, and of all others as one outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.healing.settings import Train
from blockpruner.model.models import head_of
from blockpruner.scoring.losses import token_kl
from blockpruner.scoring.work import LOGITS_BYTES

REST = 1e-6
"""The least probability of all tokens that are not among the likeliest: float32 knows no smaller one beside 1."""


@dataclass(frozen=True)
class TrainingLoss:
    """What training minimises. The head has no gradient: it is not trained."""

    model: PreTrainedModel
    """The model that is trained."""
    teacher: PreTrainedModel | None
    """The dense model, if the recipe compares with it."""
    recipe: Train
    _known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What the teacher finds likeliest in rows that were seen, on the host: places, log-probabilities, [T - 1, K]."""

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
            told = self._told(ids, lengths, predicts)
        total, nll = torch.zeros(2, dtype=torch.float64, device=home)
        gradients, chunk = torch.empty_like(states), max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
        for part in (slice(start, start + chunk) for start in range(0, len(targets), chunk)):
            leaf = states[part].detach().requires_grad_(train)
            losses, nlls = self._token_losses(leaf, [each[part] for each in told], targets[part])
            loss = losses.double() @ weight[part]
            if train:
                (gradients[part],) = torch.autograd.grad(loss, leaf)
            total, nll = total + loss.detach(), nll + nlls.detach().double() @ weight[part]
        known = (states * gradients).sum() if train else total  # its gradient for the states is the one found above
        return total + (known - known.detach()), nll

    def _told(self, ids: Tensor, lengths: Tensor, predicts: Tensor) -> list[Tensor]:
        """What the teacher says of the tokens: nothing, its final states, or what it finds likeliest."""
        if self.teacher is None:
            return []
        if self.recipe.likeliest is None:
            return [_states(self.teacher, ids, predicts)]
        rows = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        for number in (number for number, row in enumerate(rows) if row not in self._known):
            one = slice(number, number + 1)
            states, k = _states(self.teacher, ids[one], predicts[one]), self.recipe.likeliest
            chunk = max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
            parts = [_wide(head_of(self.teacher)(part)).log_softmax(-1).topk(k) for part in torch.split(states, chunk)]
            places = torch.cat([part.indices for part in parts]).to("cpu", torch.int32)
            self._known[rows[number]] = places, torch.cat([part.values for part in parts]).cpu()
        return [torch.cat(each) for each in zip(*map(self._known.__getitem__, rows), strict=True)]

    def _token_losses(self, states: Tensor, told: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads make of final states [N, H]: the loss and the NLL, [N].

        Args:
            told: what the teacher says of these tokens, as from `_told`.
        """
        logits, share = _wide(head_of(self.model)(states)), self.recipe.distill
        nll = F.cross_entropy(logits, targets, reduction="none")
        if self.teacher is None:
            return nll, nll
        if self.recipe.likeliest is None:
            with torch.no_grad():
                p = _wide(head_of(self.teacher)(told[0])).to(logits.device)
            kl = token_kl(logits, targets, p)
        else:
            kl = _kl_of_likeliest(logits, *(each.to(logits.device) for each in told))
        return share * kl + ((1 - share) * nll if share < 1 else 0.0), nll


def _kl_of_likeliest(logits: Tensor, places: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) of the tokens at some places [N, K], and of all others as one outcome."""
    log_p, log_q = log_p.to(logits.dtype), logits.gather(-1, places.long()) - logits.logsumexp(-1, keepdim=True)
    parts = [
        torch.cat([each, torch.log1p(-each.exp().sum(-1, True).clamp(max=1 - REST))], -1) for each in (log_p, log_q)
    ]
    return (parts[0].exp() * (parts[0] - parts[1])).sum(-1)


def _states(model: PreTrainedModel, ids: Tensor, chosen: Tensor) -> Tensor:
    """The states [N, H] of the chosen tokens [B, T - 1] that the head reads; no token sees a pad behind it."""
    states: Tensor = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return states[:, :-1].to(model.get_output_embeddings().weight.device)[chosen.to(states.device)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
