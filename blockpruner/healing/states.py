"""States of training on disk: checkpoints of transformers' Trainer, each sealed by a manifest that
is written last.

Decides from which state a killed training continues. A state has the best weights so far as well,
so an older state can be taken where the last one is damaged. The other files of a state are the
Trainer's.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.store.files import (
    link_or_copy,
    make_folder,
    read_json,
    set_aside,
    sync,
    write_atomic,
    write_sealed_json,
)
from blockpruner.store.manifest import manifest

BEST = "best.safetensors"
"""The best weights so far, in the folder of all states and in each state."""

SEAL = "seal.json"
"""The manifest of a state."""

STATE_FOLDER = re.compile(r"checkpoint-(\d+)")


def seal_state(states: Path, step: int) -> None:
    """Have a state that the Trainer has just written on disk, and seal it."""
    state = states / f"checkpoint-{step}"
    if (states / BEST).exists():
        link_or_copy(states / BEST, state / BEST)
    for path in (*state.iterdir(), states):
        sync(path)
    write_sealed_json(state / SEAL, {"manifest": manifest(state)})


def drop_old_states(states: Path) -> None:
    """Keep the newest state only, before another one is written."""
    for state in _states(states)[:-1]:
        _drop(state)


def last_state(states: Path, note: Callable[[str], object]) -> Path | None:
    """The last whole state, if there is one; later ones are removed. A damaged state is set aside,
    and `note` gets a line."""
    make_folder(states)
    state = None
    for candidate in reversed(_states(states)):
        if _is_whole(candidate, note):
            state = candidate
            break
        # A damaged state is set aside by now.
        if candidate.exists():
            _drop(candidate)
    # The best weights so far may be of a step that is taken again.
    (states / BEST).unlink(missing_ok=True)
    if state is not None and (state / BEST).exists():
        write_atomic(states / BEST, lambda temporary: link_or_copy(state / BEST, temporary))
    return state


def _states(states: Path) -> list[Path]:
    """The folders of states in the order of their steps, without those that were set aside."""
    folders = [path for path in states.iterdir() if STATE_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=lambda state: int(state.name.removeprefix("checkpoint-")))


def _is_whole(state: Path, note: Callable[[str], object]) -> bool:
    if not (state / SEAL).exists():  # a kill came before its end
        return False
    with suppress(InputError):
        files = manifest(state)
        del files[SEAL]
        if files == read_json(state / SEAL, sealed=True)["manifest"]:
            return True
    note(
        f"warning: {state} is damaged: set aside as {set_aside(state).name}, and an earlier state"
        " is taken"
    )
    return False


def _drop(state: Path) -> None:
    """Remove a state, its seal first: if a kill comes in between, the rest counts as unfinished,
    not as damaged."""
    (state / SEAL).unlink(missing_ok=True)
    shutil.rmtree(state)
