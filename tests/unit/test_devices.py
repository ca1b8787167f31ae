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
from blockpruner.fitting.memory import fit_bytes, sums_bytes
from blockpruner.fitting.streams import Streams
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
from blockpruner.scoring.work import Task, live_numbers
from blockpruner.store.files import read_json
from tests import fake_devices as made_up
from tests.fake_devices import MODULE, SETUP, fake_devices
from tests.golden import unverified
from tests.plans import fetch_tiny, narrow_plan, plan_of, pruning, save_pruned
from tests.tiny import GRID, VARIANTS, VOCABULARY, tiny_model, tolerance

pytestmark = pytest.mark.skipif(
    SETUP is None, reason=f"torch {torch.__version__} has no devices written in Python"
)


def make_rows(count, length):
    """Rows of equal lengths."""
    rows = []
    for row in range(count):
        ids = (7 * row + 3 * torch.arange(length)) % 250 + 1
        rows.append(tuple(ids.tolist()))
    return rows


ROWS = [tuple(range(1, 10)), tuple(range(3, 12)), (5, 6, 7), (9, 8, 7, 100, 4)]
LONG_ROWS = make_rows(6, 16)
EQUAL_ROWS = make_rows(8, 32)
MASK = parse_mask("mlp.0")
SILENT = SilentObserver()
TEXTS = HubTexts(source="hub", repo="a/b")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Weights are read in this thread, which has the devices."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directory of each tiny model, float64."""
    folder = tmp_path_factory.mktemp("models")

    def directory(variant):
        path = folder / variant
        if not path.exists():
            if variant == "tied":
                model = tiny_model("llama", 2, tie_word_embeddings=True)
            else:
                model = tiny_model(variant, 2)
            model.save_pretrained(path)
        return path

    return directory


def on_gpu(dtype, layers=2, **sizes):
    return tiny_model("llama", layers, dtype, **sizes).to("gpu:0")


def single_blocks():
    return [frozenset({block}) for block in all_blocks(2)]


def scored(metric):
    masks = single_blocks()
    if not metric.influence:
        masks.insert(0, DENSE)

    def losses(model):
        task = Task(range(4), tuple(masks), metric)
        numbers = []
        for unit in Engine(model, 20).run([task], ROWS):
            numbers.append((sorted(map(str, unit.mask)), list(unit.span), unit.loss))
        return sorted(numbers)

    return losses


def refit(model, plan, rows):
    """A compensated plan's weights and facts; the last two rows choose the strength."""
    fit_rows = CalibrationSet(tuple(rows[:-2]))
    validation_rows = CalibrationSet(tuple(rows[-2:]))
    return compensate(model, {"plan": plan}, fit_rows, validation_rows, SILENT)["plan"]


def compensated(model):
    plan = plan_of(model.config.to_dict(), ["mha.1", "mlp.0"])
    weights, facts = refit(model, plan, LONG_ROWS)
    sums = [weight.sum().item() for weight in weights.values()]
    return [*facts["perplexity"].values(), *sums]


def narrowed_and_compensated(model):
    """The narrow copy of a model that accelerate has hooked is narrow, too."""
    levels = by_cost(list(measure_levels(model, ROWS, 12, (), SILENT)))
    channels = {block: parse_channels(of_block[1].kept) for block, of_block in levels.items()}
    plan = narrow_plan(model.config.to_dict(), channels)
    weights, facts = refit(model, plan, ROWS)
    pruned = pruned_copy(model, plan, ())
    set_weights_(pruned, weights, shared=True)
    costs = [level.cost for of_block in levels.values() for level in of_block]
    return [*costs, *facts["perplexity"].values(), *measure_perplexity(pruned, ROWS).row_nll]


def merged(model):
    merges = (Merge(0, 1),)
    numbers = []
    for variant in ("repo", "paper"):
        numbers.append(Similarity(model, ROWS, variant)(merges))
        numbers.append(merged_nll(model, ROWS, merges, variant))
    return numbers


def recipe(**changes):
    settings = {"rank": 2, "distill": 0.5, "learning_rate": 1e-3, "batch": 2, "accumulation": 1}
    return Train(data=TEXTS, **settings | changes)


