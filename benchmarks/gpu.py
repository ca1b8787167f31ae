"""What a GPU shows, in nine parts and half an hour: right numbers first, then speed, each beside its baseline.

    python -m benchmarks.gpu [--shape llama2-7b] [--out data/benchmarks/gpu.json] [--patience 1] [part ...]

Needs no network and no checkpoint: models have the widths of the shape and random, seeded weights. Without an
accelerator it says so and rehearses all parts at tiny shapes.

A worker process (`gpu_parts`) computes the parts, each with a deadline. One that fails, hangs or dies takes no other
with it: the next gets a new worker. What a part finds is in the file at once, whatever happens then, and a page beside
it (gpu.md) is written from the file. The same command again goes on with the parts that are not whole; parts that are
named are computed anew. Exits with 1 if a part is not whole or something does not hold.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from blockpruner.core.errors import InputError
from blockpruner.store.files import read_kept_json, write_sealed_json, write_text
from blockpruner.store.provenance import commit

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "data" / "paper" / "table7_pruning_time.csv"
SHAPES = ("llama2-7b", "llama2-13b", "tiny")
WORKER = (sys.executable, "-m", "benchmarks.gpu_parts")


@dataclass(frozen=True)
class Part:
    """One of the nine."""

    name: str
    seconds: float
    """Its deadline."""
    question: str


START = Part("start", 120, "Is there a worker?")
PARTS = (
    Part("card", 60, "What do the card's copies reach, and the model's matrix products alone?"),
    Part("numbers", 120, "Does it compute the right numbers, in every model family?"),
    Part("iteration", 120, "How fast is an exact iteration, and how fast are full forward passes in the same run?"),
    Part("search", 600, "How long is the whole search (Table 7 of the paper), exact and lazy+race?"),
    Part("ways", 210, "What do batch size, attention kernel, logits at once and compilation gain or move?"),
    Part("profile", 60, "Where does the time of a candidate go?"),
    Part("memory", 90, "Does the memory model hold, and does work go on where memory ends?"),
    Part("streaming", 120, "Is a model that is read layer by layer scored to the same bits, and how fast?"),
    Part("around", 300, "Do generation, training and verified checkpoints work, and how fast?"),
)
"""In order: half an hour with `START`."""


class Worker:
    """A process that computes parts, and its children. It ends when this process does.

    Args:
        patience: multiplies deadlines.
    """

    def __init__(self, command: Sequence[str], patience: float) -> None:
        self._patience = patience
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT, env=offline
        )
        self._held = b""

    def ask(self, part: Part) -> Iterator[dict[str, Any]]:
        """What the worker says of a part, until the message that tells how it "ended", which is ours if need be."""
        seconds = part.seconds * self._patience
        deadline = time.monotonic() + seconds
        assert self._process.stdin and self._process.stdout
        if part is not START:
            try:
                self._process.stdin.write(f"{part.name}\n".encode())
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # read below: its output ends
        ended = None
        while ended is None:
            left = deadline - time.monotonic()
            line, newline, rest = self._held.partition(b"\n")
            if newline:
                self._held = rest
                message = json.loads(line)
            elif left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                message = {"ended": f"deadline: not done in {seconds:g} s"}
            elif more := os.read(self._process.stdout.fileno(), 2**12):
                self._held += more
                continue
            else:
                message = {"ended": f"lost: the worker ended by itself ({self._status()})"}
            ended = message.get("ended")
            yield message

    def stop(self) -> None:
        """End it with all that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._status()

    def _status(self) -> str:
        try:
            return f"exit status {self._process.wait(30)}"
        except subprocess.TimeoutExpired:
            return "it does not let go"


def lines_in(stream: TextIO) -> Iterator[str]:
    """For a worker: the lines of its standard input as they come. When that ends, who asks is gone, and then so is this
    process with all that it started, whatever it is at."""
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            found.put(line.strip())
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield found.get()


def run(
    path: Path, names: Sequence[str], command: Sequence[str], parts: Sequence[Part] = PARTS, patience: float = 1.0
) -> bool:
    """Compute the parts that are not whole yet, or those named; whether all are whole and everything holds."""
    kept = read_kept_json(path, lambda line: print(line, file=sys.stderr)) or {"where": None, "records": []}
    records: list[dict[str, Any]] = kept["records"]

    def write() -> None:
        write_sealed_json(path, kept)
        write_text(path.with_suffix(".md"), page(kept, parts))

    whole = {record["part"] for record in records if record["ended"] == "whole"}
    wanted = [part for part in parts if (part.name in names if names else part.name not in whole)]
    worker: Worker | None = None
    try:
        for number, part in enumerate(wanted, 1):
            if worker is None:
                worker = Worker(command, patience)
                kept["where"] = placed(worker, path, kept["where"])
            record = {"part": part.name, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit()}
            record |= {"ended": "killed", "seconds": 0.0, "found": {}}
            records.append(record)
            write()  # a run that is killed leaves it so
            started = time.monotonic()
            for message in worker.ask(part):
                record["found"] |= message.get("found", {})
                record["ended"] = message.get("ended", "killed")
                record["seconds"] = round(time.monotonic() - started, 2)
                write()
            print(f"{number}/{len(wanted)} {part.name}: {record['ended']}, {record['seconds']:.0f} s", file=sys.stderr)
            for line in lines_of(record):
                print(f"  {line}", file=sys.stderr, flush=True)
            if record["ended"] != "whole":
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()
    write()
    print(f"{path.with_suffix('.md')}", file=sys.stderr)
    last = latest(records)
    ended = {last[part.name]["ended"] if part.name in last else "missing" for part in parts}
    return ended == {"whole"} and not any(map(broken, last.values()))


