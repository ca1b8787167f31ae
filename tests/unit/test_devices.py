"""What runs on a GPU, on two devices that do not exist (`tests/fake_devices.py`): nothing meets that lies on different
devices, numbers are the CPU's, memory is what the memory model says, and where it ends, work goes on in smaller pieces.

The CPU's numbers are held against oracles elsewhere. A made-up device computes by the same kernels, so only what is
moved where can make a difference.
"""

import copy
import gc
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

from benchmarks import memory, parity
from benchmarks.scoring import Meter, full_forward, matrix_rate
from blockpruner.checkpoints import gguf, nas, packing
from blockpruner.checkpoints.hf import export_hf, save_pruned
from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.checkpoints.verification import in_float32, reference_outputs
from blockpruner.core.blocks import DENSE, all_blocks, parse_mask
from blockpruner.core.budgets import parse_budget
from blockpruner.core.errors import DeviceMemoryError, InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import HubTexts
from blockpruner.evaluation import choices
from blockpruner.evaluation.choices import answers
from blockpruner.evaluation.latency import measure_latency
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.evaluation.settings import Speed
from blockpruner.evaluation.speed import generate, measure_speed, random_prompt
from blockpruner.healing import train as train_module
from blockpruner.healing.compensate import compensate
from blockpruner.healing.loss import TrainingLoss
from blockpruner.healing.settings import Train
from blockpruner.healing.trainer import _batch, train_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import changed_weights, load_healed_, parameter_digests
from blockpruner.methods.laco.merging import ModelBench
from blockpruner.methods.laco.walk import Merge
from blockpruner.methods.slicegpt.kind import SLICEGPT, plan_width
from blockpruner.methods.slicegpt.slicing import slice_
from blockpruner.methods.slicegpt.widths import SLICEABLE
from blockpruner.model import accelerator, models
from blockpruner.model.models import load_model, prune_, resolve_device, shared_copy
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large import streaming
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.settings import Latency
from blockpruner.scoring.work import Task, live_numbers
from blockpruner.store.files import read_json
from blockpruner.store.locks import this_process
from tests import fake_devices as made_up
from tests.fake_devices import MODULE, SETUP, attention_without_scores, fake_devices
from tests.golden import unverified
from tests.plans import fetch_tiny, healed_of, plan_of, pruning
from tests.tiny import GRID, VARIANTS, VOCABULARY, tiny_model, tiny_tokenizer, tolerance

pytestmark = pytest.mark.skipif(SETUP is None, reason=f"torch {torch.__version__} has no devices written in Python")

ROWS = [tuple(range(1, 10)), tuple(range(3, 12)), (5, 6, 7), (9, 8, 7, 100, 4)]
LONG = CalibrationSet(tuple(tuple((7 * r + 3 * k) % 250 + 1 for k in range(16)) for r in range(6)))
MASK = parse_mask("mlp.0")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Weights are read in this thread, where the devices are; locks are this test's."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    logging.disable_progress_bar()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "locks"))
    release()
    yield
    release()
    logging.enable_progress_bar()


