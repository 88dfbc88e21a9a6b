"""A real Slurm on this machine, of Debian's packages: munge, slurmctld, and one slurmd for each node.

Nothing of the system's own configuration is read or changed. Everything lives in one directory, listens on free ports of the
loopback interface, and is ended by process.
"""

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GPUS = 1
"""Fake GPUs of each node."""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")


def missing_programs() -> list[str]:
    """Programs that a Slurm of our own needs and this machine lacks, or that it has to be root."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return missing if os.geteuid() == 0 else [*missing, "root"]


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(what: str, check: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait until *check* returns something true."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.3)


class Slurm:
    """A running Slurm: its environment, and calls of its programs."""

    def __init__(self, directory: Path, nodes: int):
        self.directory = directory
        self.names = [f"n{number}" for number in range(nodes)]
        self.conf = directory / "slurm.conf"
        self.calls = directory / "sbatch.calls"
        programs = directory / "bin"
        self.environment = os.environ | {
            "SLURM_CONF": str(self.conf),
            "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin",
            "SNAKEMAKE_SLURM_PARTITIONS": str(directory / "partitions.yaml"),
            "MASTER_ADDR": "127.0.0.1",  # nothing resolves the names of the nodes
        }
        programs.mkdir()
        # The executor removes SLURM_CONF from the environment of the jobs' own srun; and calls of sbatch are to be counted.
        for name, first in (("srun", f"export SLURM_CONF={self.conf}"), ("sbatch", f'echo "$@" >> {self.calls}')):
            (programs / name).write_text(f'#!/bin/sh\n{first}\nexec {shutil.which(name)} "$@"\n')
            (programs / name).chmod(0o755)

    def configure(self, *, munge_socket: Path) -> None:
        """Write slurm.conf, with the partitions `cpu` and `gpu` of all nodes, and the file of their limits."""
        host = socket.gethostname().split(".")[0]
        settings = {
            "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": _find_free_port(),
            "SlurmUser": "root",
            "AuthType": "auth/munge", "AuthInfo": f"socket={munge_socket}", "CredType": "cred/munge",
            "StateSaveLocation": self.directory / "state", "SlurmdSpoolDir": self.directory / "spool-%n",
            "SlurmctldPidFile": self.directory / "slurmctld.pid", "SlurmdPidFile": self.directory / "slurmd-%n.pid",
            "PlugStackConfig": self.directory / "plugstack.conf",
            "ProctrackType": "proctrack/pgid", "TaskPlugin": "task/none", "MpiDefault": "none", "SwitchType": "switch/none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core_Memory", "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=2,sched_min_interval=0", "ReturnToService": 2, "MinJobAge": 7200,
            "SlurmdParameters": "config_overrides", "AccountingStorageType": "accounting_storage/none", "MailProg": "/bin/true",
            "GresTypes": "gpu",
        }  # fmt: skip
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_find_free_port()} CPUs=2 RealMemory=8000 "
            f"Gres=gpu:fake:{GPUS}"
            for name in self.names
        ]
        names = ",".join(self.names)
        lines.append(f"PartitionName=cpu Nodes={names} Default=YES DefaultTime=10 MaxTime=60 State=UP")
        lines.append(f"PartitionName=gpu Nodes={names} DefaultTime=10 MaxTime=60 State=UP")
        self.conf.write_text("\n".join(lines) + "\n")
        (self.directory / "plugstack.conf").touch()
        # A GPU is a character device. These are /dev/null, /dev/zero, … by another name.
        for number, minor in enumerate((3, 5, 7, 8)[:GPUS]):
            os.mknod(self.directory / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        gpus = [f"NodeName={names} Name=gpu Type=fake File={self.directory / f'gpu{number}'}" for number in range(GPUS)]
        (self.directory / "gres.conf").write_text("\n".join(["AutoDetect=off", *gpus]) + "\n")
        (self.directory / "partitions.yaml").write_text(
            f"partitions:\n  cpu: {{max_runtime: 60}}\n  gpu: {{max_runtime: 60, max_gpu: {GPUS}}}\n"
        )

    def call(self, *words) -> str:
        """The output of one of Slurm's programs."""
        done = subprocess.run([*map(str, words)], env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def list_jobs(self, state: str) -> list[str]:
        """Ids of the jobs in a state, such as PENDING or RUNNING."""
        return self.call("squeue", "-h", "-t", state, "-o", "%A").split()


@contextlib.contextmanager
def running_slurm(directory: Path, *, nodes: int = 1) -> Iterator[Slurm]:
    """A Slurm that runs during a `with` block; *directory* must be short, because sockets are made in it."""
    slurm = Slurm(directory, nodes)
    processes: list[subprocess.Popen] = []

    def launch(name: str, *words) -> None:
        command = [name.split("-", maxsplit=1)[0], *map(str, words)]
        with (directory / f"{name}.log").open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            processes.append(subprocess.Popen(command, env=slurm.environment, start_new_session=True, **streams))

    try:
        key = directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge_socket = directory / "munge.socket"
        launch(
            "munged", "-F", f"--key-file={key}", f"--socket={munge_socket}", f"--pid-file={directory / 'munged.pid'}",
            f"--log-file={directory / 'munge.log'}", f"--seed-file={directory / 'munge.seed'}",
        )  # fmt: skip
        wait_for("munge", munge_socket.exists)
        slurm.configure(munge_socket=munge_socket)
        launch("slurmctld", "-D", "-i", "-f", slurm.conf)
        for name in slurm.names:
            (directory / f"spool-{name}").mkdir()
            launch(f"slurmd-{name}", "-D", "-N", name, "-f", slurm.conf)

        def are_idle() -> bool:
            command = ["sinfo", "-h", "-N", "-o", "%N=%T"]  # a line for each node and partition
            done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, check=False)
            return set(done.stdout.split()) == {f"{name}=idle" for name in slurm.names}

        wait_for("the nodes", are_idle)
        yield slurm
        with contextlib.suppress(AssertionError):
            slurm.call("scancel", "--user=root")
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
