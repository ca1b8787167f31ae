"""States of training on disk: checkpoints of transformers' Trainer, each sealed by a manifest that
is written last.

Decides from which state a killed training continues. A state has the best weights so far as well,
so an older one can be taken where the last one is damaged. What else is in a state is decided by
the Trainer.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.model.process_group import ProcessGroup
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

NAME = re.compile(r"checkpoint-(\d+)")


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
    for _, state in sorted(_states(states).items())[:-1]:
        _drop(state)


def last_state(states: Path, team: ProcessGroup, note: Callable[[str], object]) -> Path | None:
    """The last state that every process has whole; later ones are removed. A damaged state is set
    aside, and `note` gets a line."""
    make_folder(states)
    whole = {step for step, state in _states(states).items() if _is_whole(state, note)}
    last = max(team.intersection(whole), default=None)
    for step, state in _states(states).items():
        if last is None or step > last:
            _drop(state)
    (states / BEST).unlink(missing_ok=True)
    if last is None:
        return None
    state = states / f"checkpoint-{last}"
    if (state / BEST).exists():
        write_atomic(states / BEST, lambda temporary: link_or_copy(state / BEST, temporary))
    return state


def _states(states: Path) -> dict[int, Path]:
    """The folders of states by step, without those that were set aside."""
    return {int(name[1]): path for path in states.iterdir() if (name := NAME.fullmatch(path.name))}


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
    """Remove a state, its seal first: what a kill leaves of it is then no damaged one."""
    (state / SEAL).unlink(missing_ok=True)
    shutil.rmtree(state)
