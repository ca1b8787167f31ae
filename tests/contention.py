"""Equal commands that start at random moments on one cache: `python -m tests.contention [ROUNDS
[SEED]]`.

In each round some processes run the same `prune --train all`, at the same `--out` or at their own.
Prints one JSON object: how many commands ended with which exit code, how many checkpoints have the
bytes of a command that ran alone, what a round computed at most, how many waited, and what is left
beside OUT.

The processes are forks of this one, which never trains itself: a fork of a process with autograd's
threads cannot.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch

from blockpruner.checkpoints import hf, verification
from blockpruner.cli import main
from blockpruner.healing import choice, train, trainer
from tests.fakes import InProcess
from tests.shipped import replace_shipped
from tests.tiny import save_tiny

torch.set_num_threads(1)
TEXTS = "\n".join(f"{i} little words and {i * i} more of them" for i in range(300))
COMMAND = (
    "prune",
    "tiny",
    "--budget",
    "0.2",
    "--texts",
    "texts.txt",
    "--seq-len",
    "16",
    "--method",
    "floating",
)
COMMAND += ("--compensate", "refit", "--train", "all", "--set", "train.num_rows=40")
WRITTEN = {"README.md", "blockpruner_plan.json", "verification.json"}
"""Files of a checkpoint that hold its own name or the time."""


def counted(module: ModuleType, name: str, log: Path) -> None:
    """Have each call of a function leave a line in a file."""
    original: Any = getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{name}\n")
        return original(*args, **options)

    setattr(module, name, call)


def start(cache: Path, out: Path, log: Path) -> int:
    """Run the command in a fork; its errors go to `log`.PID."""
    if child := os.fork():
        return child
    code = 1
    try:
        errors = os.open(f"{log}.{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        verification.subprocess = InProcess
        trainer.SAVE_SECONDS = trainer.SAVE_COST_FACTOR = 0  # each step leaves a state
        for module, name in ((choice, "choose"), (train, "train_"), (hf, "save_pruned")):
            counted(module, name, log)
        main.main([*COMMAND, "--cache", str(cache), "--out", str(out)])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.glob("*") if path.name not in WRITTEN)
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def scores(cache: Path) -> int:
    """How many scores the logs of a cache hold."""
    return sum(log.read_text().count('"trial"') for log in cache.glob("*/*.jsonl"))


def contend(rounds: int = 200, seed: int = 0) -> dict[str, Any]:
    dice, found, codes, most = random.Random(seed), Counter(), Counter(), Counter()
    save_tiny(Path("tiny"))
    Path("texts.txt").write_text(TEXTS)
    began = time.monotonic()
    code = ended(start(Path("alone"), Path("whole"), Path("first")))
    assert code == 0, [path.read_text() for path in Path().glob("first.*")]
    seconds, whole = time.monotonic() - began, content(Path("whole"))
    for number in range(rounds):
        cache, log = Path(f"cache{number}"), Path(f"log{number}")
        own, children, outs = dice.random() < 0.5, [], []
        for each in range(dice.choice((2, 2, 3))):
            outs.append(Path(f"out{number}-{each * own}").absolute())
            children.append(start(cache, outs[-1], log))
            time.sleep(dice.random() * dice.choice((0.02, 0.3, 1.0)) * seconds)
        codes.update(str(ended(child)) for child in children)
        found["commands"] += len(children)
        found["equal bytes"] += sum(content(out) == whole for out in outs)
        calls = Counter(log.read_text().split())
        most |= {
            "fits": calls["choose"],
            "trainings": calls["train_"],
            "checkpoints more than places": calls["save_pruned"] - len({*outs}),
            "scores more than alone": scores(cache) - scores(Path("alone")),
        }
        errors = [path.read_text() for path in Path().glob(f"{log}.*")]
        found["waited"] += sum("waiting for it" in text for text in errors)
        found["left beside OUT"] += len([*Path().glob(".out*")])
        for path in (cache, *Path().glob(f"log{number}*"), *outs):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (number + 1) % 20 == 0:
            print(number + 1, dict(found), dict(codes), dict(most), file=sys.stderr, flush=True)
    return {"rounds": rounds, **found, "codes": codes, "most": most}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        replace_shipped(Path("shipped").absolute())
        print(json.dumps(contend(*map(int, sys.argv[1:]))))
        os.chdir("/")
