"""Expected errors, by the rule that was broken rather than by their wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blockpruner.core.errors import InputError


@contextmanager
def refused(
    rule: str, kind: type[InputError] = InputError
) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Within, an InputError of this rule is raised; the caught error is yielded."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.rule == rule, (
        f"another rule was broken: {caught.value.rule!r}, {caught.value}"
    )
