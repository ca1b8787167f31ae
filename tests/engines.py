"""Marks of tests that need another engine. Where it is not installed they are skipped, and pytest
prints the reason."""

from importlib.util import find_spec

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed: pip install 'blockpruner[serve]'"
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


with_mlx = needs("mlx_lm")
with_llama_cpp = needs("xllamacpp")
