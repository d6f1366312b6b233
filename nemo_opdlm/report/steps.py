"""The order in which a response was unmasked, as text."""

from collections.abc import Sequence

from rich.text import Text

#: Early forwards are cold, late ones warm; the colours start again with every block.
_COLOURS = ("bright_blue", "cyan", "green", "yellow", "bright_red", "magenta")


def unmasking_order(pieces: Sequence[str], unmask_steps: Sequence[int], blocks: Sequence[int]) -> Text:
    """One line per block: each token behind the number of the forward that revealed it.

    Args:
        pieces: the text of each response token.
        unmask_steps: the forward that revealed it, counted from 1 over the response.
        blocks: the block it stands in.
    """
    text = Text()
    for block in sorted(set(blocks)):
        members = [i for i, number in enumerate(blocks) if number == block]
        first = min(unmask_steps[i] for i in members)
        text.append(f"  block {block:>3} ", style="dim")
        for i in members:
            colour = _COLOURS[min(unmask_steps[i] - first, len(_COLOURS) - 1)]
            text.append(f" {unmask_steps[i]}:", style="dim")
            text.append(_quoted(pieces[i]), style=colour)
        text.append("\n")
    return text


def _quoted(piece: str) -> str:
    """A token with its spaces and line breaks to be seen."""
    return "'" + piece.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") + "'"
