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
        self.tokens = 0
        self.started = time.perf_counter()
        self.stamps = dict[str, Any]()

    def watch(self, model: Any) -> Any:
        def count(module: Any, inputs: Any, named: Any) -> None:
            # Some peers name the argument, some do not.
            token_ids = named["input_ids"] if "input_ids" in named else inputs[0]
            self.tokens += token_ids.numel()

        model.register_forward_pre_hook(count, with_kwargs=True)
        return model.eval()

    def print(self, *values: Any) -> None:
        self.stamps[" ".join(map(str, values))] = self.usage()

    def usage(self) -> tuple[float, float, int]:
        """Seconds, those of the processors, and tokens so far."""
        # Time of the processors does not count what else the machine was doing.
        return time.perf_counter() - self.started, time.process_time(), self.tokens


def blocks_of(removed: list[Any]) -> list[str]:
    """Names of blocks from numbers of layers, or from pairs of a kind and a layer."""
    names: dict[str, None] = {}
    for entry in removed:
        # A whole layer is both of its blocks.
        pairs = [entry] if isinstance(entry, tuple) else [("mha", entry), ("mlp", entry)]
        for kind, layer in pairs:
            names[f"{kind}.{layer}"] = None
    return list(names)


def drive(
    name: str, code: str, folder: str, budget: str, model: str, rows: list[list[int]]
) -> list[Any]:
    """Run a peer, in its environment, for a budget; returns what it removes at each step, and when
    it knew."""
    import torch
    import transformers

    sys.path[:0] = [code, f"{code}/src"]
    counter = Counter()
    # Every peer loads its model through this function, so its tokens can be counted.
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def load(*_: Any, **__: Any) -> Any:
        return counter.watch(from_pretrained(model, torch_dtype=torch.bfloat16, use_cache=False))

    keep_on_cpu(name)
    os.chdir(folder)
    DRIVERS[name](counter, load, torch.tensor(rows), LAYERS[budget], code, folder, model)
    steps = []
    for line, stamp in counter.stamps.items():
        # A line that ends in a list of layers or blocks is a step.
        if line.endswith("]"):
            removed = ast.literal_eval(line[line.index("[") :])
            steps.append((blocks_of(removed), stamp))
    return steps


def keep_on_cpu(name: str) -> None:
    """Peers move tensors to "cuda", and EvoPress refuses to run without it."""
    import torch

    to = torch.Tensor.to

    def to_cpu(self: Any, *arguments: Any, **options: Any) -> Any:
        devices = ["cpu" if argument == "cuda" else argument for argument in arguments]
        return to(self, *devices, **options)

    torch.Tensor.to = to_cpu
    torch.cuda.is_available = lambda: name == "EvoPress"


