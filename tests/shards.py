"""Parts of the tests, for machines that run beside each other: `pytest --shard 2/3`, `make test
SHARD=2/3`."""

import re
from collections.abc import Sequence

import pytest


def in_shard(scopes: Sequence[str], shard: str) -> list[bool]:
    """Whether each test runs in a shard "i/n". Tests of one scope run together, and scopes take
    turns."""
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if numbers is None or int(numbers[1]) > int(numbers[2]):
        raise pytest.UsageError(
            f"--shard {shard} is not one of 1/N to N/N, for example 1/3, 2/3 and 3/3"
        )
    turns = {scope: turn for turn, scope in enumerate(dict.fromkeys(scopes))}
    return [turns[scope] % int(numbers[2]) == int(numbers[1]) - 1 for scope in scopes]
