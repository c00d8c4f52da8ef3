"""Tables that tools write into pages, between `<!-- NAME: tools/PROGRAM -->` and `<!-- end -->`."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_table(page, name, head, rows):
    """In the place of the rows that the page has there."""
    path = ROOT / page
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    pattern = re.compile(rf"(<!-- {name}: [^>]* -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", path.read_text())
    if count != 1:
        raise ValueError(f"{page} has {count} places for {name}")
    path.write_text(text)
