"""One of four ranks, TP2 x PP2, that read a checkpoint which the first rank opened; run by `test_foreign_checkpoints`."""

import sys
from contextlib import ExitStack
from pathlib import Path

from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron.atomic_folder import on_every_rank, on_rank_zero
from nemo_opdlm.megatron.checkpoint import save_sharded
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import build_model
from nemo_opdlm.models.conversion import PREFIX, archive_architecture, read_weights
from nemo_opdlm.models.foreign import open_checkpoint


def main(path: Path, output: Path) -> None:
    """Read `path` into this rank's part of the network, and write the whole network to `output`."""
    parallel = initialize(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with ExitStack() as stack:
        archive = on_rank_zero(lambda: stack.enter_context(open_checkpoint(path)))
        model = build_model(archive_architecture(archive, archive.config), parallel, AttentionRule.CAUSAL)
        read_weights(model, archive)
        on_every_rank(lambda: None)
    save_sharded(output, model.sharded_weights(PREFIX))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