def release():
    """As if this process ended."""
    accelerator._CLAIMS.close()
    accelerator._MINE.clear()
    for kept in (accelerator.own, accelerator.claim):
        kept.cache_clear()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directory of each tiny model, float64."""
    folder = tmp_path_factory.mktemp("models")

    def directory(variant):
        found = folder / variant
        if not found.exists():
            tied = {"tie_word_embeddings": True} if variant == "tied" else {}
            tiny_model("llama" if tied else variant, 2, **tied).save_pretrained(found)
        return found

    return directory


def scored(metric):
    masks = [mask for mask in (DENSE, *(frozenset({block}) for block in all_blocks(2))) if mask or not metric.influence]

    def losses(model):
        units = Engine(model, 20).run([Task(range(4), tuple(masks), metric)], ROWS)
        return sorted((str(sorted(map(str, unit.mask))), list(unit.span), unit.loss) for unit in units)

    return losses


def compensated(method):
    def change(model):
        found = compensate(
            model, plan_of(model.config.to_dict(), ["mha.1", "mlp.0"]), LONG, 2, method, SilentObserver()
        )
        return [*found.report["perplexity"].values(), *(weight.sum().item() for weight in found.weights.values())]

    return change


def merged(model):
    bench, merges = ModelBench(model, ROWS, lambda *step: None), (Merge(0, 1),)
    return [
        [bench.similarity(variant, {}, lambda *found: None)(merges), bench.merged_nll(merges, variant)]
        for variant in ("repo", "paper")
    ]


def recipe(**changes):
    given = {"rank": 2, "distill": 0.5, "learning_rate": 1e-3, "batch": 2, "accumulation": 1}
    return Train(data=HubTexts(source="hub", repo="a/b"), **given | changes)


def distance(model):
    """What training minimises, of the pruned model and the dense one: without a gradient, on one device or on two."""
    student = prune_(copy.deepcopy(model), MASK)
    with torch.no_grad():
        return [each.item() for each in TrainingLoss(student, model, recipe())(**_batch(ROWS), count=len(ROWS))]


WORK = {f"score {name}": scored(metric) for name, metric in METRICS.items()}
WORK |= {f"compensate {method}": compensated(method) for method in ("map", "refit")}
OFTEN = ("llama", "gemma2", "gpt_neox", "mixtral", "baichuan")
"""Variants that differ most in what a device must be told; the others are tried by `make test-slow`."""

WORK |= {
    "perplexity": lambda model: measure_perplexity(model, ROWS).row_nll,
    "decode": lambda model: generate(model, random_prompt(model, 2, 5), 6).tokens.tolist(),
    "generate": lambda model: model.generate(random_prompt(model, 2, 5), max_new_tokens=5, do_sample=False).tolist(),
    "answers": lambda model: answers(
        model, [((*range(1, 20),), (4, 5)), ((*range(1, 20),), (6, 7, 9)), ((3, 4), (8,))], 60
    ),
    "latency": lambda model: measure_latency(model, Latency(prompt_tokens=4, new_tokens=3, repeats=1))["batch"],
    "laco": merged,
    "distance": distance,
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in VARIANTS]
)
def test_numbers_are_those_of_the_cpu(variant, checkpoints):
    dense, limit, refused = checkpoints(variant), tolerance(variant), []
    for name, work in WORK.items():
        try:
            expected = work(load_model(dense, "float64", "cpu"))
        except InputError as error:  # what the family cannot be asked for, wherever it is
            refused.append(f"{name}: {error}")
            continue
        # on two devices there is all that goes wrong on one; torch takes no gradient over two made-up ones
        one = {"auto": {0}} if name == "score taylor" or variant == "llama" else {}
        for place, indices in (one | ({} if name == "score taylor" else {"split": {0, 1}})).items():
            with fake_devices():
                model = load_model(dense, "float64", place)
                assert {weight.device.index for weight in model.parameters()} == indices
                found = work(model)
            assert flat(found) == pytest.approx(flat(expected), rel=limit, abs=limit), (name, place)
    assert len(refused) <= 1, refused


def flat(value):
    if isinstance(value, list | tuple):
        return [number for item in value for number in flat(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("variant", SLICEABLE)
def test_slicing_runs_on_a_device(variant, checkpoints):
    """Eigenvectors have a sign of their own, and the perplexity does not depend on it."""
    expected = measure_perplexity(slice_(load_model(checkpoints(variant), "float64", "cpu"), ROWS, 24), ROWS)
    with fake_devices():
        found = measure_perplexity(slice_(load_model(checkpoints(variant), "float64"), ROWS, 24), ROWS)
    assert found.row_nll == pytest.approx(expected.row_nll, rel=1e-8)


@pytest.mark.parametrize(("weights", "dtype"), [("lora", "float32"), ("lora", "float16"), ("all", "float32")])
def test_a_student_whose_weights_are_frozen_shares_them_with_its_teacher(weights, dtype, tmp_path, monkeypatch):
    """The oracle: the same training of two models that have nothing in common."""
    dense, rows = fetch_tiny(tmp_path, layers=3), CalibrationSet(tuple(ROWS))
    plan, wanted, met = plan_of(dense, ["mlp.1"]), recipe(weights=weights, learning_rate=0.01, seq_len=16), []
    more = {"validation": None, "observer": SilentObserver()}
    start = healed_of(dense, plan, tmp_path / "healed", {"model.norm.weight": torch.full((32,), 1.5)})

    def seen(model, *rest, teacher, **others):
        own = {id(weight) for weight in teacher.parameters()}
        met.append({name for name, weight in model.named_parameters() if id(weight) in own})
        return train_(model, *rest, teacher=teacher, **others)

    monkeypatch.setattr(train_module, "train_", seen)
    job = replace(
        pruning(dense, plan, dtype), device="cpu", healed=replace(start, of=pruning(dense, plan, dtype).identity)
    )
    found, _ = train_module.train(job, wanted, rows, states=tmp_path / "states", **more)
    found = {name: weight.cpu() for name, weight in found.items()}
    student, teacher = prune_(load_model(dense, dtype, "cpu"), plan.mask), load_model(dense, dtype, "cpu")
    before = parameter_digests(student)
    load_healed_(student, start.path)
    by_hand = train_(
        student, rows, wanted, teacher=teacher, states=tmp_path / "by hand", **more,
    )  # fmt: skip
    expected = {name: weight.cpu() for name, weight in changed_weights(by_hand.model, before, plan).items()}
    shares = weights == "lora" and dtype != "float16"
    assert met == [before.keys() - {"model.norm.weight"} if shares else set()]
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("variant", GRID)
def test_streaming_runs_on_a_device(variant, checkpoints):
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")), METRICS["js"])]
    expected = list(StreamingEngine(checkpoints(variant), "float64", device="cpu").run(tasks, ROWS))
    with fake_devices():
        found = list(StreamingEngine(checkpoints(variant), "float64").run(tasks, ROWS))
    assert [unit.mask for unit in found] == [unit.mask for unit in expected]
    assert flat([unit.loss for unit in found]) == pytest.approx(flat([unit.loss for unit in expected]), rel=1e-9)


ASKS = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
}  # fmt: skip


@pytest.mark.parametrize("metric", ["perplexity", "js"])
def test_candidates_ask_a_device_for_no_number(metric, checkpoints, monkeypatch):
    """It would have to be done before the answer comes. Rows are of different lengths; the first task is dense."""
    asked, run = [], made_up.run

    def watched(func, args, kwargs):
        indices = args[1] if func.__name__.startswith("index") and isinstance(args[1], list | tuple) else ()
        if func in ASKS or any(index is not None and index.dtype is torch.bool for index in indices):
            asked.append(func)
        return run(func, args, kwargs)

    with fake_devices(1):
        engine = Engine(load_model(checkpoints("llama"), "float64"), 40)
        prepare = engine._prepare
        monkeypatch.setattr(engine, "_prepare", lambda *given: (prepare(*given), asked.clear())[0])
        monkeypatch.setattr(made_up, "run", watched)
        units = list(engine.run([Task(range(4), (DENSE, MASK), METRICS[metric])], ROWS))
        assert len(units) == 2 and not asked
        (torch.ones(2, device="gpu:0") > 0).nonzero()
        assert len(asked) == 1


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_streamed_weights_arrive_before_they_are_used_and_after_others_are_done(variant, tmp_path, monkeypatch):
    """Copies are as late as they may be."""
    tiny_model(variant, 4, torch.bfloat16).save_pretrained(tmp_path)
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")))]
    with fake_devices(1):
        expected = list(Engine(load_model(tmp_path, "float32"), 40).run(tasks, ROWS))
        engine, streams = StreamingEngine(tmp_path, "float32"), []
        monkeypatch.setattr(MODULE, "set_stream", lambda s: streams.append(s) or setattr(MODULE.streams, "own", s))
        found = list(engine.run(tasks, ROWS))
    assert sorted(map(str, found)) == sorted(map(str, expected))
    stream, *of_tiles = streams
    assert not any(each.late for each in of_tiles)
    # a group waits until that which was in its slab is dropped
    assert len(stream.waited) == len(engine._groups(DENSE)) and not stream.late
    assert all(event.stream is MODULE.main for event in stream.waited)


@pytest.mark.parametrize(("room", "places"), [(None, (9, 0)), (4, (4, 5)), (0, (0, 9))])
def test_tiles_are_on_the_device_first(room, places, tmp_path, monkeypatch):
    tiny_model("llama", 4).save_pretrained(tmp_path)
    rows, masks = [tuple(range(r, r + 32)) for r in range(4)], (DENSE, *(frozenset({block}) for block in all_blocks(4)))
    tasks = [Task(range(4), masks)]
    expected = {unit.mask: unit.loss for unit in Engine(load_model(tmp_path, "float64", "cpu"), 128).run(tasks, rows)}
    with fake_devices(1):
        tile = 4 * 32 * 32 * 8
        engine = StreamingEngine(tmp_path, "float64", batch_tokens=128)
        monkeypatch.setattr(accelerator, "free_memory", lambda device: 10**9 if room is None else 2 * (room * tile + 9))
        monkeypatch.setattr(streaming.PassPlan, "check", lambda plan: None)
        found = {unit.mask: unit.loss for unit in engine.run(tasks, rows)}
        plan = engine.plan
    assert found.keys() == expected.keys()
    assert [found[mask] for mask in masks] == [pytest.approx(expected[mask], rel=1e-9) for mask in masks]
    on_device = min(plan.tiles, plan.device_room)
    assert (on_device, plan.tiles - on_device) == places


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cuda", "split"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_on_a_real_device(variant, place, checkpoints):
    for name, work in WORK.items():
        try:
            expected = work(load_model(checkpoints(variant), "float64", "cpu"))
        except InputError:
            continue
        found = work(load_model(checkpoints(variant), "float64", place))
        assert flat(found) == pytest.approx(flat(expected), rel=1e-5, abs=1e-5), name


def test_these_tests_see_no_real_device():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_devices_are_named_by_the_settings():
    with fake_devices():
        assert resolve_device("cpu") == torch.device("cpu")
        assert resolve_device("split") == resolve_device("gpu") == torch.device("gpu:0")
        assert resolve_device("gpu:1") == torch.device("gpu:1")
        assert accelerator.name(torch.device("gpu:1")) == "Made-up Card"
        assert accelerator.name(torch.device("cpu")) == "cpu"
        with pytest.raises(InputError, match=r"'gpu:2' is not here: 2 CUDA devices; use auto$"):
            resolve_device("gpu:2")
    assert resolve_device("auto") == torch.device("cpu") and accelerator.devices() == []
    for device in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match="is not here: 0 CUDA devices"):
            resolve_device(device)
    for device in ("tpu", "meta", "mps", "gpu"):
        with pytest.raises(InputError, match="is unknown; valid: auto, cpu, cuda, cuda:<n>, split$"):
            resolve_device(device)
    with pytest.raises(InputError, match="needs CUDA devices, and there is none here"):
        resolve_device("split")


HOLDER = """
import sys
from pathlib import Path
from blockpruner.store.locks import hold
with hold(Path(sys.argv[1]), "process 1 on node7", print):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_holds(*cards):
    """Within, other processes hold the locks of these cards."""
    with ExitStack() as stack:
        for card in cards:
            command = [sys.executable, "-c", HOLDER, str(accelerator._locks() / f"made-up-{card}.lock")]
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert process.stdout.readline() == b"held\n"
        yield


