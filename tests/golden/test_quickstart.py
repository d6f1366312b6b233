"""Twenty updates of the quickstart's model on rollouts that are kept here, as they were when the files were last made on purpose.

The rollouts are replayed, so that rounding on another processor moves figures and not texts. After an intended change:
``python -m tests.golden.test_quickstart``, and say why in the commit.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opdlm.convert import sources
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from tests.parallel import runs
from tests.parallel.runs import Layout

GOLDEN = Path(__file__).with_name("quickstart.json")
ROLLOUTS = Path(__file__).with_name("quickstart_rollouts.safetensors")
FIGURES = ("train/loss", "train/kl", "train/grad_norm", "train/lr")
BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("glassllm") / "glassllm.nemo"
    convert_hf_to_nemo(sources.fetch("glassllm"), path)
    return str(path)


def kept_rollouts() -> list[dict[str, Any]]:
    tensors = load_file(ROLLOUTS)
    numbers = sorted({int(name.partition("/")[0]) for name in tensors})
    return [
        {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}/")}
        | {"block_size": BLOCK_SIZE}
        for number in numbers
    ]


def test_updates_on_kept_rollouts_are_what_they_were(archive: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = runs.train(archive, Layout(), runs.MAX_STEPS, replayed=kept_rollouts()).metrics
    assert len(found) == len(golden) == runs.MAX_STEPS
    for ours, theirs in zip(found, golden, strict=True):
        assert {name: ours[name] for name in FIGURES} == pytest.approx(theirs, rel=1e-4)


def test_the_first_rollouts_are_the_kept_ones(archive: str) -> None:
    """But for a row whose text hangs on the rounding of another processor."""
    (found,) = runs.train(archive, Layout(), 1).rollouts
    ours, theirs = (Trajectory.from_state_dict(state) for state in (found, kept_rollouts()[0]))
    width = max(ours.token_ids.shape[1], theirs.token_ids.shape[1])
    records = [
        torch.nn.functional.pad(torch.stack([x.token_ids, x.unmask_step.long()]), (0, width - x.token_ids.shape[1]))
        for x in (ours, theirs)
    ]
    assert int((records[0] != records[1]).any(0).any(1).sum()) <= 1


def main() -> None:
    """Make both files anew."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "glassllm.nemo"
        convert_hf_to_nemo(sources.fetch("glassllm"), path)
        outcome = runs.train(str(path), Layout(), runs.MAX_STEPS)
    metrics = [{name: float(f"{row[name]:.7g}") for name in FIGURES} for row in outcome.metrics]
    GOLDEN.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{number}/{name}": value.contiguous()
        for number, state in enumerate(outcome.rollouts)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, ROLLOUTS)


if __name__ == "__main__":
    main()
