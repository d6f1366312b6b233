"""Prompt files, and the rows in them."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nemo_opdlm.data.prompts import load_prompts
from nemo_opdlm.data.tokenizer import load_tokenizer
from nemo_opdlm.testing import tiny
from tests.fuzz import mutations, tokens
from tests.fuzz.engine import Case


def prompts(folder: Path) -> tuple[Callable[[Case], None], Callable[[Case], str]]:
    """Reads a prompt file through to token ids, with and without a chat template and responses."""
    tokenizers = []
    for template in (None, "{% for turn in messages %}{{ turn.content }} {% endfor %}"):
        home = folder / f"tokenizer-{template is None}"
        home.mkdir()
        for name, content in tiny.tokenizer_files().items():
            (home / name).write_bytes(content)
        if template is not None:
            (home / "chat_template.jinja").write_text(template)
        tokenizers.append(load_tokenizer(home))

    def read(case: Case) -> None:
        path = folder / case.file
        path.write_bytes(case.content)
        tokenizer = tokenizers[len(case.content) % 2]
        ends = (tiny.END_TOKEN_ID,) if len(case.content) % 4 < 2 else None
        load_prompts(
            path, tokenizer=tokenizer, max_prompt_length=50, mask_token_id=tiny.MASK_TOKEN_ID, response_end_ids=ends
        )

    return read, lambda case: case.file


_ROWS: tuple[Any, ...] = (
    {"prompt": "w4 w5"},
    {"question": "w4", "domain": "math", "id": 7},
    {"messages": [{"role": "system", "content": "w9"}, {"role": "user", "content": "w4 w5"}], "id": "a"},
    {"prompt": "w6", "messages": None, "answer": {"nested": [1, 2]}},
    {"input": "w4 w5", "output": " w6"},
    {"prompt": "w4", "response": " w7 w8", "output": None},
    {"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]},
)


def jsonl_cases() -> SearchStrategy[Case]:
    """Files of some rows, each whole or edited."""
    row = (
        st.sampled_from(_ROWS).map(mutations.dump)
        | mutations.edited_json(*_ROWS)
        | mutations.values.map(mutations.dump)
    )
    ends = st.sampled_from((b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"", b"\x85", b"\xe2\x80\xa8", b"\0"))
    starts = st.sampled_from((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"[", b" "))
    rows = st.lists(st.tuples(row, ends), max_size=4).map(lambda pairs: b"".join(map(b"".join, pairs)))
    whole = b"".join(mutations.dump(row) + b"\n" for row in _ROWS)
    files = (
        st.tuples(starts, rows).map(b"".join)
        | mutations.edited_bytes(whole, tokens=tokens.JSON)
        | st.binary(max_size=200)
    )
    return files.map(lambda content: Case("rows.jsonl", content))


def parquet_cases() -> SearchStrategy[Case]:
    """Damaged files, and whole ones with columns of other types."""
    whole = [
        _parquet({"prompt": pa.array(["w4", "w5 w6", "w7"]), "id": pa.array([1, 2, 3])}, codec)
        for codec in ("NONE", "SNAPPY", "ZSTD")
    ]
    whole.append(_parquet({"messages": pa.array([_ROWS[2]["messages"]] * 2)}, "NONE"))
    whole.append(_parquet({"input": pa.array(["w4", "w5"]), "output": pa.array([" w6", " w7"])}, "NONE"))
    damaged = mutations.edited_bytes(
        *whole, tokens=(b"PAR1", b"\xff\xff\xff\x7f", b"\x80" * 9, b"\x15", b"\x19", b"\0" * 4)
    )
    files = damaged | _typed_parquet()
    return files.map(lambda content: Case("rows.parquet", content))


def _parquet(columns: dict[str, Any], codec: str = "NONE") -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, compression=codec)
    return stream.getvalue()


_COLUMNS: tuple[Any, ...] = (
    *(
        ["w4", None, ""],
        [1, 2, 3],
        [1.5, float("nan"), None],
        [True, False, None],
        [b"w4", b"\xff", b""],
        [None, None, None],
    ),
    *(
        [["w4"], [], None],
        [{"a": 1}, {"a": None}, None],
        [[{"role": "user", "content": "w4"}]] * 3,
        [[{"role": "user"}], [{}], None],
    ),
    *([[{"role": "user", "content": None}]] * 3, ["w4 " * 1000] * 3, ["\0", "w4", "\u2028"]),
    *(
        pa.array([1, 2, 2**60], pa.timestamp("ns")),
        pa.array([2**62] * 3, pa.timestamp("s")),
        pa.array([1, 2, 2**31 - 1], pa.date32()),
    ),
    *(
        pa.array([10**37] * 3, pa.decimal128(38)),
        pa.array(["w4"] * 3).dictionary_encode(),
        pa.array(["w4"] * 3, pa.large_string()),
    ),
    *(
        pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int32())),
        pa.array([2**62] * 3, pa.duration("s")),
        pa.nulls(3),
    ),
    *(
        pa.array([b"w4", b"\xff", b"x"], pa.binary()).view(pa.string()),
        pa.array([2**62] * 3, pa.time64("us")),
        pa.array([1.0] * 3, pa.float16()),
    ),
    pa.array([[("role", "user"), ("content", "w4")]] * 3, pa.map_(pa.string(), pa.string())),
    pa.array([[[("role", "user"), ("content", "w4")]]] * 3, pa.list_(pa.map_(pa.string(), pa.string()))),
)


@st.composite
def _typed_parquet(draw: DrawFn) -> bytes:
    of_rows = ("prompt", "question", "messages", "input", "response", "output", "id", "domain")
    names = draw(st.lists(st.sampled_from((*of_rows, "x", "", "prompt.a")), max_size=3))
    columns = [draw(st.sampled_from(_COLUMNS)) for _ in names]
    rows = draw(st.sampled_from((0, 1, 3)))
    table = pa.table([pa.array(column)[:rows] for column in columns], names=names)
    stream = io.BytesIO()
    with contextlib.suppress(pa.ArrowException, OSError):  # a few values cannot be written
        pq.write_table(table, stream)
    return stream.getvalue()