def layer_count(model: str) -> int:
    return int(json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"])


def drive_blockpruner(
    counter: Counter, load: Any, ids: Any, count: int, code: str, folder: str, model: str
) -> None:
    import block_search
    import torch

    # The official code prints each removal, and the printing tells when it knew.
    options = SimpleNamespace(
        block_type="mix",
        cal_dataset="own",
        cal_nsamples=ROWS,
        ppl_search_path=folder,
        del_block_num=5 * count // 2,
        model_path="model",
    )
    block_search.print = counter.print
    batches = []
    for batch in ids.split(8):
        batches.append({"input_ids": batch, "attention_mask": torch.ones_like(batch)})
    block_search.block_search_by_ppl(options, load(), batches)


def drive_sleb(
    counter: Counter, load: Any, ids: Any, count: int, code: str, folder: str, model: str
) -> None:
    import sleb
    import torch

    get_loss = sleb.get_loss

    def get_llm(_: str) -> Any:
        loaded = load()
        loaded.seqlen, loaded.name = LENGTH, "llama"
        return loaded

    sleb.get_llm = get_llm
    sleb.print = counter.print
    # All peers are calibrated on the same rows, whatever they would draw.
    sleb.get_trainloaders = lambda *_, **__: SimpleNamespace(input_ids=ids.reshape(1, -1))
    sleb.get_loss = lambda model, rows, bs, device: get_loss(model, rows, bs, torch.device("cpu"))
    sleb.sleb("llama", layer_count(model), count, eval_ppl=False, result_folder=folder)


def drive_shortened_llm(
    counter: Counter, load: Any, ids: Any, count: int, code: str, folder: str, model: str
) -> None:
    # It imports an old copy of peft, which only checkpoints of adapters need.
    for module in ("LLMPruner", "LLMPruner.peft"):
        sys.modules[module] = ModuleType(module)
    sys.modules["LLMPruner.peft"].PeftModel = None
    import dataset
    import utils

    get_pruned = utils.get_block_pruned_network
    dataset.get_examples = lambda **_: ids
    utils.get_model = lambda **_: (load(), None, "")
    utils.get_block_pruned_network = lambda *arguments, **options: counter.watch(
        get_pruned(*arguments, **options).bfloat16()
    )
    options = f" --device cpu --num_calib_data {ROWS} --output_dir {folder}/scores --use_bfloat"
    sys.argv = options.split(" ")
    runpy.run_path(f"{code}/src/anal_block_sensitivity_ppl.py", run_name="__main__")
    numbers = (Path(folder) / "scores/block_order.csv").read_text().split(",")
    order = [int(number) for number in numbers]
    for layers in LAYERS.values():
        counter.print(order[:layers])


def drive_evopress(
    counter: Counter, load: Any, ids: Any, count: int, code: str, folder: str, model: str
) -> None:
    import evo_drop_search

    evo_drop_search.AutoModelForCausalLM = SimpleNamespace(from_pretrained=load)
    evo_drop_search.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    evo_drop_search.get_data = lambda *_, **__: list(ids.split(1))
    layers = layer_count(model)
    # As many candidates as an exact search of blocks scores.
    scored = sum(2 * layers - step for step in range(5 * count // 2))
    tokens = ROWS * LENGTH
    options = (
        f" --model_name_or_path {model} --calibration_data own --calibration_tokens {tokens}"
        f" --no_eval --calibration_sequence_length {LENGTH}"
        f" --sparsity {(count + 0.5) / layers} --dtype bfloat16"
        f" --generations {scored // (CHILDREN + FINALISTS)} --offspring {CHILDREN}"
        f" --initially_generated 8 --initial_tokens {tokens} --survivors_per_selection 2 1"
        f" --tokens_per_selection {tokens} {tokens} --fitness_fn kl --drop_config_dir {folder}"
    )
    sys.argv = options.split(" ")
    evo_drop_search.main()
    kinds = {"attn+mlp": ("mha", "mlp"), "attn": ("mha",), "mlp": ("mlp",), "none": ()}
    lines = (Path(folder) / "layer_drop_config.txt").read_text().split()
    removed = []
    for layer, line in enumerate(lines):
        removed += [(kind, layer) for kind in kinds[line]]
    counter.print(removed)


DRIVERS = {
    "BlockPruner": drive_blockpruner,
    "SLEB": drive_sleb,
    "Shortened-LLM": drive_shortened_llm,
    "EvoPress": drive_evopress,
}
"""What runs each peer's program with its hard-coded device, rows and tokenizer replaced."""


def environment(peer: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """The Python of a peer's environment, and the folder of its code."""
    repository, commit, transformers = PEERS[peer]
    code = options.out / "code" / repository.partition("/")[2]
    env = options.out / "envs" / transformers
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
    started = time.perf_counter()
    cpu_started = os.times()
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    cpu_ended = os.times()
    user_seconds = cpu_ended.children_user - cpu_started.children_user
    system_seconds = cpu_ended.children_system - cpu_started.children_system
    seconds = {"seconds": time.perf_counter() - started, "cpu": user_seconds + system_seconds}
    last_line = done.stdout.strip().splitlines()[-1]
    return seconds, json.loads(last_line)


class Measured:
    """What is known of each contender, kept in a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        from blockpruner.evaluation.perplexity import held_out
        from blockpruner.evaluation.settings import Perplexity
        from blockpruner.inputs.calibration import draw_rows
        from blockpruner.inputs.settings import Calibration
        from blockpruner.inputs.texts import read_texts
        from blockpruner.inputs.tokenizers import load_tokenizer
        from blockpruner.model.models import load_model

        self.load = partial(load_model, dtype="bfloat16", device="cpu")
        self.options, self.file = options, options.out / "found.json"
        self.results: dict[str, Any] = {}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
        tokenizer = load_tokenizer(options.model)
        source = {"source": "path", "path": str(options.texts)}
        settings = Calibration(data=source, split="all", num_rows=ROWS, seq_len=LENGTH)
        rows = draw_rows(read_texts(options.texts), tokenizer, settings, (), print).rows
        (options.out / "rows.json").write_text(json.dumps(rows))
        max_rows, seq_len = HELD_OUT
        heldout_settings = Perplexity(seq_len=seq_len, max_rows=max_rows, packing="documents")
        self.heldout = held_out(tokenizer, read_texts(options.heldout), heldout_settings).rows

    def keep(self, name: str, budget: str, model: Any, **facts: Any) -> None:
        """Keep facts, with the held-out perplexity of a model."""
        from blockpruner.evaluation.perplexity import measure_perplexity

        facts["perplexity"] = measure_perplexity(model, self.heldout).perplexity
        self.results.setdefault(name, {})[budget] = facts
        self.file.write_text(json.dumps(self.results, indent=1))
        print(f"{name} {budget}: {facts}", file=sys.stderr, flush=True)

    def peer(self, name: str) -> None:
        from blockpruner.core.blocks import parse_mask
        from blockpruner.core.families import count_parameters
        from blockpruner.model.models import prune_

        costs = count_parameters(json.loads((self.options.model / "config.json").read_text()))
        python, code = environment(name, self.options)
        # Of a greedy search, a step on the way to the larger budget answers the smaller one.
        has_steps = name != "EvoPress"
        for budget in ("0.2",) if has_steps else LAYERS:
            if budget in self.results.get(name, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                model, rows = self.options.model.absolute(), self.options.out / "rows.json"
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
            for target in LAYERS if has_steps else (budget,):
                ratio, blocks, stamp = min(steps, key=lambda step: abs(step[0] - float(target)))
                facts = dict(zip(("seconds", "cpu", "tokens"), stamp, strict=True))
                pruned = prune_(self.load(self.options.model), parse_mask(",".join(blocks)))
                self.keep(name, target, pruned, removed=ratio, **facts)

    def ours(self, name: str) -> None:
        for budget in LAYERS:
            if budget in self.results.get(name, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "blockpruner",
                    "prune",
                    self.options.model,
                    "--budget",
                    budget,
                    "--json",
                ]
                command += [
                    "--texts",
                    self.options.texts,
                    "--seq-len",
                    LENGTH,
                    "--dtype",
                    "bfloat16",
                ]
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


def draw(results: dict[str, Any], out: Path) -> None:
    """Draw perplexity over seconds."""
    from matplotlib.figure import Figure

    dense = results["dense"]["0"]["perplexity"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, budget in zip(figure.subplots(1, 2), LAYERS, strict=True):
        for name, facts_by_budget in results.items():
            if budget not in facts_by_budget:
                continue
            facts = facts_by_budget[budget]
            peer, point = name in PEERS, (facts["cpu"], facts["perplexity"] / dense)
            axes.plot(*point, "o" if peer else "s", color=f"tab:{'gray' if peer else 'blue'}")
            side = {"ha": "right", "va": "bottom"} if peer else {"ha": "left", "va": "top"}
            label = name if peer or name.startswith("recommended") else f"ours, {name}"
            axes.annotate(
                label, point, (-5 if peer else 5, 0), textcoords="offset points", fontsize=7, **side
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
        *texts, rows = arguments[1:]
        print("\n" + json.dumps(drive(*texts, json.loads(Path(rows).read_text()))))
        return
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    for name in ("model", "texts", "heldout"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--only", nargs="*", default=[*OURS, *PEERS], help=", ".join([*OURS, *PEERS])
    )
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/peers"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    measured = Measured(options)
    if "dense" not in measured.results:
        measured.keep("dense", "0", measured.load(options.model))
    for name in options.only:
        (measured.peer if name in PEERS else measured.ours)(name)
    dense = measured.results["dense"]["0"]["perplexity"]
    print(
        "| | removed | seconds | of processors | tokens | perplexity, x dense"
        " |\n|---|---:|---:|---:|---:|---:|"
    )
    for budget in LAYERS:
        for name, facts_by_budget in measured.results.items():
            if budget not in facts_by_budget:
                continue
            facts = facts_by_budget[budget]
            figures = " | ".join(f"{facts[key]:,.0f}" for key in ("seconds", "cpu", "tokens"))
            ratio = facts["perplexity"] / dense
            print(f"| {name} | {facts['removed']:.1%} | {figures} | {ratio:.2f} |")
    draw(measured.results, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