@pytest.mark.parametrize(
    ("held", "chosen", "said"),
    [
        ((), 0, "gpu:0 (Made-up Card)"),
        ((0,), 1, "gpu:1 (Made-up Card)"),
        ((0, 1), 0, "gpu:0 (Made-up Card), shared with process 1 on node7"),
    ],
)
def test_auto_takes_a_device_that_no_other_process_holds_and_says_which(held, chosen, said, capsys):
    with fake_devices(), another_holds(*held):
        assert resolve_device("auto") == resolve_device("auto") == torch.device("gpu", chosen)
        assert capsys.readouterr().err == f"runtime.device auto: {said}\n"
        mine = [path.name for path in accelerator._locks().iterdir() if path.read_text() == f"{this_process()}\n"]
        assert mine == ([] if chosen in held else [f"made-up-{chosen}.lock"])


def test_an_only_device_is_taken_without_words(capsys):
    with fake_devices(1):
        assert resolve_device("auto") == torch.device("gpu:0")
    assert capsys.readouterr().err == ""


def test_devices_are_taken_without_locks_where_there_is_no_place_for_them(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with fake_devices():
        assert resolve_device("auto") == torch.device("gpu:0")


def test_a_split_that_cannot_fit_is_refused_before_a_weight_is_read(checkpoints):
    weights = sum(weight.nbytes for weight in tiny_model("llama", 2).parameters())
    with fake_devices() as cards:
        for card in cards:
            card.limit = card.live + weights // 3
        with pytest.raises(DeviceMemoryError, match="does not fit into the memory of runtime.device 'split'"):
            load_model(checkpoints("llama"), "float64", "split")
        assert [card.peak - card.live for card in cards] == [0, 0]


def test_a_split_needs_accelerate_and_says_so(checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with (
        fake_devices(),
        pytest.raises(InputError, match="needs the package accelerate; pip install 'blockp"),
    ):
        load_model(checkpoints("llama"), "float64", "split")


def test_a_model_that_does_not_fit_is_one_line(checkpoints):
    with fake_devices() as cards:
        cards[0].limit = cards[0].live + 1000
        with pytest.raises(DeviceMemoryError, match="does not fit into the memory of runtime.device 'auto'"):
            load_model(checkpoints("llama"), "float64")


@pytest.mark.parametrize("has_accelerate", [True, False])
def test_weights_go_straight_to_their_device(has_accelerate, checkpoints, monkeypatch):
    moved, move = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to, **how: moved.append(to) or move(self, *to, **how))
    monkeypatch.setattr(models, "find_spec", lambda name: has_accelerate or None)
    with fake_devices(1):
        model = load_model(checkpoints("llama"), "float64")
        assert {weight.device for weight in model.parameters()} == {torch.device("gpu:0")}
    assert bool(moved) is not has_accelerate


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "mixtral", "tied"])
def test_a_model_beside_another_takes_memory_for_what_differs_alone(variant, checkpoints, tmp_path):
    folder = checkpoints(variant)
    dense = load_model(folder, "float64", "cpu")
    pruned, counted = prune_(load_model(folder, "float64", "cpu"), MASK), dense.num_parameters()
    with torch.no_grad():
        changed = next(w for name, w in pruned.named_parameters() if w.dim() == 2 and "layers.1." in name)
        changed[-1, -1] += 1
    save_pruned(pruned, tmp_path / "pruned")
    more = 8 * (counted - pruned.num_parameters() + changed.numel()) + sum(b.nbytes for b in dense.buffers())
    for first, second, expected in (("pruned", "dense", dense), ("dense", "pruned", pruned)):
        places = {"pruned": tmp_path / "pruned", "dense": folder}
        with fake_devices(1) as (card,):
            one = load_model(places[first], "float64", trust_remote_code=first == "pruned")
            gc.collect()
            before = card.live
            other = load_model(places[second], "float64", "auto", second == "pruned", beside=one)
            gc.collect()
            wanted = more if second == "dense" else 8 * changed.numel() + sum(b.nbytes for b in pruned.buffers())
            assert card.live - before == wanted
            assert {weight.device for weight in (*other.parameters(), *other.buffers())} == {torch.device("gpu:0")}
            found = {name: weight.cpu() for name, weight in other.state_dict().items()}
            assert other(input_ids=torch.tensor([ROWS[0]], device="gpu:0")).logits.isfinite().all()
            del one, other
        assert found.keys() == expected.state_dict().keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.state_dict().items())


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert accelerator.is_out_of_memory(error) is is_one


