"""The readers of what comes from elsewhere, each with whole files to start from and damaged ones made of them."""

import contextlib
import copy
import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nemo_opdlm import cli
from nemo_opdlm.config import Config, full_keys, parse, validate
from nemo_opdlm.config.generate import GenerateConfig, validate_generate
from nemo_opdlm.data.encoding import encode_rows
from nemo_opdlm.data.prompts import load_prompts
from nemo_opdlm.data.rows import PromptRow
from nemo_opdlm.data.tokenizer import load_tokenizer, resolve_end_token_ids
from nemo_opdlm.megatron import safe_metadata
from nemo_opdlm.megatron.stored_tensors import StoredTensors
from nemo_opdlm.models.archive_format import check_class
from nemo_opdlm.models.conversion import archive_architecture, convert_hf_to_nemo
from nemo_opdlm.models.foreign import open_checkpoint
from nemo_opdlm.testing import tiny
from tests.fuzz import mutations
from tests.fuzz.engine import Case, Reader
from tests.integration import foreign_samples

_JSON = tuple(
    b'{ } [ ] , : " \\u \\ud800 null true NaN -Infinity 1e999 0x 99999999999999999999 \xff \xef\xbb\xbf'.split(b" ")
) + (
    b"\r\n",
    b"\n",
    b"\0",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"9" * 5000,
)
_YAML = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system ",
        b"!!python/name:os.system ",
        b"!!binary ",
        b"!x ",
        b"${",
    ),
    *(
        b"${a}",
        b"}",
        b": ",
        b"- ",
        b"\t",
        b"---\n",
        b"...\n",
        b"? ",
        b"|\n",
        b">\n",
        b"%YAML 9.9\n",
        b"!!timestamp 2001-99-99",
    ),
    *(
        b".nan",
        b".inf",
        b"1:2:3",
        b"0x" + b"f" * 5000,
        b"9" * 5000,
        b"2001-01-01",
        b"\xff",
        b"\0",
        b"#",
        b"'",
        b'"',
        b"\n",
    ),
    *(
        b"[" * 2000,
        b"- " * 2000,
        b"{a: " * 2000,
        b"!!set ",
        b"!!omap ",
        b"!!int x",
        b"!!float x",
        b"yes",
        b"~",
        b"@",
        b"`",
    ),
)
_TEMPLATES = (
    "{{ messages }}",
    "{{ messages[0].content }}{{ messages[9].content }}",
    "{% for i in range(99999) %}{% for j in range(99) %}{% endfor %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ messages[0]['content'] + 1 }}",
    "{{ raise_exception('no\nno') }}",
    "{{ 'a' * 10000000000000 }}",
    "{{ messages.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% if x",
    "{{ strftime_now('%Y') }}",
    "{{ messages | tojson(indent=-1) }}",
    "{{ '%d' % 'x' }}",
    "{{ messages | map('frobnicate') | list }}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
)
_PICKLE = (
    *(
        b"c",
        b"\x93",
        b"\x94",
        b"R",
        b"b",
        b"\x81",
        b"0",
        b"2",
        b"}",
        b"]",
        b")",
        b"\x85",
        b"\x86",
        b"\x87",
        b"(",
        b"t",
        b"u",
        b"s",
    ),
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"\x8c\x05torch\x94\x8c\x04load\x94\x93",
        b"ctorch\nSize\n",
        b"ctorch\nfloat32\n",
    ),
    *(
        b"r\xff\xff\xff\x0f",
        b"j\xff\xff\xff\x7f",
        b"B\xff\xff\xff\x7f",
        b"\x8e" + b"\xff" * 7 + b"\x0f",
        b"\x8b\xff\xff\xff\x7f",
    ),
    *(
        b"\x8a\x09" + b"\xff" * 8 + b"\x0f",
        b"I1\n",
        b"K\x01",
        b"J\xff\xff\xff\xff",
        b"N",
        b"\x88",
        b"G\x7f\xf8" + bytes(6),
        b".",
    ),
    *(b"(" * 500, b"]" * 3000, b"\x85" * 3000, b"\x8c\x04\xed\xa0\x80x", b"\x82\x01", b"P1\n", b"Q", b"\x97", b"\x98"),
)


