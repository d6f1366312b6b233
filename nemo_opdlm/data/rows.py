"""Prompt files as validated rows: jsonl and parquet, no tokenizer involved.

Every error is one line and names the culprit (file, line or row, key): all of them are raised at set-up, before a model
is built.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.data.bounded import parse_json
from nemo_opdlm.data.shown import shortened, shown

PROMPT_KEYS = ("prompt", "messages", "question", "input")
RESPONSE_KEYS = ("response", "output")
#: Alpaca's rows have it beside an `input` that means little without it.
_INSTRUCTION = "instruction"
ROLES = ("system", "user", "assistant")
_EXTENSIONS = (".jsonl", ".parquet")
#: All rows are held in memory, and one of parquet may cost a few bits of the file.
MAX_ROWS = 10_000_000
MAX_ROW_BYTES = 64 * 2**20
_ROWS_PER_BATCH = 1024

Message = dict[str, str]


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file.

    Exactly one of `text` (a single user text) and `messages` (a conversation that ends with a user turn) is set.
    `where` is `file:line` of a jsonl row, `file:row N` of a parquet row; both count from 1. `response` is None unless
    responses were asked for.
    """

    where: str
    row_id: str
    text: str | None
    messages: tuple[Message, ...] | None
    domain: str | None
    response: str | None = None

    def conversation(self, suffix: str = "") -> list[Message]:
        """The row as chat turns, `suffix` appended to the last user turn. No system message is ever added."""
        turns = [dict(turn) for turn in self.messages or ({"role": "user", "content": self.text or ""},)]
        turns[-1]["content"] += suffix
        return turns


def read_rows(path: str | Path, *, with_responses: bool = False) -> list[PromptRow]:
    """Read and validate every row of a prompt file.

    Rows hold `prompt` (text), `question` (text, as in the published OPDLM set), `input` (text, as in NeMo's SFT files)
    or `messages` (a list of {role, content}), and optionally `domain` and `id`. With responses they also hold `response`
    or `output` (text), or their `messages` end with an assistant turn. Other columns are ignored; an absent value may be
    null.

    Raises FileNotFoundError for a missing file, ValueError for anything malformed or an empty file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    if path.is_dir() or path.suffix not in _EXTENSIONS:
        kind = "is a folder" if path.is_dir() else f"has the extension {path.suffix!r}"
        raise ValueError(f"prompt file {path} {kind}; expected a file ending in {' or '.join(_EXTENSIONS)}")
    objects = read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path, with_responses)
    rows = [_parse_row(where, number, fields, with_responses) for where, number, fields in objects]
    if not rows:
        raise ValueError(f"prompt file {path} holds no rows")
    return rows


def read_jsonl(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Where each line stands (`file:line`), its number from 1 and its value; empty lines are passed over.

    Raises ValueError for a line that is no UTF-8 or no JSON.
    """
    # Bytes, not text: a decoding error must name its line, and only "\n" may end one (str.splitlines has eight others).
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read: {error.strerror}") from error
    with file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(raw) > MAX_ROW_BYTES:
                raise ValueError(f"{where}: the row has more than {MAX_ROW_BYTES // 2**20} MiB")
            line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if not line:
                continue
            try:
                # Half a character counts only where it is part of a prompt.
                row = parse_json(line, allow_surrogates=True)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield where, number, row


def _read_parquet(path: Path, with_responses: bool) -> Iterator[tuple[str, int, Any]]:
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    except Exception as error:  # Arrow's errors, and Python's for what it cannot express
        raise _damaged(path, error) from error
    wanted = {*PROMPT_KEYS, *(RESPONSE_KEYS if with_responses else ()), _INSTRUCTION, "domain", "id"}
    columns = [name for name in names if name in wanted]
    if not wanted.intersection(PROMPT_KEYS).intersection(columns):
        raise ValueError(f"{path}: no column is one of {', '.join(PROMPT_KEYS)}; found {shown(names)}")
    if len(set(columns)) != len(columns):
        raise ValueError(f"{path}: several columns have the same name; found {shown(names)}")
    if num_rows > MAX_ROWS:
        raise ValueError(f"{path} has {num_rows} rows, more than {MAX_ROWS}")
    number = 0
    batches = file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns)
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except Exception as error:
            raise _damaged(path, error) from error
        for fields in rows:
            number += 1
            yield f"{path}:row {number}", number, fields


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path}: not a readable parquet file ({shortened(reason)})")


