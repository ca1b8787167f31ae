"""commit <target>: the plan that meets its budget, and the iteration tables it used, at data/plans/<target>."""

from __future__ import annotations

from dataclasses import replace

from blockpruner.core.progress import observer
from blockpruner.methods.commit import commit_run, save_iterations
from blockpruner.methods.registry import KINDS
from blockpruner.params import load_params, load_run
from blockpruner.store.files import read_json
from blockpruner.store.plans import save_plan
from stages import DATA, run


def main(name: str) -> None:
    target, out = load_params().target(name), DATA / "plans" / name
    config = read_json(DATA / "models" / target.run / "config.json")
    plan, tables = commit_run(DATA / "scores" / target.run, config, target.budget, name, target.run)
    compensate = target.compensate or load_run(target.run).compensate.method
    plan = replace(plan, compensate=compensate, train=target.train)
    if tables:
        save_iterations(tables, out / "iterations.parquet")
    save_plan(plan, out / "plan.json")
    what = KINDS[plan.kind].taken_out(plan)
    observer().note(
        f"{name}: {what} ({', '.join(plan.order) or plan.method}); ratio {plan.ratio:.4f} for budget {target.budget}"
    )


if __name__ == "__main__":
    run("commit", main)
