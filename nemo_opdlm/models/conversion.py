"""A checkpoint of another kind -> ``.nemo`` archive, and an archive -> Hugging Face folder; needs Megatron, not NeMo."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.hf_folder import check_output_is_free
from nemo_opdlm.convert.hugging_face import HfImport, megatron_to_hf, read_origin
from nemo_opdlm.convert.plain_settings import one_line
from nemo_opdlm.convert.sdar import check_is_sdar, megatron_to_sdar
from nemo_opdlm.convert.setting_values import count, section, token_ids
from nemo_opdlm.data.shown import shown
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron.atomic_folder import on_every_rank
from nemo_opdlm.megatron.checkpoint import load_sharded, load_whole, write_sharded
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT, build_model
from nemo_opdlm.models.archive_format import (
    WEIGHTS,
    Archive,
    check_class,
    check_output,
    check_target,
    existing,
    make_scratch,
    read_archive_config,
    write_nemo,
)
from nemo_opdlm.models.foreign import (
    BLOCK_SIZE,
    Choices,
    Kind,
    archive_config,
    open_checkpoint,
    open_foreign,
    recognise,
)
from nemo_opdlm.models.precision import PRECISIONS
from nemo_opdlm.models.safe_tar import ArchiveError

_WITHOUT_MASK = (
    "The row of {mask_token}, which the conversion had added, is not in it: the folder is for autoregressive use, the archive "
    "for block diffusion.\n"
)
#: Keys of every tensor in an archive start with it.
PREFIX = "model."


def convert_hf_to_nemo(
    source: str | Path,
    output: str | Path,
    *,
    precision: str | None = None,
    mask_token: str | None = None,
    tokenizer: str | Path | None = None,
    block_size: int = BLOCK_SIZE,
    overwrite: bool = False,
) -> None:
    """Write a ``.nemo`` archive of a Hugging Face folder, or of another checkpoint that ``open_checkpoint`` reads.

    Args:
        source: local folder, or archive of NeMo 1.x.
        output: archive to write.
        precision: a key of ``PRECISIONS``; None keeps the source's.
        mask_token: token that stands for "masked"; None chooses one.
        tokenizer: folder of the tokenizer; None = the source's own.
        block_size: block size the archive proposes for training; an SDAR folder's own wins.
        overwrite: replace an existing archive.

    Raises:
        ValueError, OSError: one line naming the culprit, before anything is written.
    """
    check_output(output, overwrite=overwrite)
    choices = Choices(tokenizer, mask_token, PRECISIONS[precision] if precision else None)
    scratch = make_scratch(output)
    try:
        (scratch / "weights").mkdir()
        with open_foreign(existing(source), choices, scratch) as (imported, _):
            write_weights(_network(imported, str(source)), scratch / "weights")
            config = archive_config(imported, block_size)
            write_nemo(output, config, scratch / "weights", imported.tokenizer_files, overwrite=overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _network(imported: HfImport, source: str) -> StagedGPT:
    options = ModelOptions(params_dtype=getattr(torch, imported.origin.dtype), initialize=False)
    model = build_model(imported.architecture, initialize(), AttentionRule.CAUSAL, options)
    vocab_size = imported.architecture.vocab_size
    wanted = model.sharded_weights(PREFIX)
    state = load_whole(imported.state_dict, wanted, prefix=PREFIX, vocab_size=vocab_size, source=source)
    model.load_weights(state, PREFIX)
    return model


def write_weights(model: StagedGPT, folder: Path) -> None:
    """Write a network's weights as the distributed checkpoint of an archive; every rank calls this."""
    write_sharded(folder, model.sharded_weights(PREFIX))


def read_weights(model: StagedGPT, archive: Archive) -> None:
    """Fill a network of any layout with the weights of an archive; every rank calls this.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state = load_archive(archive, model.sharded_weights(PREFIX), model.arch.vocab_size)
    model.load_weights(state, PREFIX)


def load_archive(archive: Archive, wanted: dict[str, Any], vocab_size: int, *, strict: bool = True) -> dict[str, Any]:
    """Load the weights of an archive, or of a checkpoint opened like one, as ``load_sharded`` does; every rank calls this.

    Args:
        archive: open.
        wanted: Megatron's sharded state dict, keys start with ``PREFIX``.
        vocab_size: true rows of the vocabulary.
        strict: refuse an archive with more tensors than the model.

    Raises:
        ValueError: a tensor is missing, has another shape or is damaged.
    """
    weights, source = archive.weights, str(archive.source)
    if isinstance(weights, Path):
        return load_sharded(weights, wanted, strict=strict, vocab_size=vocab_size)
    return on_every_rank(lambda: load_whole(weights, wanted, prefix=PREFIX, vocab_size=vocab_size, source=source))


def archive_architecture(archive: Archive | Path, config: dict[str, object]) -> Architecture:
    """The network that an archive's settings describe, once all of them are known to be what they must be.

    Raises:
        ArchiveError: settings are missing, are none, or describe no network or one that is larger than the weights.
    """
    source = archive.source if isinstance(archive, Archive) else archive
    known = {field.name: config[field.name] for field in fields(Architecture) if config.get(field.name) is not None}
    try:
        # Padding is a matter of the run that reads the archive: its student and its teacher need the same.
        arch = Architecture(**known).padded_to(Architecture.make_vocab_size_divisible_by)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ArchiveError(f"{source}: model_config.yaml describes no network: {one_line(error)}") from error
    stored = archive.stored_values if isinstance(archive, Archive) else None
    if stored is not None and arch.num_parameters > 2 * stored:  # less is left to who names the tensor
        raise ArchiveError(
            f"{source}: model_config.yaml describes a network of {arch.num_parameters:.3g} values, {WEIGHTS}/ holds {stored}"
        )
    try:
        _check_settings(config)
    except (TypeError, ValueError) as error:
        raise ArchiveError(f"{source}: model_config.yaml: {one_line(error)}") from error
    return arch


def _check_settings(config: Mapping[str, Any]) -> None:
    """What is looked up in an archive's settings besides the network."""
    if str(config.get("precision", "32")) not in PRECISIONS:
        raise ValueError(f"precision={shown(config['precision'])} is none of {', '.join(PRECISIONS)}")
    opdlm = section(config, "opdlm")
    token_ids(opdlm, "mask_token_id")
    token_ids(section(opdlm, "rollout"), "end_token_ids")
    if opdlm.get("block_size") is not None:
        count("block_size", opdlm["block_size"])
    section(config, "tokenizer")
    origin = section(config, "origin")
    if origin:
        read_origin(origin)
    token_ids(section(origin, "generation_config"), "eos_token_id")


def checkpoint_architecture(path: str | Path, tokenizer: str | None = None) -> Architecture:
    """The network that a checkpoint of any kind holds, without its weights.

    Args:
        path: file or folder; only an archive of NeMo 1.x is extracted for it.
        tokenizer: folder of the tokenizer, for checkpoints of other kinds that hold none.

    Raises:
        ValueError, OSError: as `open_checkpoint`.
    """
    if recognise(existing(path)) is Kind.OURS:
        settings = read_archive_config(path)
        check_target(path, settings)
        return archive_architecture(Path(path), settings)
    with open_checkpoint(path, tokenizer) as archive:
        return archive_architecture(archive, archive.config)


@contextmanager
def open_model(path: str | Path) -> Iterator[tuple[StagedGPT, Archive]]:
    """A network with the weights of an archive, or other checkpoint, in their stored precision, and the open archive."""
    with open_checkpoint(path) as archive:
        check_class(archive)
        arch = archive_architecture(archive, archive.config)
        dtype = PRECISIONS[str(archive.config.get("precision", "32"))]
        model = build_model(
            arch, initialize(), AttentionRule.CAUSAL, ModelOptions(params_dtype=dtype, initialize=False)
        )
        read_weights(model, archive)
        yield model, archive


def convert_nemo_to_hf(source: str | Path, output: str | Path, output_format: str, precision: str | None = None) -> str:
    """Write the Hugging Face folder of an archive; returns what its user has to know: for ``sdar``, how to serve it.

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
        origin = read_origin(section(archive.config, "origin"))
        state = {name: value for name, value in model[0].state_dict().items() if not name.endswith("_extra_state")}
        dtype = PRECISIONS[precision] if precision else None
        files = tokenizer_files(archive)
        block_size = int(archive.config["opdlm"]["block_size"])
        if output_format == "sdar":
            check_is_sdar(model.arch, origin)
            return megatron_to_sdar(state, model.arch, origin, files, output, block_size=block_size, dtype=dtype)
        named_size = None if block_size == BLOCK_SIZE else block_size
        megatron_to_hf(state, model.arch, origin, files, output, block_size=named_size, dtype=dtype)
        return _WITHOUT_MASK.format(mask_token=origin.mask_token) if origin.added_rows else ""


def tokenizer_files(archive: Archive) -> dict[str, bytes]:
    """Name -> content of an archive's tokenizer files.

    Raises:
        ArchiveError: it has none.
    """
    if archive.tokenizer is None:
        raise ArchiveError(f"{archive.source}: the archive holds no tokenizer")
    return {file.name: file.read_bytes() for file in sorted(archive.tokenizer.iterdir())}
