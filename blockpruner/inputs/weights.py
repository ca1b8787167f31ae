"""The weights of a checkpoint directory that is being made: which there are, and how they are
rewritten."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockpruner.store.files import let_others_read, write_json


def weight_names(directory: Path) -> Iterator[str]:
    """The names of a directory's weights."""
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            yield from file.keys()


def rewrite_weights_(
    directory: Path, change: Callable[[str, Tensor], Mapping[str, Tensor]]
) -> None:
    """Replace each tensor by those that `change` makes of its name and itself, one file at a time
    in memory."""
    file_by_weight: dict[str, str] = {}
    total_size = 0
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        for path in sorted(directory.glob("*.safetensors")):
            tensors: dict[str, Tensor] = {}
            for name, tensor in load_file(path).items():
                tensors |= change(name, tensor)
            if tensors:
                save_file(tensors, Path(folder, path.name), metadata={"format": "pt"})
            file_by_weight |= dict.fromkeys(tensors, path.name)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
        # The old files and their index
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        shards = list(Path(folder).iterdir())
        if len(shards) == 1:
            shards[0].rename(directory / "model.safetensors")
        else:
            for shard in shards:
                shard.rename(directory / shard.name)
            index = {"metadata": {"total_size": total_size}, "weight_map": file_by_weight}
            write_json(directory / "model.safetensors.index.json", index)
    let_others_read(directory)
