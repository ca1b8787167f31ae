"""Other projects' public code and this project on one model: seconds, tokens and held-out
perplexity.

    python -m benchmarks.peers MODEL TEXTS HELDOUT [--out data/benchmarks/peers] [--only NAME ...]

All see the same calibration rows, one after another, with the same threads, in bfloat16. Each peer
runs in an environment of its own (made at OUT/envs by pip), from a clone of its repository at a
pinned commit, in OUT/code. What a peer hard-codes is replaced while it runs, and nothing else: the
device, how rows are read, and tokenizers that are not used. EvoPress gets as many tokens as an
exact search of blocks looks at; its own budget takes hours. What is finished stays in
OUT/found.json; a second run goes on there.

Prints Markdown and draws OUT/cpu.png. Tokens are those of the search of blocks or layers: the
widths of narrower MLPs and the refit look at more rows than the peers do, and are not counted.
"""

import argparse
import ast
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PEERS = {
    "BlockPruner": ("MrGGLS/BlockPruner", "8210707", "transformers==4.43.4"),
    "SLEB": ("jiwonsong-dev/SLEB", "d07129a", "transformers==4.37.2"),
    "Shortened-LLM": ("Nota-NetsPresso/shortened-llm", "4031a92", "transformers==4.40.1"),
    "EvoPress": ("IST-DASLab/EvoPress", "50888a0", "transformers==4.43.4"),
}
"""Repository, commit, and the version of transformers that it asks for, or that its code was
written for."""

OTHERS = [
    "torch",
    "numpy<2",
    "pyarrow<18",
    "datasets<3",
    "tqdm",
    "fire",
    "accelerate",
    "sentencepiece",
    "protobuf",
]

OURS = {
    "exact": "--method blockpruner",
    "lazy + race": "--method blockpruner --acceleration lazy+race",
    "recommended, no refit": "--compensate none",
    "recommended": "",
}
LAYERS = {"0.1": 4, "0.2": 8}
"""Whole layers of SmolLM2-135M that come near a budget."""

ROWS, LENGTH, HELD_OUT = 16, 128, (30, 512)

CHILDREN, FINALISTS = 32, 3
"""What a generation of EvoPress scores."""


class Counter:
    """The tokens that go through a model, and when something was printed."""

    def __init__(self) -> None:
        self.tokens, self.started, self.stamps = 0, time.perf_counter(), dict[str, Any]()

    def watch(self, model: Any) -> Any:
        def count(module: Any, given: Any, named: Any) -> None:
            self.tokens += named.get("input_ids", given[0] if given else None).numel()

        model.register_forward_pre_hook(count, with_kwargs=True)
        return model.eval()

    def print(self, *words: Any) -> None:
        self.stamps[" ".join(map(str, words))] = self.now()

    def now(self) -> tuple[float, float, int]:
        """Seconds, those of the processors, and tokens so far."""
        return time.perf_counter() - self.started, time.process_time(), self.tokens


def blocks_of(found: list[Any]) -> list[str]:
    """Names of blocks from numbers of layers, or from pairs of a kind and a layer."""
    pairs = [
        pair if isinstance(pair, tuple) else (kind, pair)
        for pair in found
        for kind in ("mha", "mlp")
    ]
    return list(dict.fromkeys(f"{kind}.{layer}" for kind, layer in pairs))


