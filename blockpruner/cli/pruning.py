"""`blockpruner prune` and `apply`: the pipeline for one model and one budget, in one process.

Decides where things are kept, and that a folder which holds something else is never replaced. Torch
is loaded only when something must be computed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blockpruner import pipeline
from blockpruner.checkpoints.registry import EXPORTS, require_families, require_packages
from blockpruner.checks import check_run
from blockpruner.cli.values import called, model_of
from blockpruner.core.errors import InputError, named
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import (
    HubModel,
    LocalModel,
    LocalTexts,
    MixedTexts,
    Model,
    Runtime,
    Texts,
    merged,
    read_settings,
)
from blockpruner.evaluation.kinds import Loss, in_words
from blockpruner.evaluation.settings import Perplexity
from blockpruner.healing.settings import Train
from blockpruner.inputs.calibration import CalibrationSet, check_context
from blockpruner.inputs.checkpoints import (
    cached_checkpoint,
    checkpoint_identity,
    checkpoint_weights,
    fetch_config,
    require_unchanged,
)
from blockpruner.inputs.hub import COMMIT, HubError, pinned_revision
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.sources import shipped_texts
from blockpruner.inputs.texts import by_kind, judging_texts, load_texts
from blockpruner.inputs.tokenizers import conversation, load_tokenizer
from blockpruner.methods.blocks.kind import require_of
from blockpruner.methods.recipes import DRAWN, compensation, is_judged, require_reached
from blockpruner.methods.registry import KINDS
from blockpruner.methods.score import open_material
from blockpruner.settings import Run
from blockpruner.store.files import clear_left, read_json, remove_temporaries, set_aside
from blockpruner.store.locks import hold, this_process
from blockpruner.store.manifest import require_verified
from blockpruner.store.plans import PLAN_FILE, load_plan, plan_fields, unmeasured
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import PLAN_VERSION, SCORE_VERSION, SEARCH_VERSION, WEIGHTS_VERSION

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning


@dataclass(frozen=True)
class Place:
    root: Path
    """The folder of all trial stores, of models as fetched, traces, plans and healed weights."""
    device: str
    observer: Observer
    export: str = ""
    """Formats beside `hf`, as in `--export`."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Values of `runtime` other than the device."""

    @property
    def _asked(self) -> dict[str, tuple[str, ...]]:
        """The formats, each with what its files are quantized to. A format may be named by an
        engine that loads it."""
        engines = {
            engine.lower(): row.name
            for row in reversed([*EXPORTS.values()])
            for engine in row.engines
        }
        found: dict[str, tuple[str, ...]] = {"hf": ()}
        for form, _, quantization in (
            part.strip().partition(":") for part in self.export.split(",") if part.strip()
        ):
            name = engines.get(form.lower(), form)
            if quantization and name != "gguf":
                raise InputError(
                    f"export {form}:{quantization}: only gguf has quantizations, as in gguf:Q4_K_M"
                )
            found[name] = (*found.get(name, ()), *([quantization.upper()] if quantization else []))
        return found

    def read_run(
        self, model: str | None, sections: Mapping[str, Any], *, computes: bool = False
    ) -> Run:
        """The settings of a run file; raises InputError for a model, name or value that is not
        valid.

        The model has its own dtype; but where it is None, and `sections` name one, they decide as a
        run file does.

        Args:
            computes: whether another dtype may be computed in (`rates.fast_dtype`), where the user
                names none.
        """
        given = {} if model is None else model_of(model)
        run = read_settings(
            Run,
            merged({"export": list(self._asked)}, sections)
            | {"model": merged(given, sections.get("model", {}))},
        )
        require_packages(run.export)
        config = self.config_of(run)
        if "vllm" in self.export.lower() and not FAMILIES[str(config["model_type"])].in_vllm:
            raise InputError(
                f"export vllm: vLLM runs no pruned {config['model_type']} models; leave it out"
            )
        require_families(run.export, config)
        is_auto = model is not None and "dtype" not in run.model.model_fields_set
        heldout = fitted(run.evaluate.perplexity, config, "evaluate.perplexity.seq_len")
        own: dict[str, Any] = {
            "train": run.train and run.train.fitted(config.get("max_position_embeddings"))
        }
        own |= {"model": self._in_dtype(run, config, is_auto, computes)}
        own |= {"calibration": fitted(run.calibration, config, "calibration.seq_len")}
        run = run.model_copy(
            update=own | {"evaluate": run.evaluate.model_copy(update={"perplexity": heldout})}
        )
        check_run(run)
        self._runtime.model_dump()  # checked before anything is computed
        self.checked_formats()
        return run

    def _in_dtype(self, run: Run, config: Config, is_auto: bool, computes: bool) -> Model:
        """The model with the dtype that is computed in; it is set where the user has named one."""
        if not is_auto:
            return run.model.model_copy(update={"dtype": run.model.dtype})
        own = found = own_dtype(config)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # in float32, and half of that for states
        if computes and 6 * count_parameters(config).total < memory:
            from blockpruner.model.rates import fast_dtype

            found = fast_dtype(own, self.device, self.root)
        if found != own:
            self.observer.note(
                f"{own} is slow on this CPU: {found} is computed in (with --dtype {own} not)"
            )
        return type(run.model).model_construct(
            run.model.model_fields_set, **{**dict(run.model), "dtype": found}
        )

    def checked_formats(self) -> Mapping[str, Sequence[str]]:
        """The formats, each with its quantizations, which this machine can make; raises
        InputError."""
        if quantizations := self._asked.get("gguf"):
            from blockpruner.checkpoints.gguf import require_quantizations

            require_quantizations(quantizations)
        return self._asked

    def prune(
        self, run: Run, budget: str, out: Path, max_loss: float | None = None
    ) -> dict[str, Any]:
        """Every step of the pipeline, as far as it was not done before. Raises InputError before
        the export if a kind of text loses more than `max_loss`."""
        from blockpruner.healing import choice
        from blockpruner.methods.healed import COMPENSATE_FACTS

        config, method = self.config_of(run), compensation(run.compensate.method, run.score.method)
        require_reached(run.score, config, budget)
        judged = is_judged(run.score.method, method) or max_loss is not None
        pool, dense = self._pool(run, judged), self.fetch(run)
        tokenizer, base = (
            load_tokenizer(dense, run.model.trust_remote_code),
            checkpoint_identity(dense),
        )
        wanted = run.calibration, run.compensate, run.train
        rows = pipeline.calibrate(
            *wanted, pool, tokenizer, config, self._note, judged=judged, at_most=True
        )
        key = self._key(run, rows, method, base, budget)
        healed, traces = self.root / "compensated" / key, self.root / "searches" / key
        with (
            self._alone(key, "searches and fits the same"),
            open_material(dense, run.model, self._runtime, self.root, self.observer) as material,
        ):
            is_kept = self._is_kept(healed, choice.PLAN, COMPENSATE_FACTS)
            kept = (
                replace(load_plan(healed / choice.PLAN), train=run.train is not None)
                if is_kept
                else None
            )
            for place in self._places(run, out).values():  # before a search
                _is_there(place, kept)
            if not is_kept:
                pipeline.require_room(
                    config, run.model.dtype, self._runtime, run.score, method, run.train, budget
                )
            pipeline.require_fit(rows, run.compensate, method)
            latency = partial(
                pipeline.latency, material, traces, dense, run.model, run.score, self._runtime
            )
            counts = pipeline.score(material, rows, run.score, [budget], traces, latency)
            if not is_kept:
                found = pipeline.commit(
                    traces,
                    run.score,
                    config,
                    budget,
                    rows,
                    target="",
                    run=run.model.title,
                    compensate=method,
                    dense=dense,
                )
                best = pipeline.heal(material.dense, found, rows, self.observer)
                data = run.compensate.data or run.calibration.data
                choice.keep(healed, best, self._pruning(run, dense, best.plan, rows.search), data)
        pruning = self._healed(
            run, dense, replace(load_plan(healed / choice.PLAN), target=out.name), rows, [healed]
        )
        facts = read_json(healed / COMPENSATE_FACTS)
        told = {"compensated": facts["perplexity"]} if "perplexity" in facts else {}
        if run.train is not None:
            pruning = replace(pruning, plan=replace(pruning.plan, train=True))
            trained = self._train(run.train, pruning, rows)
            pruning = self._healed(run, dense, pruning.plan, rows, [trained])
            assert pruning.healed is not None
            if "training" in pruning.healed.perplexity:
                told["trained"] = pruning.healed.perplexity["training"]
        pipeline.require_kept(pruning.plan, max_loss)
        is_mixed = isinstance(run.calibration.data, MixedTexts)
        own = [] if is_mixed else [kind.name for kind in by_kind(pool.search) if kind]
        return self._export(run, pruning, out) | {
            "search": counts,
            "perplexity": told,
            "only_kinds": own,
        }

    def _note(self, message: str) -> None:
        """A line, with this command's names for the keys in it."""
        self.observer.note(called(message, "", {"--set"}))

    def look(self, run: Run, out: Path) -> None:
        """Raise InputError for what a dry run can see: bad texts on this machine, or a place that
        is taken."""
        given = (run.calibration.data, run.compensate.data, run.train and run.train.data)
        for data in (
            one for each in given for one in (each.of if isinstance(each, MixedTexts) else (each,))
        ):
            if isinstance(data, LocalTexts):
                load_texts(data, self.root / "cache", self.pins, lambda messages: "")
        for place in self._places(run, out).values():
            if not (place / PLAN_FILE).is_file():
                _is_there(place, None)

    def _pool(self, run: Run, judged: bool) -> pipeline.Pool:
        """The texts of a run, if it is `judged` also those that judge. The held-out ones count
        where a run file names them."""
        tokenizer = cache(lambda: load_tokenizer(self.fetch(run), run.model.trust_remote_code))

        @cache
        def load(data: Texts | None) -> list[str] | None:
            written = partial(conversation, tokenizer)
            return (
                None if data is None else load_texts(data, self.root / "cache", self.pins, written)
            )

        heldout, texts = run.evaluate.perplexity, load(run.calibration.data)
        judge = judging_texts(self._shipped(load)) if judged else ()
        pool = pipeline.Pool(
            texts or (), load(run.compensate.data), load(run.train and run.train.data), judge
        )
        if "data" not in heldout.model_fields_set:
            return pool
        from blockpruner.evaluation.perplexity import held_out

        return replace(
            pool, evaluated=held_out(tokenizer(), load(heldout.data) or (), heldout).documents
        )

    def _shipped(self, load: Callable[[Texts], Sequence[str] | None]) -> Sequence[str]:
        """Our own texts; none, and a note, where they cannot be fetched and nothing but the judging
        asks for them."""
        try:
            return load(shipped_texts()) or ()
        except InputError as error:
            self.observer.note(f"warning: what other kinds of text lose is not judged: {error}")
            return ()

    def _key(self, run: Run, rows: pipeline.Rows, method: str, base: str, budget: str) -> str:
        """What decides the compensated model."""
        facts = run.model_dump(
            mode="json", include={"score": True, "compensate": True, "model": {"dtype"}}
        )
        digests = [
            *(part.digest for part in (rows.search, rows.fit, rows.tuning, rows.judge)),
            *rows.judge.kinds,
        ]
        version = [SCORE_VERSION, SEARCH_VERSION, PLAN_VERSION, WEIGHTS_VERSION]
        return fingerprint(
            {
                **facts,
                "method": method,
                "base": base,
                "rows": digests,
                "budget": budget,
                "version": version,
            }
        )

    def _healed(
        self, run: Run, dense: Path, plan: Plan, rows: pipeline.Rows, folders: Sequence[Path]
    ) -> "Pruning":
        from blockpruner.methods.healed import find_healed

        pruning = self._pruning(run, dense, plan, rows.search)
        healed = find_healed(folders, pruning.identity)
        return replace(pruning, healed=healed, plan=healed.plan(plan) if healed else plan)

    def _train(self, wanted: Train, pruning: "Pruning", rows: pipeline.Rows) -> Path:
        """The folder of trained weights; a killed training continues."""
        from blockpruner.methods.healed import TRAIN_FACTS

        facts = {
            "of": pruning.identity,
            "since": pruning.healed and pruning.healed.digest,
            "rows": [rows.train.digest, rows.validation.digest],
            "recipe": wanted.model_dump(mode="json"),
            "version": WEIGHTS_VERSION,
            "judge": rows.judge.digest,
        }
        folder = self.root / "trained" / fingerprint(facts)
        with self._alone(folder.name, "trains the same"):
            if not self._is_kept(folder, TRAIN_FACTS):
                states, workers = self.root / "training", self._runtime.here
                pipeline.train(pruning, wanted, rows, states, folder, self.observer, workers)
        return folder

    def _alone(self, name: str, work: str) -> AbstractContextManager[int]:
        """Hold the lock of a piece of work in the cache: of equal commands one computes, and the
        others wait."""
        note = self.observer.note
        lock = self.root / "cache/locks" / name
        return hold(lock, this_process(), lambda holder: note(f"{holder} {work}; waiting for it"))

    def _is_kept(self, folder: Path, *facts: str) -> bool:
        """Whether a folder of healed weights, whose lock is held, is whole. One that is not is set
        aside, and a line reports that; what a killed writer left beside it is removed."""
        from blockpruner.methods.healed import FILE, has_weights
        from blockpruner.store.tensors import read_tensors

        remove_temporaries(folder.parent, f".{folder.name}.*.tmp")
        if not folder.exists():
            return False
        try:
            for name in facts:
                read_json(folder / name)
            if has_weights(folder):
                read_tensors(folder / FILE)
        except InputError:
            old = set_aside(folder).name
            self.observer.note(
                f"warning: {folder} is not whole: it is made again; {old} is the old one"
            )
            return False
        return True

    @property
    def _runtime(self) -> Runtime:
        return read_settings(Runtime, {"device": self.device, **self.runtime}, section="runtime.")

    def apply(self, run: Run, path: Path, out: Path) -> dict[str, Any]:
        file, plan = read_plan(path)
        if not KINDS[plan.kind].is_part:
            words = (
                f"of a model with other weights (method: {plan.method}), which a plan does not hold"
            )
            raise InputError(f"{file} is {words}; run prune again: scores are kept")
        if plan.compensate != "none" or plan.train:
            refit = plan.compensate if plan.compensate != "none" else "no refit"
            healing = f"{refit}{', trained' * plan.train}"
            words = "a plan holds no weights: this model loses the same parts, but is not healed"
            self.observer.note(f"{words} ({healing})")
            plan = replace(plan, compensate="none", train=False)
        run, dense = self.fetch_base(run, file, plan)
        plan = unmeasured(plan)  # what its author has measured, nobody has measured here
        shares = {name: share for name, share in plan.removes.items() if name != "latency"}
        plan = replace(plan, removes=shares, weights=checkpoint_weights(dense))
        return self._export(
            run, self._pruning(run, dense, replace(plan, target=out.name), CalibrationSet(())), out
        )

    def fetch(self, run: Run) -> Path:
        """The folder of the run's dense model, as fetched."""
        return cached_checkpoint(run.model, self.root / "cache", self.pins, self.observer.note)

    def fetch_base(self, run: Run, file: Path, plan: Plan) -> tuple[Run, Path]:
        """The dense model that a plan's file is of, as fetched, and the run with its revision;
        raises InputError for another model, or a plan that does not follow from what it removes."""
        if plan.base is None:
            raise InputError(
                f"{file} does not name its base model; give a plan that `blockpruner prune` has"
                " written"
            )
        repo, at, commit = plan.base.partition("@")
        is_own = isinstance(run.model, HubModel) and run.model.repo == repo
        if at:
            run = self._at_commit(run, file, repo, commit)
        with named(f"{file}: "):
            config = self.config_of(run)
            require_of(plan, config, run.model.title, KINDS[plan.kind].pruned(plan, config))
        dense = self.fetch(run)
        found = checkpoint_weights(dense) if at else checkpoint_identity(dense)
        if at and plan.weights is None and not is_own:
            self.observer.note(
                f"{file} is for {repo}; of {run.model.title} only the shape was compared"
            )
        if found != (plan.weights or found if at else plan.base):
            other = f"its base is {plan.base}, and {run.model.title} is by content {found}"
            message = (
                f"{file} is of another model: {other}; give the model that the plan was made for"
            )
            raise InputError(message, rule="plan-of-other-model", key="base", value=plan.base)
        return run, dense

    def _at_commit(self, run: Run, file: Path, repo: str, commit: str) -> Run:
        """The run with the revision that a plan names, if it is of the plan's repository. Code of
        it is run, or a revision of the user's own replaced, only if that is the same commit; raises
        InputError otherwise."""
        if not COMMIT.fullmatch(commit):
            message = (
                f"{file} names the revision {commit!r} of {repo}, which may be anybody's; valid: 40"
                " hex digits"
            )
            raise InputError(message, rule="plan-revision", key="base", value=commit)
        if not isinstance(run.model, HubModel) or run.model.repo != repo:
            return run
        if not run.model.trust_remote_code and run.model.revision is None:
            self.observer.note(f"weights of commit {commit}, because {file} names it")
            return run.model_copy(
                update={"model": run.model.model_copy(update={"revision": commit})}
            )
        own = pinned_revision(repo, "model", run.model.revision, self.pins)
        if own != commit:
            raise InputError(
                f"{file} is for commit {commit} of {repo}, and yours is {own}, which counts where"
                " you name a revision or trust its code; leave that out, or fetch the plan's"
                " commit yourself and give its folder",
                rule="plan-revision",
                key="trust_remote_code",
                value=True,
            )
        return run

    @property
    def pins(self) -> Path:
        return self.root / "pins.json"

    def config_of(self, run: Run) -> Config:
        if not isinstance(run.model, HubModel | LocalModel):
            return dict(read_json(self.fetch(run) / "config.json"))
        try:
            return fetch_config(run.model, self.pins)
        except HubError as error:
            raise InputError(f"there is no folder {run.model.title!r} here, and {error}") from error

    def _pruning(self, run: Run, dense: Path, plan: Plan, rows: CalibrationSet) -> "Pruning":
        from blockpruner.methods.apply import Pruning  # loads torch

        require_unchanged(dense)
        return Pruning(
            dense, plan, rows, run.model.dtype, self._runtime.device, run.model.trust_remote_code
        )

    def _places(self, run: Run, out: Path) -> dict[str, Path]:
        return {
            form: out if form == "hf" else out.with_name(f"{out.name}-{form}")
            for form in run.export
        }

    def _export(self, run: Run, pruning: "Pruning", out: Path) -> dict[str, Any]:
        words, places = (
            "" if pruning.healed is None else pruning.healed.words,
            self._places(run, out),
        )
        with self._alone(fingerprint({"out": str(out)}), f"writes {out}"):
            for place in places.values():
                clear_left(place)
            files = {
                form: [places[form] / f"model-{name}.gguf" for name in more]
                for form, more in self._asked.items()
            }
            missing = {
                form: place
                for form, place in places.items()
                if not _is_there(place, pruning.plan, words)
            }
            kept = [file for form in files.keys() - missing.keys() for file in files[form]]
            for lacking in (file for file in kept if not file.exists()):
                fix = "remove that folder and run again, or choose another --out: scores are kept"
                message = (
                    f"{lacking.parent} was written without {lacking.name}, and nothing is replaced;"
                    f" {fix}"
                )
                raise InputError(
                    message, rule="place-not-empty", key="out", value=str(lacking.parent)
                )
            own = (
                run.model.dtype
                if "dtype" in run.model.model_fields_set
                else own_dtype(self.config_of(run))
            )
            pipeline.export(replace(pruning, dtype=own), missing, self._asked)
        told = {
            "plan": plan_fields(pruning.plan),
            "taken_out": KINDS[pruning.plan.kind].taken_out(pruning.plan),
        }
        return told | {"written": [pipeline.exported(*each) for each in places.items()]}


