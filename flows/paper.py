"""`python -m flows.paper --study NAME`: the paper's tables and figures for the targets of a study.

Adds the targets of studies/NAME.yaml to params.yaml, brings them up to date and makes the study's tables at
data/tables/NAME. A target that fails stops no other; the tables name its reason. Which stages run is decided by
flows.selection, and how by flows.prune.
"""

from __future__ import annotations

import argparse
import sys

from prefect import flow
from prefect.client.schemas.objects import State

from flows.prune import build, run_here
from flows.selection import choose_study


@flow(name="paper-tables", flow_run_name="{study}")
def paper(study: str) -> State[None]:
    """Bring every target of a study up to date, then its tables; what is known is not computed again.

    Args:
        study: The name of studies/<name>.yaml. `smollm2` takes hours on 2 CPU cores.
    """
    return build(lambda: choose_study(study), keep_going=True)


def main(argv: list[str] | None = None) -> int:
    """0: up to date; 1: a target failed; 2: refused, nothing changed; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.paper", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--study", required=True, metavar="NAME", help="studies/NAME.yaml")
    study = parser.parse_args(argv).study
    return run_here(lambda: choose_study(study), lambda: paper(study, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
