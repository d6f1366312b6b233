"""Documentation says what the code says."""

import re
from pathlib import Path

import pytest

from nemo_opdlm.config.foreign import RENAMED

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of a page's tables, without their headings."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]


def source() -> str:
    """Every text of the package, with literals that go on in the next line joined."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((REPOSITORY / "nemo_opdlm").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_foreign_keys_are_documented_as_they_are_answered() -> None:
    keys = {cells[0].strip(" `"): cells[1].strip(" `") for cells in rows("coming_from.md")}
    # Those of Megatron-Bridge and of NeMo stand in the sections of their own.
    elsewhere = ("recompute_", "trainer.opdlm", "save_interval")
    expected = {key: ours for key, ours in RENAMED.items() if not key.startswith(elsewhere)}
    assert {key: keys.get(key) for key in expected} == expected


@pytest.mark.parametrize("message", [cells[0].strip() for cells in rows("troubleshooting.md") if "`" in cells[0]])
def test_messages_are_those_of_the_code(message: str) -> None:
    text = source()
    for part in message.strip("` ").split("…"):
        # What is printed differs from its literal where values stand.
        assert part.strip(" ;:") in text, part
