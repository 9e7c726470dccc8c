"""The registry's entries of published SAEs, and the table of docs/public_saes.md.

    python -m recipes.public_saes

writes both again, byte for byte. What makers publish stands in one module a project; what they do
not say, or what could not be looked up, stays open in the entry and is marked `# not known`.
"""

from __future__ import annotations

from pathlib import Path

from recipes.public_saes import by_hand, clip, prisma, saev, visaebench
from recipes.public_saes.entry import Entry, toml
from recipes.public_saes.table import table

ENTRIES: tuple[Entry, ...] = tuple(
    entry for module in (saev, prisma, visaebench, clip, by_hand) for entry in module.entries()
)
_BEGIN, _END = "<!-- saes -->\n", "<!-- end -->"


def files() -> dict[str, str]:
    """Path below `registry/saes` -> the text of an entry."""
    return {f"{entry.name}.toml": toml(entry) for entry in ENTRIES}


def page(text: str) -> str:
    """The text of docs/public_saes.md, its table written anew."""
    before, _, rest = text.partition(_BEGIN)
    return f"{before}{_BEGIN}{table(ENTRIES)}\n{_END}{rest.partition(_END)[2]}"


def write(content: Path) -> None:
    """Write all entries and the table below a content folder."""
    for name, text in files().items():
        path = content / "registry/saes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    docs = content / "docs/public_saes.md"
    docs.write_text(page(docs.read_text(encoding="utf-8")), encoding="utf-8")