class Folder:
    """A whole checkpoint of which one file at a time is replaced.

    Args:
        path: of the checkpoint; what lies beside it is watched, too.
        edits: file of it -> strategy of its other contents.
        read: reads what is at a path.
    """

    def __init__(self, path: Path, edits: dict[str, SearchStrategy[bytes]], read: Callable[[Path], None]) -> None:
        self.path, self._edits, self._read = path, edits, read
        self._whole = {name: (path / name).read_bytes() if (path / name).is_file() else None for name in edits}
        self._before = {str(file) for file in path.parent.rglob("*")}

    @property
    def cases(self) -> SearchStrategy[Case]:
        """One file with another content."""
        return st.one_of(
            [contents.map(lambda content, name=name: Case(name, content)) for name, contents in self._edits.items()]
        )

    def read(self, case: Case) -> None:
        """Read the checkpoint with this file in it, then put the whole one back."""
        file, whole = self.path / case.file, self._whole[case.file]
        file.write_bytes(case.content)
        try:
            self._read(self.path)
        finally:
            file.unlink()
            if whole is not None:
                file.write_bytes(whole)
        left = sorted({str(path) for path in self.path.parent.rglob("*")} - self._before)
        for path in left:
            shutil.rmtree(path, ignore_errors=True) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
        assert not left, f"left behind: {left[:3]}"

    def names(self, case: Case) -> str:
        """The checkpoint, or its parent where a run of several was given."""
        return str(self.path)


def read_checkpoint(path: Path) -> None:
    """As training and conversion do it, up to the network itself, which is not built."""
    with open_checkpoint(path, scratch=path.parent) as archive:
        check_class(archive)
        archive_architecture(archive, archive.config)
        if not isinstance(archive.weights, Path):
            for name in archive.weights:
                archive.weights[name]


# -- checkpoints --


def hugging_face(folder: Path) -> Folder:
    """A Hugging Face folder."""
    path = tiny.write_hf_folder(folder / "checkpoint")
    generation = {"eos_token_id": [1, 2], "temperature": 0.7}
    (path / "generation_config.json").write_bytes(mutations.dump(generation))
    weights = (path / "model.safetensors").read_bytes()
    index = {
        "metadata": {},
        "weight_map": {name: "model.safetensors" for name in ("lm_head.weight", "model.norm.weight")},
    }
    return Folder(
        path,
        {
            "config.json": _json_file(path / "config.json"),
            "generation_config.json": _json_file(path / "generation_config.json"),
            "tokenizer.json": _json_file(path / "tokenizer.json"),
            "tokenizer_config.json": _json_file(path / "tokenizer_config.json"),
            "special_tokens_map.json": mutations.edited_json(
                {"mask_token": "<unused>", "pad_token": {"content": "<pad>"}}
            ),
            "added_tokens.json": mutations.edited_json({"<unused>": 3}),
            "chat_template.jinja": st.sampled_from(_TEMPLATES).map(str.encode) | st.binary(max_size=50),
            "model.safetensors": _safetensors(weights),
            "model.safetensors.index.json": mutations.edited_json(index),
        },
        read_checkpoint,
    )


def nemo(folder: Path) -> Folder:
    """An archive of ours as a folder."""
    convert_hf_to_nemo(tiny.write_hf_folder(folder / "hf"), folder / "model.nemo")
    with tarfile.open(folder / "model.nemo") as tar:
        tar.extractall(folder / "checkpoint", filter="data")
    shutil.rmtree(folder / "hf")
    (folder / "model.nemo").unlink()
    path = folder / "checkpoint"
    return Folder(
        path,
        {"model_config.yaml": _yaml_file(path / "model_config.yaml"), **_distributed(path, "model_weights")},
        read_checkpoint,
    )


