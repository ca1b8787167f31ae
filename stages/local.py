"""local <run>-<number>: the digests of a file or folder that a run names by path, at
data/local/<run>/.

What is fetched of it depends on them, so a text or model that was changed is fetched again.
"""

from pathlib import Path

from blockpruner.config.dag import read_dag
from blockpruner.store.files import write_json
from blockpruner.store.provenance import file_sha256
from stages import DATA, run


def main(name: str) -> None:
    entry = read_dag()["local"][name]
    path = Path(entry["path"])
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    digests = {str(file.relative_to(path.parent)): file_sha256(file) for file in files}
    write_json(DATA / "local" / entry["run"] / f"{name}.json", digests)


if __name__ == "__main__":
    run("local", main)
