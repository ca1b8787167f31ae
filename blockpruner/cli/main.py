"""The command's options, and how it ends.

Results go to standard output, progress and errors to standard error. Exit codes: 0, done; 1,
failed, or something that is needed is missing; 2, a value that the user can correct, named with the
fix; 130, interrupted; 129 and 143, ended by SIGHUP and SIGTERM. An error that nobody foresaw is one
line, which names a log. The modules that do the work are imported when needed.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option
from typer.core import TyperGroup

from blockpruner import __version__
from blockpruner.cli.values import called, data_of, model_of, to_json, values_of
from blockpruner.core.budgets import share_for
from blockpruner.core.errors import InputError
from blockpruner.core.progress import stderr_observer
from blockpruner.core.settings import read_settings
from blockpruner.evaluation.settings import Perplexity, ZeroShot
from blockpruner.inputs.sources import cache_folder
from blockpruner.methods.recipes import RECOMMENDED


def value(metavar: str, text: str, default: str | bool = True, **limits: Any) -> Any:
    """An option with a value; `default` is shown as its default, `limits` are typer's."""
    return Option(metavar=metavar, help=text, show_default=default, **limits)


A_MODEL = "A folder, or a name on the Hugging Face hub, perhaps with @REVISION."
Dense = Annotated[str, Argument(metavar="MODEL", help=A_MODEL)]
FORMATS = "nas (mlx-lm, and vLLM without our plugin), mlx, gguf (or llama.cpp), gguf:Q4_K_M."
OUT_FORMATS = (
    f"More formats, at OUT-FORMAT, separated by commas: {FORMATS} vllm means OUT itself, which vLLM"
    " serves."
)
Export = Annotated[str, value("NAMES", OUT_FORMATS)]
PRUNE_LAYERS = (
    "Print llama-quantize's option for a plan of whole layers, and end; the model is not read."
)
DTYPES = (
    "float32, bfloat16, float16, float64; auto is the model's own, or float32 where that is faster."
)
Dtype = Annotated[str, value("NAME", DTYPES)]
Device = Annotated[
    str, value("NAME", "auto, cpu, cuda, cuda:N, or split: one model over all GPUs.")
]
Trust = Annotated[bool, Option("--trust-remote-code", help="Run code that comes with the model.")]
KEPT = (
    "Folder that keeps all scores and links to models. A killed run continues from it; it is safe"
    " to delete."
)
CACHE = value("DIR", KEPT, "~/.cache/blockpruner", default_factory=cache_folder)
AsJson = Annotated[bool, Option("--json", help="Print one JSON object in place of text.")]
Spoken = Annotated[
    str,
    Argument(metavar="MODEL", help="A checkpoint's folder, or a dense model's name on the hub."),
]
Limit = Annotated[int, value("N", "The most tokens of an answer.", min=1)]

BUDGETS = (
    "Share of all parameters to remove; or 17blocks, 7layers, 0.3kv, 1.25x; or what is left: 7B,"
    " 120M."
)
SAMPLES = "enough for 64 rows"
SEQ_LEN = "256; at most the context"
UNITS = (
    "What a step removes: block, layer, shifted. For blocks alone, name a search: --method greedy"
    " --unit block."
)
ACCELERATIONS = "none (exact), lazy, race, lazy+race."
COMPENSATIONS = "Fit the weights that stay: refit, none."
METHODS = "A recipe: recommended, or blockpruner, the paper's search; or a search."
TRAIN = (
    "Train the result towards the dense model's predictions, on the texts: all (weights), or lora"
    " (adapters, for less memory)."
)
TASKS = ",".join(ZeroShot().tasks)
FILES = ".jsonl, .json or .parquet records with a text, or a .txt file."
CALIBRATION = f"Your texts, half of those that decide; the other half are ours. {FILES}"
ONLY_TEXTS = "Let your texts alone decide what is removed, and how the rest is fitted."
MAX_LOSS = (
    "End without a checkpoint if a kind of text loses more: 1.5 is 1.5 times the dense model's"
    " perplexity."
)
UNSEEN = f"Texts that prune has not seen, to measure perplexity on: {FILES}"
Written = Annotated[Path, Argument(metavar="DIR", help="A folder that prune or apply has written.")]

UNPRINTED = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""What is no text: control characters, and bytes of a name that are no UTF-8."""


class Commands(TyperGroup):
    """The commands. Typer takes the EOFError of a damaged file for a Ctrl-D, and ends without a
    word on it."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except EOFError as error:
            _fail(error, context.invoked_subcommand)


app = typer.Typer(
    cls=Commands, rich_markup_mode="markdown", no_args_is_help=True, pretty_exceptions_enable=False
)


