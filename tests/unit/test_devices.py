"""What runs on a GPU, on two devices that do not exist (`tests/fake_devices.py`): nothing meets that lies on different
devices, numbers are the CPU's, memory is what the memory model says, and where it ends, work goes on in smaller pieces.

The CPU's numbers are held against oracles elsewhere. A made-up device computes by the same kernels, so only what is
moved where can make a difference.
"""

import copy

import pytest
from safetensors.torch import load_file
from transformers.utils import logging

from blockpruner.compensation.compensate import compensate
from blockpruner.core.blocks import DENSE, all_blocks, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import HubTexts, Latency, Recover
from blockpruner.evaluation.choices import answers
from blockpruner.evaluation.latency import measure_latency
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.evaluation.speed import generate, random_prompt
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.laco.merging import ModelBench
from blockpruner.methods.laco.walk import Merge
from blockpruner.methods.slicegpt.slicing import slice_
from blockpruner.methods.slicegpt.widths import SLICEABLE
from blockpruner.model import accelerator
from blockpruner.model.models import load_model, prune_
from blockpruner.recovery.loss import TrainingLoss
from blockpruner.recovery.training import recover_
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import Task
from tests.fake_devices import fake_devices
from tests.plans import plan_of
from tests.tiny import VARIANTS, tiny_model, tolerance

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
    for kept in (accelerator.own, accelerator.claim):
        kept.cache_clear()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directory of each tiny model, float64."""
    folder = tmp_path_factory.mktemp("models")

    def directory(variant):
        found = folder / variant
        if not found.exists():
            tiny_model(variant, 2).save_pretrained(found)
        return found

    return directory


def scored(metric):
    masks = [mask for mask in (DENSE, *(frozenset({block}) for block in all_blocks(2))) if mask or not metric.influence]

    def losses(model):
        units = Engine(model, 20).run([Task(range(4), tuple(masks), metric)], ROWS)
        return sorted((str(sorted(map(str, unit.mask))), unit.start, unit.loss) for unit in units)

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
    given = {"rank": 2, "distill": 0.5, "hidden": 0.1, "learning_rate": 1e-3, "batch": 2, "accumulation": 1}
    return Recover(data=HubTexts(source="hub", repo="a/b"), **given | changes)


def distance(model):
    """What training minimises, of the pruned model and the dense one: without a gradient, on one device or on two."""
    student = prune_(copy.deepcopy(model), MASK)
    return TrainingLoss(student, model, recipe(), range(2)).measure(ROWS)


WORK = {f"score {name}": scored(metric) for name, metric in METRICS.items()}
WORK |= {f"compensate {method}": compensated(method) for method in ("scale", "map", "refit")}
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_those_of_the_cpu(variant, checkpoints):
    dense, limit, refused = checkpoints(variant), tolerance(variant), []
    for name, work in WORK.items():
        try:
            expected = work(load_model(dense, "float64", "cpu"))
        except InputError as error:  # what the family cannot be asked for, wherever it is
            refused.append(f"{name}: {error}")
            continue
        # torch takes no gradient over two made-up devices
        for place, indices in ({"auto": {0}} | ({} if name == "score taylor" else {"split": {0, 1}})).items():
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


@pytest.mark.parametrize("changes", [{}, {"weights": "all", "checkpointing": True}, {"top_k": 20}])
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "mixtral"])
def test_training_runs_on_a_device(variant, changes, checkpoints, tmp_path):
    def train(device):
        teacher = load_model(checkpoints(variant), "float64", device)
        student, rows = prune_(copy.deepcopy(teacher), MASK), CalibrationSet(tuple(ROWS))
        found = recover_(
            student, rows, recipe(**changes), teacher=teacher, validation=rows, adapters=tmp_path / device,
            identity="x", observer=SilentObserver(), depths=range(2),
        )  # fmt: skip
        (state,) = (tmp_path / device).iterdir()
        return [
            found.losses,
            [v.loss for v in found.validations],
            sorted(w.sum().item() for w in load_file(state).values()),
        ]

    expected = train("cpu")
    with fake_devices(1):
        assert flat(train("auto")) == pytest.approx(flat(expected), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_runs_on_a_device(variant, checkpoints):
    tasks = [Task(range(4), (DENSE, MASK, parse_mask("mha.1")), METRICS["js"])]
    expected = list(StreamingEngine(checkpoints(variant), "float64", device="cpu").run(tasks, ROWS))
    with fake_devices():
        found = list(StreamingEngine(checkpoints(variant), "float64").run(tasks, ROWS))
    assert [unit.mask for unit in found] == [unit.mask for unit in expected]
    assert flat([unit.loss for unit in found]) == pytest.approx(flat([unit.loss for unit in expected]), rel=1e-9)
