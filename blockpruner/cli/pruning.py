"""`blockpruner prune` and `apply`: what the stages do, for one model and one budget, in one process.

Decides where things are kept, and that a folder which holds something else is never replaced. Torch is loaded only when
something must be computed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blockpruner.checkpoints.registry import EXPORTS, Writer, require_families, require_packages
from blockpruner.checks import check_run
from blockpruner.compensation.rows import compensation_rows
from blockpruner.core.errors import InputError, MissingPackageError, missing
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.core.plan import Plan
from blockpruner.core.progress import Observer
from blockpruner.core.settings import (
    Calibration,
    HubModel,
    LocalModel,
    Perplexity,
    Recover,
    Run,
    Runtime,
    TaskAnswers,
    read_settings,
)
from blockpruner.inputs.calibration import CalibrationSet, check_context, draw_rows
from blockpruner.inputs.checkpoints import checkpoint_identity, fetch_checkpoint, fetch_config
from blockpruner.inputs.hub import HubError
from blockpruner.inputs.texts import load_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.commit import commit_run
from blockpruner.methods.recipes import rival, settled
from blockpruner.methods.registry import require_budgets
from blockpruner.methods.score import open_material, score_run
from blockpruner.store.files import read_json, write_text
from blockpruner.store.manifest import REPORT_FILE, require_verified
from blockpruner.store.plans import PLAN_FILE, load_plan, plan_fields, save_plan
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import COMPENSATION_VERSION, RECOVERY_VERSION

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning
    from blockpruner.methods.healed import Healed

TrainingRows = tuple[CalibrationSet, CalibrationSet | None]
"""Rows of training, and rows that are held out of it."""

ROWS = 16
"""Calibration rows from a file of one's own: about as many as the paper's 256 samples fill."""


@dataclass(frozen=True)
class Place:
    """Where the command works."""

    root: Path
    """The folder of all trial stores. Models as fetched, traces, plans and compensated weights lie there, too."""
    device: str
    observer: Observer
    export: str = ""
    """Formats beside `hf`, as in `--export`."""

    @property
    def _asked(self) -> dict[str, tuple[str, ...]]:
        """The formats, each with what its files are quantized to. A format may be named by an engine that loads it."""
        engines = {engine.lower(): row.name for row in EXPORTS.values() for engine in row.engines}
        found: dict[str, tuple[str, ...]] = {"hf": ()}
        for form, _, quantization in (part.strip().partition(":") for part in self.export.split(",") if part.strip()):
            name = engines.get(form.lower(), form)
            if quantization and name != "gguf":
                raise InputError(f"export {form}:{quantization}: only gguf has quantizations, as in gguf:Q4_K_M")
            found[name] = (*found.get(name, ()), *([quantization.upper()] if quantization else []))
        return found

    def read_run(self, model: str, dtype: str, trusted: bool, sections: Mapping[str, Any]) -> Run:
        """The settings of a run file; raises InputError for a model, name or value that is not valid."""
        if model.endswith(".gguf") or Path(model).expanduser().is_file():
            raise InputError(
                f"model {model!r}: GGUF files and other single files are not read; give a folder "
                "with config.json, safetensors and the tokenizer, or a name on the hub"
            )
        is_path = model.startswith((".", "/", "~")) or model.count("/") > 1  # a name on the hub has one
        is_folder = is_path or Path(model).expanduser().is_dir()
        path = str(Path(model).expanduser().absolute())
        source = {"source": "path", "path": path} if is_folder else {"source": "hub", "repo": model}
        given = {**source, "trust_remote_code": trusted} | ({} if dtype == "auto" else {"dtype": dtype})
        run = read_settings(Run, {"model": given, "export": list(self._asked), **sections})
        self._require_programs(run)
        config = self.config_of(run)
        if "vllm" in self.export.lower() and not FAMILIES[str(config["model_type"])].in_vllm:
            raise InputError(f"export vllm: vLLM has no {config['model_type']} models; leave it out")
        require_families(run.export, str(config["model_type"]))
        own = run.model.model_copy(update={"dtype": own_dtype(config)} if dtype == "auto" else {})
        heldout = fitted(run.evaluate.perplexity, config, "evaluate.perplexity.seq_len")
        context, recover = config.get("max_position_embeddings"), run.recover
        if recover is not None and recover.weights == "lora" and find_spec("peft") is None:
            raise missing("peft", "train")
        if recover is not None and context:
            recover = recover.model_copy(update={"seq_len": min(recover.seq_len, context)})
        run = run.model_copy(
            update={
                "recover": recover,
                "model": own,
                "calibration": fitted(run.calibration, config, "calibration.seq_len"),
                "evaluate": run.evaluate.model_copy(update={"perplexity": heldout}),
            }
        )
        check_run(run)
        if quantizations := self._asked.get("gguf"):
            from blockpruner.checkpoints.gguf import require_quantizations

            require_quantizations(quantizations)
        return run

    def _require_programs(self, run: Run) -> None:
        """Raise MissingPackageError for what the formats lack here, all at once."""
        try:
            require_packages(run.export)
        except MissingPackageError as error:
            if not self._asked.get("gguf") or shutil.which("llama-quantize"):
                raise
            raise MissingPackageError(
                f"{error}; --export {self.export} needs llama.cpp's program llama-quantize, too, which is not on PATH"
            ) from error

    def prune(self, run: Run, budget: str, out: Path, recipe: str) -> dict[str, Any]:
        """Search, commit, compensate, train and export, as far as that was not done before.

        Of the recommended search and its rival the model is exported that has the lower perplexity on the held-out rows
        of the compensation.
        """
        config = self.config_of(run)
        require_budgets(run.score, config, (budget,))
        layers = rival(recipe, run.score, config, budget, run.compensate.method)
        runs = [run, *([] if layers is None else [run.model_copy(update={"score": layers})])]
        assert not isinstance(run.calibration.data, TaskAnswers)
        texts, dense = load_texts(run.calibration.data, self.root / "cache", self.pins), self.fetch(run)
        tokenizer = load_tokenizer(dense, run.model.trust_remote_code)
        rows = draw_rows(texts, tokenizer, run.calibration, (), self.observer.note, at_most=True)
        context = config.get("max_position_embeddings", run.calibration.seq_len)
        fit = partial(compensation_rows, texts, tokenizer, run.compensate, (), context)
        training = None if run.recover is None else self._training_rows(run.recover, texts, tokenizer)
        base = checkpoint_identity(dense).before
        keys = [self._key(one, base, rows, budget) for one in runs]
        plans = [self.root / "plans" / key for key in keys]
        known = [load_plan(kept) for kept in plans if kept.exists()]
        self._formats(run, out, [replace(plan, recover=run.recover is not None) for plan in known])  # refuses early
        found = []
        for number, (one, key, kept) in enumerate(zip(runs, keys, plans, strict=True), 1):
            healing = "" if run.compensate.method == "none" else f", then {run.compensate.method}"
            self.observer.note(f"search {number} of {len(runs)}: {one.score.method}, by {one.score.unit}{healing}")
            counts = self._score(one, dense, rows, budget, self.root / "searches" / key)
            plan, _ = commit_run(self.root / "searches" / key, config, budget, "", run.model.title)
            save_plan(replace(plan, base=base, compensate=run.compensate.method), kept)
            plan = replace(load_plan(kept), target=out.name)
            healed = None if plan.compensate == "none" else self._compensated(one, dense, plan, rows, key, fit)
            found.append((plan, healed, counts))
        if len(found) > 1:
            self.observer.note(settled([one.score for one in runs], [_after(each[1]) for each in found]))
        plan, healed, counts = min(found, key=lambda each: _after(each[1]))
        told = {} if healed is None else {"compensated": read_json(healed / "compensate.json")["perplexity"]}
        if run.recover is not None and training is not None:
            plan = replace(plan, recover=True)
            healed = self._trained(run.recover, self._pruning(run, dense, plan, rows), healed, training)
            facts = read_json(healed / "recover.json")
            by_step = {each["step"]: math.exp(each["nll"]) for each in facts["validations"]}
            told["trained"] = {"before": by_step[0], "after": by_step[facts["step"]]}
        return self._export(run, dense, plan, rows, out, healed) | {"search": counts, "perplexity": told}

    def _key(self, run: Run, base: str, rows: CalibrationSet, budget: str) -> str:
        facts = run.model_dump(mode="json", include={"score": True, "compensate": True, "model": {"dtype"}})
        return fingerprint({**facts, "base": base, "rows": rows.digest, "budget": budget, "v": COMPENSATION_VERSION})

    def _compensated(
        self, run: Run, dense: Path, plan: Plan, rows: CalibrationSet, key: str, fit: Callable[[], CalibrationSet]
    ) -> Path:
        from blockpruner.compensation.compensate import write_compensated

        assert not isinstance(run.calibration.data, TaskAnswers)
        pruning = self._pruning(run, dense, plan, rows)
        healed = self.root / "compensated" / f"{key}-{pruning.identity}"
        if not healed.exists():
            write_compensated(healed, pruning, fit(), run.compensate, run.calibration.data, self.observer)
        return healed

    def _training_rows(self, wanted: Recover, texts: Sequence[str], tokenizer: Any) -> TrainingRows:
        """Drawn before the search: too few texts are found out at once."""
        from blockpruner.recovery.rows import training_rows

        rows, validation = training_rows(texts, tokenizer, wanted, (), self.observer.note, at_most=True)
        asked = f" of the {wanted.num_rows} wanted" if len(rows.rows) < (wanted.num_rows or 0) else ""
        self.observer.note(f"training: {len(rows.rows)}{asked} rows of {wanted.seq_len} tokens")
        return rows, validation

    def _trained(self, wanted: Recover, pruning: Pruning, healed: Path | None, drawn: TrainingRows) -> Path:
        """Train on the calibration's texts, from compensated weights on; a killed training goes on."""
        from blockpruner.methods.healed import find_healed
        from blockpruner.recovery.recover import write_recovered

        pruning = replace(pruning, healed=None if healed is None else find_healed([healed], pruning.identity))
        facts = {
            "of": pruning.identity, "since": pruning.healed and pruning.healed.digest, "rows": drawn[0].digest,
            "recipe": wanted.model_dump(mode="json"), "v": RECOVERY_VERSION,
        }  # fmt: skip
        folder = self.root / "trained" / fingerprint(facts)
        if not folder.exists():
            write_recovered(folder, pruning, wanted, *drawn, self.root / "training", self.observer)
        return folder

    def apply(self, run: Run, path: Path, out: Path) -> dict[str, Any]:
        """Export the model of a plan's file."""
        file, plan = read_plan(path)
        if plan.kind != "mask":
            raise InputError(
                f"{file} is of a model with other weights (method: {plan.method}), which a plan does not hold; run "
                "prune again: scores are kept"
            )
        if plan.compensate != "none" or plan.recover:
            self.observer.note(
                "a plan holds no weights: this model loses the same blocks, but is not healed "
                f"({plan.compensate if plan.compensate != 'none' else 'no refit'}{', trained' * plan.recover})"
            )
            plan = replace(plan, compensate="none", recover=False)
        run, dense = self.fetch_base(run, file, plan)
        return self._export(run, dense, replace(plan, target=out.name), CalibrationSet(()), out)

    def mergekit(self, run: Run, path: Path, out: Path) -> Path:
        """Write a plan as a configuration of mergekit. No weights are read: of the model the shape is compared."""
        from blockpruner.checkpoints.mergekit import mergekit_config

        (file, plan), config = read_plan(path), self.config_of(run)
        assert isinstance(run.model, HubModel | LocalModel)
        if (count_parameters(config).total, config["num_hidden_layers"]) != (plan.parameters["dense"], plan.layers):
            raise InputError(f"{file} is of another model than {run.model.title}; give the one that it was made for")
        name = run.model.repo if isinstance(run.model, HubModel) else run.model.path
        write_text(out, mergekit_config(plan, name, run.model.dtype))
        return out

    def fetch(self, run: Run) -> Path:
        """The folder of the run's dense model, as fetched."""
        dense = self.root / "models" / fingerprint(run.model.model_dump(exclude={"dtype"}))
        fetch_checkpoint(run.model, dense, self.root / "cache", self.pins)
        return dense

    def fetch_base(self, run: Run, file: Path, plan: Plan) -> tuple[Run, Path]:
        """The dense model that a plan's file is of, as fetched, and the run with its revision; raises InputError for
        another model."""
        if plan.base is None:
            raise InputError(f"{file} does not name its base model; give a plan that `blockpruner prune` has written")
        repo, at, commit = plan.base.partition("@")
        if at and isinstance(run.model, HubModel) and run.model.repo == repo:
            run = run.model_copy(update={"model": run.model.model_copy(update={"revision": commit})})
        dense = self.fetch(run)
        base = checkpoint_identity(dense).before
        if at:
            config = read_json(dense / "config.json")
            base = f"{count_parameters(config).total:,} parameters in {config['num_hidden_layers']} layers"
            if base == f"{plan.parameters['dense']:,} parameters in {plan.layers} layers":
                if not (isinstance(run.model, HubModel) and run.model.repo == repo):
                    self.observer.note(f"{file} is for {repo}; of {run.model.title} only the shape was compared")
                return run, dense
        if plan.base != base:
            raise InputError(
                f"{file} is of another model: its base is {plan.base}, and {run.model.title} is {base}; give the model "
                "that the plan was made for"
            )
        return run, dense

    def _score(self, run: Run, dense: Path, rows: CalibrationSet, budget: str, traces: Path) -> dict[str, Any]:
        """On return the model is out of memory: the export loads it again."""
        runtime = read_settings(Runtime, {"device": self.device})

        def latency() -> Mapping[str, Any]:
            from blockpruner.evaluation.latency import kept_latency

            return kept_latency(traces, self.root, dense, run.model, run.score.latency, runtime, self.observer)

        with open_material(dense, run.model, runtime, self.root, self.observer) as material:
            return score_run(material, rows, run.score, [budget], traces, latency)

    @property
    def pins(self) -> Path:
        return self.root / "pins.json"

    def config_of(self, run: Run) -> Config:
        assert isinstance(run.model, HubModel | LocalModel)
        try:
            return fetch_config(run.model, self.pins)
        except HubError as error:
            raise InputError(f"there is no folder {run.model.title!r} here, and {error}") from error

    def _pruning(self, run: Run, dense: Path, plan: Plan, rows: CalibrationSet) -> Pruning:
        from blockpruner.methods.apply import Pruning

        return Pruning(dense, plan, rows, run.model.dtype, self.device, run.model.trust_remote_code)

    def _formats(
        self, run: Run, out: Path, plans: Sequence[Plan], healed: Healed | None = None
    ) -> list[tuple[str, Path, Writer | None]]:
        """Each format, its folder, and what writes it; None where the checkpoint of one of the plans is there, healed
        as wanted if that is known.

        Raises:
            InputError: a folder holds something else.
        """
        words = None if healed is None else healed.words
        places = {form: out if form == "hf" else out.with_name(f"{out.name}-{form}") for form in run.export}
        found: list[tuple[str, Path, Writer | None]] = []
        for form, place in places.items():
            more = self._asked[form]
            files = [place / f"model-{name}.gguf" for name in more]
            writer: Any = EXPORTS[form].write
            write = partial(writer, quantizations=more) if more else writer
            is_there = _is_there(place, plans, words) and all(map(Path.exists, files))
            found.append((form, place, None if is_there else write))
        return found

    def _export(
        self, run: Run, dense: Path, plan: Plan, rows: CalibrationSet, out: Path, healed: Path | None = None
    ) -> dict[str, Any]:
        written, pruning = [], self._pruning(run, dense, plan, rows)
        if healed is not None:
            from blockpruner.methods.healed import find_healed

            pruning = replace(pruning, healed=find_healed([healed], pruning.identity))
        for form, place, write in self._formats(run, out, [plan], pruning.healed):
            if write is not None:
                if self._asked[form] and not rows.rows:
                    self.observer.note("apply has no calibration rows: no importance matrix of quantizations")
                write(pruning, place)
            seen, row = read_json(place / REPORT_FILE), EXPORTS[form]
            facts = {"format": form, "path": str(place), "for": row.engines}
            written.append(facts | {"verified": seen["ok"], "verified_by": seen["engine"]})
        return {"plan": plan_fields(plan), "written": written}


