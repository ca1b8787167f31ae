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

    def __call__(self, ids: Tensor, lengths: Tensor, row_count: float) -> tuple[Tensor, Tensor]:
        """The sum over rows of the loss, and of the text's NLL, both divided by `row_count`. The
        rows `ids` [B, T] are padded behind their `lengths` [B]."""
        # Layers may be on several devices; the logits are on that of the head.
        device = self.model.get_output_embeddings().weight.device
        target_counts = lengths - 1  # [B]
        is_target = torch.arange(ids.shape[1] - 1) < target_counts[:, None]  # [B, T - 1]
        row_weight = 1 / row_count / target_counts.double()  # [B]
        weight = row_weight[:, None].expand(is_target.shape)[is_target].to(device)  # [N]
        targets = ids[:, 1:][is_target].to(device)  # [N]
        states = _final_states(self.model, ids, is_target)
        dense_states = None
        if self.teacher is not None:
            with torch.no_grad():
                dense_states = _final_states(self.teacher, ids, is_target)

        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        nll_sum = torch.zeros((), dtype=torch.float64, device=device)
        gradient = torch.empty_like(states)
        bytes_of_a_token = 4 * self.model.config.vocab_size
        chunk_size = max(1, LOGITS_BYTES // bytes_of_a_token)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            leaf = states[chunk].detach().requires_grad_(torch.is_grad_enabled())
            logits = head_of(self.model)(leaf)
            dense_logits = None
            if dense_states is not None:
                dense_logits = self._dense_logits(dense_states[chunk]).to(device)
            loss, nll, logits_gradient = self._of_chunk(
                logits.detach(), dense_logits, targets[chunk], weight[chunk]
            )
            if torch.is_grad_enabled():
                (gradient[chunk],) = torch.autograd.grad(logits, leaf, logits_gradient)
            loss_sum = loss_sum + loss.double() @ weight[chunk]
            nll_sum = nll_sum + nll.double() @ weight[chunk]
        if torch.is_grad_enabled():
            # A term of value 0 whose gradient for the states is the one computed above.
            product = (states * gradient).sum()
            loss_sum = loss_sum + (product - product.detach())
        return loss_sum, nll_sum

    @torch.no_grad()
    def _dense_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = head_of(self.teacher)(states)
        return logits

    @torch.no_grad()
    def _of_chunk(
        self, logits: Tensor, dense_logits: Tensor | None, targets: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and the NLL of some tokens, [N], and the gradient of the weighted loss for their
        logits, [N, V]."""
        arguments = [logits, targets, weight]
        if dense_logits is not None:
            arguments.append(dense_logits)
        losses, nlls, gradients = [], [], []
        for piece in pieces(*arguments):
            loss, nll, gradient = self._of_tokens(*piece)
            losses.append(loss)
            nlls.append(nll)
            gradients.append(gradient)
        return torch.cat(losses), torch.cat(nlls), torch.cat(gradients)

    def _of_tokens(
        self, logits: Tensor, targets: Tensor, weight: Tensor, dense_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_of_chunk`. The gradient of a cross-entropy for the logits is q less the target
        distribution."""
        log_q = log_probabilities(logits)
        distill = 0.0 if dense_logits is None else self.recipe.distill
        nll = -log_q.gather(-1, targets[:, None])[:, 0]
        loss = torch.zeros_like(nll)
        # 0 times an infinite NLL would be NaN.
        if distill < 1:
            loss = (1 - distill) * nll
        # (1 - distill) (q - target) + distill (q - p) = q - distill p - (1 - distill) target
        gradient = log_q.exp()
        if dense_logits is not None:
            log_p = log_probabilities(dense_logits)
            p = log_p.exp()
            kl = log_p.sub_(log_q).mul_(p).sum(-1)
            loss = loss + distill * kl
            gradient = gradient.sub_(p.mul_(distill))
        target_share = torch.full_like(nll, 1 - distill)[:, None]
        gradient.scatter_add_(-1, targets[:, None], -target_share)
        token_weight = weight[:, None].to(gradient.dtype)
        return loss, nll, gradient.mul_(token_weight).to(logits.dtype)


def _final_states(model: PreTrainedModel, ids: Tensor, is_target: Tensor) -> Tensor:
    """The states [N, H] that the head reads to predict the tokens of `is_target` [B, T - 1]; no
    token sees the padding behind it."""
    head_device = model.get_output_embeddings().weight.device
    decoder = model.get_decoder()
    states: Tensor = decoder(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    predicting_states = states[:, :-1].to(head_device)
    return predicting_states[is_target.to(head_device)]
