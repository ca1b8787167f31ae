"""`blockpruner chat` and `compare`: greedy answers and held-out perplexity of checkpoints, dense or
pruned.

Only our own code is run. A dense model of a known family needs none, whatever its folder holds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from blockpruner.cli.pruning import fitted, own_dtype
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES, Config
from blockpruner.evaluation.kinds import ALL, Loss, uneven
from blockpruner.evaluation.perplexity import HeldOut, held_out, measure_perplexity
from blockpruner.evaluation.samples import answer
from blockpruner.evaluation.settings import Perplexity, ZeroShot
from blockpruner.evaluation.tasks import check_tasks, fetch_tasks
from blockpruner.inputs.calibration import require_embedded
from blockpruner.inputs.checkpoints import read_fields
from blockpruner.inputs.texts import load_texts
from blockpruner.inputs.tokenizers import conversation, load_tokenizer
from blockpruner.model.classes import has_our_code
from blockpruner.model.models import load_model
from blockpruner.model.rates import fast_dtype
from blockpruner.reporting.formats import number, printable
from blockpruner.reporting.statistics import losses_by_kind, perplexity_ratio
from blockpruner.reporting.table import Number
from blockpruner.store.manifest import REPORT_FILE, require_verified


def config_of(folder: Path) -> Config:
    """A checkpoint's config; raises InputError if the folder holds none, or no weights, or a
    checkpoint of ours that is not what was verified."""
    if (folder / REPORT_FILE).exists():
        require_verified(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{str(folder)!r} has no config.json; give a checkpoint's folder, as prune writes it"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{str(folder)!r} has no safetensors; give the folder of format hf, as prune writes it"
        )
    config = read_fields(folder)
    if config["model_type"] == "nemotron-nas":
        raise InputError(
            f"{str(folder)!r} is of format nas, which transformers does not load; give the hf"
            " folder"
        )
    return config


class Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped
    """Prints an answer as it comes, as text alone."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Talker:
    def __init__(self, folder: Path, device: str) -> None:
        config = config_of(folder)
        has_code = config.get("model_type") not in FAMILIES and has_our_code(folder)
        self.model = load_model(folder, fast_dtype(own_dtype(config), device), device, has_code)
        self.tokenizer = load_tokenizer(folder)

    def answer(self, turns: Sequence[str], limit: int, show: bool = False) -> str:
        """As `samples.answer`; `show` prints the text as it comes."""
        streamer = (
            Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        )
        return answer(self.model, self.tokenizer, turns, limit, streamer)

    def chat(self, prompts: Iterable[str] | None, limit: int) -> None:
        """Answer these prompts, or those that are typed, on standard output."""
        turns: list[str] = []
        for prompt in typed() if prompts is None else prompts:
            turns.append(prompt)
            turns.append(self.answer(turns, limit, show=True))


def typed() -> Iterator[str]:
    while True:
        try:
            if (line := input("> ")).strip():
                yield line
        except EOFError:
            return


