"""`restore_from_path` takes checkpoints of other trainers: the same network as by the Hugging Face converter, or one line."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from nemo_opdlm.diffusion.masks import TokenAttributes
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.models.archive_format import write_nemo
from nemo_opdlm.models.conversion import convert_hf_to_nemo, open_model
from nemo_opdlm.models.foreign import open_checkpoint
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.ranks import Ranks
from tests.integration import foreign_samples as samples
from tests.integration.foreign_ranks import read_in_parts
from tests.integration.foreign_samples import Sample
from tests.integration.training_runs import TINY, read_metrics, run, run_script, write_prompts

FAMILIES = ("qwen3-tied-wide-heads", "qwen3", "qwen2", "llama-biases")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A tiny Hugging Face folder and the archive that the converter makes of it, by family."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str = FAMILIES[0], **changes: Any) -> tuple[Path, Path]:
        key = f"{family}-{changes}"
        if key not in made:
            folder = tiny.write_hf_folder(root / f"hf-{len(made)}", family, num_hidden_layers=4, **changes)
            convert_hf_to_nemo(folder, root / f"{len(made)}.nemo")
            made[key] = folder, root / f"{len(made)}.nemo"
        return made[key]

    return get


@torch.no_grad()
def logits(network: StagedGPT) -> Tensor:
    token_ids = torch.arange(2 * 12).reshape(2, 12) % tiny.NUM_TOKENS
    position_ids = torch.arange(12).expand(2, 12)
    document = torch.arange(2)[:, None].expand(2, 12)
    attributes = TokenAttributes(document, torch.zeros_like(token_ids), position_ids, position_ids // 4)
    hidden = forward_only(network, [MicroBatch(token_ids, attributes)], lambda hidden, _: hidden)[0]
    return LMHead(network).logits(hidden)


def assert_same_model(path: Path, archive: Path) -> None:
    """Architecture, mask token, weights and logits of a checkpoint are those of the converted archive."""
    with open_model(archive) as (expected, ours), open_model(path) as (network, theirs):
        assert network.arch == expected.arch
        assert theirs.config["opdlm"] == ours.config["opdlm"] and theirs.config["precision"] == ours.config["precision"]
        weights = dict(network.named_parameters())
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        assert torch.equal(logits(network), logits(expected))
        names = ("tokenizer.json", "tokenizer_config.json")
        assert all((theirs.tokenizer / name).read_bytes() == (ours.tokenizer / name).read_bytes() for name in names)


def single(folder: Path, sample: Sample, **changes: Any) -> Path:
    return samples.nemo_1(folder, sample, {"": samples.state_dict(sample)}, **changes)


def ranks(tensor: int, pipeline: int, prefix: str = "model.") -> Callable[..., Path]:
    def write(folder: Path, sample: Sample, **changes: Any) -> Path:
        states = samples.rank_state_dicts(sample, tensor, pipeline, prefix)
        layout = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        return samples.nemo_1(folder, sample, states, **{**layout, **changes})

    return write


def distributed(prefix: str, metadata: dict[str, Any] | None = None) -> Callable[..., Path]:
    return lambda folder, sample, **changes: samples.nemo_1(folder, sample, prefix, metadata=metadata, **changes)


APART = {"non_homogeneous_layers": True, "singleton_local_shards": True}
SHAPES: dict[str, Callable[..., Path]] = {
    "single": single,
    "tp2": ranks(2, 1),
    "tp2-pp2": ranks(2, 2),
    "pp4-O2": ranks(1, 4, "model.module."),
    "distributed": distributed("model."),
    "distributed-O2": distributed("model.module."),
    "distributed-layers-and-halves-apart": distributed("model.", APART),
    "nemo-2": samples.nemo_2,
    "nemo-2-json": lambda folder, sample: samples.nemo_2(folder, sample, as_json=True),
    "bridge": samples.bridge,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_model_that_the_converter_makes(
    shape: str, family: str, folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, archive = folders(family)
    path = SHAPES[shape](tmp_path / "checkpoint", Sample.of(hf))
    assert_same_model(path, archive)
    if (path / "model_config.yaml").is_file():
        packed = samples.pack(path)
        assert_same_model(packed, archive)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", packed.name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_folder_needs_no_converter(family: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    assert_same_model(*folders(family))


def test_layers_and_halves_apart_are_really_apart(folders: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    path = distributed("model.", APART)(tmp_path / "checkpoint", Sample.of(folders()[0]))
    index = (path / "model_weights" / ".metadata").read_bytes()
    assert b"model.decoder.layers.3.mlp.linear_fc1.weight_v" in index


@pytest.mark.parametrize(
    ("family", "write", "rope"),
    [
        ("llama-linear-rope", single, "linear"),
        ("llama-llama3-rope", samples.bridge, "llama3"),
        ("llama-llama3-rope", samples.nemo_2, "llama3"),
    ],
)
def test_rotary_scaling_is_kept(
    family: str, write: Callable[..., Path], rope: str, folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, archive = folders(family)
    path = write(tmp_path / "checkpoint", Sample.of(hf))
    assert_same_model(path, archive)
    with open_checkpoint(path) as opened:
        assert opened.config["rope_scaling"]["rope_type"] == rope


def test_bf16_stays_bf16(folders: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    hf, archive = folders(dtype="bfloat16")
    assert_same_model(single(tmp_path / "checkpoint", Sample.of(hf)), archive)


@pytest.mark.parametrize(
    ("write", "rows", "stored", "named"),
    [
        # What NeMo adds to reach a multiple of 128 x TP is explained by the tokenizer; the mask token needs a new row.
        (single, tiny.NUM_TOKENS, 128, None),
        (ranks(2, 1), tiny.NUM_TOKENS, 256, None),
        (distributed("model."), tiny.NUM_TOKENS, 128, None),
        # A number in the settings goes before.
        (ranks(2, 1), tiny.VOCAB_SIZE, 256, tiny.VOCAB_SIZE),
        # Rows that neither explains belong to the model.
        (single, tiny.VOCAB_SIZE, tiny.VOCAB_SIZE, None),
    ],
)
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_rows_that_pad_the_vocabulary_are_left_out(
    write: Callable[..., Path],
    rows: int,
    stored: int,
    named: int | None,
    family: str,
    folders: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    hf, archive = folders(family, vocab_size=rows)
    sample = Sample.of(hf).with_padding(stored)
    assert_same_model(write(tmp_path / "checkpoint", sample, override_vocab_size=named), archive)


@pytest.mark.parametrize("tracker", samples.TRACKERS)
def test_the_latest_iteration_of_a_run_is_taken(
    tracker: str, folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, archive = folders()
    run = samples.bridge(tmp_path / "run", Sample.of(hf))
    for other in samples.TRACKERS:
        if other != tracker:
            (run / other).unlink()
    assert_same_model(run, archive)
    assert_same_model(run / "iter_0000010", archive)


WITHOUT_TOKENIZER: dict[str, Callable[[Path, Sample], Path]] = {
    "nemo-1": lambda folder, sample: single(folder, sample, tokenizer=False),
    "nemo-2": lambda folder, sample: samples.nemo_2(folder, sample, tokenizer=False),
    "bridge": lambda folder, sample: samples.bridge(folder, sample, tokenizer=False),
}


def test_a_tokenizer_of_the_users_choice_makes_up_for_none(
    folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, archive = folders()
    tokenizer = samples.write_folder(tmp_path / "tokenizer", tiny.tokenizer_files())
    bare = tmp_path / "hf"
    shutil.copytree(hf, bare, ignore=shutil.ignore_patterns("*token*"))
    checkpoints = [write(tmp_path / name, Sample.of(hf)) for name, write in WITHOUT_TOKENIZER.items()]
    for path in (*checkpoints, bare):
        with pytest.raises(ValueError, match=r"has no tokenizer .*set model\.tokenizer\.type"), open_checkpoint(path):
            pass
        with open_checkpoint(path, tokenizer) as theirs, open_checkpoint(archive) as ours:
            assert theirs.config["opdlm"] == ours.config["opdlm"]
            assert "mask_token" in (theirs.tokenizer / "tokenizer_config.json").read_text()
            settings = OmegaConf.create(theirs.config)
        model = OPDLMModel.restore_from(str(path), override_config_path=settings)
        assert b"mask_token" in model.tokenizer_files["tokenizer_config.json"]
        assert model.cfg.tokenizer.type == str(tokenizer)


def test_a_run_from_foreign_checkpoints_is_the_run_from_their_conversions(
    folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    (student_hf, student), (teacher, teacher_archive) = folders("qwen3"), folders("llama")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    data = [f"model.data.{name}.file_path={prompts}" for name in ("train_ds", "validation_ds")]
    foreign = ranks(2, 2)(tmp_path / "checkpoint", Sample.of(student_hf))
    paths = {"converted": (student, teacher_archive), "foreign": (samples.pack(foreign), teacher)}
    losses = {}
    for name, (first, second) in paths.items():
        model = f"model.restore_from_path={first}", f"model.kd_teacher_restore_from_path={second}"
        run(tmp_path / name, *TINY, *data, *model)
        losses[name] = [(line["train/loss"], line.get("val_loss")) for line in read_metrics(tmp_path / name)]
    assert len(losses["foreign"]) == 2 and losses["foreign"] == losses["converted"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint",
        "checkpoint.nemo",
        "converted",
        "foreign",
        "prompts.jsonl",
    ]


def test_a_run_refuses_what_it_cannot_start_from_before_it_writes(
    folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, archive = folders()
    data = f"model.data.train_ds.file_path={write_prompts(tmp_path / 'prompts.jsonl')}"
    bad = single(tmp_path / "bad", Sample.of(hf), activation="gelu")
    for student, teacher in ((bad, archive), (archive, bad)):
        paths = f"model.restore_from_path={student}", f"model.kd_teacher_restore_from_path={teacher}"
        with pytest.raises(ValueError, match=r"bad/model_config\.yaml: activation='gelu' is not supported"):
            run(tmp_path / "log", *TINY, data, *paths)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("write", [ranks(2, 2), samples.bridge], ids=["ranks", "bridge"])
def test_a_restored_model_is_saved_as_an_archive_of_ours(
    write: Callable[..., Path], folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, archive = folders()
    path = write(tmp_path / "checkpoint", Sample.of(hf))
    settings = OPDLMModel.restore_from(str(path), return_config=True)
    assert settings.num_layers == 4 and settings.opdlm.mask_token_id == tiny.MASK_TOKEN_ID
    model = OPDLMModel.restore_from(str(path))
    shutil.rmtree(path)
    model.save_to(str(tmp_path / "ours.nemo"))
    assert_same_model(tmp_path / "ours.nemo", archive)


def test_other_settings_than_the_checkpoints_are_compared_with_its_tensors(
    folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, _ = folders()
    path = single(tmp_path / "checkpoint", Sample.of(hf))
    settings = OPDLMModel.restore_from(str(path), return_config=True)
    for changes, message in (
        ({"num_layers": 3}, "holds more layers than the model's 3"),
        ({"num_layers": 5}, r"lacks decoder\.layers\.4\.input_layernorm\.weight"),
        ({"ffn_hidden_size": 32}, r"linear_fc1\.weight has shape \[48, 32\], the model needs \[64, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            OPDLMModel.restore_from(str(path), override_config_path=OmegaConf.merge(settings, changes))


@pytest.mark.parametrize("write", [None, ranks(2, 2), samples.bridge], ids=["hugging-face", "ranks", "distributed"])
def test_one_rank_can_open_a_checkpoint_for_all(
    write: Callable[..., Path] | None, folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, _ = folders()
    path = hf if write is None else write(tmp_path / "checkpoint", Sample.of(hf))
    with open_checkpoint(path) as archive:
        first = dict(archive.weights)
        sent = pickle.dumps(archive)
        assert len(sent) < 100_000
        for name, tensor in pickle.loads(sent).weights.items():
            assert torch.equal(tensor, first[name]), name


def test_four_ranks_read_a_checkpoint_into_their_own_layout(
    folders: Callable[..., tuple[Path, Path]], four_ranks: Ranks, tmp_path: Path
) -> None:
    # A tied head on the last stage, and 41 rows, which TP2 pads.
    hf, archive = folders(vocab_size=tiny.NUM_TOKENS)
    path = samples.pack(ranks(1, 2)(tmp_path / "checkpoint", Sample.of(hf)))
    four_ranks.run(read_in_parts, path, tmp_path / "weights")
    with open_checkpoint(path) as opened:
        files = {file.name: file.read_bytes() for file in opened.tokenizer.iterdir()}
        write_nemo(tmp_path / "ours.nemo", opened.config, tmp_path / "weights", files)
    assert_same_model(tmp_path / "ours.nemo", archive)


def test_end_tokens_that_only_the_generation_defaults_name_are_kept(
    folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    sample, defaults = Sample.of(folders()[0]), {"eos_token_id": [1, 5], "_from": "x", "pad_token_id": None}
    nemo_2 = samples.nemo_2(tmp_path / "nemo-2", sample)
    content = {"generation_config.json": json.dumps(defaults).encode()}
    samples.write_folder(nemo_2 / "context" / "artifacts", content)
    of_bridge = {"_target_": "transformers.GenerationConfig.from_dict", "_call_": True, "config_dict": defaults}
    for path in (nemo_2, samples.bridge(tmp_path / "bridge", sample, generation_config=of_bridge)):
        assert Generator.load(path).tokens.end_token_ids == (1, 5)


def test_the_converters_and_generation_take_them_too(folders: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    hf, archive = folders()
    path = samples.nemo_2(tmp_path / "checkpoint", Sample.of(hf), tokenizer=False)
    tokenizer = samples.write_folder(tmp_path / "tokenizer", tiny.tokenizer_files())
    there = ("--input_name_or_path", str(path), "--output_path", str(tmp_path / "ours.nemo"))
    assert "has no tokenizer" in str(run_script("convert_hf_to_nemo.py", *there))
    assert run_script("convert_hf_to_nemo.py", *there, "--tokenizer", str(tokenizer)) == 0
    assert_same_model(tmp_path / "ours.nemo", archive)
    assert "is a .nemo archive of this package already" in str(
        run_script(
            "convert_hf_to_nemo.py", "--input_name_or_path", str(archive), "--output_path", str(tmp_path / "x.nemo")
        )
    )
    samples.write_folder(path / "context" / "nemo_tokenizer", tiny.tokenizer_files())
    back = ("--input_name_or_path", str(path), "--hf_output_path", str(tmp_path / "hf"))
    assert run_script("convert_nemo_to_hf.py", *back) == 0
    ours, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", hf))
    assert ours.keys() == original.keys() and all(torch.equal(ours[name], original[name]) for name in ours)
    assert Generator.load(path).tokens.mask_token_id == tiny.MASK_TOKEN_ID
