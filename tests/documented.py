"""The commands of the documentation, as its pages show them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (
    *(
        REPOSITORY / name
        for name in ("README.md", "conf/README.md", "nemo_opdlm/README.md", "examples/study/README.md")
    ),
    *sorted((REPOSITORY / "docs").glob("*.md")),
)
_PROGRAMS = ("python", "torchrun", "make", "pip")


@dataclass(frozen=True)
class Command:
    """A line of a page.

    Attributes:
        page: relative to the repository.
        words: of the line, without its comment.
    """

    page: str
    words: tuple[str, ...]

    @property
    def script(self) -> str | None:
        """Name of the script in `examples/` that it starts."""
        found = (re.fullmatch(r"examples/(\w+)\.py", word) for word in self.words)
        return next((match[1] for match in found if match is not None), None)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the script."""
        return self.words[self.words.index(f"examples/{self.script}.py") + 1 :]

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands() -> list[Command]:
    """Every command in a block of a page."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            if line.split(" ")[0] in _PROGRAMS:
                found.append(Command(str(page.relative_to(REPOSITORY)), tuple(shlex.split(line, comments=True))))
    return found