def nemo_1(folder: Path) -> Folder:
    """A NeMo 1.x archive of two ranks as a folder."""
    sample = _sample(folder)
    states = foreign_samples.rank_state_dicts(sample, 2, 1)
    path = foreign_samples.nemo_1(folder / "checkpoint", sample, states, tensor_model_parallel_size=2)
    rank = "mp_rank_01/model_weights.ckpt"
    edits = {
        "model_config.yaml": _yaml_file(path / "model_config.yaml"),
        rank: _torch_file((path / rank).read_bytes()),
        f"{0:032x}_tokenizer.json": _json_file(path / f"{0:032x}_tokenizer.json"),
    }
    return Folder(path, edits, read_checkpoint)


def nemo_2(folder: Path) -> Folder:
    """A NeMo 2.0 folder."""
    path = foreign_samples.nemo_2(folder / "checkpoint", _sample(folder))
    context = {"context/model.yaml": _yaml_file(path / "context/model.yaml")}
    return Folder(path, {**context, **_distributed(path, "weights")}, read_checkpoint)


def nemo_2_json(folder: Path) -> Folder:
    """A NeMo 2.0 folder with its settings in `io.json`."""
    path = foreign_samples.nemo_2(folder / "checkpoint", _sample(folder), as_json=True)
    return Folder(path, {"context/io.json": _json_file(path / "context/io.json")}, read_checkpoint)


def bridge(folder: Path) -> Folder:
    """A Megatron-Bridge run of one iteration."""
    path = foreign_samples.bridge(folder / "checkpoint", _sample(folder))
    tracker = "latest_train_state.pt"
    tensors = [torch.tensor(10), torch.zeros(3), torch.zeros(1).expand(10**9), torch.tensor(float("nan"))]
    states = [{"step": value} for value in (*tensors, 10, "release", [[]], None, 10**30)]
    edits = {
        tracker: _torch_file(*map(_saved, [*states, [1], "x", {}])),
        "iter_0000010/run_config.yaml": _yaml_file(path / "iter_0000010/run_config.yaml"),
    }
    return Folder(path, {**edits, **_distributed(path, "iter_0000010")}, read_checkpoint)


def tokenizer(folder: Path) -> Folder:
    """The tokenizer's files, as a run uses them: loaded by transformers, with their chat template."""
    path = foreign_samples.write_folder(folder / "checkpoint", tiny.tokenizer_files())

    def read(path: Path) -> None:
        loaded = load_tokenizer(path)
        resolve_end_token_ids(loaded, path)
        row = PromptRow(str(path), "1", "w4 w5", None, None)
        encode_rows([row], loaded, templated=bool(loaded.chat_template))

    edits = {
        "tokenizer.json": _json_file(path / "tokenizer.json"),
        "tokenizer_config.json": _json_file(path / "tokenizer_config.json"),
        "special_tokens_map.json": mutations.edited_json({"mask_token": "<unused>", "pad_token": {"content": "<pad>"}}),
        "added_tokens.json": mutations.edited_json({"<unused>": 3}),
        "chat_template.jinja": st.sampled_from(_TEMPLATES).map(str.encode) | st.binary(max_size=50),
        "generation_config.json": mutations.edited_json({"eos_token_id": [1, 2], "temperature": 0.7}),
        "config.json": mutations.edited_json({"model_type": "llama", "auto_map": {"AutoTokenizer": "x.Y"}}),
    }
    return Folder(path, edits, read)


def index(folder: Path) -> Folder:
    """The index of a distributed checkpoint and the plain values beside it, with every tensor read."""
    import torch.distributed.checkpoint as dcp

    path = folder / "checkpoint"
    dcp.save(
        {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.ones(5), "x._extra_state": None}, checkpoint_id=path
    )
    torch.save({"optimizer": {"lr": 1.0}}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))

    def read(path: Path) -> None:
        safe_metadata.check(path)
        stored = StoredTensors.open(path)
        for key in stored.shapes:
            stored.read(key)

    return Folder(path, {"common.pt": _torch_file((path / "common.pt").read_bytes()), **_distributed(path, ".")}, read)


def _sample(folder: Path) -> foreign_samples.Sample:
    sample = foreign_samples.Sample.of(tiny.write_hf_folder(folder / "hf", num_hidden_layers=2))
    shutil.rmtree(folder / "hf")
    return sample