def _after(healed: Path | None) -> float:
    return math.inf if healed is None else float(read_json(healed / "compensate.json")["perplexity"]["after"])


T = TypeVar("T", Calibration, Perplexity)


def fitted(given: T, config: Config, key: str) -> T:
    """The same, its rows as long as the model's context at most; raises InputError if longer ones were asked for."""
    if "seq_len" in given.model_fields_set:
        check_context(given.seq_len, dict(config), key)
    length = min(given.seq_len, config.get("max_position_embeddings") or given.seq_len)
    return given.model_copy(update={"seq_len": length})


def several(rows: tuple[tuple[int, ...], ...], seq_len: int) -> tuple[tuple[int, ...], ...]:
    """The same held-out rows; raises InputError if there is one alone."""
    if len(rows) < 2:
        raise InputError(
            f"the held-out texts are 1 row of {seq_len} tokens, and an interval needs at least 2; give a smaller "
            "--seq-len, a larger --max-rows or longer --texts"
        )
    return rows


def read_plan(path: Path) -> tuple[Path, Plan]:
    """A plan's file, and the plan; raises InputError if there is none at the path or in its folder."""
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"plan {str(path)!r} does not exist; give a {PLAN_FILE}, or the checkpoint's folder")
    return file, load_plan(file)


def own_dtype(config: Config) -> str:
    """The dtype of a model's weights as its config says; float32 where it does not."""
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in ("bfloat16", "float16", "float64") else "float32"


