"""Checkpoints of each kind, as folders of which one file at a time is damaged."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from nemo_opdlm.data.encoding import encode_rows
from nemo_opdlm.data.rows import PromptRow
from nemo_opdlm.data.tokenizer import load_tokenizer, resolve_end_token_ids
from nemo_opdlm.megatron import safe_metadata
from nemo_opdlm.megatron.stored_tensors import StoredTensors
from nemo_opdlm.models.archive_format import check_class
from nemo_opdlm.models.conversion import archive_architecture, convert_hf_to_nemo
from nemo_opdlm.models.foreign import open_checkpoint
from nemo_opdlm.testing import tiny
from tests.fuzz import mutations, tokens
from tests.fuzz.engine import Case
from tests.integration import foreign_samples

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
            "config.json": json_file(path / "config.json"),
            "generation_config.json": json_file(path / "generation_config.json"),
            "tokenizer.json": json_file(path / "tokenizer.json"),
            "tokenizer_config.json": json_file(path / "tokenizer_config.json"),
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
        f"{0:032x}_tokenizer.json": json_file(path / f"{0:032x}_tokenizer.json"),
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
    return Folder(path, {"context/io.json": json_file(path / "context/io.json")}, read_checkpoint)


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
        "tokenizer.json": json_file(path / "tokenizer.json"),
        "tokenizer_config.json": json_file(path / "tokenizer_config.json"),
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
        f"{prefix}.metadata": mutations.edited_bytes(metadata, tokens=tokens.PICKLE),
        f"{prefix}metadata.json": json_file(folder / "metadata.json"),
        f"{prefix}{part}": mutations.edited_bytes((folder / part).read_bytes()),
    }


def json_file(path: Path) -> SearchStrategy[bytes]:
    text = path.read_bytes()
    tree = json.loads(text)
    return (
        mutations.edited_json(tree)
        | mutations.edited_json(tree)
        | mutations.edited_bytes(text, tokens=tokens.JSON)
        | mutations.values.map(mutations.dump)
    )


def _yaml_file(path: Path) -> SearchStrategy[bytes]:
    text = path.read_bytes()
    return mutations.edited_json(yaml.safe_load(text)) | mutations.edited_bytes(text, tokens=tokens.YAML)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _torch_file(*samples: bytes) -> SearchStrategy[bytes]:
    """Around the pickle and the directory of the zip file; the rest is numbers."""
    hot = [sample.find(b"data.pkl") for sample in samples] + [sample.rfind(b"PK\1\2") for sample in samples]
    return mutations.edited_bytes(*samples, tokens=tokens.PICKLE, hot=hot, reach=600) | st.sampled_from(samples)


def _safetensors(weights: bytes) -> SearchStrategy[bytes]:
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + weights[8 + size :]

    return mutations.edited_json(header).map(with_header) | mutations.edited_bytes(
        weights, tokens=tokens.JSON, hot=(0, 8, size), reach=size
    )
