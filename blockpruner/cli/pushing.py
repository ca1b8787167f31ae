"""`blockpruner push`: what would be uploaded. What may be is decided by `checkpoints.hub`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockpruner.inputs.checkpoints import checkpoint_identity, licence_of
from blockpruner.reporting.formats import size
from blockpruner.store.manifest import SOURCE_FILE
from blockpruner.store.plans import PLAN_FILE, load_plan


def base_licence(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """The licence of the checkpoint's base, if the folder of `--cache` still has that model."""
    plan = checkpoint / PLAN_FILE
    base = load_plan(plan).base if plan.is_file() else None
    places = (source.parent for source in (cache / "cache/models").glob(f"[!.]*/{SOURCE_FILE}"))
    known = (place for place in places if ".bad" not in place.suffixes)
    return next((licence_of(dense) for dense in known if checkpoint_identity(dense) == base), {})


def words(found: Mapping[str, Any]) -> str:
    lines = [f"  {name}  {size(count)}" for name, count in found["files"].items()]
    seen = "private" if found["private"] else "public"
    return "\n".join([f"to the {seen} repository {found['repo']}: {size(sum(found['files'].values()))}", *lines])
