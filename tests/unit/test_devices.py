"""What runs on a GPU, on two devices that do not exist (`tests/fake_devices.py`): nothing meets
that lies on different devices, numbers are the CPU's, memory is what the memory model says, and
where it ends, work goes on in smaller pieces.

The CPU's numbers are held against oracles elsewhere. A made-up device computes by the same kernels,
so only what is moved where can make a difference.
"""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from transformers.utils import logging

from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.checkpoints.verification import reference_outputs
from blockpruner.checkpoints.verify import in_float32
from blockpruner.core.blocks import DENSE, all_blocks, parse_channels, parse_mask
from blockpruner.core.errors import DeviceMemoryError, InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import HubTexts, Runtime
from blockpruner.evaluation.latency import measure_latency
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.evaluation.settings import Speed
from blockpruner.evaluation.speed import generate, measure_speed, random_prompt, weight_bytes
from blockpruner.healing.choice import choose
from blockpruner.healing.compensate import compensate
from blockpruner.healing.loss import TrainingLoss
from blockpruner.healing.memory import step_bytes
from blockpruner.healing.settings import Train
from blockpruner.healing.trainer import _batch, train_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import pruned_copy
from blockpruner.methods.healed import set_weights_
from blockpruner.methods.laco.merging import Similarity, merged_nll
from blockpruner.methods.laco.walk import Merge
from blockpruner.methods.narrow.levels import by_cost, measure_levels
from blockpruner.methods.slicegpt.slicing import slice_
from blockpruner.methods.slicegpt.widths import SLICEABLE
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, load_model, prune_, resolve_device, shared_copy
from blockpruner.pipeline import require_room
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.settings import Latency, Score
from blockpruner.scoring.streams import Streams
from blockpruner.scoring.work import Task, fit_bytes, live_numbers, sums_bytes
from blockpruner.store.files import read_json
from tests import fake_devices as made_up
from tests.fake_devices import MODULE, SETUP, fake_devices
from tests.golden import unverified
from tests.plans import fetch_tiny, narrow_plan, plan_of, pruning, save_pruned
from tests.tiny import GRID, VARIANTS, VOCABULARY, tiny_model, tolerance

pytestmark = pytest.mark.skipif(
    SETUP is None, reason=f"torch {torch.__version__} has no devices written in Python"
)

ROWS = [tuple(range(1, 10)), tuple(range(3, 12)), (5, 6, 7), (9, 8, 7, 100, 4)]
LONG = [tuple((7 * r + 3 * k) % 250 + 1 for k in range(16)) for r in range(6)]
MASK = parse_mask("mlp.0")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Weights are read in this thread, where the devices are."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


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
    masks = [
        mask
        for mask in (DENSE, *(frozenset({block}) for block in all_blocks(2)))
        if mask or not metric.influence
    ]

    def losses(model):
        units = Engine(model, 20).run([Task(range(4), tuple(masks), metric)], ROWS)
        return sorted(
            (str(sorted(map(str, unit.mask))), list(unit.span), unit.loss) for unit in units
        )

    return losses


def parted(rows):
    """The rows of a fit, and two that choose its strength."""
    return CalibrationSet(tuple(rows[:-2])), CalibrationSet(tuple(rows[-2:]))


def compensated(model):
    plan = plan_of(model.config.to_dict(), ["mha.1", "mlp.0"])
    weights, facts = compensate(model, {"plan": plan}, *parted(LONG), SilentObserver())["plan"]
    return [*facts["perplexity"].values(), *(weight.sum().item() for weight in weights.values())]


def narrowed_and_compensated(model):
    """The narrow copy of a model that accelerate has hooked is narrow, too."""
    levels = by_cost(list(measure_levels(model, ROWS, 12, (), SilentObserver())))
    plan = narrow_plan(
        model.config.to_dict(),
        {block: parse_channels(each[1].kept) for block, each in levels.items()},
    )
    weights, facts = compensate(model, {"plan": plan}, *parted(ROWS), SilentObserver())["plan"]
    pruned = pruned_copy(model, plan, ())
    set_weights_(pruned, weights, shared=True)
    costs = [level.cost for each in levels.values() for level in each]
    return [*costs, *facts["perplexity"].values(), *measure_perplexity(pruned, ROWS).row_nll]


def merged(model):
    merges = (Merge(0, 1),)
    return [
        [Similarity(model, ROWS, variant)(merges), merged_nll(model, ROWS, merges, variant)]
        for variant in ("repo", "paper")
    ]


