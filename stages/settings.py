"""settings <run>: its sections with every default filled in, at
data/settings/<run>/<section>.json."""

from blockpruner.params import load_sections
from blockpruner.store.files import write_text
from stages import SETTINGS, resolved, run


def main(name: str) -> None:
    found = load_sections(name).texts()
    for section, text in found.items():
        write_text(SETTINGS / name / f"{section}.json", text)
    for section in found:  # the end of the stage checks what was read
        resolved(name, section)


if __name__ == "__main__":
    run("settings", main)
