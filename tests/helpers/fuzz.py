"""A small fuzzer: random damage to what users may hand to cxt, and what it does with it.

    PYTHONPATH=tests python -m helpers.fuzz --kind shard --mutations 1000 --seed 7
    PYTHONPATH=tests python -m helpers.fuzz --kind shard --seed 7 --only 123      # one of them again

What is damaged must be refused by a message (`BadRequest` or `Failed`), or be used rightly. Tracebacks, deaths by a signal,
more than ten seconds or more than 2 GB are faults; the damaged files of each are kept, and how it came about is said.

Mutations run in forked processes, so that what kills one is seen and the others go on.
"""

import argparse
import dataclasses
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zlib
from pathlib import Path

import psutil
import torch

SECONDS = 10
MEMORY = 2 * 10**9
"""Limits of one mutation: seconds, and bytes of address space beyond what the process has when it starts."""


@dataclasses.dataclass
class Fault:
    """A mutation that was neither refused nor used rightly."""

    kind: str
    seed: int
    number: int
    what: str
    how: str
    files: Path

    def __str__(self) -> str:
        again = f"PYTHONPATH=tests python -m helpers.fuzz --kind {self.kind} --seed {self.seed} --only {self.number}"
        return f"{self.kind} {self.number} ({self.what}): {self.how}\n  files: {self.files}\n  again: {again}"


def generator(kind: str, seed: int, number: int) -> random.Random:
    """The random numbers of one mutation, whatever others there are."""
    return random.Random(zlib.crc32(f"{kind} {seed} {number}".encode()))


def _work(kind, numbers, *, seed: int, directory: Path, seconds: float, memory: int) -> None:
    """Run mutations one after another, and write of each when it begins and how it ends."""
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(directory / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    stack = open(directory / "stack.txt", "w")  # noqa: SIM115
    faulthandler.enable(stack)
    # Not its watchdog thread: the one of a parent such as pytest would be waited for, and threads are not forked.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, file=stack, chain=True)
    with open(directory / "results.jsonl", "a", buffering=1) as results:
        for number in numbers:
            stack.truncate(0)
            files = directory / f"{kind.name}-{seed}-{number}"
            files.mkdir()
            what = ""
            try:
                did = kind.mutate(generator(kind.name, seed, number), files)
                what = did["what"]
                results.write(json.dumps({"number": number, "what": what}) + "\n")
                signal.setitimer(signal.ITIMER_REAL, seconds)
                messages = kind.use(files, did)
                row = {"outcome": "refused" if messages else "used", "messages": messages}
                shutil.rmtree(files)
            except BaseException:
                row = {"outcome": "fault", "how": traceback.format_exc()}
            signal.setitimer(signal.ITIMER_REAL, 0)
            results.write(json.dumps({"number": number, "what": what} | row) + "\n")


def _process(kind, numbers, *, directory: Path, **settings) -> int:
    """Run mutations in a forked process; its exit status as `os.waitpid` gives it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _work(kind, numbers, directory=directory, **settings)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def fuzz(
    kind, numbers, *, seed: int, directory: Path, seconds: float = SECONDS, memory: int = MEMORY, report=None
) -> tuple[list, dict]:
    """Mutations *numbers* of a kind that was made; the faults, and how many were refused and used.

    *report* is called with each fault, of a process that has ended.

    What takes too long or dies is tried a second time on its own: a machine may be busy.
    """
    directory.mkdir(parents=True, exist_ok=True)
    report = report or (lambda fault: None)
    results = directory / "results.jsonl"
    left, faults, counts = list(numbers), [], {"refused": 0, "used": 0}
    tried = set()
    while left:
        results.unlink(missing_ok=True)
        status = _process(kind, left, seed=seed, directory=directory, seconds=seconds, memory=memory)
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        ended = {row["number"]: row for row in rows if "outcome" in row}
        for number, row in ended.items():
            if row["outcome"] == "fault":
                files = directory / f"{kind.name}-{seed}-{number}"
                faults.append(Fault(kind.name, seed, number, row["what"], row["how"], files))
                report(faults[-1])
            else:
                counts[row["outcome"]] += 1
        left = [number for number in left if number not in ended]
        if not left:
            break
        files = directory / f"{kind.name}-{seed}-{left[0]}"
        if left[0] not in tried:
            tried.add(left[0])
            shutil.rmtree(files, ignore_errors=True)
            continue
        stack = (directory / "stack.txt").read_text()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"more than {seconds:g} s" if number == signal.SIGALRM else f"killed by signal {number}"
        what = next((row["what"] for row in rows if row["number"] == left[0]), "while it was made")
        faults.append(Fault(kind.name, seed, left.pop(0), what, f"{how}\n{stack}", files))
        report(faults[-1])
    return faults, counts


def made(name: str, directory: Path):
    """A kind by its name, its whole files in *directory*; one thread, since what is forked cannot use torch's others."""
    from helpers.fuzz_kinds import KINDS

    torch.set_num_threads(1)
    kind = KINDS[name]()
    directory.mkdir(parents=True, exist_ok=True)
    kind.make(directory)
    return kind


def main() -> None:
    names = ("shard", "manifest", "checkpoint", "configuration", "mask")
    parser = argparse.ArgumentParser(description="Damage files at random, and see what cxt does with them.")
    parser.add_argument("--kind", choices=names, nargs="+", default=list(names), help="default: all")
    parser.add_argument("--mutations", type=int, default=200, help="of each kind (default 200)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default 0)")
    parser.add_argument("--only", type=int, nargs="+", help="these mutations instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a mutation may take (default {SECONDS})")
    parser.add_argument("--directory", type=Path, help="for all files (default: a new one for temporary files)")
    args = parser.parse_args()
    directory = args.directory or Path(tempfile.mkdtemp(prefix="cxt-fuzz-"))
    failed = 0
    for name in args.kind:
        kind = made(name, directory / name / "whole")
        numbers = args.only or range(args.first, args.first + args.mutations)
        faults, counts = fuzz(
            kind, numbers, seed=args.seed, directory=directory / name / "cases", seconds=args.seconds,
            report=lambda fault: print(fault, end="\n\n", flush=True),
        )  # fmt: skip
        print(f"{name}: {len(numbers)} mutations, {counts['refused']} refused, {counts['used']} used, {len(faults)} faults")
        failed += len(faults)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