def recipe(**changes):
    given = {"rank": 2, "distill": 0.5, "learning_rate": 1e-3, "batch": 2, "accumulation": 1}
    return Train(data=HubTexts(source="hub", repo="a/b"), **given | changes)


def distance(model):
    """What training minimises, of the pruned model and the dense one: without a gradient, on one
    device or on two."""
    student = prune_(copy.deepcopy(model), MASK)
    with torch.no_grad():
        return [
            each.item()
            for each in TrainingLoss(student, model, recipe())(**_batch(ROWS), count=len(ROWS))
        ]


WORK = {f"score {name}": scored(metric) for name, metric in METRICS.items()}
WORK |= {"compensate": compensated, "compensate narrow": narrowed_and_compensated}

WORK |= {
    "perplexity": lambda model: measure_perplexity(model, ROWS).row_nll,
    "decode": lambda model: generate(model, random_prompt(model, 2, 5), 6).tokens.tolist(),
    "generate": (
        lambda model: model.generate(
            random_prompt(model, 2, 5), max_new_tokens=5, do_sample=False
        ).tolist()
    ),
    "latency": lambda model: measure_latency(
        model, Latency(prompt_tokens=4, new_tokens=3, repeats=1)
    )["batch"],
    "laco": merged,
    "distance": distance,
}


@pytest.mark.parametrize("variant", GRID)
def test_numbers_are_those_of_the_cpu(variant, checkpoints, monkeypatch):
    # of tiny models it is thousands of masks
    monkeypatch.setattr("blockpruner.scoring.engine.WIDE_NUMBERS", 4096)
    dense, limit, refused = checkpoints(variant), tolerance(variant), []
    for name, work in WORK.items():
        if name.startswith("compensate") and variant != "llama":  # seconds
            continue
        try:
            expected = work(load_model(dense, "float64", "cpu"))
        except InputError as error:  # what the family cannot be asked for, wherever it is
            refused.append(f"{name}: {error}")
            continue
        # on two devices there is all that goes wrong on one
        one = {"auto": {0}} if variant == "llama" else {}
        for place, indices in (one | {"split": {0, 1}}).items():
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
    expected = measure_perplexity(
        slice_(load_model(checkpoints(variant), "float64", "cpu"), ROWS, 24), ROWS
    )
    with fake_devices():
        found = measure_perplexity(
            slice_(load_model(checkpoints(variant), "float64"), ROWS, 24), ROWS
        )
    assert found.row_nll == pytest.approx(expected.row_nll, rel=1e-8)


@pytest.mark.parametrize("variant", GRID)
def test_streaming_runs_on_a_device(variant, checkpoints):
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")), METRICS["js"])]
    expected = list(StreamingEngine(checkpoints(variant), "float64", device="cpu").run(tasks, ROWS))
    with fake_devices():
        found = list(StreamingEngine(checkpoints(variant), "float64").run(tasks, ROWS))
    assert [unit.mask for unit in found] == [unit.mask for unit in expected]
    assert flat([unit.loss for unit in found]) == pytest.approx(
        flat([unit.loss for unit in expected]), rel=1e-9
    )


ASKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


@pytest.mark.parametrize("metric", ["perplexity", "js"])
def test_candidates_ask_a_device_for_no_number(metric, checkpoints, monkeypatch):
    """It would have to be done before the answer comes. Rows are of different lengths; the first
    task is dense."""
    asked, run = [], made_up.run

    def watched(func, args, kwargs):
        indices = (
            args[1]
            if func.__name__.startswith("index") and isinstance(args[1], list | tuple)
            else ()
        )
        if func in ASKS or any(
            index is not None and index.dtype is torch.bool for index in indices
        ):
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
def test_streamed_weights_arrive_before_they_are_used_and_after_others_are_done(
    variant, tmp_path, monkeypatch
):
    """Copies are as late as they may be."""
    tiny_model(variant, 4, torch.bfloat16).save_pretrained(tmp_path)
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")))]
    with fake_devices(1):
        expected = list(Engine(load_model(tmp_path, "float32"), 40).run(tasks, ROWS))
        engine, streams = StreamingEngine(tmp_path, "float32"), []
        monkeypatch.setattr(
            MODULE, "set_stream", lambda s: streams.append(s) or setattr(MODULE.streams, "own", s)
        )
        found = list(engine.run(tasks, ROWS))
    assert sorted(map(str, found)) == sorted(map(str, expected))
    stream, *of_tiles = streams
    assert not any(each.late for each in of_tiles)
    # a group waits until that which was in its slab is dropped
    assert len(stream.waited) == len(engine._groups(DENSE)) and not stream.late
    assert all(event.stream is MODULE.main for event in stream.waited)


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