T = TypeVar("T", Calibration, Perplexity)


def fitted(given: T, config: Config, key: str) -> T:
    """The same, its rows as long as the model's context at most; raises InputError if longer ones
    were asked for."""
    # and not what the user asks for
    is_most = given.packing == "per_sample" or given.seq_len == DRAWN["seq_len"]
    if "seq_len" in given.model_fields_set and not is_most:
        check_context(given.seq_len, dict(config), key)
    length = min(given.seq_len, config.get("max_position_embeddings") or given.seq_len)
    return given.model_copy(update={"seq_len": length})


def read_plan(path: Path) -> tuple[Path, Plan]:
    """A plan's file, and the plan; raises InputError if there is none at the path or in its
    folder."""
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there is no plan at {str(path)!r}; give a {PLAN_FILE}, or a folder that prune has"
            " written"
        )
    return file, load_plan(file)


LLAMA_CPP_COUNTS = (
    "llama.cpp counts the layers of Gemma, OLMo 3, EXAONE 4, Cohere 2 and SmolLM3 to know how each"
    " attends: there the result is wrong, unless the layers that are left alternate as before"
)


def llama_cpp_option(path: Path) -> str:
    """The option by which llama.cpp's `llama-quantize` takes a plan's layers out of any GGUF file
    of its dense model, without compensation; raises InputError for a plan that removes anything but
    whole layers."""
    plan = read_plan(path)[1]
    layers = sorted({block.layer for block in plan.mask})
    if plan.kind != "mask" or plan.cut.channels or len(plan.mask) != 2 * len(layers):
        raise InputError(
            f"plan {str(path)!r} does not remove whole layers alone, as llama-quantize does; search"
            " with --unit layer, or export gguf",
            rule="not-whole-layers",
        )
    return f"--prune-layers {','.join(map(str, layers))}"


