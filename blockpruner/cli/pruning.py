"""`blockpruner prune` and `apply`: the pipeline for one model and one budget, in one process.

Decides where results are kept, and that a folder which holds something else is never replaced.
Torch is loaded only when something must be computed.
"""

import os
from collections.abc import Mapping, Sequence
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
from blockpruner.inputs.texts import by_kind, load_texts
from blockpruner.inputs.tokenizers import conversation, load_tokenizer
from blockpruner.methods.blocks.kind import require_of
from blockpruner.methods.recipes import DRAWN, compensation, is_judged, require_reached
from blockpruner.methods.registry import KINDS
from blockpruner.methods.score import open_material
from blockpruner.settings import Run
from blockpruner.store.files import clear_left, read_json, remove_temporaries, set_aside
from blockpruner.store.locks import hold, this_process
from blockpruner.store.manifest import CARD_FILE, require_verified
from blockpruner.store.plans import PLAN_FILE, load_plan, plan_fields, unmeasured
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import PLAN_VERSION, SCORE_VERSION, SEARCH_VERSION, WEIGHTS_VERSION

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning


@dataclass(frozen=True)
class Workspace:
    """The folder in which the command keeps its work, and the options of one command."""

    root: Path
    """The folder of all trial stores, of models as fetched, traces, plans and healed weights."""
    device: str
    observer: Observer
    export: str = ""
    """Formats in addition to `hf`, as in `--export`."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Values of `runtime` other than the device."""

    @property
    def formats(self) -> dict[str, tuple[str, ...]]:
        """The formats, each with the types to which its files are quantized. A format may be named
        by an engine that loads it."""
        format_by_engine: dict[str, str] = {}
        for row in EXPORTS.values():
            for engine in row.engines:
                format_by_engine.setdefault(engine.lower(), row.name)
        types_by_format: dict[str, tuple[str, ...]] = {"hf": ()}
        for text in filter(None, map(str.strip, self.export.split(","))):
            name, _, quantization = text.partition(":")
            form = format_by_engine.get(name.lower(), name)
            types = types_by_format.setdefault(form, ())
            if not quantization:
                continue
            if form != "gguf":
                raise InputError(f"export {text}: only gguf has quantizations, as in gguf:Q4_K_M")
            types_by_format[form] = (*types, quantization.upper())
        return types_by_format

    def require_formats(self) -> None:
        """Refuse a quantization that this machine cannot make; raises InputError."""
        quantizations = self.formats.get("gguf")
        if quantizations:
            from blockpruner.checkpoints.gguf import require_quantizations

            require_quantizations(quantizations)

    def read_run(
        self, model: str | None, sections: Mapping[str, Any], *, computes: bool = False
    ) -> Run:
        """The settings of a run; raises InputError for a model, name or value that is not valid.

        Args:
            model: the model as a command names it, in its own dtype. If it is None, or `sections`
                set a dtype, they decide as a run file does.
            sections: values of a run file.
            computes: whether another dtype may be computed in (`rates.fast_dtype`), where the user
                names none.
        """
        source = {} if model is None else model_of(model)
        values = merged({"export": list(self.formats)}, sections)
        values["model"] = merged(source, sections.get("model", {}))
        run = read_settings(Run, values)
        require_packages(run.export)
        config = self.config_of(run)
        if "vllm" in self.export.lower() and not FAMILIES[str(config["model_type"])].in_vllm:
            raise InputError(
                f"export vllm: vLLM runs no pruned {config['model_type']} models; leave it out"
            )
        require_families(run.export, config)
        heldout = fitted(run.evaluate.perplexity, config, "evaluate.perplexity.seq_len")
        calibration = fitted(run.calibration, config, "calibration.seq_len")
        is_auto = model is not None and "dtype" not in run.model.model_fields_set
        changes = {
            "train": run.train and run.train.fitted(config.get("max_position_embeddings")),
            "model": self._with_dtype(run, config, is_auto, computes),
            "calibration": calibration,
            "evaluate": run.evaluate.model_copy(update={"perplexity": heldout}),
        }
        run = run.model_copy(update=changes)
        check_run(run)
        self.runtime_settings.model_dump()  # checked before anything is computed
        self.require_formats()
        return run

    def _with_dtype(self, run: Run, config: Config, is_auto: bool, computes: bool) -> Model:
        """The model with the dtype that is computed in. The field counts as set where the user has
        named a dtype; exports are in the model's own dtype otherwise."""
        if not is_auto:
            return run.model.model_copy(update={"dtype": run.model.dtype})
        stored = computed = own_dtype(config)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Float32 takes 4 bytes a parameter, and the hidden states about half of that.
        if computes and 6 * count_parameters(config).total < memory:
            from blockpruner.model.rates import fast_dtype

            computed = fast_dtype(stored, self.device, self.root)
        if computed != stored:
            self.observer.note(
                f"{stored} is slow on this CPU: {computed} is computed in (with --dtype {stored}"
                " not)"
            )
        values = {**dict(run.model), "dtype": computed}
        return type(run.model).model_construct(run.model.model_fields_set, **values)

    def prune(
        self, run: Run, budget: str, out: Path, max_loss: float | None = None
    ) -> dict[str, Any]:
        """Do every step of the pipeline that no earlier command has done; returns what `--json`
        prints. Raises InputError before the export if a kind of text loses more than `max_loss`."""
        from blockpruner.healing.choice import PLAN
        from blockpruner.methods.healed import COMPENSATE_FACTS

        config = self.config_of(run)
        method = compensation(run.compensate.method, run.score.method)
        require_reached(run.score, config, budget)  # before anything is downloaded
        judged = is_judged(run.score.method, method) or max_loss is not None
        pool = self._pool(run, judged)
        dense = self.fetch(run)
        rows = pipeline.calibrate(
            run.calibration,
            run.compensate,
            run.train,
            pool,
            load_tokenizer(dense, run.model.trust_remote_code),
            config,
            self._note,
            judged=judged,
            at_most=True,
        )
        healed, counts = self._search_and_heal(run, dense, rows, method, budget, out)
        plan = replace(load_plan(healed / PLAN), target=out.name)
        pruning = self._healed(run, dense, plan, rows, healed)
        perplexities = {}
        facts = read_json(healed / COMPENSATE_FACTS)
        if "perplexity" in facts:
            perplexities["compensated"] = facts["perplexity"]
        if run.train is not None:
            pruning = replace(pruning, plan=replace(pruning.plan, train=True))
            trained = self._train(run.train, pruning, rows)
            pruning = self._healed(run, dense, pruning.plan, rows, trained)
            assert pruning.healed is not None
            if "training" in pruning.healed.perplexity:
                perplexities["trained"] = pruning.healed.perplexity["training"]
        pipeline.require_kept(pruning.plan, max_loss)
        only_kinds = []
        if not isinstance(run.calibration.data, MixedTexts):
            only_kinds = [kind.name for kind in by_kind(pool.search) if kind]
        return self._export(run, pruning, out) | {
            "search": counts,
            "perplexity": perplexities,
            "only_kinds": only_kinds,
        }

    def _search_and_heal(
        self, run: Run, dense: Path, rows: pipeline.Rows, method: str, budget: str, out: Path
    ) -> tuple[Path, dict[str, dict[str, Any]]]:
        """The folder of the compensated model, which is made if it is not kept; and by search what
        was computed."""
        from blockpruner.healing import choice
        from blockpruner.methods.healed import COMPENSATE_FACTS

        config = self.config_of(run)
        key = self._key(run, rows, method, checkpoint_identity(dense), budget)
        healed, traces = self.root / "compensated" / key, self.root / "searches" / key
        with (
            self._alone(key, "searches and fits the same"),
            open_material(
                dense, run.model, self.runtime_settings, self.root, self.observer
            ) as material,
        ):
            is_kept = self._is_whole(healed, choice.PLAN, COMPENSATE_FACTS)
            plan = load_plan(healed / choice.PLAN) if is_kept else None
            # Before a search that may take hours: each folder is free, or holds this very model.
            for folder in self._folders(run, out).values():
                holds_checkpoint(folder, plan and replace(plan, train=run.train is not None))
            if not is_kept:
                pipeline.check(
                    rows,
                    config,
                    run.model.dtype,
                    self.runtime_settings,
                    run.score,
                    run.compensate,
                    method,
                    run.train,
                    budget,
                )
            latency = partial(
                pipeline.latency,
                material,
                traces,
                dense,
                run.model,
                run.score,
                self.runtime_settings,
            )
            # Kept searches are read again: their counts are part of the result.
            counts = pipeline.score(material, rows, run.score, [budget], traces, latency)
            if not is_kept:
                proposed = pipeline.commit(
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
                best = pipeline.heal(material.dense, proposed, rows, self.observer)
                data = run.compensate.data or run.calibration.data
                choice.keep(healed, best, self._pruning(run, dense, best.plan, rows.search), data)
        return healed, counts

    def _note(self, message: str) -> None:
        """Print a line, with this command's names for the keys in it."""
        self.observer.note(called(message, "", {"--set"}))

    def check_dry_run(self, run: Run, out: Path) -> None:
        """Raise InputError for what a dry run can see: bad texts on this machine, or a folder that
        is taken."""
        sources: list[Texts] = []
        for data in (run.calibration.data, run.compensate.data, run.train and run.train.data):
            sources += data.of if isinstance(data, MixedTexts) else [data] if data else []
        for data in sources:
            if isinstance(data, LocalTexts):
                load_texts(data, self.root / "cache", self.pins, lambda messages: "")
        for folder in self._folders(run, out).values():
            # Whose plan it is shows only after a search.
            if not (folder / PLAN_FILE).is_file():
                holds_checkpoint(folder, None)

    def _pool(self, run: Run, judged: bool) -> pipeline.Pool:
        """The texts of a run, also those that judge if it is `judged`. Held-out texts are kept
        apart where a run file names them."""
        tokenizer = cache(lambda: load_tokenizer(self.fetch(run), run.model.trust_remote_code))
        template = partial(conversation, tokenizer)

        @cache
        def load(data: Texts) -> list[str]:
            return load_texts(data, self.root / "cache", self.pins, template)

        fit_data = run.compensate.data
        train_data = run.train.data if run.train else None
        pool = pipeline.Pool(
            search=load(run.calibration.data),
            fit=load(fit_data) if fit_data else None,
            train=load(train_data) if train_data else None,
            judge=pipeline.our_judging_texts(load, self.observer.note) if judged else (),
        )
        heldout = run.evaluate.perplexity
        if "data" not in heldout.model_fields_set:
            return pool
        from blockpruner.evaluation.perplexity import held_out

        evaluated = held_out(tokenizer(), load(heldout.data), heldout).documents
        return replace(pool, evaluated=evaluated)

    def _key(self, run: Run, rows: pipeline.Rows, method: str, base: str, budget: str) -> str:
        """The fingerprint of all that decides the compensated model."""
        facts = run.model_dump(
            mode="json", include={"score": True, "compensate": True, "model": {"dtype"}}
        )
        splits = (rows.search, rows.fit, rows.tuning, rows.judge)
        facts |= {
            "method": method,
            "base": base,
            "rows": [*(split.digest for split in splits), *rows.judge.kinds],
            "budget": budget,
            "version": [SCORE_VERSION, SEARCH_VERSION, PLAN_VERSION, WEIGHTS_VERSION],
        }
        return fingerprint(facts)

    def _healed(
        self, run: Run, dense: Path, plan: Plan, rows: pipeline.Rows, folder: Path
    ) -> "Pruning":
        """The model of a plan with the weights of a folder, which may hold none."""
        from blockpruner.methods.healed import find_healed

        pruning = self._pruning(run, dense, plan, rows.search)
        healed = find_healed([folder], pruning.identity)
        return replace(pruning, healed=healed, plan=healed.plan(plan) if healed else plan)

    def _train(self, train: Train, pruning: "Pruning", rows: pipeline.Rows) -> Path:
        """The folder of trained weights; a killed training continues."""
        from blockpruner.methods.healed import TRAIN_FACTS

        facts = {
            "of": pruning.identity,
            "since": pruning.healed and pruning.healed.digest,
            "rows": [rows.train.digest, rows.validation.digest],
            "recipe": train.model_dump(mode="json"),
            "version": WEIGHTS_VERSION,
            "judge": rows.judge.digest,
        }
        folder = self.root / "trained" / fingerprint(facts)
        with self._alone(folder.name, "trains the same"):
            if not self._is_whole(folder, TRAIN_FACTS):
                states = self.root / "training"
                processes = self.runtime_settings.here
                pipeline.train(pruning, train, rows, states, folder, self.observer, processes)
        return folder

    def _alone(self, name: str, work: str) -> AbstractContextManager[int]:
        """Hold the lock of a piece of work in the cache: of equal commands one computes, and the
        others wait."""

        def waiting(holder: str) -> None:
            self.observer.note(f"{holder} {work}; waiting for it")

        return hold(self.root / "cache/locks" / name, this_process(), waiting)

    def _is_whole(self, folder: Path, *facts: str) -> bool:
        """Whether a folder of healed weights, whose lock is held, is there and undamaged. A damaged
        one is set aside, with a warning; what a killed writer left next to it is removed."""
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
            damaged = set_aside(folder).name
            self.observer.note(
                f"warning: {folder} is not whole: it is made again; {damaged} is the old one"
            )
            return False
        return True

    @property
    def runtime_settings(self) -> Runtime:
        return read_settings(Runtime, {"device": self.device, **self.runtime}, section="runtime.")

    def apply(self, run: Run, path: Path, out: Path) -> dict[str, Any]:
        """Write the checkpoint of a plan, without healing; returns what `--json` prints."""
        file, plan = read_plan(path)
        if not KINDS[plan.kind].is_part:
            raise InputError(
                f"{file} is of a model with other weights (method: {plan.method}), which a plan"
                " does not hold; run prune again: scores are kept"
            )
        if plan.compensate != "none" or plan.train:
            refit = "no refit" if plan.compensate == "none" else plan.compensate
            healing = f"{refit}, trained" if plan.train else refit
            self.observer.note(
                "a plan holds no weights: this model loses the same parts, but is not healed"
                f" ({healing})"
            )
            plan = replace(plan, compensate="none", train=False)
        run, dense = self.fetch_base(run, file, plan)
        plan = unmeasured(plan)  # its author's measurements were not made on this machine
        shares = {name: share for name, share in plan.removes.items() if name != "latency"}
        plan = replace(plan, removes=shares, weights=checkpoint_weights(dense), target=out.name)
        return self._export(run, self._pruning(run, dense, plan, CalibrationSet(())), out)

    def fetch(self, run: Run) -> Path:
        """The folder of the run's dense model, as fetched."""
        return cached_checkpoint(run.model, self.root / "cache", self.pins, self.observer.note)

    def fetch_base(self, run: Run, file: Path, plan: Plan) -> tuple[Run, Path]:
        """The run with the revision that a plan's file names, and the folder of its dense model.

        Raises InputError if the plan is of another model, or does not follow from what it removes.
        """
        if plan.base is None:
            raise InputError(
                f"{file} does not name its base model; give a plan that `blockpruner prune` has"
                " written"
            )
        repo, at, commit = plan.base.partition("@")
        is_same_repo = isinstance(run.model, HubModel) and run.model.repo == repo
        if at:
            run = self._at_commit(run, file, repo, commit)
        with named(f"{file}: "):
            config = self.config_of(run)
            require_of(plan, config, run.model.title, KINDS[plan.kind].pruned(plan, config))
        dense = self.fetch(run)
        # A plan of a hub model names its weights by their content, if its author had them all.
        content = checkpoint_weights(dense) if at else checkpoint_identity(dense)
        expected = plan.weights or content if at else plan.base
        if at and plan.weights is None and not is_same_repo:
            self.observer.note(
                f"{file} is for {repo}; of {run.model.title} only the shape was compared"
            )
        if content != expected:
            raise InputError(
                f"{file} is of another model: its base is {plan.base}, and {run.model.title} is by"
                f" content {content}; give the model that the plan was made for",
                rule="plan-of-other-model",
                key="base",
                value=plan.base,
            )
        return run, dense

    def _at_commit(self, run: Run, file: Path, repo: str, commit: str) -> Run:
        """The run with the revision that a plan names, if it is of the plan's repository.

        Raises InputError if the run names another revision, or runs code of another one: a plan
        must not choose whose code runs.
        """
        if not COMMIT.fullmatch(commit):
            raise InputError(
                f"{file} names the revision {commit!r} of {repo}, which may be anybody's; valid: 40"
                " hex digits",
                rule="plan-revision",
                key="base",
                value=commit,
            )
        model = run.model
        if not isinstance(model, HubModel) or model.repo != repo:
            return run
        if not model.trust_remote_code and model.revision is None:
            self.observer.note(f"weights of commit {commit}, because {file} names it")
            return run.model_copy(update={"model": model.model_copy(update={"revision": commit})})
        pinned = pinned_revision(repo, "model", model.revision, self.pins)
        if pinned != commit:
            raise InputError(
                f"{file} is for commit {commit} of {repo}, and yours is {pinned}, which counts"
                " where you name a revision or trust its code; leave that out, or fetch the plan's"
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
        """The config of the run's dense model, of whose weights a hub is asked for nothing."""
        if not isinstance(run.model, HubModel | LocalModel):
            return dict(read_json(self.fetch(run) / "config.json"))
        try:
            return fetch_config(run.model, self.pins)
        except HubError as error:
            raise InputError(f"there is no folder {run.model.title!r} here, and {error}") from error

    def _pruning(self, run: Run, dense: Path, plan: Plan, rows: CalibrationSet) -> "Pruning":
        from blockpruner.methods.apply import Pruning  # loads torch

        require_unchanged(dense)
        device = self.runtime_settings.device  # which --set may name, too
        return Pruning(dense, plan, rows, run.model.dtype, device, run.model.trust_remote_code)

    def _folders(self, run: Run, out: Path) -> dict[str, Path]:
        """The folder of each format."""
        folders = {form: out.with_name(f"{out.name}-{form}") for form in run.export}
        return folders | {"hf": out} if "hf" in folders else folders

    def _export(self, run: Run, pruning: "Pruning", out: Path) -> dict[str, Any]:
        """Write the formats that are not there yet; returns facts on the plan and on each."""
        folders = self._folders(run, out)
        healing = pruning.healed.words if pruning.healed else ""
        with self._alone(fingerprint({"out": str(out)}), f"writes {out}"):
            missing = {}
            for form, folder in folders.items():
                clear_left(folder)
                if holds_checkpoint(folder, pruning.plan, healing):
                    _require_quantized(folder, self.formats.get(form, ()))
                else:
                    missing[form] = folder
            # Without --dtype an export is in the model's own, whatever was computed in.
            if "dtype" not in run.model.model_fields_set:
                pruning = replace(pruning, dtype=own_dtype(self.config_of(run)))
            pipeline.export(pruning, missing, self.formats)
        return checkpoint_facts(pruning.plan, folders)


def checkpoint_facts(plan: Plan, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Facts on a plan and on its checkpoints by format, as `--json` prints them."""
    return {
        "plan": plan_fields(plan),
        "taken_out": KINDS[plan.kind].taken_out(plan),
        "written": [pipeline.exported(form, folder) for form, folder in folders.items()],
    }


T = TypeVar("T", Calibration, Perplexity)


def fitted(settings: T, config: Config, key: str) -> T:
    """The settings with rows no longer than the model's context; raises InputError if the user has
    asked for longer ones."""
    # The default length, and the cut of a sample, are limits and not what the user asks for.
    is_limit = settings.packing == "per_sample" or settings.seq_len == DRAWN["seq_len"]
    if "seq_len" in settings.model_fields_set and not is_limit:
        check_context(settings.seq_len, dict(config), key)
    context = config.get("max_position_embeddings") or settings.seq_len
    return settings.model_copy(update={"seq_len": min(settings.seq_len, context)})


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
    """The dtype of a model's weights by its config; float32 if that names none."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in ("bfloat16", "float16", "float64") else "float32"


def holds_checkpoint(folder: Path, plan: Plan | None, healing: str | None = None) -> bool:
    """Whether a folder holds the whole checkpoint of a plan; raises InputError if it holds anything
    else, or cannot be made.

    Args:
        plan: None before a search has found it.
        healing: the model card's words on healing (`Healed.words`); None: they are not compared.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise InputError(
                f"--out {folder}: nothing can be written in {parent}; choose another place",
                rule="no-place",
                key="out",
                value=str(folder),
            )
        return False
    is_same = False
    if plan is not None and (folder / PLAN_FILE).is_file():
        held = load_plan(folder / PLAN_FILE)
        is_same = replace(held, target=plan.target, kinds=plan.kinds) == plan
    card = folder / CARD_FILE
    if healing is not None and card.exists():
        is_same = is_same and healing in card.read_text(encoding="utf-8")
    if not is_same:
        raise InputError(
            f"--out {folder} is not empty and holds something else; choose another folder, or"
            " remove it",
            rule="place-not-empty",
            key="out",
            value=str(folder),
        )
    require_verified(folder)
    return True


def _require_quantized(folder: Path, quantizations: Sequence[str]) -> None:
    """Refuse a finished checkpoint without one of its quantized files, which only a new export
    writes; raises InputError."""
    for quantization in quantizations:
        name = f"model-{quantization}.gguf"
        if not (folder / name).exists():
            raise InputError(
                f"{folder} was written without {name}, and nothing is replaced; remove that folder"
                " and run again, or choose another --out: scores are kept",
                rule="place-not-empty",
                key="out",
                value=str(folder),
            )


def summary(result: Mapping[str, Any]) -> str:
    """The lines that end a command, of what `--json` prints."""
    plan = result["plan"]
    calibration = plan["calibration"]
    removed = ", ".join(plan["order"]) or result["taken_out"]
    lines = [f"removed {plan['ratio']:.1%} of the parameters: {removed}"]
    if calibration.get("perplexity"):
        lines.append(
            f"perplexity of the calibration texts: {calibration['dense_perplexity']:.2f} ->"
            f" {calibration['perplexity']:.2f}"
        )
    perplexities = result.get("perplexity", {})
    for name, perplexity in perplexities.items():
        before, after, dense = (perplexity.get(key) for key in ("before", "after", "dense"))
        line = f"{name}: perplexity of texts set aside {before:.2f} -> {after:.2f}"
        if dense:
            line += f", dense {dense:.2f} ({after / dense:.2f} times)"
        lines.append(line)
    if not perplexities and not plan["train"] and plan["compensate"] == "none":
        lines.append("no weight was fitted again: --compensate refit makes up for part of the loss")
    losses = plan.get("kinds") or {}
    pairs, warning = in_words(losses)
    lines += [f"perplexity of texts set aside, {kind}: {lost}" for kind, lost in pairs]
    if warning:
        lines.append(f"warning: {warning}")
    for checkpoint in result["written"]:
        engine = checkpoint["verified_by"]
        checked = f"unchecked: {engine} is not installed here"
        if checkpoint["verified"]:
            checked = f"checked in a fresh process of {engine}"
        lines.append(f"{checkpoint['path']}: for {', '.join(checkpoint['for'])}, {checked}")
    only_kinds = result.get("only_kinds", ())
    users = {kind: loss for kind, loss in losses.items() if kind in only_kinds}
    ours = {kind: loss for kind, loss in losses.items() if kind not in only_kinds}
    if users and ours:
        lines.append(
            f"only your texts decided: they lost {Loss.of(users).mean:.2f} times, other texts"
            f" {Loss.of(ours).mean:.2f} times on average; without --only-texts, ours are half of"
            " those that decide"
        )
    return "\n".join(lines)