def test_devices_are_named_by_the_settings():
    with fake_devices():
        assert resolve_device("cpu") == torch.device("cpu")
        assert (
            resolve_device("auto")
            == resolve_device("split")
            == resolve_device("gpu")
            == torch.device("gpu:0")
        )
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
        with pytest.raises(
            InputError, match="is unknown; valid: auto, cpu, cuda, cuda:<n>, split$"
        ):
            resolve_device(device)
    with pytest.raises(InputError, match="needs CUDA devices, and there is none here"):
        resolve_device("split")


def test_a_split_that_cannot_fit_is_refused_before_a_weight_is_read(checkpoints):
    weights = sum(weight.nbytes for weight in tiny_model("llama", 2).parameters())
    with fake_devices() as cards:
        for card in cards:
            card.limit = card.live + weights // 3
        with pytest.raises(
            DeviceMemoryError, match="does not fit into the memory of runtime.device 'split'"
        ):
            load_model(checkpoints("llama"), "float64", "split")
        assert [card.peak - card.live for card in cards] == [0, 0]


@pytest.mark.parametrize("variant", ["llama", "mixtral", "tied"])
def test_a_model_beside_another_takes_memory_for_what_differs_alone(variant, checkpoints, tmp_path):
    folder = checkpoints(variant)
    dense = load_model(folder, "float64", "cpu")
    pruned = prune_(load_model(folder, "float64", "cpu"), MASK)
    with torch.no_grad():
        changed = next(
            w for name, w in pruned.named_parameters() if w.dim() == 2 and "layers.1." in name
        )
        changed[-1, -1] += 1
    save_pruned(pruned, tmp_path / "pruned")
    with fake_devices(1) as (card,):
        one = load_model(folder, "float64")
        gc.collect()
        before = card.live
        other = load_model(tmp_path / "pruned", "float64", "auto", True, beside=one)
        gc.collect()
        assert card.live - before == 8 * changed.numel() + sum(b.nbytes for b in pruned.buffers())
        assert {weight.device for weight in (*other.parameters(), *other.buffers())} == {
            torch.device("gpu:0")
        }
        found = {name: weight.cpu() for name, weight in other.state_dict().items()}
    assert (
        dense.num_parameters() > pruned.num_parameters()
        and found.keys() == pruned.state_dict().keys()
    )
    assert all(torch.equal(found[name], weight) for name, weight in pruned.state_dict().items())


def test_peak_memory_is_a_models_own_though_two_share_weights(checkpoints):
    asked, alone, weights = Speed(prompt_tokens=8, new_tokens=4, repeats=1, batch=2), {}, {}
    for name in ("dense", "pruned"):
        gc.collect()
        with fake_devices(1) as (card,):
            before, model = card.live, load_model(checkpoints("llama"), "float64")
            model = prune_(model, MASK) if name == "pruned" else model
            gc.collect()
            alone[name] = measure_speed({name: model}, asked)[name].peak_memory_bytes - before
            weights[name] = weight_bytes(model)
            del model
    gc.collect()
    with fake_devices(1) as (card,):
        before, dense = card.live, load_model(checkpoints("llama"), "float64")
        found = measure_speed({"pruned": prune_(shared_copy(dense), MASK), "dense": dense}, asked)
    prompt = 2 * 8 * 8  # the other model's
    for name, speed in found.items():
        assert speed.peak_memory == "allocated"
        assert speed.peak_memory_bytes - before - prompt == alone[name]
        assert alone[name] > weights[name] + speed.kv_cache_bytes


EQUAL = [tuple((7 * r + 3 * k) % 250 + 1 for k in range(32)) for r in range(8)]


def sweep(model, batch_tokens):
    engine = Engine(model, batch_tokens)
    tasks = [
        Task(span, (DENSE, *(frozenset({b}) for b in all_blocks(2))))
        for span in engine.row_batches(EQUAL, range(8))
    ]
    return engine, engine.run(tasks, EQUAL)


