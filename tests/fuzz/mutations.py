"""Hypothesis strategies of damaged and hostile files, most of them made from whole ones."""

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

#: Stand in for what no JSON writer writes: put into the text afterwards.
_RAW = {
    '"@deep"': "[" * 3000 + "]" * 3000,
    '"@deeper"': '{"a":' * 200_000 + "1" + "}" * 200_000,
    '"@digits"': "9" * 5000,
    '"@float"': "1e999",
    '"@twice"': '{"a": 1, "a": 2}',
}
_NAMES = ("a", "", "_target_", "target", "type", "content", "id", "prompt", "messages", "tokenizer", "files", "vocab")
_LEAVES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**18, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "\0",
        "\n",
        "\ud800",
        "\U0001f600",
        "\u2028",
        "1e-5",
        "true",
        "x" * 5000,
        "../../etc/passwd",
        "/dev/zero",
    ),
    *("${oc.env:HOME}", "${a}", "nemo:../x", "{{", "{% for x in y %}", "os.system", "torch.load", "iter_0000010"),
    *(text.strip('"') for text in _RAW),
    *([], {}, [[]], [None], {"": None}, [1, 2, 3], ["full_attention"], {"_target_": "os.system", "_args_": ["true"]}),
)
leaves: SearchStrategy[Any] = st.one_of(
    st.sampled_from(_LEAVES), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(_NAMES)
)
#: Anything that JSON can say, and some things that it cannot.
values: SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def dump(value: Any) -> bytes:
    """JSON text, lone surrogates as escapes."""
    text = json.dumps(value)
    for stand_in, raw in _RAW.items():
        text = text.replace(stand_in, raw)
    return text.encode()


@st.composite
def edited_tree(draw: DrawFn, samples: Sequence[Any]) -> Any:
    """A sample in which some places hold another value, are missing or are there under another name."""
    tree = copy.deepcopy(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)
        if not places:
            return copy.deepcopy(draw(values))
        where, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "remove", "rename", "repeat")))
        if action == "replace":
            where[key] = copy.deepcopy(draw(values))
        elif action == "remove":
            del where[key]
        elif isinstance(where, dict):
            new = draw(st.sampled_from(_NAMES) | st.text(max_size=5))
            where[new] = copy.deepcopy(where[key]) if action == "repeat" else where.pop(key)
        else:
            where.insert(key, copy.deepcopy(where[key]))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    found = [(tree, key) for key in keys]
    # The first and last of many alike say as much as all of them.
    inner = found if len(found) <= 40 else found[:3] + found[-3:]
    return inner + [place for where, key in inner for place in _places(where[key])]


def edited_json(*samples: Any) -> SearchStrategy[bytes]:
    """A JSON text with other values."""
    return edited_tree(samples).map(dump)


def edited_bytes(
    *samples: bytes, tokens: Sequence[bytes] = (), hot: Sequence[int] = (), reach: int = 64
) -> SearchStrategy[bytes]:
    """A sample after flips, insertions, removals, cuts and splices.

    Args:
        samples: whole files.
        tokens: what the format is made of, inserted and written over.
        hot: offsets near which most edits are made; by default everywhere.
        reach: how far from them.
    """
    return _edited_bytes(samples, tuple(tokens), tuple(hot), reach)


@st.composite
def _edited_bytes(
    draw: DrawFn, samples: tuple[bytes, ...], tokens: tuple[bytes, ...], hot: tuple[int, ...], reach: int
) -> bytes:
    data = draw(st.sampled_from(samples))
    piece = st.binary(min_size=1, max_size=8) | (st.sampled_from(tokens) if tokens else st.nothing())
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("overwrite", "overwrite", "insert", "remove", "cut", "splice", "flip")))
        if hot and draw(st.integers(0, 3)):
            at = draw(st.sampled_from(hot)) + draw(st.integers(0, reach))
        else:
            at = draw(st.integers(0, 2**24))
        at %= len(data) + 1
        if kind == "overwrite":
            new = draw(piece)
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + draw(piece) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "splice":
            start, size = draw(st.integers(0, 2**24)) % (len(data) + 1), draw(st.integers(1, 512))
            data = data[:at] + data[start : start + size] + data[at:]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    return data