def _version(is_set: bool) -> None:
    if is_set:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make a language model smaller: remove the MLP channels, layers or blocks that it needs
    least."""


# The options of `prune`, in the order of its help.
Budget = Annotated[str, value("SHARE", BUDGETS)]
OptionalModel = Annotated[
    str | None, Argument(metavar="MODEL", help=A_MODEL, show_default="that of --config")
]
OutFolder = Annotated[Path | None, value("DIR", "The checkpoint's folder.", "NAME-BUDGET")]
ConfigFile = Annotated[
    Path | None, value("FILE", "A run file (docs/methods.md); options replace its values.")
]
SetKeys = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of a run file or of runtime, as in calibration.split=all.",
    ),
]
Revision = Annotated[
    str | None, value("NAME", "The model's commit, branch or tag on the hub.", "main")
]
UserTexts = Annotated[Path | None, value("FILE", CALIBRATION, "ours alone, eight kinds")]
DataSet = Annotated[str | None, value("REPO[:SPLIT]", "The same from a data set of the hub.")]
OnlyTexts = Annotated[bool, Option("--only-texts", help=ONLY_TEXTS)]
MaxLoss = Annotated[float | None, value("TIMES", MAX_LOSS, "no limit", min=1.0)]
NumSamples = Annotated[int | None, value("N", "Texts that are drawn.", SAMPLES, min=1)]
SeqLen = Annotated[int | None, value("N", "Tokens in a row.", SEQ_LEN, min=2)]
Method = Annotated[str | None, value("NAME", METHODS, RECOMMENDED)]
Unit = Annotated[str | None, value("NAME", UNITS, "that of the method")]
MetricName = Annotated[
    str | None, value("NAME", "The score to minimise (docs/methods.md).", "perplexity")
]
Acceleration = Annotated[str | None, value("NAME", ACCELERATIONS, "lazy+race if recommended")]
Compensation = Annotated[str | None, value("NAME", COMPENSATIONS, "refit if recommended")]
Training = Annotated[str | None, value("NAME", TRAIN, "no training")]
Workers = Annotated[
    int | None, value("N", "Copies of the model that score at once, by Ray.", min=1)
]
Streaming = Annotated[
    bool,
    Option(
        "--streaming",
        help="Score one layer at a time; healing and exports hold the whole model.",
    ),
]
DryRun = Annotated[bool, Option("--dry-run", help="Print what it would take; prune nothing.")]


@app.command()
def prune(
    budget: Budget,
    cache: Annotated[Path, CACHE],
    model: OptionalModel = None,
    out: OutFolder = None,
    config: ConfigFile = None,
    set_: SetKeys = None,
    revision: Revision = None,
    texts: UserTexts = None,
    dataset: DataSet = None,
    only_texts: OnlyTexts = False,
    max_loss: MaxLoss = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    method: Method = None,
    unit: Unit = None,
    metric: MetricName = None,
    acceleration: Acceleration = None,
    compensate: Compensation = None,
    train: Training = None,
    export: Export = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    workers: Workers = None,
    streaming: Streaming = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a pruned checkpoint that transformers loads. If it is interrupted, run the same command
    again."""
    from blockpruner.cli import dry_run as forecast
    from blockpruner.cli import pruning as work

    out = out and _output_folder(out)
    source = {} if model is None else model_of(model)
    source |= _model_options(dtype, trust_remote_code) | _set_options(revision=revision)
    settings = values_of(
        config,
        set_ or (),
        {
            "model": source,
            "runtime": _set_options(
                workers=workers, executor=workers and "ray", streaming=streaming or None
            ),
        },
        method,
        only_texts,
        data=data_of(texts, dataset),
        calibration=_set_options(num_samples=num_samples, seq_len=seq_len),
        score=_set_options(unit=unit, metric=metric, acceleration=acceleration),
        compensate=compensate,
        train=train,
    )
    if "source" not in settings["model"]:
        raise InputError(
            "there is no model; give MODEL, or --config FILE that names one", rule="no-model"
        )
    runtime, formats = settings.pop("runtime"), [*settings.pop("export", ()), export]
    workspace = work.Command(
        cache.expanduser().absolute(), device, stderr_observer(), ",".join(formats), runtime
    )
    run = workspace.read_run(model, settings, computes=not dry_run)
    share = share_for(budget, workspace.config_of(run))
    folder = out or _output_folder(Path(f"{run.model.title.rpartition('/')[2]}-{budget}"))
    if dry_run:
        workspace.check_dry_run(run, folder)
        result = forecast.dry_run(run, workspace.config_of(run), share)
        _print_result(result, forecast.in_words(result), as_json)
    else:
        result = workspace.prune(run, share, folder, max_loss)
        _print_result(result, work.summary(result), as_json)


