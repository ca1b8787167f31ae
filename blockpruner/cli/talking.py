"""`blockpruner chat` and `compare`: greedy answers of checkpoints, dense or pruned.

Of their code only ours is run. A dense model of a known family needs none, whatever lies beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from blockpruner.cli.pruning import own_dtype
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.evaluation.samples import answer
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.classes import has_our_code
from blockpruner.model.models import load_model
from blockpruner.store.files import read_json


class Talker:
    """A model that answers."""

    def __init__(self, folder: Path, device: str) -> None:
        if not (folder / "config.json").is_file():
            raise InputError(f"{str(folder)!r} has no config.json; give a checkpoint's folder, as prune writes it")
        config = read_json(folder / "config.json")
        has_code = config.get("model_type") not in FAMILIES and has_our_code(folder)
        self.model = load_model(folder, own_dtype(config), device, has_code)
        self._tokenizer = load_tokenizer(folder)

    def answer(self, turns: Sequence[str], limit: int, show: bool = False) -> tuple[str, int]:
        """As `samples.answer`; `show` prints the text as it comes."""
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        return answer(self.model, self._tokenizer, turns, limit, streamer)

    def chat(self, prompts: Iterable[str] | None, limit: int) -> None:
        """Answer these prompts, or those that are typed, on standard output."""
        turns: list[str] = []
        for prompt in typed() if prompts is None else prompts:
            turns.append(prompt)
            turns.append(self.answer(turns, limit, show=True)[0])


def typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@dataclass(frozen=True)
class Answer:
    """What a checkpoint answers."""

    model: str
    """Its folder."""
    parameters: int
    tokens_per_second: float
    answer: str


def answers(folders: Sequence[Path], prompt: str, limit: int, device: str) -> list[Answer]:
    """The answers of checkpoints. One model at a time is in memory."""
    found = []
    for folder in folders:
        talker = Talker(folder, device)
        talker.answer([prompt], 1)  # the first call of a process is slower
        started = time.perf_counter()
        text, tokens = talker.answer([prompt], limit)
        speed = tokens / (time.perf_counter() - started)
        found.append(Answer(str(folder), talker.model.num_parameters(), round(speed, 1), text.strip()))
    return found


def side_by_side(found: Sequence[Answer]) -> Table:
    """Answers, a column each."""
    table = Table(expand=True)
    for one in found:
        title = f"{one.model}\n{one.parameters / 1e6:,.1f} M, {one.tokens_per_second:.1f} tokens/s"
        table.add_column(title, ratio=1)
    table.add_row(*(Text(one.answer) for one in found))
    return table
