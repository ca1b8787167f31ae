"""commit <target>: the plan that meets its budget, and the iteration tables it used, at data/plans/<target>."""

from __future__ import annotations

from dataclasses import replace

from blockpruner.families import count_parameters
from blockpruner.params import load_params
from blockpruner.plans import commit, save_iterations
from blockpruner.progress import observer
from blockpruner.search.iteration import removals
from blockpruner.search.trace import read_current, read_trace, table_path, trace_directory
from blockpruner.tables import read_json
from stages import DATA, run


def main(name: str) -> None:
    target = load_params().target(name)
    scores = DATA / "scores" / target.run
    facts = read_current(scores)
    directory = trace_directory(scores, facts, target.budget)
    trace = read_trace(directory, facts["search"])
    counts = count_parameters(read_json(DATA / "models" / target.run / "config.json"))
    order, perplexities = removals(trace, facts["nested"])
    facts |= {"target": name, "run": target.run}
    plan = replace(commit(order, perplexities, counts, target.budget, facts), recover=target.recover)
    used = len(plan.order) if facts["nested"] else len(trace)
    save_iterations([table_path(directory, i) for i in range(used)], DATA / "plans" / name / "iterations.parquet")
    plan.save(DATA / "plans" / name / "plan.json")
    observer().note(f"{name}: removed {', '.join(plan.order)}; ratio {plan.ratio:.4f} for budget {target.budget}")


if __name__ == "__main__":
    run("commit", main)