def test_peak_memory_is_a_models_own_though_two_share_weights(checkpoints):
    asked, alone = Speed(prompt_tokens=8, new_tokens=4, repeats=1, batch=2), {}
    for name in ("dense", "pruned"):
        gc.collect()
        with fake_devices(1) as (card,):
            before, model = card.live, load_model(checkpoints("llama"), "float64")
            model = prune_(model, MASK) if name == "pruned" else model
            gc.collect()
            alone[name] = measure_speed({name: model}, asked)[name].peak_memory_bytes - before
            del model
    gc.collect()
    with fake_devices(1) as (card,):
        before, dense = card.live, load_model(checkpoints("llama"), "float64")
        found = measure_speed({"pruned": prune_(shared_copy(dense), MASK), "dense": dense}, asked)
    prompt = 2 * 8 * 8  # the other model's
    for name, speed in found.items():
        assert speed.peak_memory == "allocated"
        assert speed.peak_memory_bytes - before - prompt == alone[name]
        assert alone[name] > speed.weight_bytes + speed.kv_cache_bytes


EQUAL = [tuple((7 * r + 3 * k) % 250 + 1 for k in range(32)) for r in range(8)]


def sweep(model, batch_tokens):
    engine = Engine(model, batch_tokens)
    tasks = [
        Task(span, (DENSE, *(frozenset({b}) for b in all_blocks(2)))) for span in engine.row_batches(EQUAL, range(8))
    ]
    return engine, engine.run(tasks, EQUAL)


