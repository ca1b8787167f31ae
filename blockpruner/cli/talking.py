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
    # Only checkpoints of ours have a report of what was verified.
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
        streamer = None
        if show:
            streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return answer(self.model, self.tokenizer, turns, limit, streamer)

    def chat(self, prompts: Iterable[str] | None, limit: int) -> None:
        """Answer these prompts, or those that are typed, on standard output."""
        turns: list[str] = []
        for prompt in typed() if prompts is None else prompts:
            turns.append(prompt)
            turns.append(self.answer(turns, limit, show=True))


def typed() -> Iterator[str]:
    """The lines that a user types, to the end of standard input."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip():
            yield line


@dataclass(frozen=True)
class Compared:
    """A checkpoint beside others; what was not asked for is None."""

    model: str
    """Its folder."""
    parameters: int
    answer: str | None = None
    perplexity: float | None = None
    relative: float | None = None
    """The perplexity over that of the first checkpoint, which has none, and no interval."""
    interval: tuple[float, float] | None = None
    """The 95 % interval of `relative`, over paired rows."""
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By kind of text, where there are several: `perplexity`, `relative` and `interval`."""


def rows_of(folders: Sequence[Path], settings: Perplexity) -> HeldOut:
    """Held-out rows that fit into the shortest context of some checkpoints; raises InputError if
    the texts are fewer than two rows, or the tokenizers make different rows of them."""
    first_tokenizer = cache(lambda: load_tokenizer(folders[0]))
    texts = load_texts(settings.data, Path(), Path(), partial(conversation, first_tokenizer))
    configs = [config_of(folder) for folder in folders]
    shortest = min(configs, key=lambda config: config.get("max_position_embeddings") or math.inf)
    settings = fitted(settings, shortest, "evaluate.perplexity.seq_len")
    heldout_sets = []
    for folder, config in zip(folders, configs, strict=True):
        tokenizer = load_tokenizer(folder)
        heldout = held_out(tokenizer, texts, settings)
        heldout_sets.append(heldout)
        # One row has no variance, and so no interval.
        if len(heldout.rows) < 2:
            raise InputError(
                f"the held-out texts are 1 row of {settings.seq_len} tokens, and an interval needs"
                " at least 2; give a smaller --seq-len, a larger --max-rows or longer --texts"
            )
        require_embedded(heldout.rows, tokenizer, config)
        if heldout.rows != heldout_sets[0].rows:
            raise InputError(
                f"{folder} has another tokenizer than {folders[0]}: perplexities of different"
                " tokens cannot be compared; leave out --texts, or compare models of one tokenizer"
            )
    return heldout_sets[0]


def compared(
    folders: Sequence[Path], prompt: str | None, limit: int, heldout: Perplexity | None, device: str
) -> list[Compared]:
    """Checkpoints compared, one model at a time in memory; raises InputError as `rows_of`."""
    rows = None if heldout is None else rows_of(folders, heldout)
    results: list[Compared] = []
    reference_nll: Sequence[float] = ()
    for folder in folders:
        talker = Talker(folder, device)
        result = Compared(str(folder), talker.model.num_parameters())
        if prompt is not None:
            result = replace(result, answer=talker.answer([prompt], limit).strip())
        if rows is not None:
            measurement = measure_perplexity(talker.model, rows.rows)
            result = replace(result, perplexity=measurement.perplexity)
            # The first checkpoint is what the others are compared with.
            if reference_nll:
                ratio = perplexity_ratio(reference_nll, measurement.row_nll)
                result = replace(result, relative=ratio.value, interval=astuple(ratio.interval))
            reference_nll = reference_nll or measurement.row_nll
            kinds = _kinds(reference_nll, measurement.row_nll, rows.kinds)
            result = replace(result, kinds=kinds)
        results.append(result)
    return results


def _kinds(
    reference_nll: Sequence[float], row_nll: Sequence[float], kinds: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`Compared.kinds` from the NLL of each row."""
    facts_by_kind = {}
    for kind, (perplexity, ratio) in losses_by_kind(reference_nll, row_nll, kinds).items():
        facts_by_kind[kind] = {
            "perplexity": perplexity,
            "relative": ratio.value,
            "interval": astuple(ratio.interval),
        }
    return facts_by_kind


def scored(
    folder: Path, settings: ZeroShot, cache: Path, device: str, note: Callable[[str], object]
) -> dict[str, Any]:
    """A checkpoint's scores by task, with the keys that lm-eval's command prints."""
    # What cannot be scored is refused before anything is downloaded.
    check_tasks(settings)
    config_of(folder)
    # lm-eval takes seconds to import.
    from blockpruner.evaluation.zero_shot import evaluate

    scores_by_task = {}
    with TemporaryDirectory() as directory:
        tasks = Path(directory)
        fetch_tasks(settings, tasks, tasks, cache / "cache", cache / "pins.json", note)
        talker = Talker(folder, device)
        for task in settings.tasks:
            result = evaluate(talker.model, talker.tokenizer, task, tasks, settings.limit)
            scores_by_task[task] = result.scores
            note(f"{task}: scored")
    return scores_by_task


def _times(relative: float, interval: tuple[float, float]) -> str:
    return str(Number(relative, 2, low=interval[0], high=interval[1]))


def side_by_side(results: Sequence[Compared]) -> Table:
    """A column for each checkpoint."""
    table = Table(expand=True)
    for result in results:
        heading = "\n".join(_heading(result))
        table.add_column(Text(printable(heading)), ratio=1)
    if results[0].answer is not None:
        table.add_row(*(Text(printable(result.answer or "")) for result in results))
    return table


def _heading(result: Compared) -> list[str]:
    """The lines above a checkpoint's answer: its size and its perplexities."""
    lines = [result.model, f"{result.parameters / 1e6:,.1f} M parameters"]
    if result.perplexity is not None:
        lines.append(f"held-out perplexity {number(result.perplexity)}")
    if result.relative is not None and result.interval is not None:
        lines.append(f"{_times(result.relative, result.interval)} of the first")
    ratios = {}
    for kind, facts in result.kinds.items():
        line = f"{kind}: {number(facts['perplexity'])}"
        if result.relative is not None:
            line += f", {_times(facts['relative'], facts['interval'])}"
        lines.append(line)
        ratios[kind] = facts["relative"]
    if len(ratios) > 1 and result.relative is not None:
        lines.append(f"{ALL}: {Loss(ratios)}")
    if warning := uneven(ratios):
        lines.append(f"warning: {warning}")
    return lines
