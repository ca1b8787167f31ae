"""settings <run>: its sections with every default filled in, at
data/settings/<run>/<section>.json."""

from blockpruner.config.params import load_sections
from blockpruner.store.files import write_text
from stages import SETTINGS, resolved, run


def main(name: str) -> None:
    text_by_section = load_sections(name).texts()
    for section, text in text_by_section.items():
        write_text(SETTINGS / name / f"{section}.json", text)
    for section in text_by_section:
        resolved(name, section)  # so that the end of the stage checks it


if __name__ == "__main__":
    run("settings", main)
