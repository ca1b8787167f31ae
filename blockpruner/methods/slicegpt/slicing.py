"""SliceGPT (arXiv 2401.15024): the residual stream loses the directions that hold least of the
calibration signal.

Decides how weights are rotated and sliced. `widths` decides the width, and `modeling_slicegpt.py`,
which ships in the checkpoint, how a sliced model runs.

Each block (MHA or MLP) reads the residual stream X [tokens, d] in a basis B [d, n] of its own: of
the eigenvectors of X^T X, summed over the calibration tokens, the n of the largest eigenvalues.
RMSNorm without its scale commutes with rotations, so for a block between the bases B and B':

    norm scale g and B into what reads:   W diag(g) B
    B' into what writes:                  B'^T W, B'^T b
    a shortcut past the block:            X B -> X B (B^T B')

X comes from the model as sliced so far: X B B^T + block(X B), from the embedding on. The output of
the last MLP is not sliced: a rotation of it would cancel in the head, and B' is the identity there.

As in the public code, X is the input of a norm; in the paper's text it is the output. The public
code also adds 1 % of the mean diagonal to X^T X. That moves every eigenvalue and no eigenvector,
and is left out here.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError
from blockpruner.methods.slicegpt.widths import sliceable_family
from blockpruner.model import modeling_slicegpt as slicegpt
from blockpruner.model.models import decoder_layers
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Rows

CHUNK = 8192
"""Rows of a weight that are in float64 at once; all rows of a vocabulary would be gigabytes."""


@torch.no_grad()  # not inference_mode: its tensors could not be trained afterwards
def slice_(
    model: PreTrainedModel, rows: Rows, width: int, *, batch_tokens: int | str = "auto"
) -> PreTrainedModel:
    """Slice the residual stream of a dense model in eval mode to `width` columns, in place, for
    good. Raises InputError for a family that cannot be sliced, a wrong width, a model on several
    devices, or a signal that is not finite.

    Model and config become the SliceGPT classes of the family, which `save_pretrained` and
    `from_pretrained(..., trust_remote_code=True)` round-trip; tied embeddings are untied. At the
    full width the model is only rotated and its logits stay. The model's device also sums and
    solves the Gram matrices in float64, and the host's memory holds the rows' signal in the model's
    dtype: tokens x hidden size. (The paper has 1,024 Alpaca samples of 2,048 tokens.)
    """
    family = sliceable_family(model.config.model_type)
    hidden, layers = int(model.config.hidden_size), decoder_layers(model)
    if not 1 <= width <= hidden:
        raise InputError(
            f"width {width} is not valid for a hidden size of {hidden}; give 1 to {hidden}"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise InputError(
            f"a model on {', '.join(devices)} cannot be sliced; load it on one device, or on"
            " the CPU"
        )

    embedding, norm, head = (
        model.get_input_embeddings(),
        model.get_submodule(family.final_norm),
        model.lm_head,
    )
    eps = float(model.config.rms_norm_eps)
    signal = _Signal(model, rows, batch_tokens)
    into = first = principal_directions(signal.gram(), width)
    for index, layer in enumerate(layers):
        for norm_name, module, readers, writer, shortcut in slicegpt.BLOCKS:
            block, scale = getattr(layer, module), getattr(layer, norm_name).weight
            for name in readers:
                reader = getattr(block, name)
                _set_weight_(reader, _product(reader.weight, scale.double()[:, None] * into))
            setattr(layer, norm_name, slicegpt.ScaleFreeRMSNorm(hidden, eps))
            if layer is layers[-1] and module == family.mlp.module:
                out_of = torch.eye(hidden, dtype=into.dtype, device=into.device)
            else:
                signal.pass_(index, norm_name, module, into)
                out_of = principal_directions(signal.gram(), width)
                output = getattr(block, writer)
                _set_weight_(output, _product(output.weight.T, out_of).T)
                if output.bias is not None:
                    output.bias = _parameter(out_of.T @ output.bias.double(), output.bias)
            past = nn.Linear(into.shape[1], out_of.shape[1], bias=False, device="meta")
            past.weight = _parameter((into.T @ out_of).T, scale)
            setattr(layer, shortcut, past)
            into = out_of
        layer.__class__ = getattr(slicegpt, f"{family.prefix}SlicedLayer")
    # embedding and final norm at the end: until then each pass runs the decoder around its layers
    embedding.weight = _parameter(_product(embedding.weight, first), embedding.weight)
    embedding.embedding_dim = width
    head.weight = _parameter(head.weight * norm.weight, head.weight)
    model.set_submodule(family.final_norm, slicegpt.ScaleFreeRMSNorm(hidden, eps))

    model.__class__ = getattr(slicegpt, f"{family.prefix}SliceGPTForCausalLM")
    model.config.__class__ = getattr(slicegpt, f"{family.prefix}SliceGPTConfig")
    model.config.sliced_width = width
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    model._weight_conversions = []  # as in `prune_`: the new class reads its own names only
    return model


def principal_directions(gram: Tensor, width: int) -> Tensor:
    """B [d, width]: the `width` orthonormal directions of most energy, from X^T X [d, d]; both are
    float64."""
    if not gram.isfinite().all():
        raise InputError(
            "the residual stream of the calibration rows is not finite; use a wider dtype"
            " (model.dtype: float32)"
        )
    vectors: Tensor = torch.linalg.eigh(gram)[1]  # by ascending eigenvalue
    return vectors.flip(1)[:, :width]


class _Signal:
    """The residual stream of the calibration rows before a block, [B, T, d] a batch, in the dense
    model's basis. The engine batches the rows, and records the arguments that the family's decoder
    passes to its layers."""

    def __init__(self, model: PreTrainedModel, rows: Rows, batch_tokens: int | str) -> None:
        self._engine = Engine(model, batch_tokens)
        self._device = self._engine.home
        spans = self._engine.row_batches(rows, range(len(rows)))
        self._batches = [Batch.of([rows[i] for i in span], self._device) for span in spans]
        self._states = []
        for batch in self._batches:
            embedded, _ = self._engine.prepare(batch.input_ids)
            self._states.append(embedded.cpu())

    def gram(self) -> Tensor:
        """X^T X [d, d] over the real tokens, float64, on the model's device."""
        hidden = self._states[0].shape[-1]
        total = torch.zeros(hidden, hidden, dtype=torch.float64, device=self._device)
        for state, batch in zip(self._states, self._batches, strict=True):
            tokens = state[batch.is_real.cpu()].to(self._device).double()
            total.addmm_(tokens.T, tokens)
        return total

    def pass_(self, index: int, norm: str, module: str, basis: Tensor) -> None:
        """Move the stream past a block of layer `index` that reads it in `basis` and still writes d
        columns."""
        layer = self._engine.layers[index]
        block = getattr(layer, module)
        basis = basis.to(self._states[0].dtype)
        for number, batch in enumerate(self._batches):
            sliced = self._states[number].to(self._device) @ basis
            normed = getattr(layer, norm)(sliced)
            if module == self._engine.family.mha.module:
                _, layer_kwargs = self._engine.prepare(batch.input_ids)
                added = block(hidden_states=normed, **layer_kwargs[index])[0]
            else:
                added = block(normed)
            self._states[number] = (sliced @ basis.T + added).cpu()


def _product(weight: Tensor, matrix: Tensor) -> Tensor:
    """weight [R, d] @ matrix [d, n] float64, rounded once to the weight's dtype; [R, n]."""
    return torch.cat(
        [(part.double() @ matrix).to(weight.dtype) for part in torch.split(weight, CHUNK)]
    )


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)


def _set_weight_(linear: nn.Linear, weight: Tensor) -> None:
    linear.out_features, linear.in_features = weight.shape
    linear.weight = _parameter(weight, linear.weight)