@app.command()
def apply(
    model: Dense,
    plan: Annotated[
        Path, Argument(metavar="PLAN", help="A checkpoint's folder, or the file of a plan.")
    ],
    cache: Annotated[Path, CACHE],
    out: Annotated[Path | None, value("DIR", "The checkpoint's folder.")] = None,
    export: Export = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    prune_layers: Annotated[bool, Option("--prune-layers", help=PRUNE_LAYERS)] = False,
    as_json: AsJson = False,
) -> None:
    """Write the checkpoint of a plan from the dense model that it was made for."""
    from blockpruner.cli import pruning as work

    if prune_layers:
        print(work.llama_cpp_option(plan))
        print(work.LLAMA_CPP_COUNTS, file=sys.stderr)
        return
    if out is None:
        raise InputError(
            "apply writes a checkpoint, and --out does not say where", rule="no-place", key="--out"
        )
    workspace = work.Command(cache.expanduser().absolute(), device, stderr_observer(), export)
    run = workspace.read_run(model, {"model": _model_options(dtype, trust_remote_code)})
    result = workspace.apply(run, plan, _output_folder(out))
    _print_result(result, work.summary(result), as_json)


@app.command()
def export(
    checkpoint: Written,
    formats: Annotated[list[str], Argument(metavar="FORMATS...", help=FORMATS)],
    as_json: AsJson = False,
) -> None:
    """Write other formats of a finished checkpoint, each at DIR-FORMAT."""
    from blockpruner.cli import exporting, pruning

    workspace = pruning.Command(cache_folder(), "cpu", stderr_observer(), ",".join(formats))
    result = exporting.export(checkpoint.expanduser().absolute(), workspace)
    _print_result(result, pruning.summary(result), as_json)


@app.command()
def chat(
    model: Spoken,
    prompt: Annotated[str | None, value("TEXT", "Answer this, and end.")] = None,
    max_new_tokens: Limit = 256,
    device: Device = "auto",
) -> None:
    """Talk to a checkpoint, dense or pruned. A model without a chat template continues texts.
    Ctrl-D ends."""
    from blockpruner.cli.talking import Talker

    Talker(_folder(model), device).chat(None if prompt is None else [prompt], max_new_tokens)


