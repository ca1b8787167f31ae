"""settings <run>: its sections with every default filled in, at data/settings/<run>/<section>.json."""

from blockpruner.params import load_sections
from blockpruner.settings import Sections
from blockpruner.store.files import write_text
from stages import SETTINGS, run, sections


def main(name: str) -> None:
    found = load_sections(name)
    for section in Sections.model_fields:
        write_text(SETTINGS / name / f"{section}.json", found.text(section))
    for section in Sections.model_fields:  # the end of the stage checks what was read
        getattr(sections(name), section)


if __name__ == "__main__":
    run("settings", main)