@pytest.mark.parametrize("rows", [2, 8])
def test_a_batch_takes_no_more_memory_than_the_model_of_it_says(rows, monkeypatch):
    """In bfloat16, with widths in Llama's proportions; at tiny widths what is not a state counts for more."""
    monkeypatch.setattr("blockpruner.scoring.work.LOGITS_BYTES", 16 * VOCABULARY * 4)
    gc.collect()
    with fake_devices(1) as (card,):
        model = tiny_model("llama", 2, torch.bfloat16, hidden_size=256, intermediate_size=688).to("gpu:0")
        MODULE.reset_peak_memory_stats(0)
        before = card.live
        list(sweep(model, rows * 32)[1])
    said = live_numbers(256, 688) * rows * 32 * 2
    assert said / 3 < card.peak - before <= said + 4 * 16 * VOCABULARY * 4


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_where_memory_ends_batches_are_halved_and_finished_masks_kept(variant, checkpoints):
    expected = {(unit.mask, row): loss
                for unit in sweep(load_model(checkpoints(variant), "float64", "cpu"), 256)[1]
                for row, loss in zip(unit.span, unit.loss, strict=True)}  # fmt: skip
    with fake_devices(1) as (card,):
        model, peaks = load_model(checkpoints(variant), "float64"), {}
        for tokens in (64, 256):
            gc.collect()
            MODULE.reset_peak_memory_stats(0)
            list(sweep(model, tokens)[1])
            peaks[tokens] = card.peak
        for share in (0.2, 0.6, 0.95):  # of the way from what two rows need to what eight need
            gc.collect()
            card.limit = int(peaks[64] + share * (peaks[256] - peaks[64]))
            MODULE.reset_peak_memory_stats(0)
            engine, units = sweep(model, 256)
            found = [((u.mask, row), loss) for u in units for row, loss in zip(u.span, u.loss, strict=True)]
            assert len(found) == len(dict(found)) and dict(found) == pytest.approx(expected, rel=1e-9)
            assert card.peak <= card.limit and max(map(len, engine.row_batches(EQUAL, range(8)))) < 8
        card.limit = card.live + 1000
        with pytest.raises(DeviceMemoryError, match=r"^one row of 32 tokens does not fit .*\(CUDA out of memory\)"):
            list(sweep(model, 256)[1])


