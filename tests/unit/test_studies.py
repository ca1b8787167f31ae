"""The searches of a study, and its models in memory: against single searches and masked models, and what is kept."""

import math
from statistics import fmean
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.evaluation import suite
from blockpruner.evaluation.perplexity import held_out
from blockpruner.evaluation.settings import Evaluate, Speed
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.healing.compensate import compensate
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import write_texts
from blockpruner.methods import score
from blockpruner.methods.healed import FILE
from blockpruner.methods.kind import make_plan
from blockpruner.methods.registry import KINDS, model_facts
from blockpruner.methods.weights import weights_kind
from blockpruner.model.models import load_model, masked
from blockpruner.paper.check import Check, hold_against
from blockpruner.paper.evaluation import Candidate, CandidateModel, evaluate_study, time_study, unique
from blockpruner.paper.experiments import Variant, cures
from blockpruner.paper.healing import FACTS, Healer, healed_of
from blockpruner.paper.studies import SearchRecord, Setting, StudyTexts, load_plans, model_name, search_all
from blockpruner.scoring.settings import Score
from blockpruner.search.trace import Current
from blockpruner.settings import Run
from blockpruner.store.files import read_json, write_json
from blockpruner.store.manifest import SOURCE_FILE
from blockpruner.store.tensors import read_tensors
from blockpruner.versions import PLAN_VERSION
from stages import study_search
from tests.builders import small_config
from tests.tiny import full_nll, save_tiny, tiny_tokenizer
from tests.unit.zero_shot_items import write_tasks

TEXTS_OF_WORLD = [f"sentence number {i} is about {'cats' if i % 2 else 'dogs'} and nothing else" for i in range(30)]
DATA = {"source": "path", "path": "nowhere", "format": "text"}
MODEL = {"source": "path", "path": "nowhere"}
MAIN = {"block": "2blocks", "layer": "1layers"}


def variant(name, score=None, budgets=("2blocks", "1blocks"), **calibration):
    section = {"data": DATA, "num_samples": 6, "seq_len": 20, "packing": "per_sample", "split": "all", "seed": 1}
    return Variant(name, name, "block", Score(**score or {}), Calibration(**section | calibration), budgets)


