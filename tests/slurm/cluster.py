"""A real Slurm on loopback: munged, slurmctld and slurmd of their own, with their own ports, keys and state.

One node, this machine, in two partitions: a job of `urgent` preempts one of `patient`, which Slurm queues again.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd")
_PACKAGES = ("slurm-wlm", "munge")
_CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=patient Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


def install() -> None:
    """Install Slurm and munge by apt where they are missing; leave with one line where that is not possible."""
    if all(map(shutil.which, _DAEMONS)):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"slurm-test needs {' and '.join(_PACKAGES)}: install them, or call it as root on Debian or Ubuntu")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *_PACKAGES]):
        finished = subprocess.run(["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(f"slurm-test: apt-get {arguments[0]} failed: {finished.stderr.strip().splitlines()[-1]}")


@contextmanager
def slurm(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """Start the daemons, which root alone can, and stop them; gives the environment for sbatch and its like."""
    if os.geteuid() != 0:
        sys.exit("slurm-test must be called by root: slurmd starts jobs as their users")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(2)
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=host, folder=folder, cpus=cpus, controller_port=ports[0], node_port=ports[1]))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    commands = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-f", str(config)],
        ["slurmd", "-D", "-f", str(config), "-N", host],
    )
    daemons: list[subprocess.Popen[bytes]] = []
    with (folder / "daemons.log").open("wb") as log:
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                time.sleep(1)
            _wait_for_node(environment, daemons, folder)
            yield environment
        finally:
            subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=environment, capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(timeout=30)


def _wait_for_node(environment: dict[str, str], daemons: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True)
        if "idle" in answer.stdout.split():
            return
        if any(daemon.poll() is not None for daemon in daemons):
            break
        time.sleep(1)
    sys.exit(f"slurm-test: Slurm does not start:\n{(folder / 'daemons.log').read_text()[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()