def _distributed(path: Path, inner: str) -> dict[str, SearchStrategy[bytes]]:
    folder = path / inner
    part = min(file.name for file in folder.glob("__*_0.distcp"))
    metadata = (folder / ".metadata").read_bytes()
    prefix = "" if inner == "." else f"{inner}/"
    return {
        f"{prefix}.metadata": mutations.edited_bytes(metadata, tokens=_PICKLE),
        f"{prefix}metadata.json": _json_file(folder / "metadata.json"),
        f"{prefix}{part}": mutations.edited_bytes((folder / part).read_bytes()),
    }


def _json_file(path: Path) -> SearchStrategy[bytes]:
    text = path.read_bytes()
    tree = json.loads(text)
    return (
        mutations.edited_json(tree)
        | mutations.edited_json(tree)
        | mutations.edited_bytes(text, tokens=_JSON)
        | mutations.values.map(mutations.dump)
    )


def _yaml_file(path: Path) -> SearchStrategy[bytes]:
    text = path.read_bytes()
    return mutations.edited_json(yaml.safe_load(text)) | mutations.edited_bytes(text, tokens=_YAML)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _torch_file(*samples: bytes) -> SearchStrategy[bytes]:
    """Around the pickle and the directory of the zip file; the rest is numbers."""
    hot = [sample.find(b"data.pkl") for sample in samples] + [sample.rfind(b"PK\1\2") for sample in samples]
    return mutations.edited_bytes(*samples, tokens=_PICKLE, hot=hot, reach=600) | st.sampled_from(samples)


def _safetensors(weights: bytes) -> SearchStrategy[bytes]:
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + weights[8 + size :]

    return mutations.edited_json(header).map(with_header) | mutations.edited_bytes(
        weights, tokens=_JSON, hot=(0, 8, size), reach=size
    )


# -- archives --


def archive(folder: Path) -> Folder:
    """An archive as a file."""
    source = nemo(folder / "source")
    packed = foreign_samples.pack(source.path)
    (folder / "checkpoint").mkdir()
    path = packed.rename(folder / "checkpoint" / "model.nemo")
    shutil.rmtree(folder / "source")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    sizes = [offset + 124 for offset in headers]
    edits = (
        mutations.edited_bytes(whole, tokens=_TAR, hot=headers, reach=511),
        mutations.edited_bytes(whole, tokens=_TAR, hot=headers, reach=511).map(_with_checksums),
        mutations.edited_bytes(whole, tokens=_TAR, hot=sizes, reach=40).map(_with_checksums),
        _members(whole),
        mutations.edited_bytes(gzip.compress(whole, 1), hot=(0,), reach=4096),
    )
    return Folder(path.parent, {path.name: st.one_of(edits)}, lambda folder: read_checkpoint(folder / path.name))


_TAR = (
    *(
        b"0",
        b"1",
        b"2",
        b"3",
        b"4",
        b"5",
        b"6",
        b"7",
        b"L",
        b"K",
        b"x",
        b"g",
        b"S",
        b"V",
        b"D",
        b"\0",
        b"\x80",
        b"\xff" * 12,
    ),
    *(
        b"\x80" + b"\xff" * 11,
        b"77777777777\0",
        b"../",
        b"/etc/",
        b"ustar\x0000",
        b"ustar  \0",
        b"20 size=9999999999\n",
        b"11 path=..\n",
    ),
    *(b"12 size=-512\n", b"0 x=y\n", b"22 GNU.sparse.major=1\n", bytes(512)),
)


