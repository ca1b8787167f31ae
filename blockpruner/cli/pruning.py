"""`blockpruner prune` and `apply`: the pipeline for one model and one budget, in one process.

Decides where results are kept, and that a folder which holds something else is never replaced.
Torch is loaded only when something must be computed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from blockpruner import pipeline
from blockpruner.checkpoints.output import Output, holds_checkpoint
from blockpruner.checkpoints.registry import EXPORTS, require_families, require_packages
from blockpruner.cli.values import called, model_of
from blockpruner.config.checks import check_run
from blockpruner.config.sections import Run
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
from blockpruner.inputs.calibration import CalibrationSet, check_context
from blockpruner.inputs.checkpoints import (
    cached_checkpoint,
    checkpoint_identity,
    checkpoint_weights,
    fetch_config,
)
from blockpruner.inputs.hub import COMMIT, HubError, pinned_revision
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import by_kind, load_texts
from blockpruner.inputs.tokenizers import conversation, load_tokenizer
from blockpruner.methods.blocks.kind import require_of
from blockpruner.methods.recipes import DRAWN, require_reached
from blockpruner.methods.registry import KINDS
from blockpruner.splits import Pool, our_judging_texts
from blockpruner.store.files import read_json
from blockpruner.store.plans import PLAN_FILE, load_plan, plan_fields, unmeasured
from blockpruner.workspace import FetchedModel, Workspace


@dataclass(frozen=True)
class Command:
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
        """Run the pipeline, as far as no earlier command has; returns what `--json` prints. Raises
        InputError before the export if a kind of text loses more than `max_loss`."""
        require_reached(run.score, self.config_of(run), budget)  # before anything is downloaded
        pool = self._pool(run, pipeline.has_judges(run, max_loss))
        outcome = pipeline.run(
            run,
            budget,
            self.dense(run),
            pool,
            self.workspace,
            max_loss=max_loss,
            output=self.output(run, out),
        )
        only_kinds = []
        if not isinstance(run.calibration.data, MixedTexts):
            only_kinds = [kind.name for kind in by_kind(pool.search) if kind]
        return checkpoint_facts(outcome.pruning.plan, self.output(run, out).folders) | {
            "search": outcome.counts,
            "perplexity": outcome.perplexity,
            "only_kinds": only_kinds,
        }

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root, self.root, self.runtime_settings, self.observer, self._note)

    def dense(self, run: Run) -> FetchedModel:
        """The dense model of a run, as fetched."""
        return FetchedModel(run.model, self.fetch(run), self.runtime_settings.device)

    def output(self, run: Run, out: Path) -> Output:
        """The checkpoints of a run. Without --dtype they are in the model's own dtype, whatever was
        computed in."""
        quantizations = {form: self.formats.get(form, ()) for form in run.export}
        is_own = "dtype" not in run.model.model_fields_set
        return Output(out, quantizations, own_dtype(self.config_of(run)) if is_own else "")

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
        for folder in self.output(run, out).folders.values():
            # Whose plan it is shows only after a search.
            if not (folder / PLAN_FILE).is_file():
                holds_checkpoint(folder, None)

    def _pool(self, run: Run, judged: bool) -> Pool:
        """The texts of a run, also those that judge if it is `judged`. Held-out texts are kept
        apart where a run file names them."""
        tokenizer = cache(lambda: load_tokenizer(self.fetch(run), run.model.trust_remote_code))
        template = partial(conversation, tokenizer)

        @cache
        def load(data: Texts) -> list[str]:
            return load_texts(data, self.root / "cache", self.pins, template)

        fit_data = run.compensate.data
        train_data = run.train.data if run.train else None
        pool = Pool(
            search=load(run.calibration.data),
            fit=load(fit_data) if fit_data else None,
            train=load(train_data) if train_data else None,
            judge=our_judging_texts(load, self.observer.note) if judged else (),
        )
        heldout = run.evaluate.perplexity
        if "data" not in heldout.model_fields_set:
            return pool
        from blockpruner.evaluation.perplexity import held_out

        evaluated = held_out(tokenizer(), load(heldout.data), heldout).documents
        return replace(pool, evaluated=evaluated)

    @property
    def runtime_settings(self) -> Runtime:
        return read_settings(Runtime, {"device": self.device, **self.runtime}, section="runtime.")

    def apply(self, run: Run, path: Path, out: Path) -> dict[str, Any]:
        """Write the checkpoint of a plan, without healing; returns what `--json` prints."""
        file, plan = read_plan(path)
        if not KINDS[plan.kind].keeps_weights:
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
        pruning = self.dense(run).pruning(plan, CalibrationSet(()))
        output = self.output(run, out)
        pipeline.write_checkpoints(pruning, output, self.workspace)
        return checkpoint_facts(plan, output.folders)

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
            require_of(
                plan, config, run.model.title, KINDS[plan.kind].pruned_parameters(plan, config)
            )
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


def checkpoint_facts(plan: Plan, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Facts on a plan and on its checkpoints by format, as `--json` prints them."""
    return {
        "plan": plan_fields(plan),
        "taken_out": KINDS[plan.kind].removed_words(plan),
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
        pruned, healed = perplexity["before"], perplexity["after"]
        line = f"{name}: perplexity of texts set aside {pruned:.2f} -> {healed:.2f}"
        if dense := perplexity.get("dense"):
            line += f", dense {dense:.2f} ({healed / dense:.2f} times)"
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
