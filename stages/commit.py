"""commit <target>: the plan that meets its budget, and the iteration tables it used, at data/plans/<target>."""

from __future__ import annotations

from dataclasses import replace

from blockpruner.core.progress import observer
from blockpruner.methods.commit import commit_run, save_iterations
from blockpruner.methods.registry import KINDS
from blockpruner.store.files import read_json
from blockpruner.store.plans import save_plan
from stages import DATA, run, sections, target


def main(name: str) -> None:
    wanted, out = target(name), DATA / "plans" / name
    settings, config = sections(wanted.run), read_json(DATA / "models" / wanted.run / "config.json")
    scores = DATA / "scores" / wanted.run / (wanted.method or next(iter(settings.score)))
    plan, tables = commit_run(scores, config, wanted.budget, name, wanted.run)
    compensate = wanted.compensate or settings.compensate.method
    plan = replace(plan, compensate=compensate, recover=wanted.recover)
    if tables:
        save_iterations(tables, out / "iterations.parquet")
    save_plan(plan, out / "plan.json")
    what = KINDS[plan.kind].taken_out(plan)
    observer().note(
        f"{name}: {what} ({', '.join(plan.order) or plan.method}); ratio {plan.ratio:.4f} for budget {wanted.budget}"
    )


if __name__ == "__main__":
    run("commit", main)
