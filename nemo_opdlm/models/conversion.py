"""Hugging Face folder -> ``.nemo`` archive and back; needs Megatron, not NeMo."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.hf_folder import check_output_is_free
from nemo_opdlm.convert.hugging_face import HfImport, HfOrigin, hf_to_megatron, megatron_to_hf
from nemo_opdlm.convert.sdar import check_is_sdar, megatron_to_sdar
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron.checkpoint import load_sharded, write_sharded
from nemo_opdlm.megatron.parallel import ParallelContext, initialize
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT, build_model
from nemo_opdlm.models.archive_format import (
    Archive,
    ArchiveError,
    check_class,
    check_output,
    make_scratch,
    open_nemo,
    write_nemo,
)

#: ``--precision`` -> dtype of the stored weights, under NeMo's names.
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
#: Keys of every tensor in an archive start with it.
PREFIX = "model."


def precision_name(dtype: torch.dtype) -> str:
    """The key of ``PRECISIONS`` that an archive says its weights are stored in."""
    return {value: key for key, value in PRECISIONS.items()}[dtype]


def convert_hf_to_nemo(
    source: str | Path,
    output: str | Path,
    *,
    precision: str | None = None,
    mask_token: str | None = None,
    block_size: int = 4,
    overwrite: bool = False,
) -> None:
    """Write a ``.nemo`` archive of a Hugging Face folder (Llama, Qwen2, Qwen3 or SDAR).

    Args:
        source: local folder.
        output: archive to write.
        precision: a key of ``PRECISIONS``; None keeps the source's.
        mask_token: token that stands for "masked"; None chooses one.
        block_size: block size the archive proposes for training; an SDAR folder's own wins.
        overwrite: replace an existing archive.

    Raises:
        ValueError, OSError: one line naming the culprit, before anything is written.
    """
    check_output(output, overwrite=overwrite)
    imported = hf_to_megatron(source, mask_token, PRECISIONS[precision] if precision else None)
    config = {
        **asdict(imported.architecture),
        "precision": precision_name(getattr(torch, imported.origin.dtype)),
        "opdlm": {
            "block_size": imported.origin.block_size or block_size,
            "mask_token_id": imported.origin.mask_token_id,
        },
        "origin": imported.origin.as_dict(),
    }
    scratch = make_scratch(output)
    try:
        write_weights(_network(imported, initialize()), scratch)
        write_nemo(output, config, scratch, imported.tokenizer_files, overwrite=overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _network(imported: HfImport, parallel: ParallelContext) -> StagedGPT:
    dtype = getattr(torch, imported.origin.dtype)
    model = build_model(
        imported.architecture, parallel, AttentionRule.CAUSAL, ModelOptions(params_dtype=dtype, initialize=False)
    )
    # Layers carry an empty entry for FP8 scales, which a Hugging Face model has not.
    missing, unexpected = model[0].load_state_dict(imported.state_dict, strict=False)
    left_out = [name for name in missing if not name.endswith("_extra_state")]
    assert not left_out and not unexpected, (left_out, unexpected)
    return model


def write_weights(model: StagedGPT, folder: Path) -> None:
    """Write a network's weights as the distributed checkpoint of an archive; every rank calls this."""
    write_sharded(folder, model.sharded_weights(PREFIX))


def read_weights(model: StagedGPT, archive: Archive) -> None:
    """Fill a network of any layout with the weights of an archive; every rank calls this.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state = load_sharded(archive.weights, model.sharded_weights(PREFIX), vocab_size=model.arch.vocab_size)
    model.load_weights(state, PREFIX)


def archive_architecture(archive: Archive | Path, config: dict[str, object]) -> Architecture:
    """The network that an archive's settings describe.

    Raises:
        ArchiveError: settings are missing or describe no network.
    """
    source = archive.source if isinstance(archive, Archive) else archive
    known = {field.name: config[field.name] for field in fields(Architecture) if config.get(field.name) is not None}
    try:
        return Architecture(**known)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ArchiveError(f"{source}: model_config.yaml describes no network: {error}") from error


@contextmanager
def open_model(path: str | Path) -> Iterator[tuple[StagedGPT, Archive]]:
    """A network with the weights of an archive in their stored precision, and the open archive."""
    with open_nemo(path) as archive:
        check_class(archive)
        arch = archive_architecture(archive, archive.config)
        dtype = PRECISIONS[str(archive.config["precision"])]
        model = build_model(arch, initialize(), AttentionRule.CAUSAL, ModelOptions(params_dtype=dtype, initialize=False))
        read_weights(model, archive)
        yield model, archive


def convert_nemo_to_hf(source: str | Path, output: str | Path, output_format: str, precision: str | None = None) -> str:
    """Write the Hugging Face folder of an archive; returns how to serve it (empty for ``hf``).

    Args:
        source: archive, or an extracted one.
        output: folder to create.
        output_format: ``hf`` (the source's family) or ``sdar`` (Qwen3 only).
        precision: a key of ``PRECISIONS``; None keeps the stored one, which makes the round trip bit-exact.

    Raises:
        ValueError, OSError: one line naming the culprit, before anything is written.
    """
    check_output_is_free(Path(output))
    with open_model(source) as (model, archive):
        origin = HfOrigin(**archive.config["origin"])
        state = {name: value for name, value in model[0].state_dict().items() if not name.endswith("_extra_state")}
        dtype = PRECISIONS[precision] if precision else None
        files = tokenizer_files(archive)
        if output_format == "sdar":
            check_is_sdar(model.arch, origin)
            block_size = int(archive.config["opdlm"]["block_size"])
            return megatron_to_sdar(state, model.arch, origin, files, output, block_size=block_size, dtype=dtype)
        megatron_to_hf(state, model.arch, origin, files, output, dtype=dtype)
        return ""


def tokenizer_files(archive: Archive) -> dict[str, bytes]:
    """Name -> content of an archive's tokenizer files.

    Raises:
        ArchiveError: it has none.
    """
    if archive.tokenizer is None:
        raise ArchiveError(f"{archive.source}: the archive holds no tokenizer")
    return {file.name: file.read_bytes() for file in sorted(archive.tokenizer.iterdir())}
