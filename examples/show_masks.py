"""Print who may attend to whom: the student's two-stream mask and the teacher's causal mask of a tiny layout."""

import argparse

import torch

from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense

_VISIBLE, _HIDDEN = "■", "·"
_MOST_TOKENS = 120


def main() -> None:
    """Parse the sizes, then print both masks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt_len", type=positive, default=6, help="prompt tokens P (default: 6)")
    parser.add_argument("--response_len", type=positive, default=5, help="response tokens R (default: 5)")
    parser.add_argument("--block_size", type=positive, default=4, help="tokens of a block b (default: 4)")
    parser.add_argument("--num_states", type=positive, default=1, help="half-masked copies of it (default: 1)")
    args = parser.parse_args()
    prompt_len, response_len = torch.tensor([args.prompt_len]), torch.tensor([args.response_len])
    layout = BlockLayout(prompt_len, response_len, torch.tensor([args.num_states]), args.block_size)
    if int(layout.row_len) > _MOST_TOKENS:
        parser.error(f"the row has {int(layout.row_len)} tokens, more than the {_MOST_TOKENS} that can be read")
    causal = BlockLayout(prompt_len, response_len, torch.tensor([0]), args.block_size)
    print(f"P = {args.prompt_len} prompt tokens, R = {args.response_len} response tokens, b = {args.block_size}\n")
    print("Student: block diffusion over [prompt | clean | state copies]")
    print(render(AttentionRule.BLOCK_DIFFUSION, layout.attributes(), args.prompt_len, args.response_len))
    print("\nTeacher: causal over [prompt | response]")
    attributes = causal.attributes(width=args.prompt_len + args.response_len)
    print(render(AttentionRule.CAUSAL, attributes, args.prompt_len, args.response_len))
    print(
        f"\n{_VISIBLE} may attend, {_HIDDEN} may not; rows ask, columns answer. Numbers are absolute positions.\n"
        "p prompt, x clean response, s state copy (its masked tokens are trained), s' the second copy, and so on;\n"
        ". rest of the final block behind the response. | and - divide streams and blocks.\n"
        "A state copy opens with its own copy of the prompt tokens that share the first response block: they see the\n"
        "masks of that block, as they do when the student writes."
    )


def render(rule: AttentionRule, attributes: TokenAttributes, prompt_len: int, response_len: int) -> str:
    """The mask of one row as text, a line per query token."""
    visible = dense(rule, attributes, attributes)[0, 0].tolist()
    streams, positions, blocks = (
        x[0].tolist() for x in (attributes.stream_ids, attributes.position_ids, attributes.block_ids)
    )
    labels = [_label(*token, prompt_len, response_len) for token in zip(streams, positions, strict=True)]
    # A divider stands before each token that opens a stream or a block.
    opens = [i > 0 and (streams[i], blocks[i]) != (streams[i - 1], blocks[i - 1]) for i in range(len(labels))]
    width = max(map(len, labels))

    def line(label: str, cells: list[str]) -> str:
        columns = "".join((" | " if new else " ") + cell for new, cell in zip(opens, cells, strict=True))
        return f"{label:>{width}} {columns}".rstrip()

    divider = "-" * (width + 1 + 2 * len(labels) + 2 * sum(opens))
    # Column labels are read downwards.
    lines = [line("", [label.ljust(width)[i] for label in labels]) for i in range(width)]
    lines.append("")
    for label, new, row in zip(labels, opens, visible, strict=True):
        if new:
            lines.append(divider)
        lines.append(line(label, [_VISIBLE if cell else _HIDDEN for cell in row]))
    return "\n".join(lines)


def _label(stream: int, position: int, prompt_len: int, response_len: int) -> str:
    if position >= prompt_len + response_len:
        kind = "."
    elif stream == 0:
        kind = "p" if position < prompt_len else "x"
    else:
        kind = "s"
    return f"{kind}{position}{chr(39) * (stream - 1)}"


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
