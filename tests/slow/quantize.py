"""Stands in for llama.cpp's `llama-quantize`, which is a command for `llama_model_quantize` of its library.

python quantize.py <folder of libllama> <input> <output> <quantization>
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from gguf import LlamaFileType


class Parameters(ctypes.Structure):
    """Some of llama_model_quantize_params, and room for the others, which keep their defaults."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("flags", ctypes.c_char * 16),
        ("rest", ctypes.c_char * 232),
    )


def main(folder: str, source: str, target: str, ftype: str) -> int:
    source, target = str(Path(source).absolute()), str(Path(target).absolute())
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
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    result: int = library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return result


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