REQUESTS = [((n, *range(1, 24)), (k + 5, n + 9, 7)) for n in range(24) for k in range(2)]
REQUESTS += [((100 + n, 3, 4), (8, n + 1)) for n in range(8)]


def answered(model, requests=REQUESTS):
    """Answers, the tokens that each pass read, and how many requests were done after each."""
    read, done = [], []
    hook = model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, result: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with hook:
        return answers(model, requests, 60, done.append), read, done


def test_a_device_answers_in_larger_passes_and_where_memory_ends_in_halves(checkpoints, monkeypatch):
    expected, read, _ = answered(load_model(checkpoints("llama"), "float64", "cpu"))
    assert read == [22 * 23, 44 * 3, 2 * 23, 4 * 3, 8 * 4]
    with fake_devices(1) as (card,):
        model = load_model(checkpoints("llama"), "float64")
        gc.collect()
        MODULE.reset_peak_memory_stats(0)
        before = card.live
        found, read, _ = answered(model)
        assert read == [24 * 23, 48 * 3, 8 * 4] and flat(found) == pytest.approx(flat(expected), rel=1e-9)
        needed = card.peak - before
        for share in (0.9, 0.3):
            gc.collect()
            card.limit = before + int(share * needed)
            MODULE.reset_peak_memory_stats(0)
            found, smaller, done = answered(model)
            assert flat(found) == pytest.approx(flat(expected), rel=1e-9) and card.peak <= card.limit
            assert len(smaller) > len(read) and done == sorted(set(done)), "an answer was computed twice"
        monkeypatch.setattr(choices, "DEVICE_TOKENS", 26 * 20)  # a row has 23 common tokens in the cache and 3 more
        card.limit = made_up.TOTAL
        assert answered(model)[1][1] == 20 * 3
        card.limit = card.live + 1000
        with pytest.raises(DeviceMemoryError, match=r"^one request of up to 27 tokens .*\(CUDA out of memory\)"):
            answered(model)


def test_perplexity_has_larger_chunks_of_logits_on_a_device_and_a_row_that_does_not_fit_is_one_line(
    checkpoints, monkeypatch
):
    monkeypatch.setattr("blockpruner.scoring.work.LOGITS_BYTES", 16 * VOCABULARY * 4)
    for place, calls in (("cpu", 2), ("auto", 1)):
        with fake_devices(1) as (card,):
            model, heads = load_model(checkpoints("llama"), "float64", place), []
            model.get_output_embeddings().register_forward_hook(lambda *call, heads=heads: heads.append(call))
            measure_perplexity(model, EQUAL[:1])
            assert len(heads) == calls
            heads.clear()
            gc.collect()
            card.limit = card.live + 1000
            if place == "auto":
                with pytest.raises(DeviceMemoryError, match=r"one row of 32 tokens does not fit .*; lower its seq_len"):
                    measure_perplexity(model, EQUAL)


