"""push <target>: upload a checkpoint to the hub, as the target's `push` describes. Not part of the DAG: run by hand."""

from __future__ import annotations

from blockpruner.checkpoints.hub import push
from blockpruner.core.errors import InputError
from blockpruner.core.progress import observer
from blockpruner.inputs.checkpoints import licence_of
from blockpruner.params import load_params
from stages import DATA, run


def main(name: str) -> None:
    target = load_params().target(name)
    if target.push is None:
        raise InputError(f"target {name!r} has no push section; add push: {{repo: <user>/<name>}} to it in params.yaml")
    folder = DATA / "checkpoints" / name / target.push.format
    licence = licence_of(DATA / "models" / target.run)
    observer().note(f"{name}: {push(folder, target.push.repo, target.push.private, licence, name)}")


if __name__ == "__main__":
    run("push", main)