def placed(worker: Worker, path: Path, known: Mapping[str, str] | None) -> Mapping[str, str]:
    """Where a worker computes.

    Raises:
        InputError: it did not start, or the records of the file are of another place: they are not mixed.
    """
    *_, message = worker.ask(START)
    place: Mapping[str, str] | None = message.get("where")
    if place is None:
        raise InputError(f"the worker did not start ({message['ended']}); what it printed tells why")
    if known not in (None, place):
        raise InputError(f"{path} is of {dict(known or {})}, and this is {dict(place)}; name another file with --out")
    print(place["device"], file=sys.stderr, flush=True)
    return place


def latest(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of each part, a whole one where there is one."""
    ordered = sorted(records, key=lambda record: record["ended"] == "whole")
    return {record["part"]: record for record in ordered}


def broken(record: Mapping[str, Any]) -> list[str]:
    """What does not hold."""
    return [
        f"{check['what']}: {text(check['found'])}, at most {text(check['at most'])} is right"
        for check in record["found"].get("checks", ())
        if not check["holds"]
    ]


def lines_of(record: Mapping[str, Any]) -> list[str]:
    return [*record["found"].get("headlines", {}).values(), *(f"DOES NOT HOLD: {line}" for line in broken(record))]


# -- the page --


def page(kept: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> str:
    """What the file shows, as Markdown."""
    found, place = latest(kept["records"]), kept["where"] or {}
    lines = [f"# {place.get('shape', '')} on {place.get('device', '')}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in place.items()) + ".", ""]
    lines += ["`python -m benchmarks.gpu` wrote this from its JSON file. Weights and rows are random and seeded.", ""]
    failed = [(part.name, line) for part in parts for line in broken(found.get(part.name, {"found": {}}))]
    checks = sum(len(record["found"].get("checks", ())) for record in found.values())
    lines += [f"- **{name} does not hold: {line}. Do not trust what follows from it.**" for name, line in failed]
    lines += [f"- {checks - len(failed)} of {checks} checks hold."]
    for part in parts:
        record = found.get(part.name)
        if record is None or record["ended"] != "whole":
            lines.append(f"- **{part.name} is not whole: {record['ended'] if record else 'not computed yet'}.**")
        lines += [f"- {line}" for line in (record or {"found": {}})["found"].get("headlines", {}).values()]
    lines += [f"- {line}" for line in paper(str(place.get("shape")))]
    for number, part in enumerate(parts, 1):
        lines += ["", f"## {number}. {part.name}", "", part.question]
        if part.name in found:
            lines += section(found[part.name], part)
    return "\n".join(lines) + "\n"


def paper(shape: str) -> Iterator[str]:
    name = shape.replace("llama2-", "Llama2-").replace("b", "B")
    with open(PAPER) as handle:
        for row in csv.DictReader(handle):
            if row["model"] == name and row["method"] == "blockpruner":
                yield f"The paper's search of {name} took {row['minutes']} minutes on two RTX 4090."


def section(record: Mapping[str, Any], part: Part) -> Iterator[str]:
    """The facts of a record: a line each, and a table for each list of rows."""
    yield ""
    took = f"{record['ended']}, {record['seconds']:.0f} of {part.seconds:g} s"
    yield f"{took}; {record['when']}, commit {record['commit'] or 'unknown'}."
    facts = {key: value for key, value in record["found"].items() if key not in ("headlines", "checks")}
    flat = [(key, value) for key, value in facts.items() if not isinstance(value, dict) and not is_table(value)]
    tables = {key: value for key, value in facts.items() if is_table(value)}
    pairs = {key: value.items() for key, value in facts.items() if isinstance(value, dict)}
    tables |= {key: [{"": name, "value": value} for name, value in items] for key, items in pairs.items()}
    if flat:
        yield ""
        yield from (f"- {key}: {text(value)}" for key, value in flat)
    if record["found"].get("checks"):
        tables["Must hold"] = record["found"]["checks"]
    for title, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        yield from ("", f"{title}:", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
        yield from (f"| {' | '.join(text(row.get(column)) for column in columns)} |" for row in rows)


def is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, float) for each in value):
        ordered = sorted(value)
        return f"{text(ordered[0])} to {text(ordered[-1])}, median {text(ordered[len(ordered) // 2])}"
    if isinstance(value, list):
        return "; ".join(map(text, value))
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def require_packages() -> None:
    """Refuse versions that the library does not run with, before a rented minute is lost.

    Raises:
        InputError: names the packages and what they must be.
    """
    from packaging.requirements import Requirement

    short, project = [], tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    training = [line for line in project["optional-dependencies"]["dag"] if line.startswith("peft")]
    for line in [*project["dependencies"], *training]:
        needed = Requirement(line)
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            there = "not installed"
        if there == "not installed" or not needed.specifier.contains(there, prereleases=True):
            short.append(f"{needed} ({there})")
    if short:
        raise InputError(f"these packages do not fit: {', '.join(short)}; pip install '.[dag]'")


def main(arguments: Sequence[str]) -> int:
    valid = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"compute anew: {valid}")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/gpu.json"))
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies all deadlines, for a slow machine")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; valid: {valid}")
    try:
        require_packages()
        return int(not run(given.out, given.parts, [*WORKER, given.shape], patience=given.patience))
    except InputError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