def test_where_memory_ends_fewer_texts_are_generated_at_once(checkpoints):
    """Texts end at a letter or a token, each at its own place, and parts where the last of their texts does."""
    from lm_eval.api.instance import Instance  # takes seconds

    from blockpruner.evaluation import zero_shot

    how = {"max_gen_toks": 12, "do_sample": False}

    def generated(model, until, end=None):
        done, model.generation_config.eos_token_id = [], end
        harness = zero_shot._Harness(
            lambda *step: done.append(step), pretrained=model, tokenizer=tiny_tokenizer(), batch_size=8,
        )  # fmt: skip
        arguments = [(f"{n}: {'ab' * n}", how | {"until": until}) for n in range(8)]
        requests = [Instance("generate_until", {}, each, number) for number, each in enumerate(arguments)]
        return harness.generate_until(requests), [step[0] for step in done]

    dense = load_model(checkpoints("llama"), "float64", "cpu")
    whole, _ = generated(dense, ["\0"])
    until, last = [letter for letter in "".join(whole) if letter.isascii() and letter.isalnum()][:2]
    how_to_end = ([until], tiny_tokenizer()(last)["input_ids"][-1])
    expected, done = generated(dense, *how_to_end)
    assert done == [8] and len({len(text) for text in expected}) > 2
    assert any(text.endswith(last) for text in expected)
    with fake_devices(1) as (card,):
        model = load_model(checkpoints("llama"), "float64")
        gc.collect()
        MODULE.reset_peak_memory_stats(0)
        before = card.live
        assert generated(model, *how_to_end) == (expected, [8])
        needed = card.peak - before
        gc.collect()
        card.limit = before + int(0.2 * needed)
        assert generated(model, *how_to_end) == (expected, [1, 2, 3, 4, 5, 6, 7, 8])
        card.limit = card.live + 1000
        with pytest.raises(torch.OutOfMemoryError):  # which `suite` words
            generated(model, *how_to_end)