def _is_there(place: Path, plans: Sequence[Plan], words: str | None = None) -> bool:
    """Whether a folder holds the whole checkpoint of one of the plans; raises InputError if it holds anything else.

    Args:
        words: of `Healed`, which the model card tells; None: they are not compared.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    file = place / PLAN_FILE
    held = load_plan(file) if file.is_file() else None
    card = place / "README.md"
    other = words is not None and card.exists() and words not in card.read_text()
    if held is None or other or all(replace(held, target=plan.target) != plan for plan in plans):
        raise InputError(f"--out {place} is not empty and holds something else; choose another folder, or remove it")
    require_verified(place)
    return True


def words(found: Mapping[str, Any]) -> str:
    """What was done, for a reader."""
    plan, seen = found["plan"], found["plan"]["calibration"]
    lines = [f"removed {plan['ratio']:.1%} of the parameters: {', '.join(plan['order']) or plan['method']}"]
    if seen.get("perplexity"):
        lines.append(f"perplexity of the calibration texts: {seen['dense_perplexity']:.2f} -> {seen['perplexity']:.2f}")
    for name, told in found.get("perplexity", {}).items():
        dense = f", dense {told['dense']:.2f}" if "dense" in told else ""
        lines.append(f"{name}: perplexity of rows held out for it {told['before']:.2f} -> {told['after']:.2f}{dense}")
    for each in found["written"]:
        engine = each["verified_by"]
        checked = (
            f"checked in a fresh process of {engine}"
            if each["verified"]
            else f"unchecked: {engine} is not installed here"
        )
        lines.append(f"{each['path']}: for {', '.join(each['for'])}, {checked}")
    return "\n".join(lines)