@pytest.mark.parametrize("rows", [2, 8])
def test_a_batch_takes_no_more_memory_than_the_model_of_it_says(rows, monkeypatch):
    """In bfloat16, with widths in Llama's proportions; at tiny widths what is not a state counts
    for more."""
    monkeypatch.setattr("blockpruner.scoring.work.LOGITS_BYTES", 16 * VOCABULARY * 4)
    gc.collect()
    with fake_devices(1) as (card,):
        model = tiny_model("llama", 2, torch.bfloat16, hidden_size=256, intermediate_size=688).to(
            "gpu:0"
        )
        MODULE.reset_peak_memory_stats(0)
        before = card.live
        list(sweep(model, rows * 32)[1])
    said = live_numbers(256, 688) * rows * 32 * 2
    assert said / 3 < card.peak - before <= said + 4 * 16 * VOCABULARY * 4


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_where_memory_ends_batches_are_halved_and_finished_masks_kept(variant, checkpoints):
    expected = {
        (unit.mask, row): loss
        for unit in sweep(load_model(checkpoints(variant), "float64", "cpu"), 256)[1]
        for row, loss in zip(unit.span, unit.loss, strict=True)
    }
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
            found = [
                ((u.mask, row), loss)
                for u in units
                for row, loss in zip(u.span, u.loss, strict=True)
            ]
            assert len(found) == len(dict(found)) and dict(found) == pytest.approx(
                expected, rel=1e-9
            )
            assert (
                card.peak <= card.limit and max(map(len, engine.row_batches(EQUAL, range(8)))) < 8
            )
        card.limit = card.live + 1000
        with pytest.raises(
            DeviceMemoryError, match=r"^one row of 32 tokens does not fit .*\(CUDA out of memory\)"
        ):
            list(sweep(model, 256)[1])


def test_a_row_that_does_not_fit_is_one_line(checkpoints):
    with fake_devices(1) as (card,):
        model = load_model(checkpoints("llama"), "float64")
        gc.collect()
        card.limit = card.live + 1000
        with pytest.raises(
            DeviceMemoryError, match=r"one row of 32 tokens does not fit .*; lower its seq_len"
        ):
            measure_perplexity(model, EQUAL)


def test_training_that_does_not_fit_is_one_line(checkpoints, tmp_path):
    with fake_devices(1) as (card,):
        student, rows = (
            prune_(load_model(checkpoints("llama"), "float64"), MASK),
            CalibrationSet(tuple(EQUAL)),
        )
        gc.collect()
        card.limit = card.live + 40_000
        with pytest.raises(
            DeviceMemoryError, match=r"training on a row of 32 tokens .* lower train.seq_len"
        ):
            train_(
                student,
                rows,
                recipe(distill=0.0),
                teacher=None,
                validation=None,
                states=tmp_path,
                observer=SilentObserver(),
            )


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
        files[device] = {
            path.name: path.read_bytes()
            for path in (tmp_path / device).iterdir()
            if path.suffix in (".safetensors", ".gguf")
        }
    assert files["cpu"] == files["auto"] != {}


def test_a_hybrid_in_16_bits_is_verified_in_float32():
    """Its linear attentions read the weight of a convolution that never runs."""
    model = tiny_model("qwen3_5_text", dtype=torch.bfloat16)
    ids = torch.arange(1, 25)[None]
    with in_float32(model), torch.no_grad():
        found = model(ids).logits
    with torch.no_grad():
        assert torch.equal(found, copy.deepcopy(model).float()(ids).logits)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_reference_in_float32_takes_a_weight_at_a_time():
    with fake_devices(1) as (card,):
        model = tiny_model("llama", 4, torch.bfloat16, hidden_size=256, intermediate_size=688).to(
            "gpu:0"
        )
        own, size, before = (
            dict(model.named_parameters()),
            sum(w.nbytes for w in model.parameters()),
            card.live,
        )
        MODULE.reset_peak_memory_stats(0)
        reference_outputs(model, plan_of(model.config.to_dict(), ["mlp.0"]))
        assert card.peak - before < size / 2
        assert all(weight is own[name] for name, weight in model.named_parameters())
        assert not any("forward" in vars(module) for module in model.modules())