@dataclass(frozen=True)
class Compared:
    """A checkpoint beside others; None is what was not asked for."""

    model: str
    """Its folder."""
    parameters: int
    answer: str | None = None
    perplexity: float | None = None
    relative: float | None = None
    """The perplexity, times that of the first checkpoint; as is the next, None for that one
    itself."""
    interval: tuple[float, float] | None = None
    """The 95 % interval of `relative`, over paired rows."""
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By kind of text, where there are several: `perplexity`, `relative` and `interval`."""


def rows_of(folders: Sequence[Path], wanted: Perplexity) -> HeldOut:
    """Held-out rows that fit into the shortest context of some checkpoints; raises InputError if
    the texts are fewer than two rows, or the tokenizers make different rows of them."""
    written = partial(conversation, cache(lambda: load_tokenizer(folders[0])))
    texts, found = load_texts(wanted.data, Path(), Path(), written), list[HeldOut]()
    shortest = min(
        map(config_of, folders),
        key=lambda config: config.get("max_position_embeddings") or math.inf,
    )
    wanted = fitted(wanted, shortest, "evaluate.perplexity.seq_len")
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        found.append(held_out(tokenizer, texts, wanted))
        if len(found[-1].rows) < 2:
            few = (
                f"the held-out texts are 1 row of {wanted.seq_len} tokens, and an interval needs at"
                " least 2"
            )
            raise InputError(
                f"{few}; give a smaller --seq-len, a larger --max-rows or longer --texts"
            )
        require_embedded(found[-1].rows, tokenizer, config_of(folder))
        if found[-1].rows != found[0].rows:
            why = "perplexities of different tokens cannot be compared"
            fix = "leave out --texts, or compare models of one tokenizer"
            raise InputError(f"{folder} has another tokenizer than {folders[0]}: {why}; {fix}")
    return found[0]


def compared(
    folders: Sequence[Path], prompt: str | None, limit: int, heldout: Perplexity | None, device: str
) -> list[Compared]:
    """Checkpoints compared, one model at a time in memory; raises InputError as `rows_of`."""
    rows = None if heldout is None else rows_of(folders, heldout)
    found: list[Compared] = []
    first: Sequence[float] = ()
    for folder in folders:
        talker = Talker(folder, device)
        one = Compared(str(folder), talker.model.num_parameters())
        if prompt is not None:
            one = replace(one, answer=talker.answer([prompt], limit).strip())
        if rows is not None:
            measured = measure_perplexity(talker.model, rows.rows)
            own = measured.row_nll
            kinds = {
                kind: {
                    "perplexity": value,
                    "relative": times.value,
                    "interval": astuple(times.interval),
                }
                for kind, (value, times) in losses_by_kind(first or own, own, rows.kinds).items()
            }
            one = replace(one, perplexity=measured.perplexity, kinds=kinds)
            if first:
                effect = perplexity_ratio(first, own)
                one = replace(one, relative=effect.value, interval=astuple(effect.interval))
            first = first or own
        found.append(one)
    return found


def scored(
    folder: Path, wanted: ZeroShot, cache: Path, device: str, note: Callable[[str], object]
) -> dict[str, Any]:
    """A checkpoint's scores by task, with the keys that lm-eval's command prints."""
    check_tasks(wanted)
    config_of(folder)  # refuses what cannot be scored before anything is downloaded
    from blockpruner.evaluation.zero_shot import evaluate  # lm-eval takes seconds to import

    with TemporaryDirectory() as directory:
        tasks = Path(directory)
        fetch_tasks(wanted, tasks, tasks, cache / "cache", cache / "pins.json", note)
        talker, found = Talker(folder, device), {}
        for task in wanted.tasks:
            found[task] = evaluate(talker.model, talker.tokenizer, task, tasks, wanted.limit).scores
            note(f"{task}: scored")
    return found


def _times(relative: float, interval: tuple[float, float]) -> str:
    return str(Number(relative, 2, low=interval[0], high=interval[1]))


def side_by_side(found: Sequence[Compared]) -> Table:
    table = Table(expand=True)
    for one in found:
        lines = [one.model, f"{one.parameters / 1e6:,.1f} M parameters"]
        if one.perplexity is not None:
            lines.append(f"held-out perplexity {number(one.perplexity)}")
        if one.relative is not None and one.interval is not None:
            lines.append(f"{_times(one.relative, one.interval)} of the first")
        for kind, own in one.kinds.items():
            times = "" if one.relative is None else f", {_times(own['relative'], own['interval'])}"
            lines.append(f"{kind}: {number(own['perplexity'])}{times}")
        ratios = {kind: own["relative"] for kind, own in one.kinds.items()}
        if len(ratios) > 1 and one.relative is not None:
            lines.append(f"{ALL}: {Loss(ratios)}")
        if warning := uneven(ratios):
            lines.append(f"warning: {warning}")
        table.add_column(Text(printable("\n".join(lines))), ratio=1)
    if found[0].answer is not None:
        table.add_row(*(Text(printable(one.answer or "")) for one in found))
    return table
