"""commit <target>: the plans that meet its budget, one a search, with the iteration tables they
used, at data/plans/<target>; and what these tables took, at data/costs/<target>.json, which changes
no plan."""

from pathlib import Path

from blockpruner import pipeline
from blockpruner.config.dag import read_dag
from blockpruner.core.progress import observer
from blockpruner.methods.recipes import compensation
from blockpruner.methods.registry import KINDS
from blockpruner.search.trace import save_iterations
from blockpruner.splits import Rows
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.plans import save_plan
from stages import DATA, run, searched, sections, target


def main(name: str) -> None:
    settings = target(name)
    run_name = settings.run
    method = read_dag()["pruned"][name]["method"]
    dense = DATA / "models" / run_name
    proposals = pipeline.commit(
        DATA / "scores" / run_name / method,
        searched(run_name, method).score,
        read_json(dense / "config.json"),
        settings.budget,
        Rows.load(DATA / "calibration" / run_name, "search", "judge"),
        target=name,
        run=run_name,
        compensate=settings.compensate
        or compensation(sections(run_name).compensate.method, method),
        train=settings.train,
        dense=dense,
    )

    def build(directory: Path) -> None:
        for proposal in proposals:
            save_plan(proposal.plan, directory / f"{proposal.name}.json")
            # A method such as SliceGPT searches nothing, and has no table.
            if proposal.tables:
                save_iterations(proposal.tables, directory / f"{proposal.name}.parquet")

    replace_directory(DATA / "plans" / name, build)
    # Seconds differ from run to run: in a file of their own they make no later stage stale.
    write_json(DATA / "costs" / f"{name}.json", pipeline.total_cost(proposals))
    for proposal in proposals:
        plan = proposal.plan
        removed = KINDS[plan.kind].removed_words(plan)
        order = ", ".join(plan.order) or plan.method
        observer().note(
            f"{name}: {removed} ({order}); ratio {plan.ratio:.4f} for budget {settings.budget}"
        )


if __name__ == "__main__":
    run("commit", main)