SHAPES = {
    "qwen2": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "gemma2": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Qwen2.5 7B, Gemma 2 9B, Llama 3 70B."""


def test_what_a_device_cannot_hold_is_refused_before_the_search():
    distilled = Train(data=HubTexts(source="hub", repo="a/b"), weights="all", distill=1.0)

    def asked(family, runtime=None, score=None, compensate="refit", train=None):
        config = {"model_type": family, **SHAPES[family]}
        require_room(
            config, "bfloat16", runtime or Runtime(), score or Score(), compensate, train, "0.2"
        )

    with fake_devices(1) as (card,):
        card.limit = 24 * 2**30
        for family, least in (("qwen2", 100), ("gemma2", 128)):
            asked(family)
            with pytest.raises(
                InputError,
                match=rf"training takes {least}\.. GiB .*, and gpu:0 has 24.*train adapters",
            ):
                asked(family, train=distilled)
        asked("llama", Runtime(device="cpu"), train=distilled)
        asked("llama", Runtime(executor="ray"))
        with pytest.raises(
            InputError,
            match=r"search takes 153\.. GiB .*; score with streaming, or choose a larger",
        ):
            asked("llama")
        plain, streamed = Score(method="greedy"), Runtime(streaming=True)
        asked("llama", streamed, plain, "none")
        asked("llama", streamed, plain)  # layer by layer
        card.limit = 16 * 2**30
        with pytest.raises(InputError, match=r"refit takes 2.\.. GiB .*; leave it out"):
            asked("llama", streamed, plain)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_refit_takes_no_more_of_a_device_than_is_counted(family):
    """Of a wide MLP, whose sums are most of it, with states on the host: the device has not the
    room."""
    plan, found = None, {}
    for place in ("cpu", "gpu:0", "full"):
        with fake_devices(1) as (card,):
            model = tiny_model(family, 2, torch.float32, hidden_size=32, intermediate_size=1500)
            config = model.config.to_dict()
            plan = plan_of(config, ["mha.1"])
            sums, before = sums_bytes(1500, 32), 0
            if place != "cpu":
                model, before = model.to("gpu:0"), card.live
            if place == "full":
                card.limit = int(1.5 * sums)
            MODULE.reset_peak_memory_stats(0)
            found[place] = compensate(model, {"": plan}, *parted(ROWS), SilentObserver())[""][1][
                "perplexity"
            ]
            if place == "full":
                assert Streams(model, ROWS, 2).dense[0].device.type == "cpu"
                assert (
                    (0.6 if family == "gemma2" else 0.9) * sums < card.peak - before < 1.05 * sums
                )
                assert (
                    card.peak
                    < step_bytes(config, "float32", Score(), "refit", None, "0.1")["refit"]
                )
            elif place == "gpu:0":
                assert Streams(model, ROWS, 2).dense[0].device.type == "gpu"
    assert all(found[place] == pytest.approx(found["cpu"], rel=1e-4) for place in found)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_refit_has_one_layer_at_a_time_on_a_device_that_does_not_hold_the_model(tmp_path, family):
    """The proposals and their judgement, too; then the same weights, and the model as it was."""
    dense = fetch_tiny(tmp_path, family, 6)
    config = read_json(dense / "config.json")
    plans = {str(n): plan_of(config, [f"mlp.{n}", f"mha.{n + 1}"]) for n in (1, 3)}
    ids = torch.randint(
        1, VOCABULARY, (60, 40), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [
        CalibrationSet(tuple(map(tuple, ids[part])))
        for part in (slice(40), slice(40, 50), slice(50, 60), slice(5))
    ]
    plans = {name: replace(plan, compensate="refit") for name, plan in plans.items()}
    expected = choose(pruning(dense, plans["1"]).load_for_fit, plans, *rows, SilentObserver())

    class Watch(SilentObserver):
        def advance(self, done, total, detail):
            layers = [layer.mlp.down_proj.weight.device.type for layer in decoder_layers(model)]
            seen.append(layers.count("gpu"))

    seen = []
    with fake_devices(1) as (card,):
        card.limit = fit_bytes(config, "float32") - 1
        model = replace(pruning(dense, plans["1"]), device="gpu:0").load_for_fit()
        before = {name: weight.clone().cpu() for name, weight in model.named_parameters()}
        found = choose(lambda: model, plans, *rows, Watch())
        assert set(seen) == {1}
        assert (found.name, replace(found.plan, kinds=None)) == (
            expected.name,
            replace(expected.plan, kinds=None),
        )
        for kind, own in expected.plan.kinds.items():
            assert found.plan.kinds[kind] == pytest.approx(own, rel=1e-4)
        assert all(weight.cpu().equal(before[name]) for name, weight in model.named_parameters())
        assert model.get_input_embeddings().weight.device.type == "gpu"
        first, last = decoder_layers(model)[0].mlp, decoder_layers(model)[-1].mlp.down_proj.weight
        decoder_layers(model)[-1].mlp(torch.zeros(1, model.config.hidden_size, device="gpu:0"))
        with torch.no_grad():
            last.zero_()
        first(torch.zeros(1, model.config.hidden_size, device="gpu:0"))
        # what was changed there is changed here
        assert last.device.type == "cpu" and not last.any()
    errors, wanted = ([stop["error"] for stop in each.facts["stops"]] for each in (found, expected))
    assert errors == pytest.approx(wanted, rel=1e-4) and min(errors) < 1
    assert found.weights.keys() == expected.weights.keys() and (
        len(found.weights) > 4 or family == "llama"
    )
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5)
