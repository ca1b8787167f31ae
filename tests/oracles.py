"""Oracles of the engine (numpy's numbers from whole forward passes), and engines that are watched
or cramped."""

import weakref
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, all_blocks, parse_mask
from blockpruner.model.models import decoder_layers, masked, model_family
from blockpruner.scoring import engine as engine_module
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import ScoredRows, Task
from tests.tiny import VOCABULARY, tiny_model

LAYERS = 3
MASKS = [
    parse_mask(text)
    for text in ("", "mha.0", "mlp.2", "mha.1,mlp.0", "mha.1,mlp.1", "mha.0,mha.1,mlp.1,mlp.2")
] + [frozenset(all_blocks(LAYERS))]
model_of = cache(tiny_model)


def make_rows(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths]


def sweep(base=DENSE, layers=4):
    return [base, *(base | {block} for block in all_blocks(layers) if block not in base)]


def score_all(engine, masks, rows):
    found = {}
    tasks = [Task(span, tuple(masks)) for span in engine.row_batches(rows, range(len(rows)))]
    for unit in engine.run(tasks, rows):
        for offset, value in enumerate(unit.loss):
            key = (unit.mask, unit.span[offset])
            assert key not in found, "a (mask, row) was scored twice"
            found[key] = value
    assert len(found) == len(set(masks)) * len(rows)
    return found


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made within and are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size):
        self.now -= size


class CrampedEngine(Engine):
    """Runs out of memory where a batch has more than `rows` rows or `tokens` tokens to a row, but
    for those times that `luck` says (True: it fits); keeps the walks, with those masks that each of
    them finished. Masks go one by one.

    Garbage is not collected: it takes 50 ms where torch is loaded, at each of hundreds of failures.
    """

    def __init__(
        self, *args, rows: int = 1000, tokens: int = 1000, luck: Sequence[bool] = ()
    ) -> None:
        super().__init__(*args)
        self.rows, self.tokens, self.luck = rows, tokens, iter(luck)
        self.walks: list[tuple[Task, list[Mask]]] = []
        self.budgets: list[int] = []
        self.losses = 0

    def _width(self, tokens: int) -> int:
        return 1

    def _halved(self, *args) -> list[Task]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module.gc, "collect", lambda: 0)
            return super()._halved(*args)

    def score(self, task: Task, rows) -> Iterator[ScoredRows]:
        done: list[Mask] = []
        self.walks.append((task, done))
        self.budgets.append(self._batch_tokens)
        for unit in super().score(task, rows):
            done.append(unit.mask)
            yield unit

    def _allocate(self, rows: int, tokens: int, *rest: int) -> None:
        if (rows > self.rows or tokens > self.tokens) and not next(self.luck, False):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has too little."
            )

    def run_block(self, block, hidden, *rest):
        self._allocate(*hidden.shape)
        return super().run_block(block, hidden, *rest)

    def final_states(self, hidden, batch):
        self._allocate(*hidden.shape)
        return super().final_states(hidden, batch)

    def row_losses(self, *args):
        values = super().row_losses(*args)
        self.losses += 1
        return values


def row(length, seed, given=0):
    """Tokens, the first `given` of which are given and not scored."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
    return tuple(~token for token in ids[:given]) + tuple(ids[given:])


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(p, q):
    return float((np.exp(p) * (p - q)).sum())


def js(p, q):
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    return (kl(p, m) + kl(q, m)) / 2


@cache
def log_probabilities(variant, mask, tokens, seed=7):
    """Of a row's scored positions, each from the whole model's logits, [N, V] float64."""
    model = other_model(variant) if seed != 7 else model_of(variant, LAYERS)
    ids = torch.tensor([[token if token >= 0 else ~token for token in tokens]])
    with masked(model, mask), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double().numpy()
    return log_softmax(logits[[t - 1 for t in range(1, len(tokens)) if tokens[t] >= 0]])


def divergence(loss, variant, mask, tokens, **model):
    dense, left = (log_probabilities(variant, m, tokens, **model) for m in (DENSE, mask))
    return np.mean([{"kl": kl, "js": js}[loss](p, q) for p, q in zip(dense, left, strict=True)])


@cache
def other_model(variant):
    """The same model with a head of its own."""
    model = tiny_model(variant, LAYERS)
    head = model.get_output_embeddings().weight
    head.data = head.data.flip(0)
    return model


def values_of(engine, rows, metric, masks=MASKS, base=DENSE):
    metric = METRICS[metric] if isinstance(metric, str) else metric
    tasks = [
        Task(span, tuple(masks), metric, base)
        for span in engine.row_batches(rows, range(len(rows)))
    ]
    units = list(engine.run(tasks, rows))
    found = {
        (unit.mask, unit.span[i]): value for unit in units for i, value in enumerate(unit.loss)
    }
    assert len(found) == sum(len(unit.loss) for unit in units) == len(masks) * len(rows)
    return found


def recorded(model, base, tokens):
    """What hooks see in the model without `base`: for each unit, a block or a layer, the state that
    it reads and the one with what it adds, [T, H] each; from the model's own layers, not its
    `output_hidden_states`."""
    row, layers = model_family(model), decoder_layers(model)
    seen = {}

    def first(value):
        return (value[0] if isinstance(value, tuple) else value)[0]

    def keep(name):
        def hook(module, args, kwargs, output):
            seen[name] = first(args[0] if args else kwargs["hidden_states"]), first(output)

        return hook

    handles = []
    ids = torch.tensor([[token if token >= 0 else ~token for token in tokens]])
    with masked(model, base):
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(keep(index), with_kwargs=True))
            for block in {BlockId(kind, index) for kind in BlockKind} - base:
                branch = row.branch(block.kind)
                module, _ = branch.names(layer)
                for part, end in ((branch.norm or module, 0), (branch.post or module, 1)):
                    handles.append(
                        getattr(layer, part).register_forward_hook(
                            keep((block, end)), with_kwargs=True
                        )
                    )
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    wide = torch.promote_types(model.dtype, torch.float32)
    units = {}
    for block in all_blocks(len(layers)):
        if block not in base:
            factor = getattr(layers[block.layer], "residual_multiplier", 1)  # Granite's
            x, f = seen[block, 0][0].to(wide), factor * seen[block, 1][1].to(wide)
            units[frozenset({block})] = x.numpy(), (x + f).numpy()
    for index in range(len(layers)):
        unit = frozenset(BlockId(kind, index) for kind in BlockKind) - base
        if len(unit) == 2:
            units[unit] = tuple(state.to(wide).numpy() for state in seen[index])
    return units


def influence(name, x, y):
    """From its formula: x is read, y = x + f goes on."""
    if name == "block_influence":
        return 1 - np.mean(
            (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
        )
    if name == "relative_magnitude":
        return np.mean(np.linalg.norm(y - x, axis=-1) / np.linalg.norm(y, axis=-1))
    return np.sqrt(((y - x) ** 2).sum() / (y**2).sum())


def states_of(model, base, tokens):
    """What each layer reads, and what the last one leaves, [T, H] each."""
    seen, layers = [], decoder_layers(model)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args: seen.append(args[0][0].numpy()) if args else None
        )
        for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(lambda _, args, out: seen.append(first_of(out)[0].numpy()))
    )
    with masked(model, base), torch.no_grad():
        model(
            input_ids=torch.tensor([[token if token >= 0 else ~token for token in tokens]]),
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) + 1
    return seen


def first_of(value):
    return value[0] if isinstance(value, tuple) else value