@pytest.mark.parametrize("what", ["score", "perplexity"])
def test_memory_is_the_same_where_tensors_have_no_values(what, monkeypatch):
    """By which the memory of models is known that are in no memory (`benchmarks.memory`)."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_without_scores)
    peaks = []
    for hollow in (False, True):
        with fake_devices(1, hollow) as (card,):
            model = tiny_model("llama", 2, torch.bfloat16).to("gpu:0")
            gc.collect()
            MODULE.reset_peak_memory_stats(0)
            before = card.live
            if what == "score":
                list(sweep(model, 64)[1])
            else:
                measure_perplexity(model, EQUAL)
            peaks.append(card.peak - before)
            del model
        gc.collect()
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02) and peaks[0] > 0


def test_the_memory_of_every_part_of_the_work_is_found():
    """Each holds a model at least."""
    config = memory.MODELS["tiny"]
    rows = memory.random_rows(config["vocab_size"], 4, 32)
    with fake_devices(1, hollow=True) as (card,):
        size = memory.peak(card, lambda: memory.random_model("tiny", torch.bfloat16, "gpu:0"))
        found = {title: memory.peak(card, work) for title, work in memory.parts("tiny", rows).items()}
    assert min(found.values()) >= size > 0
    assert found["train: LoRA, distilled"] > found["train: LoRA"]
    assert found["benchmark: speed"] < found["benchmark: speed, refitted"] < found["benchmark: speed, trained"]


def test_training_that_does_not_fit_is_one_line(checkpoints, tmp_path):
    with fake_devices(1) as (card,):
        student, rows = prune_(load_model(checkpoints("llama"), "float64"), MASK), CalibrationSet(tuple(EQUAL))
        card.limit = card.live + 40_000
        with pytest.raises(DeviceMemoryError, match=r"training on 2 rows of up to 32 tokens .* lower train.batch"):
            train_(student, rows, recipe(distill=0.0), teacher=None, validation=None, states=tmp_path,
                   observer=SilentObserver())  # fmt: skip


@pytest.mark.parametrize("form", ["hf", "nas", "gguf"])
def test_an_export_takes_no_memory_of_a_device(form, tmp_path, in_process):
    """And it holds the weights that it holds without a device."""
    dense, files = fetch_tiny(tmp_path, layers=3), {}
    plan = plan_of(dense, ["mha.1", "mlp.2"])
    for device in ("cpu", "auto"):
        with fake_devices() as cards, unverified():
            before = [card.live for card in cards]
            EXPORTS[form].write(replace(pruning(dense, plan), device=device), tmp_path / device)
            assert [card.peak for card in cards] == before
        files[device] = {path.name: path.read_bytes() for path in (tmp_path / device).iterdir()
                         if path.suffix in (".safetensors", ".gguf")}  # fmt: skip
    assert files["cpu"] == files["auto"] != {}


@pytest.mark.parametrize("form", ["nas", "gguf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_says_what_the_whole_model_in_float32_would(form, dtype, tmp_path, monkeypatch):
    """To the byte: files, and what they are verified by. The first MLP is folded into the embedding."""
    dense = fetch_tiny(tmp_path, layers=3, dtype=dtype, tie_word_embeddings=True)
    job, module = pruning(dense, plan_of(dense, ["mha.0", "mlp.2"]), dtype), {"nas": nas, "gguf": gguf}[form]
    references, refer, load, found = [], module.reference_outputs, Pruning.load_for_export, []

    def outputs(model, plan):
        references.append((refer(model, plan), {weight.dtype for weight in model.parameters()}))
        return references[-1][0]

    monkeypatch.setattr(module, "reference_outputs", outputs)
    for name in ("narrow", "wide"):
        with unverified():
            EXPORTS[form].write(job, tmp_path / name)
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        monkeypatch.setattr(Pruning, "load_for_export", lambda pruning: load(pruning).float())
        for each in (module, packing):
            monkeypatch.setattr(each, "in_float32", lambda *models: nullcontext())
    (narrow, narrow_dtypes), (wide, wide_dtypes) = references
    assert found[0] == found[1] and narrow_dtypes == {getattr(torch, dtype)} != wide_dtypes == {torch.float32}
    assert narrow.keys() == wide.keys() and all(torch.equal(narrow[name], wide[name]) for name in wide)
    assert narrow["logits"].dtype is torch.float32


def test_a_reference_in_float32_takes_a_weight_at_a_time():
    with fake_devices(1) as (card,):
        model = tiny_model("llama", 4, torch.bfloat16, hidden_size=256, intermediate_size=688).to("gpu:0")
        own, size, before = dict(model.named_parameters()), sum(w.nbytes for w in model.parameters()), card.live
        MODULE.reset_peak_memory_stats(0)
        with in_float32(model):
            reference_outputs(model, plan_of(model.config.to_dict(), ["mlp.0"]))
        assert card.peak - before < size / 2
        assert all(weight is own[name] for name, weight in model.named_parameters())
        assert not any("forward" in vars(module) for module in model.modules())


def test_slices_are_computed_on_the_device_and_exported_from_the_cpu(tmp_path):
    dense = fetch_tiny(tmp_path, layers=2, dtype="float32")
    job = SimpleNamespace(material=SimpleNamespace(config=read_json(dense / "config.json")))
    details = plan_width(parse_budget("0.2", 1), SLICEGPT.options(), job)
    plan = replace(plan_of(dense, ["mha.0"]), kind="slicegpt", method="slicegpt", details=details)
    with fake_devices(1) as (card,), unverified():
        export_hf(replace(pruning(dense, plan, rows=EQUAL), device="auto"), tmp_path / "out")
        assert card.peak > 0
    assert load_model(tmp_path / "out", "float32", "cpu", True).config.sliced_width == details["width"]


def test_benchmarks_run_on_a_device(checkpoints):
    model = load_model(checkpoints("llama"), "float64", "cpu")
    expected = parity.oracle(model, MASK, EQUAL)
    with fake_devices(1):
        model = load_model(checkpoints("llama"), "float64")
        assert parity.oracle(model, MASK, EQUAL) == pytest.approx(expected, rel=1e-9)
        ids, meter = torch.tensor(EQUAL, device=model.device), Meter(model.device)
        waits = MODULE.synchronized
        losses, _ = meter("full", lambda: full_forward(model, MASK, ids))
        assert losses.tolist() == pytest.approx(expected, rel=1e-9)
        assert MODULE.synchronized == waits + 1, "the clock stopped before the device did"
        assert matrix_rate(model, 64) > 0