def drive(
    name: str, code: str, folder: str, budget: str, model: str, rows: list[list[int]]
) -> list[Any]:
    """Run a peer, in its environment, for a budget; returns what it removes at each step, and when
    it knew."""
    import torch
    import transformers

    sys.path[:0] = [code, f"{code}/src"]
    counter, ids, count = Counter(), torch.tensor(rows), LAYERS[budget]
    layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    plain, to = transformers.AutoModelForCausalLM.from_pretrained, torch.Tensor.to

    def load(*_: Any, **__: Any) -> Any:
        return counter.watch(plain(model, torch_dtype=torch.bfloat16, use_cache=False))

    torch.Tensor.to = lambda self, *a, **k: to(
        self, *("cpu" if each == "cuda" else each for each in a), **k
    )
    torch.cuda.is_available = lambda: name == "EvoPress"
    os.chdir(folder)
    if name == "BlockPruner":
        import block_search

        args = SimpleNamespace(
            block_type="mix", cal_dataset="own", cal_nsamples=ROWS, ppl_search_path=folder
        )
        args.del_block_num, args.model_path, block_search.print = (
            5 * count // 2,
            "model",
            counter.print,
        )
        batches = [
            {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
        ]
        block_search.block_search_by_ppl(args, load(), batches)
    elif name == "SLEB":
        import sleb

        def get_llm(_: str) -> Any:
            found = load()
            found.seqlen, found.name = LENGTH, "llama"
            return found

        score, sleb.get_llm, sleb.print = sleb.get_loss, get_llm, counter.print
        sleb.get_trainloaders = lambda *_, **__: SimpleNamespace(input_ids=ids.reshape(1, -1))
        sleb.get_loss = lambda model, rows, bs, device: score(model, rows, bs, torch.device("cpu"))
        sleb.sleb("llama", layers, count, eval_ppl=False, result_folder=folder)
    elif name == "Shortened-LLM":
        # an old copy of peft, for checkpoints of adapters
        for missing in (
            "LLMPruner",
            "LLMPruner.peft",
        ):
            sys.modules[missing] = ModuleType(missing)
        sys.modules["LLMPruner.peft"].PeftModel = None
        import dataset
        import utils

        without = utils.get_block_pruned_network
        dataset.get_examples, utils.get_model = lambda **_: ids, lambda **_: (load(), None, "")
        utils.get_block_pruned_network = lambda *a, **k: counter.watch(without(*a, **k).bfloat16())
        words = f" --device cpu --num_calib_data {ROWS} --output_dir {folder}/scores --use_bfloat"
        sys.argv = words.split(" ")
        runpy.run_path(f"{code}/src/anal_block_sensitivity_ppl.py", run_name="__main__")
        order = [
            int(part) for part in (Path(folder) / "scores/block_order.csv").read_text().split(",")
        ]
        for each in LAYERS.values():
            counter.print(order[:each])
    else:
        import evo_drop_search as evo

        evo.AutoModelForCausalLM = SimpleNamespace(from_pretrained=load)
        evo.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: None)
        evo.get_data = lambda *_, **__: list(ids.split(1))
        scored, most = sum(2 * layers - step for step in range(5 * count // 2)), ROWS * LENGTH
        words = (
            f" --model_name_or_path {model} --calibration_data own --calibration_tokens {most}"
            " --no_eval"
        )
        words += (
            f" --calibration_sequence_length {LENGTH} --sparsity {(count + 0.5) / layers} --dtype"
            " bfloat16"
        )
        words += (
            f" --generations {scored // (CHILDREN + FINALISTS)} --offspring {CHILDREN}"
            " --initially_generated 8"
        )
        words += (
            f" --initial_tokens {most} --survivors_per_selection 2 1 --tokens_per_selection {most}"
            f" {most}"
        )
        sys.argv = f"{words} --fitness_fn kl --drop_config_dir {folder}".split(" ")
        evo.main()
        kinds = {"attn+mlp": ("mha", "mlp"), "attn": ("mha",), "mlp": ("mlp",), "none": ()}
        lines = enumerate((Path(folder) / "layer_drop_config.txt").read_text().split())
        counter.print([(kind, layer) for layer, words in lines for kind in kinds[words]])
    steps = [
        (words[words.index("[") :], stamp)
        for words, stamp in counter.stamps.items()
        if words.endswith("]")
    ]
    return [(blocks_of(ast.literal_eval(words)), stamp) for words, stamp in steps]


def environment(peer: str, given: argparse.Namespace) -> tuple[Path, Path]:
    """The Python of a peer's environment, and the folder of its code."""
    repository, commit, transformers = PEERS[peer]
    code, env = given.out / "code" / repository.partition("/")[2], given.out / "envs" / transformers
    if not code.exists():
        subprocess.run(["git", "clone", "-q", f"https://github.com/{repository}", code], check=True)
        subprocess.run(["git", "-C", code, "checkout", "-q", commit], check=True)
    if not (env / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        subprocess.run(
            [env / "bin/python", "-m", "pip", "install", "-q", transformers, *OTHERS], check=True
        )
        (env / "ready").touch()
    return env / "bin/python", code


def run(command: list[Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a process, those of the processors, and its last line, JSON."""
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    after = os.times()
    cpu = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    return {"seconds": time.perf_counter() - began, "cpu": cpu}, json.loads(
        done.stdout.strip().splitlines()[-1]
    )


class Measured:
    """What is known of each contender, kept in a file."""

    def __init__(self, given: argparse.Namespace) -> None:
        from blockpruner.evaluation.perplexity import held_out
        from blockpruner.evaluation.settings import Perplexity
        from blockpruner.inputs.calibration import draw_rows
        from blockpruner.inputs.settings import Calibration
        from blockpruner.inputs.texts import read_texts
        from blockpruner.inputs.tokenizers import load_tokenizer
        from blockpruner.model.models import load_model

        self.load = partial(load_model, dtype="bfloat16", device="cpu")
        self.given, self.file = given, given.out / "found.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        tokenizer, source = (
            load_tokenizer(given.model),
            {"source": "path", "path": str(given.texts)},
        )
        wanted = Calibration(data=source, split="all", num_rows=ROWS, seq_len=LENGTH)
        rows = draw_rows(read_texts(given.texts), tokenizer, wanted, (), print).rows
        (given.out / "rows.json").write_text(json.dumps(rows))
        asked = Perplexity(seq_len=HELD_OUT[1], max_rows=HELD_OUT[0], packing="documents")
        self.heldout = held_out(tokenizer, read_texts(given.heldout), asked).rows

    def keep(self, name: str, budget: str, model: Any, **own: Any) -> None:
        """Keep facts, with the held-out perplexity of a model."""
        from blockpruner.evaluation.perplexity import measure_perplexity

        own["perplexity"] = measure_perplexity(model, self.heldout).perplexity
        self.found.setdefault(name, {})[budget] = own
        self.file.write_text(json.dumps(self.found, indent=1))
        print(f"{name} {budget}: {own}", file=sys.stderr, flush=True)

    def peer(self, name: str) -> None:
        from blockpruner.core.blocks import parse_mask
        from blockpruner.core.families import count_parameters
        from blockpruner.model.models import prune_

        costs = count_parameters(json.loads((self.given.model / "config.json").read_text()))
        python, code = environment(name, self.given)
        once = name != "EvoPress"  # steps on the way to the larger budget answer the smaller one
        for budget in (
            each for each in (("0.2",) if once else LAYERS) if each not in self.found.get(name, {})
        ):
            with tempfile.TemporaryDirectory() as folder:
                model, rows = self.given.model.absolute(), self.given.out / "rows.json"
                command = [
                    python,
                    __file__,
                    "drive",
                    name,
                    code.absolute(),
                    folder,
                    budget,
                    model,
                    rows,
                ]
                _, steps = run(command)
            steps = [
                (costs.ratio(parse_mask(",".join(blocks))), blocks, stamp)
                for blocks, stamp in steps
            ]
            for wanted in LAYERS if once else (budget,):
                ratio, blocks, stamp = min(steps, key=lambda step: abs(step[0] - float(wanted)))
                own = dict(zip(("seconds", "cpu", "tokens"), stamp, strict=True))
                pruned = prune_(self.load(self.given.model), parse_mask(",".join(blocks)))
                self.keep(name, wanted, pruned, removed=ratio, **own)

    def ours(self, name: str) -> None:
        for budget in (each for each in LAYERS if each not in self.found.get(name, {})):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "blockpruner",
                    "prune",
                    self.given.model,
                    "--budget",
                    budget,
                    "--json",
                ]
                command += ["--texts", self.given.texts, "--seq-len", LENGTH, "--dtype", "bfloat16"]
                command += [
                    "--out",
                    f"{folder}/out",
                    "--cache",
                    f"{folder}/cache",
                    *OURS[name].split(),
                ]
                figures, done = run(command)
                tokens = sum(counts["tokens"] for counts in done["search"].values())
                model = self.load(Path(folder) / "out", trust_remote_code=True)
                self.keep(
                    name, budget, model, removed=done["plan"]["ratio"], tokens=tokens, **figures
                )


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw perplexity over seconds."""
    from matplotlib.figure import Figure

    dense = found["dense"]["0"]["perplexity"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, budget in zip(figure.subplots(1, 2), LAYERS, strict=True):
        for name, own in ((name, own[budget]) for name, own in found.items() if budget in own):
            peer, point = name in PEERS, (own["cpu"], own["perplexity"] / dense)
            axes.plot(*point, "o" if peer else "s", color=f"tab:{'gray' if peer else 'blue'}")
            side = {"ha": "right", "va": "bottom"} if peer else {"ha": "left", "va": "top"}
            words = name if peer or name.startswith("recommended") else f"ours, {name}"
            axes.annotate(
                words, point, (-5 if peer else 5, 0), textcoords="offset points", fontsize=7, **side
            )
        axes.set(
            xscale="log",
            xlabel="processor seconds",
            ylabel="perplexity, × dense",
            title=f"budget {budget}",
        )
        axes.margins(x=0.4, y=0.1)
    figure.savefig(out / "cpu.png", dpi=150)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["drive"]:
        *words, rows = arguments[1:]
        print("\n" + json.dumps(drive(*words, json.loads(Path(rows).read_text()))))
        return
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    for name in ("model", "texts", "heldout"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--only", nargs="*", default=[*OURS, *PEERS], help=", ".join([*OURS, *PEERS])
    )
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/peers"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    measured = Measured(given)
    if "dense" not in measured.found:
        measured.keep("dense", "0", measured.load(given.model))
    for name in given.only:
        (measured.peer if name in PEERS else measured.ours)(name)
    dense = measured.found["dense"]["0"]["perplexity"]
    print(
        "| | removed | seconds | of processors | tokens | perplexity, x dense"
        " |\n|---|---:|---:|---:|---:|---:|"
    )
    for budget in LAYERS:
        for name, f in (
            (name, own[budget]) for name, own in measured.found.items() if budget in own
        ):
            figures = " | ".join(f"{f[key]:,.0f}" for key in ("seconds", "cpu", "tokens"))
            print(f"| {name} | {f['removed']:.1%} | {figures} | {f['perplexity'] / dense:.2f} |")
    draw(measured.found, given.out)


if __name__ == "__main__":
    main(sys.argv[1:])
