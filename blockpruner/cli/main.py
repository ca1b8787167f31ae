"""The command's options, and how it ends.

Results go to standard output, progress and errors to standard error. Exit codes: 0, done; 2, a value that the user can
correct, named with the fix; 130, interrupted. The modules that do the work are imported when needed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer import Argument, Option

from blockpruner import __version__
from blockpruner.core.errors import InputError
from blockpruner.core.progress import stderr_observer
from blockpruner.methods.recipes import RECOMMENDED, recipe

KEY = re.compile(
    r"\b(?:(?:model|calibration|score|runtime)\.(?:\w+\.)?"
    r"(num_samples|seq_len|method|unit|metric|acceleration|dtype|device|trust_remote_code)|(compensate)\.method)\b"
)
"""Keys of a run file in messages, which are options here."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockpruner"


Dense = Annotated[str, Argument(metavar="MODEL", help="A folder, or a name on the Hugging Face hub.")]
Export = Annotated[str, Option(help="More formats, at OUT-FORMAT: nas (vLLM, mlx-lm), gguf (llama.cpp), zeroed.")]
Dtype = Annotated[str, Option(help="float32, bfloat16, float16, float64; auto is the model's own.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:N, or split: one model over all GPUs.")]
Trust = Annotated[bool, Option("--trust-remote-code", help="Run code that lies beside the model.")]
TRIALS = Option(
    default_factory=cache_folder,
    show_default="~/.cache/blockpruner",
    help="Folder that keeps all scores and a copy of the model. A killed run goes on from it; it is safe to delete.",
)
AsJson = Annotated[bool, Option("--json", help="Print one JSON object in place of text.")]
Spoken = Annotated[str, Argument(help="A checkpoint's folder, or a dense model's name on the hub.")]
Limit = Annotated[int, Option(min=1, help="The most tokens of an answer.")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Make a language model smaller and faster: remove the attention and MLP blocks that it misses least."""


@app.command()
def prune(
    model: Dense,
    ratio: Annotated[str, Option(help="Share of all parameters to remove; or 17blocks, 7layers, 0.3kv, 1.25x.")],
    trials: Annotated[Path, TRIALS],
    out: Annotated[Path | None, Option(help="The checkpoint's folder.", show_default="NAME-RATIO")] = None,
    texts: Annotated[
        Path | None,
        Option(
            help="Calibration texts: .jsonl, .json or .parquet records with a text, or a .txt file.",
            show_default="Alpaca from the hub",
        ),
    ] = None,
    num_samples: Annotated[
        int | None, Option(min=1, help="Texts that are drawn.", show_default="256; of --texts what fills 16 rows")
    ] = None,
    seq_len: Annotated[int | None, Option(min=2, help="Tokens in a row.", show_default="2048, or the context")] = None,
    method: Annotated[
        str, Option(help="recommended; blockpruner, exactly as published; or a plain search (docs/methods.md).")
    ] = RECOMMENDED,
    unit: Annotated[str, Option(help="What a step removes: block or layer.")] = "block",
    metric: Annotated[str, Option(help="What a step keeps low (docs/methods.md).")] = "perplexity",
    acceleration: Annotated[
        str | None,
        Option(help="none is exact; lazy, race, lazy+race are faster.", show_default="lazy+race if recommended"),
    ] = None,
    compensate: Annotated[
        str | None,
        Option(help="Fit the weights that stay: refit, map, bias, scale, none.", show_default="refit if recommended"),
    ] = None,
    export: Export = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what it would take; compute nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a pruned checkpoint that transformers loads. After a kill, say the same again to go on."""
    from blockpruner.cli import pruning as work

    drawn = {"num_samples": num_samples, "seq_len": seq_len}
    calibration: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    if texts is not None:
        calibration |= {"data": {"source": "path", "path": str(texts)}, "split": "all"}
        calibration |= {"num_rows": work.ROWS} if num_samples is None else {}
    chosen = recipe(method, acceleration, compensate)
    score = {"method": chosen.method, "unit": unit, "metric": metric, "acceleration": chosen.acceleration}
    sections = {"calibration": calibration, "score": score, "compensate": {"method": chosen.compensation}}
    place = work.Place(trials.expanduser().absolute(), device, stderr_observer())
    run = place.read_run(model, dtype, trust_remote_code, export, sections)
    if dry_run:
        found = place.forecast(run, ratio)
        _tell(found, "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items()), as_json)
    else:
        named = out or Path(f"{run.model.title.rpartition('/')[2]}-{ratio}")
        found = place.prune(run, ratio, named.expanduser().absolute())
        _tell(found, work.words(found), as_json)


@app.command()
def apply(
    model: Dense,
    plan: Annotated[Path, Argument(help="The file of a plan, or a checkpoint's folder that holds one.")],
    out: Annotated[Path, Option(help="The checkpoint's folder.")],
    trials: Annotated[Path, TRIALS],
    export: Export = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write the checkpoint of a plan from the dense model that it was made for."""
    from blockpruner.cli import pruning as work

    place = work.Place(trials.expanduser().absolute(), device, stderr_observer())
    run = place.read_run(model, dtype, trust_remote_code, export, {})
    found = place.apply(run, plan, out.expanduser().absolute())
    _tell(found, work.words(found), as_json)


@app.command()
def chat(
    model: Spoken,
    prompt: Annotated[str | None, Option(help="Answer this, and end.")] = None,
    max_new_tokens: Limit = 256,
    device: Device = "auto",
) -> None:
    """Talk to a checkpoint, dense or pruned. A model without a chat template continues texts. Ctrl-D ends."""
    from blockpruner.cli.talking import Talker

    Talker(_folder(model), device).chat(None if prompt is None else [prompt], max_new_tokens)


@app.command()
def compare(
    a: Spoken,
    b: Spoken,
    prompt: Annotated[str, Option(help="What both answer.")],
    max_new_tokens: Limit = 64,
    device: Device = "auto",
) -> None:
    """Show the answers of two checkpoints beside each other, with tokens per second."""
    from blockpruner.cli.talking import side_by_side

    Console().print(side_by_side([_folder(a), _folder(b)], prompt, max_new_tokens, device))


def _folder(model: str) -> Path:
    from blockpruner.cli.pruning import Place

    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    place = Place(cache_folder(), "auto", stderr_observer())
    return place.fetch(place.read_run(model, "auto", False, "", {}))


def _tell(found: Mapping[str, Any], words: str, as_json: bool) -> None:
    print(json.dumps(found) if as_json else words)


def _fail(message: str) -> NoReturn:
    named = KEY.sub(lambda match: f"--{match[1] or match[2]}".replace("_", "-"), message)
    named = named.replace("another source (pypi, path)", "a folder, or --texts FILE, of this machine")
    print(f"error: {named}", file=sys.stderr)
    sys.exit(2)


def main(args: Sequence[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are about what is meant here
    try:
        app(args, prog_name="blockpruner")
    except SystemExit as end:
        if end.code == 130:
            print("interrupted; scores are kept: say the same again to go on", file=sys.stderr)
        raise
    except InputError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"this needs the package {error.name}, which is not installed: pip install {error.name}")
