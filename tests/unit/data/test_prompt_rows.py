"""Reading prompt files: what is accepted, and that every bad row is refused by name."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from nemo_opdlm.data import rows
from nemo_opdlm.data.rows import read_rows

USER = {"role": "user", "content": "hello"}


def test_prompt_question_and_messages_rows_are_read(write_jsonl):
    path = write_jsonl(
        [
            {"prompt": "a", "domain": "chat", "id": 7},
            {"question": "b", "ground_truth_answer": "4", "domain": "math", "source": "s"},
            "",
            {"messages": [USER, {"role": "assistant", "content": "hi"}, USER], "id": "x"},
        ]
    )
    rows = read_rows(path)
    assert [row.text for row in rows] == ["a", "b", None]
    assert [row.domain for row in rows] == ["chat", "math", None]
    assert [row.row_id for row in rows] == ["7", "2", "x"]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert [turn["role"] for turn in rows[2].conversation()] == ["user", "assistant", "user"]


def test_conversation_appends_the_suffix_to_the_last_user_turn_only(write_jsonl):
    first, second = read_rows(write_jsonl([{"prompt": "a"}, {"messages": [USER, USER]}]))
    assert first.conversation("!") == [{"role": "user", "content": "a!"}]
    assert [turn["content"] for turn in second.conversation("!")] == ["hello", "hello!"]
    assert [turn["content"] for turn in second.conversation()] == ["hello", "hello"], "the row itself is unchanged"


def test_responses_are_a_column_or_the_last_turn(write_jsonl):
    turns = [USER, {"role": "assistant", "content": "hi"}, USER, {"role": "assistant", "content": "bye"}]
    path = write_jsonl(
        [
            {"prompt": "a", "response": "b", "output": None},
            {"input": "c", "output": "d"},
            {"messages": [USER], "response": "e"},
            {"messages": turns},
        ]
    )
    found = read_rows(path, with_responses=True)
    assert [row.response for row in found] == ["b", "d", "e", "bye"]
    assert [row.text for row in found] == ["a", "c", None, None]
    assert [len(row.conversation()) for row in found] == [1, 1, 1, 3]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_input_beside_an_instruction_is_refused(tmp_path, ending):
    row, path = {"instruction": "Translate", "input": "Haus", "output": "house"}, tmp_path / f"alpaca.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match="'input' beside 'instruction' is a part of a prompt only"):
        read_rows(path)


def test_responses_that_nobody_asked_for_are_ignored_but_no_prompt_ends_with_an_assistants_turn(tmp_path, write_jsonl):
    rows_ = [{"prompt": "a", "response": 7}, {"input": "b", "output": ""}]
    assert [(row.text, row.response) for row in read_rows(write_jsonl(rows_))] == [("a", None), ("b", None)]
    path = tmp_path / "p.parquet"
    parquet.write_table(
        pyarrow.table({"prompt": ["a"], "response": pyarrow.array([2**62], pyarrow.duration("s"))}), path
    )
    assert read_rows(path)[0].response is None
    with pytest.raises(ValueError, match="not a readable parquet file"):
        read_rows(path, with_responses=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a"},
            "a row needs exactly one response, 'response' or 'output' or a last assistant .*, found none",
        ),
        ({"prompt": "a", "response": "b", "output": "c"}, r"found \['response', 'output'\]"),
        (
            {"messages": [USER, {"role": "assistant", "content": "b"}], "response": "b"},
            r"found \['response', 'messages'\]",
        ),
        ({"messages": [USER]}, "found none"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "found none"),
        (
            {"messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "b"}]},
            "must be a user turn",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"'messages\[1\].content' is empty"),
        ({"prompt": "a", "response": " \n"}, "'response' is empty"),
        ({"input": "a", "output": 3}, "'output' must be a string, got int"),
        (r'{"prompt": "a", "response": "\udfff"}', "'response' has half a character"),
        ({"response": "b"}, "needs exactly one of .*none of them among its keys .'response'"),
        ({"prompt": "a", "input": "b", "output": "c"}, r"found \['prompt', 'input'\]"),
    ],
)
def test_a_row_without_one_response_is_refused_with_file_and_line(write_jsonl, row, message):
    path = write_jsonl([{"prompt": "fine", "response": "fine"}, row])
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path, with_responses=True)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_only_a_newline_ends_a_row_and_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "p.jsonl"
    text = "one\u2028two\x85three"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n")
    assert [row.text for row in read_rows(path)] == [text]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"', "invalid JSON"),
        ("[1, 2]", "must be a JSON object, got list"),
        ({"text": "a"}, "needs exactly one of .*none of them among its keys .'text'"),
        ({"prompt": None}, "needs exactly one of"),
        ({"prompt": "a", "messages": [USER]}, r"found \['prompt', 'messages'\]"),
        ({"prompt": 3}, "'prompt' must be a string, got int"),
        ({"prompt": [USER]}, "'prompt' must be a string, got list"),
        ({"question": ""}, "'question' is empty"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"prompt": "a", "domain": 3}, "'domain' must be a string, got int"),
        ({"prompt": "a", "id": 1.5}, "'id' must be a string or an integer, got float"),
        ({"messages": []}, "'messages' must be a non-empty list"),
        ({"messages": USER}, "'messages' must be a non-empty list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object .* got str"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must be an object .* got keys \['role'\]"),
        ({"messages": [USER | {"tool_calls": [1]}]}, r"messages\[0\] .* got keys \['content', 'role', 'tool_calls'\]"),
        ({"messages": [USER | {"role": "tool"}]}, r"messages\[0\] has role 'tool'; allowed: system, user, assistant"),
        ({"messages": [USER | {"content": 1}]}, r"'messages\[0\].content' must be a string, got int"),
        ({"messages": [USER, {"role": "assistant", "content": "hi"}]}, "must be a user turn, got 'assistant'"),
        ('{"prompt": "a", "x": ' + "[" * 2000 + "]" * 2000 + "}", "invalid JSON, nested more than 100 deep"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "invalid JSON, a number of thousands of digits"),
        (r'{"prompt": "a \ud800"}', r"'prompt' has half a character \(a lone surrogate\) at position 2"),
        (r'{"prompt": "a", "id": "\udfff"}', "'id' has half a character"),
        (r'{"prompt": "a", "domain": "\udfff"}', "'domain' has half a character"),
        ({"messages": [USER | {"role": ["x"] * 1000}]}, r"messages\[0\] has role \['x', .*\.\.\.; allowed"),
        ({f"key{i}": 1 for i in range(1000)}, r"none of them among its keys \['key0', .*\.\.\.$"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(write_jsonl, row, message):
    path = write_jsonl([{"prompt": "fine"}, row])
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_half_a_character_in_a_column_that_is_ignored_does_not_matter(write_jsonl):
    assert read_rows(write_jsonl([r'{"prompt": "a", "answer": "\ud800"}']))[0].text == "a"


def test_a_row_of_gigabytes_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2**20)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "' + b"a" * 2**20 + b'"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the row has more than 1 MiB"):
        read_rows(path)


def test_bytes_that_are_not_utf8_are_refused_with_file_and_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: not UTF-8"):
        read_rows(path)


def test_missing_empty_and_unknown_files_are_refused(tmp_path, write_jsonl):
    with pytest.raises(FileNotFoundError, match=r"prompt file .*nowhere\.jsonl does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(write_jsonl(["", "  "]))
    with pytest.raises(ValueError, match=r"has the extension '\.txt'; expected a file ending in \.jsonl or \.parquet"):
        read_rows(write_jsonl([{"prompt": "a"}], name="prompts.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        read_rows(tmp_path)


def test_parquet_rows_equal_jsonl_rows(tmp_path, write_jsonl):
    objects = [
        {"prompt": "a", "messages": None, "domain": "chat"},
        {"prompt": None, "messages": [USER | {"name": None}], "domain": None},
    ]
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(objects), path)
    from_parquet, from_jsonl = read_rows(path), read_rows(write_jsonl(objects))
    assert [(r.text, r.messages, r.domain, r.row_id) for r in from_parquet] == [
        (r.text, r.messages, r.domain, r.row_id) for r in from_jsonl
    ]
    assert from_parquet[1].where == f"{path}:row 2"


def test_broken_parquet_files_are_refused(tmp_path):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"no column is one of prompt, messages, question, input; found \['text'\]"):
        read_rows(path)
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"p\.parquet: not a readable parquet file"):
        read_rows(path)
    parquet.write_table(pyarrow.table({"prompt": [1, 2]}), path)
    with pytest.raises(ValueError, match="row 1: 'prompt' must be a string, got int"):
        read_rows(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": pyarrow.array([2**62], pyarrow.duration("s"))}, "not a readable parquet file"),
        ({"prompt": pyarrow.array([b"\xff"]).view(pyarrow.string())}, "not a readable parquet file"),
        ({"prompt": ["a"], "id": pyarrow.array([0], pyarrow.timestamp("s"))}, "'id' must be a string or an integer"),
        (
            {"messages": pyarrow.array([[[("role", "user")]]], pyarrow.list_(pyarrow.map_("string", "string")))},
            "got list",
        ),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, columns, message):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_parquet_columns_of_one_name_and_rows_without_end_are_refused(tmp_path, monkeypatch):
    # A file of some kB may claim billions of rows.
    monkeypatch.setattr(rows, "MAX_ROWS", 3)
    path = tmp_path / "p.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    parquet.write_table(table, path)
    with pytest.raises(ValueError, match="several columns have the same name"):
        read_rows(path)
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array(["a"] * 4)}), path)
    with pytest.raises(ValueError, match="4 rows, more than 3"):
        read_rows(path)


@pytest.mark.parametrize("damage", [slice(0, 40), slice(4, None), slice(0, -20)])
def test_damaged_parquet_files_are_refused(tmp_path, damage):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), path)
    path.write_bytes(b"PAR1" + path.read_bytes()[damage] + b"PAR1")
    with pytest.raises(ValueError, match=r"p\.parquet: not a readable parquet file"):
        read_rows(path)
