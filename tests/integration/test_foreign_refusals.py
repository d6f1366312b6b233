"""Foreign checkpoints that are broken, hostile or another network are refused in one line, without a trace."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opdlm.models.foreign import open_checkpoint
from nemo_opdlm.testing import tiny
from tests.integration import foreign_samples as samples
from tests.integration.foreign_samples import Sample
from tests.integration.toy_model import Touch

Write = Callable[[Path, Sample], Path]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A tied model of two layers."""
    return Sample.of(tiny.write_hf_folder(tmp_path_factory.mktemp("models") / "hf"))


def refusal(path: Path) -> str:
    """The message of a refusal that names the checkpoint and leaves nothing behind."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError) as caught, open_checkpoint(path):
        pass
    assert sorted(path.parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


def single(folder: Path, sample: Sample, **changes: Any) -> Path:
    return samples.nemo_1(folder, sample, {"": samples.state_dict(sample)}, **changes)


def with_state(change: Callable[[dict[str, Any]], Any]) -> Write:
    """A one-file archive with other tensors."""

    def write(folder: Path, sample: Sample) -> Path:
        state = samples.state_dict(sample)
        change(state)
        return samples.nemo_1(folder, sample, {"": state})

    return write


def with_ranks(change: Callable[[dict[str, dict[str, Any]]], Any], **changes: Any) -> Write:
    """An archive of TP2 x PP2 with other files."""

    def write(folder: Path, sample: Sample) -> Path:
        states = samples.rank_state_dicts(sample, 2, 2)
        change(states)
        layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
        return samples.nemo_1(folder, sample, states, **{**layout, **changes})

    return write


def nemo_1(**changes: Any) -> Write:
    return lambda folder, sample: single(folder, sample, **changes)


def nemo_2(**changes: Any) -> Write:
    return lambda folder, sample: samples.nemo_2(folder, sample, **changes)


def edited(write: Write, name: str, content: bytes | None) -> Write:
    """A checkpoint in which one file has another content, or is missing."""

    def write_edited(folder: Path, sample: Sample) -> Path:
        path = write(folder, sample)
        (path / name).unlink(missing_ok=True)
        if content is not None:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path

    return write_edited


def distributed(folder: Path, sample: Sample) -> Path:
    return samples.nemo_1(folder, sample, "model.")


Q = "decoder.layers.1.self_attention.linear_qkv.weight"
OTHER_NETWORKS: dict[str, tuple[Write, str]] = {
    "gelu": (
        nemo_1(activation="gelu"),
        "model_config.yaml: activation='gelu' is not supported; allowed: 'swiglu' or 'fast-",
    ),
    "silent-activation": (nemo_1(activation=None), "activation='gelu' is not supported"),
    "layernorm1p": (
        nemo_1(normalization="layernorm1p"),
        "normalization='layernorm1p' is not supported; allowed: 'rmsnorm'",
    ),
    "learned-positions": (
        nemo_1(position_embedding_type="learned_absolute"),
        "position_embedding_type='learned_absolute'",
    ),
    "half-rotary": (nemo_1(rotary_percentage=0.5), "rotary_percentage=0.5 is not supported"),
    "experts": (nemo_1(num_moe_experts=8), "num_moe_experts=8 is not supported"),
    "window": (nemo_1(window_size=[128, 0]), "window_size=[128, 0] is not supported"),
    "old-nemo-layers": (nemo_1(mcore_gpt=False), "mcore_gpt=False is not supported"),
    "biases-and-head-norms": (nemo_1(bias=True), "qk_layernorm=True together with biases is not supported"),
    "no-layers": (nemo_1(num_layers=None), "num_layers is missing"),
    "layers-as-text": (nemo_1(num_layers="four"), "num_layers='four' must be a positive integer"),
    "epsilon-as-text": (nemo_1(layernorm_epsilon="small"), "layernorm_epsilon='small' must be a number"),
    "switch-as-text": (nemo_1(bias="False"), "bias='False' must be true or false"),
    "other-depth": (
        lambda folder, sample: samples.nemo_2(folder, sample, num_layers=3),
        "of shape [2, 32] is not one of num_layers=3",
    ),
    "odd-heads": (nemo_1(num_query_groups=3), "num_query_groups=3 must divide num_attention_heads=4"),
    "large-vocabulary": (
        nemo_1(override_vocab_size=64),
        "override_vocab_size=64, but the stored embedding has 48 rows",
    ),
    "small-vocabulary": (
        nemo_1(override_vocab_size=8),
        "the tokenizer has ids up to 39, but the embedding only 8 rows",
    ),
    "geglu": (
        nemo_2(activation_func={"_target_": "torch.nn.functional.gelu"}),
        "activation_func='gelu' is not supported",
    ),
    "not-gated": (nemo_2(gated_linear_unit=False), "gated_linear_unit=False is not supported; allowed: True"),
    "layer-norm": (nemo_2(normalization="LayerNorm"), "model.yaml: normalization='layernorm' is not supported"),
    "yarn": (nemo_2(position_embedding_type="yarn"), "position_embedding_type='yarn' is not supported"),
    "gemma-norm": (nemo_2(layernorm_zero_centered_gamma=True), "layernorm_zero_centered_gamma=True is not supported"),
    "latent-attention": (nemo_2(multi_latent_attention=True), "multi_latent_attention=True is not supported"),
    "silent-settings": (
        nemo_2(as_json=True, num_layers={"_target_": "x.y"}, hidden_size=None),
        "num_layers='x.y' must be",
    ),
    "two-scalings": (
        nemo_2(rope_scaling=True, seq_len_interpolation_factor=2.0),
        "ask for two rotary scalings at once",
    ),
}
BROKEN: dict[str, tuple[Write, str]] = {
    "missing-tensor": (with_state(lambda state: state.pop(f"model.{Q}")), f"tensor {Q} of shape [128, 32] is missing"),
    "other-shape": (
        with_state(lambda state: state.update({f"model.{Q}": torch.zeros(4, 32)})),
        f"tensor {Q} has shape [4, 32], the config says [128, 32]",
    ),
    "unknown-tensor": (
        with_state(lambda state: state.update({"model.rm_head.weight": torch.zeros(1, 32)})),
        "unexpected tensor rm_head.weight",
    ),
    "integers": (
        with_state(lambda state: state.update({f"model.{Q}": torch.zeros(128, 32, dtype=torch.int8)})),
        f"tensor {Q} is stored as torch.int8",
    ),
    "repeated-value": (
        with_state(lambda state: state.update({f"model.{Q}": torch.zeros(1).expand(128, 32)})),
        f"tensor model.{Q} is larger than what is stored of it",
    ),
    "sparse-tensor": (
        with_state(lambda state: state.update({f"model.{Q}": torch.zeros(128, 32).to_sparse()})),
        f"tensor model.{Q} is larger than what is stored of it, or not dense",
    ),
    "another-head": (
        with_state(lambda state: state.update({"model.output_layer.weight": torch.zeros(48, 32)})),
        "output_layer.weight differs from embedding.word_embeddings.weight",
    ),
    "old-nemo-tensors": (
        lambda folder, sample: samples.nemo_1(
            folder, sample, {"": {"model.language_model.embedding.x": torch.zeros(1)}}
        ),
        "holds no Megatron-core GPT: tensor embedding.word_embeddings.weight is missing, it has tensors such as model.langu",
    ),
    "no-state-dict": (
        lambda folder, sample: samples.nemo_1(folder, sample, {"": [torch.zeros(1)]}),  # type: ignore[dict-item]
        "model_weights.ckpt holds a list instead of a model's tensors",
    ),
    "damaged-file": (edited(single, "model_weights.ckpt", b"PK\3\4damaged"), "model_weights.ckpt is damaged"),
    "zip-of-several-disks": (
        edited(single, "model_weights.ckpt", b"PK\6\7" + b"\1" * 16 + b"PK\5\6" + bytes(18)),
        "model_weights.ckpt is damaged",
    ),
    "no-weights": (edited(single, "model_weights.ckpt", None), "the archive holds no weights"),
    "missing-rank": (
        with_ranks(lambda states: states.pop("tp_rank_01_pp_rank_001")),
        "tp_rank_01_pp_rank_001/model_weights.ckpt is missing: the model was saved with tensor_model_parallel_size=2, pip",
    ),
    "missing-stage": (
        with_ranks(lambda states: None, pipeline_model_parallel_size=1),
        "mp_rank_00/model_weights.ckpt is mis",
    ),
    "one-rank-too-many": (
        with_ranks(lambda states: None, tensor_model_parallel_size=1),
        "tp_rank_01_pp_rank_000/model_weights.ckpt is one file too many",
    ),
    "virtual-stages": (
        with_ranks(lambda states: None, virtual_pipeline_model_parallel_size=2),
        "virtual_pipeline_model_parallel_size=2 is not supported",
    ),
    "rank-without-a-tensor": (
        with_ranks(lambda states: states["tp_rank_01_pp_rank_000"].pop("model.embedding.word_embeddings.weight")),
        "tp_rank_01_pp_rank_000/model_weights.ckpt: tensor model.embedding.word_embeddings.weight is missing",
    ),
    "rank-of-another-shape": (
        with_ranks(
            lambda states: states["tp_rank_01_pp_rank_000"].update(
                {"model.embedding.word_embeddings.weight": torch.zeros(8, 32)}
            )
        ),
        "tensor model.embedding.word_embeddings.weight has shape [8, 32], in tp_rank_00_pp_rank_000 [24, 32]",
    ),
    "zarr-files": (
        edited(distributed, "model_weights/model.x/.zarray", b"{}"),
        "is of the zarr format, which left Megatron",
    ),
    "zarr": (
        edited(distributed, "model_weights/metadata.json", b'{"sharded_backend": "zarr"}'),
        "metadata.json says zarr",
    ),
    "no-index": (edited(distributed, "model_weights/.metadata", None), ".metadata is missing"),
    "missing-part": (edited(distributed, "model_weights/__0_0.distcp", None), "__0_0.distcp is missing"),
    "truncated-part": (edited(distributed, "model_weights/__0_0.distcp", b"short"), "__0_0.distcp is truncated"),
    "no-settings": (
        edited(samples.nemo_2, "context/model.yaml", b"{}"),
        "model.yaml: normalization='layernorm' is not supp",
    ),
    "broken-yaml": (edited(samples.nemo_2, "context/model.yaml", b"a: [1"), "model.yaml cannot be read"),
    "broken-json": (edited(nemo_2(as_json=True), "context/io.json", b"{"), "io.json cannot be read"),
    "silent-json": (
        edited(nemo_2(as_json=True), "context/io.json", json.dumps({"objects": {"x": {"items": []}}}).encode()),
        "io.json names no num_layers",
    ),
    "no-iteration": (
        edited(
            edited(samples.bridge, "latest_train_state.pt", None), "latest_checkpointed_iteration.txt", b"../../etc"
        ),
        "latest_checkpointed_iteration.txt names no iteration: '../../etc'",
    ),
    "missing-iteration": (
        edited(edited(samples.bridge, "latest_train_state.pt", None), "latest_checkpointed_iteration.txt", b"20"),
        "iter_0000020/run_config.yaml is missing, although latest_checkpointed_iteration.txt names this iteration",
    ),
    "no-tokenizer": (
        lambda folder, sample: single(folder, sample, tokenizer=False),
        "has no tokenizer (tokenizer.json): set",
    ),
    "half-a-tokenizer": (edited(single, f"{0:032x}_tokenizer.json", None), "the tokenizer is not complete"),
    "training-checkpoint": (
        lambda folder, sample: distributed(folder, sample) / "model_weights",
        "is a distributed checkpoint without the model's settings",
    ),
    "any-folder": (
        lambda folder, sample: samples.write_folder(folder, {"x": b""}),
        "is no checkpoint that can be read",
    ),
}


@pytest.mark.parametrize("case", OTHER_NETWORKS)
def test_networks_that_we_cannot_represent_are_refused_by_name(case: str, sample: Sample, tmp_path: Path) -> None:
    write, expected = OTHER_NETWORKS[case]
    assert expected in refusal(write(tmp_path / "checkpoint", sample))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_by_name(case: str, sample: Sample, tmp_path: Path) -> None:
    write, expected = BROKEN[case]
    path = write(tmp_path / "checkpoint", sample)
    assert expected in refusal(path)
    if path.name == "checkpoint" and (path / "model_config.yaml").is_file():
        assert expected in refusal(samples.pack(path))


@pytest.fixture
def payload(tmp_path: Path) -> bytes:
    """A pickle that creates the file `victim` when it is loaded."""
    return pickle.dumps(Touch(tmp_path / "victim"))


@pytest.mark.parametrize(
    ("write", "name", "expected"),
    [
        (single, "model_weights.ckpt", "model_weights.ckpt is refused: it holds more than plain data"),
        (
            with_ranks(lambda states: None),
            "tp_rank_01_pp_rank_001/model_weights.ckpt",
            "is refused: it holds more than",
        ),
        (distributed, "model_weights/.metadata", ".metadata is refused: it refers to pathlib.Path.touch"),
        (samples.nemo_2, "weights/.metadata", ".metadata is refused"),
        (samples.bridge, "iter_0000010/.metadata", ".metadata is refused"),
        (samples.bridge, "latest_train_state.pt", "latest_train_state.pt is refused"),
    ],
)
def test_pickles_that_would_execute_code_are_refused(
    write: Write, name: str, expected: str, payload: bytes, sample: Sample, tmp_path: Path
) -> None:
    path = edited(write, name, payload)(tmp_path / "checkpoint", sample)
    assert expected in refusal(path)
    if (path / "model_config.yaml").is_file():
        assert expected in refusal(samples.pack(path))
    assert not (tmp_path / "victim").exists()


def test_a_tensor_that_is_a_pickle_is_refused_when_it_is_read(payload: bytes, sample: Sample, tmp_path: Path) -> None:
    path = distributed(tmp_path / "checkpoint", sample)
    part = path / "model_weights" / "__0_0.distcp"
    part.write_bytes((payload * (part.stat().st_size // len(payload) + 1))[: part.stat().st_size])
    with open_checkpoint(path) as archive, pytest.raises(ValueError, match=r"__0_0\.distcp is (refused|damaged)"):
        dict(archive.weights)
    assert not (tmp_path / "victim").exists()


def test_objects_that_settings_name_are_never_looked_up(sample: Sample, tmp_path: Path) -> None:
    command = f"touch {tmp_path / 'victim'}"
    text = (
        f"tags: !!python/object/apply:os.system [{command!r}]\n"
        "names: [!!python/name:os.system '', !!python/object:os.path {}, !unknown 1]\n"
        f"target: {{_target_: os.system, _call_: true, _args_: [{command!r}]}}\n"
    )
    path = samples.bridge(tmp_path / "checkpoint", sample, text=text)
    with open_checkpoint(path) as archive:
        assert archive.config["num_layers"] == 2
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (single, "model_weights.ckpt"),
        (single, f"{0:032x}_tokenizer.json"),
        (distributed, "model_weights/.metadata"),
        (samples.nemo_2, "context/nemo_tokenizer"),
        (samples.nemo_2, "context/model.yaml"),
        (samples.nemo_2, "weights"),
        (samples.bridge, "iter_0000010/common.pt"),
        (samples.bridge, "iter_0000010/tokenizer"),
        (lambda folder, sample: tiny.write_hf_folder(folder), "model.safetensors"),
        (lambda folder, sample: tiny.write_hf_folder(folder), "config.json"),
        (lambda folder, sample: tiny.write_hf_folder(folder), "tokenizer_config.json"),
    ],
)
def test_links_that_lead_out_of_a_checkpoint_are_refused(
    write: Write, name: str, sample: Sample, tmp_path: Path
) -> None:
    path = write(tmp_path / "checkpoint", sample)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    assert f"{path / name} is a link that leads out of its folder" in refusal(path)


def test_the_links_of_the_hubs_cache_are_one_folder(tmp_path: Path) -> None:
    model = tiny.write_hf_folder(tmp_path / "model")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with open_checkpoint(snapshot) as archive:
        assert archive.config["num_layers"] == 2


def test_a_file_of_a_hugging_face_folder_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tiny.write_hf_folder(tmp_path / "model")
    for name in ("config.json", "tokenizer.json"):
        whole = (path / name).read_bytes()
        with (path / name).open("r+b") as file:
            file.truncate(2**40)  # of holes
        assert f"{name}" in (message := refusal(path)) and "MiB, which no such file has" in message
        (path / name).write_bytes(whole)


HF_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a-billion-layers": ({"num_hidden_layers": 10**9}, "24 tensors cannot be the 1000000000 layers"),
    "list-as-family": ({"architectures": [["Qwen3ForCausalLM"]]}, "architectures=[['Qwen3ForCausalLM']] is not supp"),
    "list-as-epsilon": ({"rms_norm_eps": [1]}, "config.json: rms_norm_eps=[1] must be a number"),
    "text-as-rotary": ({"rope_parameters": 0.5}, "rope_parameters=0.5 must be a section"),
    "unprintable-rope-key": ({"rope_parameters": {"a\nb": 1}}, r"'a\nb'=1 is not known for rope_type='default'"),
    "number-as-layer-types": ({"layer_types": 3}, "layer_types=3 must be a list"),
    "object-as-end": ({"eos_token_id": {}}, "eos_token_id={} must be a token id or a list of them"),
    "endless-epsilon": ({"rms_norm_eps": 10**400}, "rms_norm_eps=an integer of more than 40 digits must be a number"),
    "list-as-block": ({"block_size": [4]}, "block_size=[4] must be a positive integer"),
    "text-as-mask": ({"mask_token_id": "4"}, "mask_token_id='4', which is no token id"),
}


@pytest.mark.parametrize("case", HF_CONFIGS)
def test_settings_of_another_type_are_refused_by_key(case: str, tmp_path: Path) -> None:
    changes, expected = HF_CONFIGS[case]
    path = tiny.write_hf_folder(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    assert expected in refusal(path)


TOKENIZERS: dict[str, tuple[str, str, str]] = {
    "empty": ("tokenizer.json", "", "tokenizer.json cannot be read as JSON"),
    "no-objects": ("tokenizer.json", '{"added_tokens": [3], "model": {}}', "added_tokens must be a list of objects"),
    "no-model": ("tokenizer.json", '{"added_tokens": []}', "tokenizer.json cannot be read"),
    "deep": ("tokenizer_config.json", '{"a":' * 500 + "1" + "}" * 500, "nested more than 100 deep"),
    "list": ("added_tokens.json", "[3]", "added_tokens.json must hold a JSON object"),
    "no-content": ("tokenizer_config.json", '{"pad_token": {"a": 1}}', "pad_token must be the text of a token"),
    "half-a-character": ("tokenizer_config.json", r'{"pad_token": "\ud800"}', "is half a character"),
    "template": ("chat_template.jinja", "\xff", "chat_template.jinja is not UTF-8"),
    "reference": ("generation_config.json", '{"a": "${oc.env:HOME}"}', "holds a ${...} reference"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_files_of_a_tokenizer_that_are_something_else_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content, expected = TOKENIZERS[case]
    path = tiny.write_hf_folder(tmp_path / "model")
    (path / name).write_bytes(content.encode("latin-1"))
    assert expected in refusal(path)