@torch.no_grad()
def distance(model):
    """The training loss of the pruned model, with the dense one as the teacher."""
    student = prune_(copy.deepcopy(model), MASK)
    losses = TrainingLoss(student, model, recipe())(**_batch(ROWS), row_count=len(ROWS))
    return [loss.item() for loss in losses]


def generated(model):
    prompt = random_prompt(model, 2, 5)
    return model.generate(prompt, max_new_tokens=5, do_sample=False).tolist()


WORK = {f"score {name}": scored(metric) for name, metric in METRICS.items()}
WORK |= {
    "compensate": compensated,
    "compensate narrow": narrowed_and_compensated,
    "perplexity": lambda model: measure_perplexity(model, ROWS).row_nll,
    "decode": lambda model: generate(model, random_prompt(model, 2, 5), 6).tokens.tolist(),
    "generate": generated,
    "latency": lambda model: measure_latency(
        model, Latency(prompt_tokens=4, new_tokens=3, repeats=1)
    )["batch"],
    "laco": merged,
    "distance": distance,
}


COMMON_WORK = {
    *(f"score {name}" for name in METRICS.keys() - {"perplexity", "block_influence"}),
    "compensate",
    "compensate narrow",
}
"""Slow work that does the same in every family: one family is enough."""


def numbers_in(value):
    """The numbers of nested lists and tuples."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("variant", GRID)
def test_numbers_are_those_of_the_cpu(variant, checkpoints, monkeypatch):
    # Tiny models have thousands of masks in a batch else.
    monkeypatch.setattr("blockpruner.scoring.engine.WIDE_NUMBERS", 4096)
    tolerated = tolerance(variant)
    refused = []
    # What goes wrong on one device goes wrong on two; one family has both.
    indices_by_device = {"split": {0, 1}}
    if variant == "llama":
        indices_by_device["auto"] = {0}
    for name, work in WORK.items():
        if variant != "llama" and name in COMMON_WORK:
            continue
        try:
            expected = work(load_model(checkpoints(variant), "float64", "cpu"))
        except InputError as error:  # the family does not have it, on any device
            refused.append(f"{name}: {error}")
            continue
        for device, indices in indices_by_device.items():
            with fake_devices():
                model = load_model(checkpoints(variant), "float64", device)
                assert {weight.device.index for weight in model.parameters()} == indices
                numbers = numbers_in(work(model))
            assert numbers == pytest.approx(numbers_in(expected), rel=tolerated, abs=tolerated), (
                name,
                device,
            )
    assert len(refused) <= 1, refused


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "split"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_on_a_real_device(variant, device, checkpoints):
    for name, work in WORK.items():
        try:
            expected = work(load_model(checkpoints(variant), "float64", "cpu"))
        except InputError:
            continue
        numbers = numbers_in(work(load_model(checkpoints(variant), "float64", device)))
        assert numbers == pytest.approx(numbers_in(expected), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("variant", SLICEABLE)
def test_slicing_runs_on_a_device(variant, checkpoints):
    """Eigenvectors may have either sign, and the perplexity does not depend on it."""

    def sliced_nll(device):
        model = slice_(load_model(checkpoints(variant), "float64", device), ROWS, 24)
        return measure_perplexity(model, ROWS).row_nll

    expected = sliced_nll("cpu")
    with fake_devices():
        assert sliced_nll("auto") == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("variant", GRID)
def test_streaming_runs_on_a_device(variant, checkpoints):
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")), METRICS["js"])]

    def scores(device):
        engine = StreamingEngine(checkpoints(variant), "float64", device=device)
        units = list(engine.run(tasks, ROWS))
        return [unit.mask for unit in units], numbers_in([unit.loss for unit in units])

    expected_masks, expected_losses = scores("cpu")
    with fake_devices():
        masks, losses = scores("auto")
    assert masks == expected_masks
    assert losses == pytest.approx(expected_losses, rel=1e-9)


SYNCHRONIZING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
"""Operations whose result the host must wait for."""


def has_boolean_index(function, arguments):
    if not function.__name__.startswith("index") or not isinstance(arguments[1], list | tuple):
        return False
    return any(index is not None and index.dtype is torch.bool for index in arguments[1])


@pytest.mark.parametrize("metric", ["perplexity", "js"])
def test_candidates_do_not_wait_for_a_device(metric, checkpoints, monkeypatch):
    """Rows are of different lengths; the first task is dense."""
    synchronized = []
    run = made_up.run

    def watched(function, arguments, options):
        if function in SYNCHRONIZING or has_boolean_index(function, arguments):
            synchronized.append(function)
        return run(function, arguments, options)

    with fake_devices(1):
        engine = Engine(load_model(checkpoints("llama"), "float64"), 40)
        prepare = engine.prepare
        # Preparing a batch may wait: it is done once for all candidates.
        monkeypatch.setattr(
            engine, "prepare", lambda *batch: (prepare(*batch), synchronized.clear())[0]
        )
        monkeypatch.setattr(made_up, "run", watched)
        units = list(engine.run([Task(range(4), (DENSE, MASK), METRICS[metric])], ROWS))
        assert len(units) == 2
        assert not synchronized
        (torch.ones(2, device="gpu:0") > 0).nonzero()
        assert len(synchronized) == 1


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_streamed_weights_are_copied_in_time(variant, tmp_path, monkeypatch):
    """A made-up device makes copies as late as it may."""
    tiny_model(variant, 4, torch.bfloat16).save_pretrained(tmp_path)
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")))]
    streams = []

    def set_stream(stream):
        streams.append(stream)
        MODULE.streams.own = stream

    with fake_devices(1):
        expected = list(Engine(load_model(tmp_path, "float32"), 40).run(tasks, ROWS))
        engine = StreamingEngine(tmp_path, "float32")
        monkeypatch.setattr(MODULE, "set_stream", set_stream)
        units = list(engine.run(tasks, ROWS))
    assert sorted(map(str, units)) == sorted(map(str, expected))
    weight_stream, *tile_streams = streams
    assert not any(stream.late for stream in streams), tile_streams
    # A group of weights waits until the one that was in its slab is dropped.
    assert len(weight_stream.waited) == len(engine._groups(DENSE))
    assert all(event.stream is MODULE.main for event in weight_stream.waited)


def test_devices_are_named_by_the_settings():
    gpu = torch.device("gpu:0")
    with fake_devices():
        for name, device in {
            "cpu": torch.device("cpu"),
            "auto": gpu,
            "split": gpu,
            "gpu": gpu,
            "gpu:1": torch.device("gpu:1"),
        }.items():
            assert resolve_device(name) == device
        assert accelerator.name(torch.device("gpu:1")) == "Made-up Card"
        assert accelerator.name(torch.device("cpu")) == "cpu"
        with pytest.raises(InputError, match=r"'gpu:2' is not here: 2 CUDA devices; use auto$"):
            resolve_device("gpu:2")
    assert resolve_device("auto") == torch.device("cpu")
    assert accelerator.devices() == []


UNKNOWN = "is unknown; valid: auto, cpu, cuda, cuda:<n>, split$"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "is not here: 0 CUDA devices"),
        ("cuda:0", "is not here: 0 CUDA devices"),
        ("split", "needs CUDA devices, and there is none here"),
        ("tpu", UNKNOWN),
        ("meta", UNKNOWN),
        ("mps", UNKNOWN),
        ("gpu", UNKNOWN),
    ],
)
def test_a_device_that_is_absent_is_refused(device, message):
    with pytest.raises(InputError, match=message):
        resolve_device(device)


def test_a_split_that_cannot_fit_is_refused_before_a_weight_is_read(checkpoints):
    weight_bytes = sum(weight.nbytes for weight in tiny_model("llama", 2).parameters())
    with fake_devices() as cards:
        for card in cards:
            card.limit = card.live + weight_bytes // 3
        with pytest.raises(DeviceMemoryError, match="fit into the memory of .* 'split'"):
            load_model(checkpoints("llama"), "float64", "split")
        assert [card.peak - card.live for card in cards] == [0, 0]


@pytest.mark.parametrize("variant", ["llama", "mixtral", "tied"])
def test_a_second_model_takes_memory_only_for_weights_that_differ(variant, checkpoints, tmp_path):
    folder = checkpoints(variant)
    pruned = prune_(load_model(folder, "float64", "cpu"), MASK)
    layer_matrices = [
        parameter
        for name, parameter in pruned.named_parameters()
        if "layers.1." in name and parameter.dim() == 2
    ]
    with torch.no_grad():
        layer_matrices[0][-1, -1] += 1
    save_pruned(pruned, tmp_path / "pruned")
    with fake_devices(1) as (card,):
        dense = load_model(folder, "float64")
        gc.collect()
        live = card.live
        model = load_model(tmp_path / "pruned", "float64", "auto", True, shared_with=dense)
        gc.collect()
        buffer_bytes = sum(buffer.nbytes for buffer in pruned.buffers())
        assert card.live - live == layer_matrices[0].nbytes + buffer_bytes
        tensors = (*model.parameters(), *model.buffers())
        assert {tensor.device for tensor in tensors} == {torch.device("gpu:0")}
        weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
        assert dense.num_parameters() > model.num_parameters()
    expected = pruned.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_peak_memory_is_a_models_own_though_two_share_weights(checkpoints):
    settings = Speed(prompt_tokens=8, new_tokens=4, repeats=1, batch=2)
    peaks = {}
    weights = {}
    for name in ("dense", "pruned"):
        gc.collect()
        with fake_devices(1) as (card,):
            live = card.live
            model = load_model(checkpoints("llama"), "float64")
            if name == "pruned":
                prune_(model, MASK)
            gc.collect()
            peaks[name] = measure_speed({name: model}, settings)[name].peak_memory_bytes - live
            weights[name] = weight_bytes(model)
            del model
    gc.collect()
    with fake_devices(1) as (card,):
        live = card.live
        dense = load_model(checkpoints("llama"), "float64")
        models = {"pruned": prune_(shared_copy(dense), MASK), "dense": dense}
        speeds = measure_speed(models, settings)
    for name, speed in speeds.items():
        assert speed.peak_memory == "allocated"
        assert speed.peak_memory_bytes - live == peaks[name]
        assert peaks[name] > weights[name] + speed.kv_cache_bytes


def sweep(model, batch_tokens):
    """An engine, and the losses of all single blocks on equal rows."""
    engine = Engine(model, batch_tokens)
    masks = (DENSE, *single_blocks())
    tasks = [Task(span, masks) for span in engine.row_batches(EQUAL_ROWS, range(8))]
    return engine, engine.run(tasks, EQUAL_ROWS)


def loss_items(units):
    items = []
    for unit in units:
        for row, loss in zip(unit.span, unit.loss, strict=True):
            items.append(((unit.mask, row), loss))
    return items


@pytest.mark.parametrize("rows", [2, 8])
def test_a_batch_takes_no_more_memory_than_its_model_predicts(rows, monkeypatch):
    """In bfloat16, with widths in Llama's proportions: at tiny widths other tensors than states
    count for more."""
    monkeypatch.setattr("blockpruner.scoring.work.LOGITS_BYTES", 16 * VOCABULARY * 4)
    gc.collect()
    with fake_devices(1) as (card,):
        model = on_gpu(torch.bfloat16, hidden_size=256, intermediate_size=688)
        MODULE.reset_peak_memory_stats(0)
        live = card.live
        list(sweep(model, rows * 32)[1])
    predicted = live_numbers(256, 688) * rows * 32 * 2
    assert predicted / 3 < card.peak - live <= predicted + 4 * 16 * VOCABULARY * 4


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_where_memory_ends_batches_are_halved_and_finished_masks_kept(variant, checkpoints):
    _, units = sweep(load_model(checkpoints(variant), "float64", "cpu"), 256)
    expected = dict(loss_items(units))
    with fake_devices(1) as (card,):
        model = load_model(checkpoints(variant), "float64")
        peaks = {}
        for tokens in (64, 256):
            gc.collect()
            MODULE.reset_peak_memory_stats(0)
            list(sweep(model, tokens)[1])
            peaks[tokens] = card.peak
        # Limits between what batches of two rows take and what one of eight rows takes.
        for share in (0.2, 0.6, 0.95):
            gc.collect()
            card.limit = int(peaks[64] + share * (peaks[256] - peaks[64]))
            MODULE.reset_peak_memory_stats(0)
            engine, units = sweep(model, 256)
            losses = loss_items(units)
            assert len(losses) == len(dict(losses))
            assert dict(losses) == pytest.approx(expected, rel=1e-9)
            assert card.peak <= card.limit
            assert max(map(len, engine.row_batches(EQUAL_ROWS, range(8)))) < 8


def scores_one_row(model, folder):
    list(sweep(model, 256)[1])


def evaluates_one_row(model, folder):
    measure_perplexity(model, EQUAL_ROWS)


def trains_one_row(model, folder):
    train_(
        prune_(model, MASK),
        CalibrationSet(tuple(EQUAL_ROWS)),
        recipe(distill=0.0),
        teacher=None,
        validation=None,
        states=folder,
        observer=SILENT,
    )


@pytest.mark.parametrize(
    ("work", "room", "message"),
    [
        (scores_one_row, 1000, r"^one row of 32 tokens does not fit .*\(CUDA out of memory\)"),
        (evaluates_one_row, 1000, r"one row of 32 tokens does not fit .*; lower its seq_len"),
        (trains_one_row, 40_000, r"training on a row of 32 tokens .* lower train.seq_len"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line(work, room, message, checkpoints, tmp_path):
    with fake_devices(1) as (card,):
        model = load_model(checkpoints("llama"), "float64")
        gc.collect()
        card.limit = card.live + room
        with pytest.raises(DeviceMemoryError, match=message):
            work(model, tmp_path)


@pytest.mark.parametrize("form", ["hf", "nas", "gguf"])
def test_an_export_takes_no_memory_of_a_device(form, tmp_path, in_process):
    """And it has the same weights as without a device."""
    dense = fetch_tiny(tmp_path, layers=3)
    plan = plan_of(dense, ["mha.1", "mlp.2"])
    files = {}
    for device in ("cpu", "auto"):
        folder = tmp_path / device
        with fake_devices() as cards, unverified():
            live = [card.live for card in cards]
            EXPORTS[form].write(replace(pruning(dense, plan), device=device), folder)
            assert [card.peak for card in cards] == live
        weight_files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
        files[device] = {path.name: path.read_bytes() for path in weight_files}
    assert files["cpu"] == files["auto"] != {}


def test_a_hybrid_in_16_bits_is_verified_in_float32():
    """Its linear attentions read the weight of a convolution that never runs."""
    model = tiny_model("qwen3_5_text", dtype=torch.bfloat16)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        with in_float32(model):
            logits = model(ids).logits
        assert torch.equal(logits, copy.deepcopy(model).float()(ids).logits)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_reference_in_float32_takes_a_weight_at_a_time():
    with fake_devices(1) as (card,):
        model = on_gpu(torch.bfloat16, 4, hidden_size=256, intermediate_size=688)
        weights = dict(model.named_parameters())
        live = card.live
        MODULE.reset_peak_memory_stats(0)
        reference_outputs(model, plan_of(model.config.to_dict(), ["mlp.0"]))
        assert card.peak - live < sum(weight.nbytes for weight in weights.values()) / 2
        assert all(weight is weights[name] for name, weight in model.named_parameters())
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
    distilled = Train(data=TEXTS, weights="all", distill=1.0)
    greedy = Score(method="greedy")
    streaming = Runtime(streaming=True)

    def check(family, runtime=None, score=None, compensate="refit", train=None):
        config = {"model_type": family, **SHAPES[family]}
        runtime = runtime or Runtime()
        require_room(config, "bfloat16", runtime, score or Score(), compensate, train, "0.2")

    with fake_devices(1) as (card,):
        card.limit = 24 * 2**30
        for family, size in (("qwen2", 100), ("gemma2", 128)):
            check(family)
            message = rf"training takes {size}\.. GiB .*, and gpu:0 has 24.*train adapters"
            with pytest.raises(InputError, match=message):
                check(family, train=distilled)
        check("llama", Runtime(device="cpu"), train=distilled)
        check("llama", Runtime(executor="ray"))
        message = r"search takes 153\.. GiB .*; score with streaming, or choose a larger"
        with pytest.raises(InputError, match=message):
            check("llama")
        check("llama", streaming, greedy, "none")
        # A refit goes layer by layer, too.
        check("llama", streaming, greedy)
        card.limit = 16 * 2**30
        with pytest.raises(InputError, match=r"refit takes 2.\.. GiB .*; leave it out"):
            check("llama", streaming, greedy)


@pytest.mark.parametrize(("family", "least_share"), [("llama", 0.9), ("gemma2", 0.6)])
def test_a_refit_takes_no_more_of_a_device_than_is_counted(family, least_share):
    """The sums of a wide MLP are nearly all of it when the device has no room for the states."""
    sums = sums_bytes(1500, 32)
    perplexities = {}
    for case in ("cpu", "on the device", "on the host"):
        with fake_devices(1) as (card,):
            model = tiny_model(family, 2, torch.float32, hidden_size=32, intermediate_size=1500)
            config = model.config.to_dict()
            if case != "cpu":
                model = model.to("gpu:0")
            if case == "on the host":
                card.limit = int(1.5 * sums)
            live = card.live
            MODULE.reset_peak_memory_stats(0)
            _, facts = refit(model, plan_of(config, ["mha.1"]), ROWS)
            perplexities[case] = facts["perplexity"]
            peak = card.peak
            states = Streams(model, ROWS, 2).dense[0]
            if case == "on the host":
                assert states.device.type == "cpu"
                assert least_share * sums < peak - live < 1.05 * sums
                counted = step_bytes(config, "float32", Score(), "refit", None, "0.1")
                assert peak < counted["refit"]
            elif case == "on the device":
                assert states.device.type == "gpu"
    for perplexity in perplexities.values():
        assert perplexity == pytest.approx(perplexities["cpu"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_refit_has_one_layer_at_a_time_on_a_device_that_does_not_hold_the_model(tmp_path, family):
    """Proposals and their choice, too; the weights are the CPU's, and the model stays as it was."""
    dense = fetch_tiny(tmp_path, family, 6)
    config = read_json(dense / "config.json")
    plans = {}
    for layer in (1, 3):
        plan = plan_of(config, [f"mlp.{layer}", f"mha.{layer + 1}"])
        plans[str(layer)] = replace(plan, compensate="refit")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (60, 40), generator=generator).tolist()
    row_sets = [
        CalibrationSet(tuple(map(tuple, ids[span])))
        for span in (slice(40), slice(40, 50), slice(50, 60), slice(5))
    ]
    expected = choose(pruning(dense, plans["1"]).load_for_fit, plans, *row_sets, SILENT)
    layers_on_device = set()

    class Watch(SilentObserver):
        def advance(self, done, total, detail):
            weights = [layer.mlp.down_proj.weight for layer in decoder_layers(model)]
            layers_on_device.add([weight.device.type for weight in weights].count("gpu"))

    with fake_devices(1) as (card,):
        card.limit = fit_bytes(config, "float32") - 1
        model = replace(pruning(dense, plans["1"]), device="gpu:0").load_for_fit()
        weights_before = {name: w.clone().cpu() for name, w in model.named_parameters()}
        chosen = choose(lambda: model, plans, *row_sets, Watch())
        assert layers_on_device == {1}
        for name, weight in model.named_parameters():
            assert weight.cpu().equal(weights_before[name])
        check_offloaded_layers(model)
    assert chosen.name == expected.name
    assert replace(chosen.plan, kinds=None) == replace(expected.plan, kinds=None)
    for kind, figures in expected.plan.kinds.items():
        assert chosen.plan.kinds[kind] == pytest.approx(figures, rel=1e-4)
    errors = [stop["error"] for stop in chosen.facts["stops"]]
    expected_errors = [stop["error"] for stop in expected.facts["stops"]]
    assert errors == pytest.approx(expected_errors, rel=1e-4)
    assert min(errors) < 1
    assert chosen.weights.keys() == expected.weights.keys()
    assert len(chosen.weights) > 4 or family == "llama"
    for name, weight in expected.weights.items():
        torch.testing.assert_close(chosen.weights[name], weight, rtol=1e-4, atol=1e-5)


def check_offloaded_layers(model):
    """A layer comes to the device when it runs, and what was changed there is changed on the host."""
    assert model.get_input_embeddings().weight.device.type == "gpu"
    first_mlp = decoder_layers(model)[0].mlp
    last_mlp = decoder_layers(model)[-1].mlp
    x = torch.zeros(1, model.config.hidden_size, device="gpu:0")
    weight = last_mlp.down_proj.weight
    last_mlp(x)
    with torch.no_grad():
        weight.zero_()
    first_mlp(x)
    assert weight.device.type == "cpu"
    assert not weight.any()