@app.command()
def compare(
    a: Spoken,
    b: Spoken,
    prompt: Annotated[str | None, value("TEXT", "What both answer.")] = None,
    max_new_tokens: Limit = 64,
    texts: Annotated[Path | None, value("FILE", UNSEEN)] = None,
    seq_len: Annotated[
        int | None, value("N", "Tokens in a row.", "2048, or the context", min=2)
    ] = None,
    max_rows: Annotated[
        int, value("N", "The most rows of each kind of text that are used.", min=2)
    ] = 32,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show two checkpoints side by side: their answers and held-out perplexity."""
    if prompt is None and texts is None:
        raise InputError(
            "compare has nothing to compare by; give --prompt TEXT, --texts FILE, or both"
        )
    from blockpruner.cli.talking import compared, side_by_side

    heldout = None
    if texts is not None:
        rows = {"packing": "documents", "max_rows": max_rows, **_set_options(seq_len=seq_len)}
        heldout = read_settings(
            Perplexity, {"data": {"source": "path", "path": str(texts)}, **rows}
        )
    result = compared([_folder(a), _folder(b)], prompt, max_new_tokens, heldout, device)
    _print_result([vars(measured) for measured in result], side_by_side(result), as_json)


@app.command("eval")
def evaluate(
    model: Spoken,
    cache: Annotated[Path, CACHE],
    tasks: Annotated[str, value("NAMES", "Benchmarks, separated by commas.")] = TASKS,
    limit: Annotated[int | None, value("N", "The most items of a task.", "all", min=1)] = None,
    items: Annotated[
        Path | None, value("DIR", "Holds <task>_<split>.parquet files.", "from the hub")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint, dense or pruned, in lm-eval's benchmarks without examples."""
    from blockpruner.cli.talking import scored

    source = (
        {"source": "hub"} if items is None else {"source": "path", "path": str(items.expanduser())}
    )
    names = [name.strip() for name in tasks.split(",")]
    settings = read_settings(ZeroShot, {"data": source, "tasks": names, "limit": limit})
    folder = cache.expanduser().absolute()
    result = scored(_folder(model, folder), settings, folder, device, stderr_observer().note)
    scores = (
        (task, name, value) for task, metrics in result.items() for name, value in metrics.items()
    )
    lines = (f"{task}: {name} {value:.4f}" for task, name, value in scores if value is not None)
    _print_result(result, "\n".join(lines), as_json)


@app.command()
def report(
    checkpoint: Written,
    out: Annotated[Path | None, value("FILE", "The page, one file.", "DIR-report.html")] = None,
) -> None:
    """Write a page on a checkpoint: what is gone, and what that cost."""
    from blockpruner.cli.pruning import read_plan

    folder = checkpoint.expanduser().absolute()
    read_plan(folder)  # a mistake in the folder is named before a package that the page needs
    from blockpruner.cli.page import write_page_of

    file = out or folder.with_name(f"{folder.name}-report.html")
    write_page_of(folder, file)
    print(file)


@app.command()
def push(
    checkpoint: Written,
    repo: Annotated[
        str,
        Argument(
            metavar="REPO", help="USER/NAME on the Hugging Face hub; made if it is not there."
        ),
    ],
    cache: Annotated[Path, CACHE],
    private: Annotated[
        bool, Option("--private/--public", help="Who may see the repository.")
    ] = True,
    yes: Annotated[bool, Option("--yes", help="Upload without a question.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what would be uploaded; contact nobody.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, if it is unchanged since it was verified."""
    from blockpruner.checkpoints import hub
    from blockpruner.reporting.formats import size

    folder = checkpoint.expanduser().absolute()
    licence = hub.base_licence(folder, cache.expanduser().absolute())
    sizes = {name: (folder / name).stat().st_size for name in hub.files_to_push(folder, licence)}
    result = {"repo": repo, "private": private, "files": sizes}
    visibility = "private" if private else "public"
    lines = [f"to the {visibility} repository {repo}: {size(sum(sizes.values()))}"]
    lines += [f"  {name}  {size(num_bytes)}" for name, num_bytes in sizes.items()]
    text = "\n".join(lines)
    if dry_run:
        _print_result(result, text, as_json)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise InputError(
                f"nothing was uploaded to {repo!r}: there is no terminal to ask on; give --yes"
            )
        print(text, file=sys.stderr)
        typer.confirm("Upload this?", abort=True, err=True)
    address = hub.push(folder, repo, private, licence, folder.name)
    _print_result({**result, "commit": address}, address, as_json)


@app.command()
def doctor(cache: Annotated[Path, CACHE], as_json: AsJson = False) -> None:
    """Show what this machine has, and how to get what is missing. Exit code 1 if something needed
    is missing."""
    from blockpruner.cli import doctor as work

    checks = list(work.look(cache.expanduser().absolute()))
    facts = [{**vars(check), "verdict": check.verdict} for check in checks]
    _print_result(facts, work.table_of(checks), as_json)
    if any(check.verdict == "missing" for check in checks):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of run files, for editors and checkers."""
    from blockpruner.config.params import run_schema
    from blockpruner.inputs.sources import named_sources

    print(to_json(run_schema(named_sources()), indent=1, sort_keys=True))


def _set_options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _model_options(dtype: str, trusted: bool) -> dict[str, Any]:
    return _set_options(dtype=None if dtype == "auto" else dtype, trust_remote_code=trusted or None)


def _folder(model: str, cache: Path | None = None) -> Path:
    from blockpruner.cli.pruning import Command

    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    workspace = Command(cache or cache_folder(), "auto", stderr_observer())
    return workspace.fetch(workspace.read_run(model, {}))


def _output_folder(out: Path) -> Path:
    """The plain path of a folder that is written; raises InputError for a name that no line and no
    card can hold."""
    if UNPRINTED.search(str(out)):
        raise InputError(
            f"--out {str(out)!r} has a line break or another character that is not text; choose"
            " another"
        )
    return out.expanduser().resolve()


def _print_result(result: Any, text: str | Table, as_json: bool) -> None:
    """Print a result as JSON, or as a text or table."""
    if as_json:
        print(to_json(result))
    elif isinstance(text, str):
        print(text)
    else:
        # A cell may hold brackets or colons of a user's text, which rich would take for markup.
        Console(markup=False, emoji=False).print(text)


def _fail(raised: Exception, name: str) -> NoReturn:
    from blockpruner.store.files import explained  # loads much

    commands: Any = typer.main.get_command(app)
    command = commands.commands.get(name, commands)
    options = {option for parameter in command.params for option in parameter.opts}
    error = explained(raised, cache_folder())
    message = called(str(error), error.key, options)
    if error.rule in ("missing-file", "damaged-file") and "--cache" in options:
        message += (
            "; if it is in the folder of --cache, delete its own folder there and run again; else"
            " give a whole one"
        )
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1 if error.rule == "unforeseen" else 2)


def main(args: Sequence[str] | None = None) -> None:
    # its warnings are about what is meant here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # the default leaves half a checkpoint next to its folder
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as behind nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    args = sys.argv[1:] if args is None else args
    try:
        app(args, prog_name="blockpruner")
    except SystemExit as end:
        if end.code in (129, 130, 143):
            hint = "; scores are kept: run the same command again" if "prune" in args[:1] else ""
            with suppress(OSError):  # the terminal is closed
                print(f"interrupted{hint}", file=sys.stderr)
        raise
    except Exception as error:
        _fail(error, "".join(args[:1]))