def _with_checksums(data: bytes) -> bytes:
    """Headers whose checksum is right again, so that what else is in them counts."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


@st.composite
def _members(draw: DrawFn, whole: bytes) -> bytes:
    """An archive with one member more, anywhere; its header's checksum is right."""
    name = draw(
        st.sampled_from(
            ("./x", "../x", "/x", "./model_config.yaml", "model_weights/.metadata", "a/" * 400 + "x", ".", "", "x\ny")
        )
        | st.text(max_size=20).map(lambda text: text.replace("\0", ""))
    )
    member = tarfile.TarInfo(name)
    member.type = draw(
        st.sampled_from((b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"X", b"\0"))
    )
    member.linkname = draw(st.sampled_from(("", "/etc/passwd", "../x", "model_config.yaml")))
    member.size = draw(st.sampled_from((0, 0, 5, 512, 2**33, 2**62, -512, -1024, -(2**40))))
    member.pax_headers = draw(
        st.sampled_from(
            (
                {},
                {"size": "-512"},
                {"size": "99999999999"},
                {"size": "x"},
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
            )
        )
    )
    header = member.tobuf(draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))), errors="surrogatepass")
    body = draw(
        st.sampled_from(
            (b"", b"x".ljust(512, b"\0"), b"16 path=../evil\n".ljust(512, b"\0"), b"13 size=-512\n".ljust(512, b"\0"))
        )
    )
    at = 512 * draw(st.integers(0, len(whole) // 512))
    return whole[:at] + header * draw(st.sampled_from((1, 1, 1, 2, 600))) + body + whole[at:]


# -- prompts --


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
        st.tuples(starts, rows).map(b"".join) | mutations.edited_bytes(whole, tokens=_JSON) | st.binary(max_size=200)
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


# -- configuration --

_BASE: dict[str, Any] = {
    "trainer": {"max_steps": 1000, "accelerator": "cpu", "precision": 32},
    "model": {
        "restore_from_path": "x.nemo",
        "data": {"train_ds": {"file_path": "x.jsonl", "domain_suffixes": {"math": "?"}}},
        "opdlm": {"block_size": 4, "rollout": {"domain_caps": {"math": 4}}},
        "optim": {"betas": [0.9, 0.95]},
    },
    "exp_manager": {"max_time_per_run": "00:01:00:00"},
}
_KEYS = (
    *full_keys(Config),
    "model.hidden_dropout",
    "model.opdlm.blocksize",
    "pretrained_checkpoint",
    "a.b",
    "",
    "model.",
    "..",
)
_FULL_BASE = {**_BASE, "pretrained_checkpoint": {"restore_from_path": "x.nemo"}}


@st.composite
def _settings(draw: DrawFn) -> Any:
    """Any keys of the schema, and others, with any values."""
    tree = copy.deepcopy(_BASE)
    for _ in range(draw(st.integers(1, 3))):
        *sections, name = draw(st.sampled_from(_KEYS)).split(".")
        place: Any = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                break
        if isinstance(place, dict):
            place[name] = draw(mutations.values)
    return tree


def config_cases() -> SearchStrategy[Case]:
    """Settings as YAML texts, of a training run and of `generate.py`."""
    trees = (_settings() | mutations.edited_tree((_FULL_BASE,))).map(
        lambda tree: Case("train.json", mutations.dump(tree))
    )
    texts = mutations.edited_bytes(yaml.safe_dump(_FULL_BASE).encode(), tokens=_YAML).map(
        lambda text: Case("train.yaml", text)
    )
    generate = mutations.edited_json(
        {"model": {"restore_from_path": "x.nemo"}, "prompts": ["a"], "block_size": 4, "top_p": 0.5}
    )
    return trees | trees | texts | generate.map(lambda content: Case("generate.json", content))


def read_config(case: Case) -> None:
    """As settings of a mapping are read; what is no YAML is not ours to judge."""
    try:
        settings = json.loads(case.content) if case.file.endswith(".json") else yaml.safe_load(case.content)
    except (ValueError, RecursionError, yaml.YAMLError, TypeError, AttributeError, KeyError):
        return
    if not isinstance(settings, dict):
        return
    if case.file.startswith("train"):
        validate(parse(settings), check_files=False, environment={})
    else:
        validate_generate(parse(settings, GenerateConfig))


def override_cases() -> SearchStrategy[Case]:
    """Arguments of a command line."""
    key = st.sampled_from(_KEYS) | st.text(
        st.characters(codec="utf-8", exclude_characters="\0\n"), min_size=1, max_size=8
    )
    value = mutations.leaves.map(str) | st.sampled_from(
        (
            "",
            "null",
            "[1,2]",
            "{a:1}",
            "${model.seed}",
            "${x}",
            "${oc.env:NO}",
            "${int_div:1,0}",
            "${",
            "'",
            '"',
            "1,2",
            "range(1,3)",
            "[" * 300,
        )
        + (
            "${sum:a,1}",
            "${multiply:${model.seed},2}",
            "choice(1)",
            "glob(*)",
            "\\",
            "a=b",
            "0x" + "f" * 5000,
            "1e5",
            "nan",
            "${trainer}",
            "${model}",
        )
    )
    sign = st.sampled_from(("", "", "", "+", "++", "~"))
    # A newline ends an argument in the kept file.
    override = st.tuples(sign, key, st.sampled_from(("=", "=", "=", "", "@x=", ":x=")), value).map(
        lambda parts: "".join(parts).replace("\n", " ")
    )
    known = st.sampled_from(
        ("+experiment=nothing", "+experiment=off_policy", "experiment=[a,b]", "hydra.job.name=x", "trainer.max_steps=5")
    )
    arguments = st.lists(override | known, min_size=1, max_size=3).filter(
        lambda found: not any(a.startswith(("-", "hydra")) for a in found)
    )
    return arguments.map(lambda found: Case("arguments", "\n".join(found).encode("utf-8", "surrogatepass")))


_GOOD_ARGUMENTS = (
    "trainer.max_steps=1000",
    f"model.restore_from_path={os.devnull}",
    f"model.data.train_ds.file_path={os.devnull}",
)


class CommandLine:
    """The command line of a script whose task does nothing."""

    def __init__(self) -> None:
        self.read_once = cli.main("gpt_opdlm")(_do_nothing)

    def read(self, case: Case) -> str | None:
        """Run it; a refusal is its line on stderr."""
        arguments = case.content.decode("utf-8", "surrogatepass").split("\n")
        stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
            patch.setattr("sys.argv", ["fuzz", *_GOOD_ARGUMENTS, *arguments])
            patch.setattr("os.environ", {**os.environ, "HYDRA_FULL_ERROR": "0"})  # a command may change it
            try:
                self.read_once()
            except SystemExit as end:
                lines = [line for line in stderr.getvalue().splitlines() if "error: " in line]
                is_one_line = len(lines) == 1 and "Traceback" not in stderr.getvalue()
                assert end.code == 2 and is_one_line, stderr.getvalue()[-3000:]
                return lines[0]
        return None


def _do_nothing(config: Config) -> None:
    """Accept every configuration."""


# -- all of them --

#: Maker, and share of all inputs: YAML is slow to read, and every input costs what its reader costs.
_FOLDERS: dict[str, tuple[Callable[[Path], Folder], float]] = {
    "hugging_face": (hugging_face, 0.15),
    "nemo": (nemo, 0.04),
    "nemo_1": (nemo_1, 0.04),
    "nemo_2": (nemo_2, 0.04),
    "nemo_2_json": (nemo_2_json, 0.04),
    "bridge": (bridge, 0.04),
    "index": (index, 0.15),
    "archive": (archive, 0.10),
    "tokenizer": (tokenizer, 0.02),
}
NAMES = (*_FOLDERS, "jsonl", "parquet", "config", "overrides")


def reader(name: str, folder: Path) -> Reader:
    """One of `NAMES`, with its whole files in an empty folder."""
    if name in _FOLDERS:
        make, share = _FOLDERS[name]
        checkpoint = make(folder)
        return Reader(name, checkpoint.cases, checkpoint.read, checkpoint.names, share)
    if name == "config":
        return Reader(name, config_cases(), read_config, lambda case: "", 0.145)
    if name == "overrides":
        return Reader(name, override_cases(), CommandLine().read, lambda case: "", 0.005)
    read, names = prompts(folder)
    cases, share = (jsonl_cases(), 0.15) if name == "jsonl" else (parquet_cases(), 0.10)
    return Reader(name, cases, read, names, share)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)
