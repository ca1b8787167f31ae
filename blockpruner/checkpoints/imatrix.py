"""The importance matrix of GGUF files: how much each input of a matrix matters, for llama.cpp to quantize by.

Decides what is summed, over which tokens, and how the file reads. `gguf` decides which matrices there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.errors import extra
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.work import Rows

FILE = "imatrix.gguf"

TOKENS = 2**13
"""No further row is read after so many tokens. In Q4_K_M the error of SmolLM2-135M without 10.53 % is 0.47 without the
matrix, 0.37 with one of 2 thousand tokens and 0.38 with one of 16 thousand."""


@torch.inference_mode()
def write_imatrix(model: PreTrainedModel, matrices: Iterable[tuple[str, nn.Linear]], rows: Rows, path: Path) -> int:
    """Write the sums of squares of each matrix's inputs over the rows' tokens, as llama.cpp's `llama-imatrix` does.

    Args:
        matrices: the projections of the model, each by the name of its weight in the GGUF files.

    Returns:
        The number of tokens.
    """
    with extra("gguf"):
        from gguf import GGUFType, GGUFWriter
        from gguf.constants import Keys

    before = accumulate(map(len, rows), initial=0)
    read = [row for row, start in zip(rows, before, strict=False) if start < TOKENS]
    tokens, sums = sum(map(len, read)), dict[str, Tensor]()

    def add(name: str, given: Tensor) -> None:
        squares = given.flatten(0, -2).double().square().sum(0).cpu()
        sums[name] = sums[name] + squares if name in sums else squares

    hooks = [
        linear.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0])) for name, linear in matrices
    ]
    try:
        for row in read:
            model.get_decoder()(Batch.of([row], model.device).input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    writer = GGUFWriter(path, "imatrix")
    writer.add_type(GGUFType.IMATRIX)
    writer.add_array(Keys.IMatrix.DATASETS, ["calibration rows of blockpruner"])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, len(read))
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, max(map(len, read)))
    for name, squares in sums.items():
        writer.add_tensor(f"{name}.in_sum2", squares.float().numpy()[None])
        writer.add_tensor(f"{name}.counts", torch.tensor([[float(tokens)]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens
