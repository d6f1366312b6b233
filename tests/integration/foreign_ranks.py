"""What each of four ranks does in `test_foreign_checkpoints`; a module of its own, for each rank imports it."""

from contextlib import ExitStack
from pathlib import Path

from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.atomic_folder import on_every_rank, on_rank_zero
from nemo_opdlm.megatron.checkpoint import save_sharded
from nemo_opdlm.megatron.student import build_model
from nemo_opdlm.models.conversion import PREFIX, archive_architecture, read_weights
from nemo_opdlm.models.foreign import open_checkpoint


def read_in_parts(path: Path, output: Path) -> None:
    """Read a checkpoint, which the first rank opens, into this rank's part of a network, and write the whole to `output`."""
    parallel.destroy()
    context = parallel.initialize(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with ExitStack() as stack:
        archive = on_rank_zero(lambda: stack.enter_context(open_checkpoint(path)))
        # With more padding the second tensor-parallel rank would have no token.
        arch = archive_architecture(archive, archive.config).padded_to(1)
        model = build_model(arch, context, AttentionRule.CAUSAL)
        read_weights(model, archive)
        on_every_rank(lambda: None)
    save_sharded(output, model.sharded_weights(PREFIX))