def _parse_row(where: str, number: int, fields: Any, with_responses: bool) -> PromptRow:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, got {type(fields).__name__}")
    present = [key for key in PROMPT_KEYS if fields.get(key) is not None]
    if len(present) != 1:
        found = f"{present}" if present else f"none of them among its keys {shown(list(fields))}"
        raise ValueError(f"{where}: a row needs exactly one of {list(PROMPT_KEYS)}, found {found}")
    key = present[0]
    if key == "input" and fields.get(_INSTRUCTION) is not None:
        raise ValueError(
            f"{where}: 'input' beside '{_INSTRUCTION}' is a part of a prompt only; write both as one 'prompt'"
        )
    domain = fields.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise ValueError(f"{where}: 'domain' must be a string, got {type(domain).__name__}")
    row_id = fields.get("id")
    if row_id is not None and (isinstance(row_id, bool) or not isinstance(row_id, str | int)):
        raise ValueError(f"{where}: 'id' must be a string or an integer, got {type(row_id).__name__}")
    for name, value in (("domain", domain), ("id", row_id)):
        _check_characters(where, name, value)
    turns = _parse_messages(where, fields[key]) if key == "messages" else ()
    response = None
    if with_responses:
        turns, response = _split_response(where, fields, turns)
    if turns and turns[-1]["role"] != "user":
        raise ValueError(f"{where}: the last of 'messages' must be a user turn, got {turns[-1]['role']!r}")
    return PromptRow(
        where=where,
        row_id=str(number if row_id is None else row_id),
        text=None if turns else _parse_text(where, key, fields[key]),
        messages=turns or None,
        domain=domain,
        response=response,
    )


def _split_response(
    where: str, fields: Mapping[str, Any], turns: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str]:
    """The turns of the prompt, and the response: a column of its own or the last of the turns."""
    present = [key for key in RESPONSE_KEYS if fields.get(key) is not None]
    is_last_turn = len(turns) > 1 and turns[-1]["role"] == "assistant"
    if len(present) + is_last_turn != 1:
        found = [*present, *(["messages"] if is_last_turn else [])] or "none"
        raise ValueError(
            f"{where}: a row needs exactly one response, {' or '.join(map(repr, RESPONSE_KEYS))} or a last assistant turn of "
            f"'messages', found {found}"
        )
    if is_last_turn:
        return turns[:-1], turns[-1]["content"]
    return turns, _parse_text(where, present[0], fields[present[0]])


def _parse_text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    _check_characters(where, key, value)
    return value


def _check_characters(where: str, key: str, value: Any) -> None:
    """No tokenizer, and no file, takes half of a UTF-16 pair."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {key!r} has half a character (a lone surrogate) at position {error.start}"
        ) from None


def _parse_messages(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: 'messages' must be a non-empty list of {{'role', 'content'}} objects")
    turns: list[Message] = []
    for index, turn in enumerate(value):
        name = f"messages[{index}]"
        # Other keys (tool calls, images, reasoning) would change the prompt: better refused than dropped silently.
        keys = sorted(key for key, entry in turn.items() if entry is not None) if isinstance(turn, Mapping) else None
        if keys != ["content", "role"]:
            found = type(turn).__name__ if keys is None else f"keys {keys}"
            raise ValueError(
                f"{where}: {name} must be an object with exactly 'role' and 'content', got {shortened(found)}"
            )
        if turn["role"] not in ROLES:
            raise ValueError(f"{where}: {name} has role {shown(turn['role'])}; allowed: {', '.join(ROLES)}")
        turns.append({"role": turn["role"], "content": _parse_text(where, f"{name}.content", turn["content"])})
    return tuple(turns)
