"""Stands in for llama.cpp's `llama-quantize`, which is a command for `llama_model_quantize` of its library.

python quantize.py <folder of libllama> [--imatrix <file>] <input> <output> <quantization>
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, LlamaFileType


class Importance(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Parameters(ctypes.Structure):
    """Some of llama_model_quantize_params, and room for the others, which keep their defaults."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("flags", ctypes.c_char * 16),
        ("imatrix", ctypes.c_void_p),
        ("rest", ctypes.c_char * 224),
    )


def means(file: str) -> dict[str, np.ndarray]:
    """The mean squares of an importance matrix, as llama-quantize reads them."""
    found = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    return {name: (found[f"{name}.in_sum2"] / found[f"{name}.counts"]).ravel() for name in names}


def main(folder: str, *given: str) -> int:
    option, (source, target, ftype) = given[:-3], given[-3:]
    source, target = str(Path(source).absolute()), str(Path(target).absolute())
    weighed = means(option[1]) if option else {}
    names = sorted(path.name for path in Path(folder).glob("lib*.so*"))
    os.chdir(folder)
    loaded = {}
    for prefix in ("libggml-base.so", "libggml.", "libllama."):
        name = next(name for name in names if name.startswith(prefix))
        loaded[prefix] = ctypes.CDLL(str(Path(folder) / name), mode=ctypes.RTLD_GLOBAL)
    loaded["libggml."].ggml_backend_load_all_from_path(folder.encode())
    library = loaded["libllama."]
    library.llama_model_quantize_default_params.restype = Parameters
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = LlamaFileType[f"MOSTLY_{ftype}"]
    entries = [Importance(name.encode(), data.ctypes.data, data.size) for name, data in weighed.items()]
    if weighed:
        array = (Importance * (len(entries) + 1))(*entries)  # the last one has no name
        parameters.imatrix = ctypes.addressof(array)
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    result: int = library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return result


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