VARIANTS = (
    variant("BlockPruner"),
    variant("one-shot", {"method": "one_shot"}),
    variant("ShortGPT", {"method": "one_shot", "unit": "layer", "metric": "block_influence"}, ("1layers",)),
    variant("seed 2", seed=2),
    variant("LaCo", {"method": "laco", "options": {"count": 2}}, ("1layers",)),
    variant("LaCo too coarse", {"method": "laco", "options": {"count": 3}}, ("1layers",)),
    variant("SliceGPT", {"method": "slicegpt"}, ("0.2",)),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study after its searches. `made` has an entry for each model that was loaded to be scored."""
    root = tmp_path_factory.mktemp("study")
    save_tiny(root / "model", max_position_embeddings=512)
    write_json(root / "model" / SOURCE_FILE, {"identity": "tiny"})
    made, make = [], score.make_scorer
    model = LocalModel(source="path", path=str(root / "model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "make_scorer", lambda *args, **kwargs: made.append(1) or make(*args, **kwargs))
        opened = score.open_material(root / "model", model, Runtime(device="cpu"), root / "trials", SilentObserver())
        with opened as material:
            setting = Setting("tiny", material, StudyTexts(tiny_tokenizer, lambda data: TEXTS_OF_WORLD, list))
            search_all(VARIANTS, root / "scores", root / "plans", setting)
            yield SimpleNamespace(root=root, setting=setting, made=made)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_search_leads_to_its_plans(world):
    found = {v.name: SearchRecord.load(world.root / "plans" / v.slug) for v in VARIANTS}
    assert len(world.made) == 1  # one model for all of them
    base = found["BlockPruner"]
    assert (base.rows, base.tokens) == (6, 6 * 20)
    assert len(base.order) >= 2 and len(base.perplexities) == len(base.order) + 1
    assert set(base.first) == {f"{kind}.{layer}" for kind in ("mha", "mlp") for layer in range(4)}
    assert base.order[0] == min(base.first, key=base.first.get)
    assert base.cost["computed"] == base.cost["asked"] > 0
    plans = {budget: plan.order for budget, plan in load_plans(world.root / "plans", VARIANTS[0]).items()}
    assert plans == {"2blocks": base.order[:2], "1blocks": base.order[:1]}
    one_shot = found["one-shot"]  # its scores are BlockPruner's first iteration
    assert one_shot.cost["computed"] < one_shot.cost["asked"]
    assert one_shot.order[:2] == tuple(sorted(base.first, key=base.first.get)[:2])
    assert found["seed 2"].cost["computed"] == found["seed 2"].cost["asked"]
    assert found["LaCo"].order == () == found["SliceGPT"].order


def test_a_method_that_cannot_be_had_is_left_out_with_its_reason_and_the_others_go_on(world):
    coarse = VARIANTS[-2]
    reason = SearchRecord.load(world.root / "plans" / coarse.slug).refused
    assert reason.startswith("budget '1layers': LaCo with C = 3") and "the nearest that it removes: 2" in reason
    assert load_plans(world.root / "plans", coarse) == {} and load_plans(world.root / "plans", VARIANTS[-1])


@pytest.mark.parametrize("fetched", [False, True])
def test_what_a_study_evaluates_is_not_drawn(tmp_path, monkeypatch, fetched):
    """Its held-out text, and WikiText-2 where that was fetched: as far as the rows that are measured go."""
    monkeypatch.setattr(study_search, "STUDIES", tmp_path)
    study = {"main": MAIN, "wikitext": {"seq_len": 16, "max_rows": 2}}
    run = Run(model=MODEL, evaluate={"perplexity": {"data": DATA, "seq_len": 16, "max_rows": 3}}, study=study)
    save_tiny(tmp_path / "tiny" / "model")
    texts = {"perplexity": "held out", **({"wikitext": "of an encyclopaedia"} if fetched else {})}
    for role, words in texts.items():
        write_texts(tmp_path / "tiny/sources" / f"{role}.parquet", [f"{n}: {words}" for n in range(9)])
    held_out, wikitext = [f"{n}: held out" for n in range(4)], [f"{n}: of an encyclopaedia" for n in range(2)]
    # a token is a character: three rows of 16 end in the fourth text, two in the second
    assert study_search.texts_of("tiny", run).evaluated() == held_out + wikitext * fetched


def test_a_second_time_computes_nothing_and_writes_the_same(world):
    before, made = files(world.root / "plans"), len(world.made)
    (world.root / "plans" / "of-yesterday").mkdir()
    search_all(VARIANTS, world.root / "scores", world.root / "plans", world.setting)
    assert len(world.made) == made
    assert files(world.root / "plans") == before and not (world.root / "plans" / "of-yesterday").exists()


def test_published_answers_are_held_against_what_is_measured(world, tmp_path):
    """The oracle: the masked model's plain forwards, and ShortGPT's first layer as another search found it."""
    sequence = ("mlp.2", "mha.1", "mha.3")
    given = Run(model=MODEL, score={"method": "given", "options": {"order": sequence}})
    asked = {"perplexity": {"data": DATA, "seq_len": 40}, "zero_shot": {"data": {"source": "hub"}, "tasks": ["piqa"]}}
    run = Run(model=MODEL, calibration=VARIANTS[0].calibration, evaluate=asked, study={"main": MAIN})
    sources = tmp_path / "sources"
    texts = ["a word of text " * 20]
    write_texts(sources / "perplexity.parquet", texts)
    write_tasks(sources / "tasks", location=sources / "tasks")
    dense = load_model(world.root / "model", "float32", "cpu")
    rows = held_out(tiny_tokenizer(), texts, run.evaluate.perplexity).rows

    def perplexity(mask):
        with masked(dense, mask) as model:
            return math.exp(fmean(full_nll(model, row) for row in rows))

    numbers = {"dense": perplexity(frozenset()), "blockpruner": perplexity(parse_mask("mlp.2,mha.1"))}
    first = SearchRecord.load(world.root / "plans" / "shortgpt").order[0]
    layer = next(iter(parse_mask(first))).layer

    def lines(average, layers=(layer,)):
        (tmp_path / "table1_main.csv").write_text(
            "model,method,ratio_pct,wikitext2_ppl,avg\n"
            + "".join(f"Tiny,{key},0,{value},{average}\n" for key, value in numbers.items())
        )
        checkpoint = Checkpoint(world.root / "model", "float32", "cpu", False)
        return hold_against(
            Check("Tiny", "given", "2blocks", layers), run, given, checkpoint, world.setting, sources,
            tmp_path / "check", tmp_path / "store", tmp_path, SilentObserver(),
        )  # fmt: skip

    average = float(next(line.here for line in lines(0.0) if "average" in line.what))
    found = lines(average)
    assert [line.agrees for line in found if "sequence" not in line.what or "perplexity" in line.what] == [True] * 4
    assert [float(line.here) for line in found if "perplexity" in line.what] == pytest.approx(
        list(numbers.values()), abs=0.01
    )
    far = lines(average + 50, ((layer + 1) % 4,))
    assert [line.agrees for line in far] == [True, False, True, False, False] and "DIFFERS" in str(far[-1])


def candidates(world):
    """All that the searches lead to; the two of BlockPruner are timed, the main one in two settings."""
    found = []
    for v in VARIANTS:
        rows = CalibrationSet.load(world.root / "plans" / v.slug / "rows.parquet")
        for budget, plan in load_plans(world.root / "plans", v).items():
            main = budget == v.budgets[0]
            timed = {"timed", *(["main"] if main else [])} if v.name == "BlockPruner" else ()
            found.append(Candidate(plan, rows, main=main, timed=frozenset(timed)))
    return found


MERGES = {"merges": [[2, 1], [0, 1]], "variant": "repo"}


@pytest.mark.parametrize(
    ("kind", "plan", "facts", "name", "other"),
    [
        ("mask", {"removed": ("mha.0", "mlp.2")}, {"removed": ["mha.0", "mlp.2"]}, "6c8bb6810c6d7eba",
         {"removed": ("mha.0",)}),
        ("laco", {"details": MERGES | {"threshold": 0.5, "layers": 2}}, MERGES, "beda59d9b92b291c",
         {"details": MERGES | {"variant": "paper"}}),
        ("slicegpt", {"details": {"width": 24, "hidden": 32}}, {"width": 24, "rows": "digest"}, "93a29b99624165f7",
         {"details": {"width": 16, "hidden": 32}}),
    ],
)  # fmt: skip
def test_a_model_has_the_name_that_it_always_had(kind, plan, facts, name, other):
    """Facts and names of commit 6f2353f: results of evaluated models are stored under them."""
    current = Current(kind, "s", True, Score(), {}, {"rows": 3, "tokens": 30})
    plan, other = (
        make_plan(current, "2blocks", small_config(4), perplexities=(2.0, 3.0), **fields) for fields in (plan, other)
    )
    assert model_facts(plan, "digest") == {"kind": kind} | facts
    assert model_name(plan, "digest") == name != model_name(other, "digest")
    assert (model_name(plan, "digest") != model_name(plan, "other rows")) == (kind == "slicegpt")


def test_models_made_by_another_version_of_a_method_have_another_name():
    """A mended merge or slice is measured anew, though the plan is the same."""
    current = Current("mine", "s", True, Score(), {}, {"rows": 3, "tokens": 30})
    plan = make_plan(current, "2blocks", small_config(4), perplexities=(2.0, 3.0), details={"width": 24})
    names = set()
    for version in (1, 2, 3):
        row = weights_kind("mine", "Mine", plan=None, left=None, apply_=None, version=version)
        with KINDS.added(row):
            names.add(model_name(plan, "rows"))
    assert len(names) == 3
    for name in ("laco", "slicegpt"):
        assert KINDS[name].score.args[-1] == PLAN_VERSION


def test_models_in_memory_are_the_masked_model_and_leave_the_dense_one_whole(world):
    dense = Checkpoint(world.root / "model", "float32", "cpu", False)
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    weights = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    before = dense.model(input_ids=ids).logits
    for candidate in candidates(world):
        pruned = CandidateModel(dense, candidate).model
        logits = pruned(input_ids=ids).logits
        if candidate.plan.kind == "mask":
            with masked(load_model(world.root / "model", "float32", "cpu"), candidate.plan.mask) as reference:
                torch.testing.assert_close(logits, reference(input_ids=ids).logits)
        assert pruned.num_parameters() == candidate.plan.parameters["pruned"]
        assert not torch.equal(logits, before)
    assert torch.equal(dense.model(input_ids=ids).logits, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dense.model.state_dict().items())


def test_searches_that_lead_to_one_model_ask_for_it_once(world):
    first = candidates(world)[0]
    again = Candidate(first.plan, CalibrationSet(((1, 2, 3),)), main=False, timed=frozenset({"curve"}))
    (found,) = unique([first, again]).values()
    assert found.main and found.timed == first.timed | {"curve"} and found.name == first.name == again.name
    sliced = next(c for c in candidates(world) if c.plan.kind == "slicegpt")
    assert sliced.name != Candidate(sliced.plan, CalibrationSet(((1, 2, 3),))).name  # its directions are of the rows


def test_evaluation_of_a_study(world, monkeypatch):
    monkeypatch.chdir(world.root)
    write_texts(world.root / "sources" / "perplexity.parquet", ["word " * 60])
    write_texts(world.root / "sources" / "wikitext.parquet", ["other " * 60])
    write_tasks(world.root / "sources" / "tasks", location=world.root / "sources" / "tasks")
    wanted = candidates(world)
    asked = Evaluate(
        perplexity={"data": DATA, "seq_len": 40, "max_rows": 2},
        zero_shot={"data": {"source": "hub"}, "tasks": ["piqa"], "limit": 3},
    )
    study = Study(main=MAIN, sensitivity="1blocks", tasks=["winogrande"], tasks_limit=2,
                  wikitext={"seq_len": 30, "max_rows": 1})  # fmt: skip

    def evaluate():
        dense = Checkpoint(world.root / "model", "float32", "cpu", False)
        evaluate_study(
            dense, wanted, world.root / "sources", world.root / "results", world.root / "store",
            settings=asked, study=study, observer=SilentObserver(),
        )  # fmt: skip
        settings = {name: Speed(prompt_tokens=4, new_tokens=n, repeats=2) for name, n in (("main", 3), ("timed", 2))}
        time_study(
            dense, wanted, world.root / "speed", world.root / "store",
            settings=settings, observer=SilentObserver(),
        )  # fmt: skip
        return files(world.root / "results") | files(world.root / "speed")

    first = evaluate()
    models = read_json(world.root / "results" / "models.json")
    assert list(models) == ["dense", *unique(wanted)]
    items = pq.read_table(world.root / "results" / "items.parquet").to_pylist()
    changed = {c.name for c in wanted if c.plan.kind != "mask"}
    assert {name for name, model in models.items() if model.get("making_seconds", 0) > 0} == changed != set()
    for name, model in models.items():
        main = name == "dense" or unique(wanted)[name].main
        assert set(model["tasks"]) == ({"piqa", "winogrande"} if main else {"piqa"})
        assert set(model["perplexity"]) == ({"heldout", "wikitext2"} if main else {"heldout"})
        own = [item for item in items if item["model"] == name and item["task"] == "piqa"]
        assert sum(item["acc_norm"] for item in own) / 3 == pytest.approx(model["tasks"]["piqa"]["value"])
    timed = read_json(world.root / "speed" / "speed.json")
    assert set(timed["dense"]) == {"main", "timed"} and set(timed[wanted[0].name]) == {"main", "timed"}
    assert set(timed[wanted[1].name]) == {"timed"}
    assert len(timed["dense"]["main"]["dense"]["decode_seconds"]["samples"]) == 2

    def no_model(*args, **kwargs):
        raise AssertionError("a model was loaded although everything is stored")

    monkeypatch.setattr(suite, "load_model", no_model)
    assert evaluate() == first


def test_models_of_a_study_are_healed_once_and_measured_as_they_would_be_alone(world, tmp_path):
    """The oracle: the same compensation and the same training, called by hand, in the pruned model's plain forwards."""
    study = {
        "main": MAIN,
        "curve": [],
        "partial": [],
        "heal": [{"methods": ["blockpruner"], "budgets": ["2blocks"], "train": True}],
    }
    recipe = {"data": DATA, "num_rows": 4, "seq_len": 16, "validation": 0, "weights": "all", "distill": 1.0}
    run = Run(
        model=MODEL | {"dtype": "float32"}, calibration=VARIANTS[0].calibration, study=study, train=recipe,
        compensate={"num_rows": 8, "seq_len": 16, "validation": 0.25},
    )  # fmt: skip
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "model").symlink_to(world.root / "model")
    (folder / "plans").symlink_to(world.root / "plans")
    healer = Healer(run, world.setting.texts, folder, tmp_path / "states", "cpu", SilentObserver())
    healer.heal_all()
    fitted, trained = cures(run)
    assert (fitted.train, trained.train) == (False, True)
    plan, rows = (
        load_plans(folder / "plans", VARIANTS[0])["2blocks"],
        CalibrationSet.load(world.root / "plans" / "blockpruner" / "rows.parquet"),
    )
    dense = Checkpoint(folder / "model", "float32", "cpu", False)
    own = compensate(load_model(folder / "model", "float32", "cpu"), plan, healer.fit, 2, "refit", SilentObserver())
    found = {cure.train: healed_of(folder / "healed", cure) for cure in (fitted, trained)}
    assert own.weights and found[True]["digest"] not in (None, found[False]["digest"])
    weights, _ = read_tensors(folder / "healed" / fitted.slug / FILE)
    assert weights.keys() == own.weights.keys() and all(
        torch.equal(weights[name], own.weights[name]) for name in weights
    )

    def nll(cure):
        made = Candidate(
            cure.of(plan),
            rows,
            True,
            healed=found[cure.train]["digest"],
            weights=folder / "healed" / cure.slug / FILE,
        )
        return full_nll(CandidateModel(dense, made).model, healer.fit.rows[0])

    before = full_nll(dense.model, healer.fit.rows[0])
    assert nll(trained) != nll(fitted)
    path = folder / "healed" / fitted.slug / FILE
    healed = CandidateModel(dense, Candidate(fitted.of(plan), rows, healed="digest", weights=path)).model
    own = {id(weight) for weight in dense.model.parameters()}
    assert {name for name, weight in healed.named_parameters() if id(weight) not in own} == weights.keys()
    assert full_nll(dense.model, healer.fit.rows[0]) == before  # the dense model keeps its weights
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("healed/*/*")}
    Healer(run, world.setting.texts, folder, tmp_path / "states", "cpu", SilentObserver()).heal_all()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("healed/*/*")} == kept
    (path,) = folder.glob(f"healed/{trained.slug}/{FACTS}")
    path.write_text(path.read_text().replace('"digest": "', '"digest": "0'))
    with pytest.raises(InputError, match=f"{FACTS} is damaged"):
        healed_of(folder / "healed", trained)