def own_dtype(config: Config) -> str:
    """The dtype of a model's weights as its config says; float32 where it does not."""
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in ("bfloat16", "float16", "float64") else "float32"


def _is_there(place: Path, plan: Plan | None, words: str | None = None) -> bool:
    """Whether a folder holds the whole checkpoint of a plan; raises InputError if it holds anything
    else, or cannot be made.

    Args:
        plan: None where it is not known yet.
        words: what the model card says of healing (`Healed.words`); None: they are not compared.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        beside = next(folder for folder in place.absolute().parents if folder.exists())
        if not (beside.is_dir() and os.access(beside, os.W_OK | os.X_OK)):
            message = f"--out {place}: nothing can be written in {beside}; choose another place"
            raise InputError(message, rule="no-place", key="out", value=str(place))
        return False
    file = place / PLAN_FILE
    held = load_plan(file) if file.is_file() else None
    card = place / "README.md"
    other = words is not None and card.exists() and words not in card.read_text(encoding="utf-8")
    if (
        held is None
        or plan is None
        or other
        or replace(held, target=plan.target, kinds=plan.kinds) != plan
    ):
        message = (
            f"--out {place} is not empty and holds something else; choose another folder, or"
            " remove it"
        )
        raise InputError(message, rule="place-not-empty", key="out", value=str(place))
    require_verified(place)
    return True


def words(found: Mapping[str, Any]) -> str:
    plan, seen = found["plan"], found["plan"]["calibration"]
    lines = [
        f"removed {plan['ratio']:.1%} of the parameters:"
        f" {', '.join(plan['order']) or found['taken_out']}"
    ]
    if seen.get("perplexity"):
        lines.append(
            f"perplexity of the calibration texts: {seen['dense_perplexity']:.2f} ->"
            f" {seen['perplexity']:.2f}"
        )
    for name, told in found.get("perplexity", {}).items():
        known = told.get("dense")
        dense = f", dense {known:.2f} ({told['after'] / known:.2f} times)" if known else ""
        lines.append(
            f"{name}: perplexity of texts set aside {told['before']:.2f} ->"
            f" {told['after']:.2f}{dense}"
        )
    if not found.get("perplexity") and not plan["train"] and plan["compensate"] == "none":
        lines.append("no weight was fitted again: --compensate refit makes up for part of the loss")
    plan_kinds, only = plan.get("kinds") or {}, found.get("only_kinds", ())
    kinds, warning = in_words(plan_kinds)
    lines += [f"perplexity of texts set aside, {kind}: {lost}" for kind, lost in kinds]
    lines += [f"warning: {warning}"] if warning else []
    for each in found["written"]:
        checked = (
            "checked in a fresh process of {}"
            if each["verified"]
            else "unchecked: {} is not installed here"
        )
        lines.append(
            f"{each['path']}: for {', '.join(each['for'])}, {checked.format(each['verified_by'])}"
        )
    own, others = (
        {k: v for k, v in plan_kinds.items() if (k in only) is wanted} for wanted in (True, False)
    )
    if own and others:
        lost = (
            f"they lost {Loss.of(own).mean:.2f} times, other texts {Loss.of(others).mean:.2f} times"
            " on average"
        )
        lines.append(
            f"only your texts decided: {lost}; without --only-texts, ours are half of those that"
            " decide"
        )
    return "\n".join(lines)
