"""Disks that are full or read-only, files that are damaged, ranks that go missing: one line says so, and nothing is lost."""

import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Scene, command, newest_checkpoint
from tests.faults.victims import TIMEOUT_SECONDS, Outcome, Strike, Victims

BAD_INPUT = 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, room: int) -> Path:
    """Leave so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
    return ballast


def told(outcome: Outcome, pattern: str) -> None:
    """Every rank ends with one line that says why."""
    assert all(code == BAD_INPUT for code in outcome.codes), outcome.outputs[0][-3000:]
    for rank, output in enumerate(outcome.outputs):
        assert len(outcome.errors(rank)) == 1 and "Traceback" not in output, output[-3000:]
        assert re.search(pattern, outcome.errors(rank)[0]), outcome.errors(rank)


def begun(scene: Scene, log_dir: Path) -> tuple[str, dict[str, bytes]]:
    """A run that was killed after its third update; the name and files of its last checkpoint."""
    scene.run(log_dir, strike=Strike(signal.SIGKILL, "u", 12))
    checkpoint = newest_checkpoint(log_dir)
    return checkpoint.name, {file.name: file.read_bytes() for file in checkpoint.iterdir()}


def assert_untouched(log_dir: Path, name: str, files: dict[str, bytes]) -> None:
    checkpoint = newest_checkpoint(log_dir)
    assert checkpoint.name == name
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == files


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before(
    scene: Scene, kills: int, disk: Path
) -> None:
    if kills < 2 and scene.num_ranks > 1:
        pytest.skip("left to make fault-injection")
    log_dir = disk / "log"
    before = begun(scene, log_dir)
    ballast = fill(disk, room=200_000)
    told(scene.run(log_dir), rf"cannot write the checkpoint in {log_dir}/checkpoints: .*{os.strerror(errno.ENOSPC)}")
    assert_untouched(log_dir, *before)
    ballast.unlink()
    assert scene.run(log_dir).codes == [0] * scene.num_ranks
    scene.assert_same_end(log_dir)


def test_a_read_only_folder_of_checkpoints_is_one_line_at_the_first_save(
    victims: Victims, inputs: tuple[str, ...], disk: Path, tmp_path: Path
) -> None:
    (disk / "checkpoints").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    place = f"exp_manager.checkpoint_callback_params.dirpath={disk}/checkpoints"
    told(victims.run(command(inputs, 1, tmp_path / "log", place)), rf"{os.strerror(errno.EROFS)}: {disk}/checkpoints")


@pytest.mark.usefixtures("thorough")
def test_a_damaged_shard_is_refused_by_name(scene: Scene, tmp_path: Path) -> None:
    begun(scene, tmp_path)
    shard = sorted(newest_checkpoint(tmp_path).glob("*.distcp"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    told(scene.run(tmp_path), rf"{shard.name} is damaged: its content is not what was written")


@pytest.mark.usefixtures("thorough")
def test_a_truncated_archive_is_refused_by_name(scene: Scene, tmp_path: Path) -> None:
    (archive,) = (item.partition("=")[2] for item in scene.inputs if item.startswith("model.restore_from_path="))
    cut = tmp_path / "cut.nemo"
    cut.write_bytes(Path(archive).read_bytes()[:-30_000])
    told(scene.run(tmp_path / "log", f"model.restore_from_path={cut}"), r"cut\.nemo: .*truncated")


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("missing", [0, 1])
def test_the_other_rank_does_not_wait_for_one_that_was_killed(
    missing: int, victims: Victims, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    strike = Strike(signal.SIGKILL, "r", 5, missing)
    outcome = victims.run(command(inputs, 2, tmp_path), 2, strike=strike, alone=True)
    assert outcome.codes[missing] == -signal.SIGKILL and outcome.codes[1 - missing] == BAD_INPUT
    (line,) = outcome.errors(1 - missing)
    assert "another rank died" in line and "Traceback" not in outcome.outputs[1 - missing]
    assert outcome.seconds < TIMEOUT_SECONDS
