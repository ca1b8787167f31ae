"""commit <target>: the plans that meet its budget, one a search, with the iteration tables they
used, at data/plans/<target>; and what these tables took, at data/costs/<target>.json, which changes
no plan."""

from pathlib import Path
from typing import Any

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.dag import read_dag
from blockpruner.methods.recipes import compensation
from blockpruner.methods.registry import KINDS
from blockpruner.search.trace import save_iterations
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.plans import save_plan
from stages import DATA, run, searched, sections, target


def main(name: str) -> None:
    wanted = target(name)
    dense = DATA / "models" / wanted.run
    settings, config = sections(wanted.run), read_json(dense / "config.json")
    method = read_dag()["pruned"][name]["method"]
    scores, asked = DATA / "scores" / wanted.run / method, searched(wanted.run, method).score
    rows = pipeline.Rows.load(DATA / "calibration" / wanted.run, "search", "judge")
    healing = wanted.compensate or compensation(settings.compensate.method, method)
    own: dict[str, Any] = {
        "target": name,
        "run": wanted.run,
        "compensate": healing,
        "train": wanted.train,
    }
    found = pipeline.commit(scores, asked, config, wanted.budget, rows, dense=dense, **own)

    def build(directory: Path) -> None:
        for each in found:
            save_plan(each.plan, directory / f"{each.name}.json")
            if each.tables:
                save_iterations(each.tables, directory / f"{each.name}.parquet")

    replace_directory(DATA / "plans" / name, build)
    costs = [each.cost for each in found]
    total = (
        {key: round(sum(cost[key] for cost in costs), 2) for key in costs[0]} if all(costs) else {}
    )
    write_json(DATA / "costs" / f"{name}.json", total)
    for plan in (each.plan for each in found):
        what = KINDS[plan.kind].taken_out(plan)
        order = ", ".join(plan.order) or plan.method
        observer().note(
            f"{name}: {what} ({order}); ratio {plan.ratio:.4f} for budget {wanted.budget}"
        )


if __name__ == "__main__":
    run("commit", main)
