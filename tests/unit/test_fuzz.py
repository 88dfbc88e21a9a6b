"""Random damage to files that users hand over is refused by a message, or does no harm; see `fuzz.py`."""

import mmap
import os
import signal
import time
from types import SimpleNamespace

import pytest
from helpers.fuzz import fuzz, made

from cxt.errors import BadRequest

MUTATIONS = int(os.environ.get("CXT_FUZZ_MUTATIONS", "40"))
"""Of each of five kinds; `make test-fuzz` makes two hundred of each."""

SEED = int(os.environ.get("CXT_FUZZ_SEED", "1"))
"""Another one gives other mutations."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shard", "manifest", "checkpoint", "configuration", "mask"])
def test_damage_is_refused_or_harmless(name, tmp_path):
    faults, counts = fuzz(made(name, tmp_path / "whole"), range(MUTATIONS), seed=SEED, directory=tmp_path / "cases")
    assert not faults, "\n\n".join(map(str, faults))
    assert counts["refused"] + counts["used"] == MUTATIONS
    assert counts["refused"] > MUTATIONS / 4


def wrong_in_some_way(files, did):
    """What a mutation is used for: all that may go wrong, and what may not be called wrong."""
    number = did["number"]
    if number == 1:
        raise KeyError("what a user must not see")
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 3:
        time.sleep(60)
    if number == 4:
        bytearray(3 * 10**8)
    if number == 5:
        mmap.mmap(-1, 3 * 10**8)
    return ["refused"] if number % 2 else []


def test_the_fuzzer_sees_what_goes_wrong(tmp_path):
    def mutate(rng, directory):
        (directory / "file").write_bytes(rng.randbytes(10))
        return {"what": "nothing", "number": int(directory.name.rsplit("-", 1)[1])}

    kind = SimpleNamespace(name="any", mutate=mutate, use=wrong_in_some_way)
    faults, counts = fuzz(kind, range(9), seed=1, directory=tmp_path, seconds=2, memory=2 * 10**8)
    assert {fault.number: fault.how.splitlines()[0] for fault in faults if fault.number in (2, 3)} == {
        2: f"killed by signal {int(signal.SIGSEGV)}",
        3: "more than 2 s",
    }
    assert sorted(fault.number for fault in faults) == [1, 2, 3, 4, 5]
    assert all((fault.files / "file").stat().st_size == 10 for fault in faults)
    assert "wrong_in_some_way" in next(fault.how for fault in faults if fault.number == 3)
    assert counts == {"refused": 1, "used": 3}


def test_refusals_must_name_the_file_and_say_something():
    from helpers.fuzz_kinds import Refusals

    def refuse(message):
        raise BadRequest(message)

    refusals = Refusals("/data/here")
    assert refusals.attempt(refuse, "/data/here/x is damaged") is None
    assert refusals.attempt(len, "abc") == 3
    assert refusals.messages == ["/data/here/x is damaged"]
    for message in ("", "it is damaged", "/data/here" + "x" * 10_000):
        with pytest.raises(AssertionError):
            refusals.attempt(refuse, message)
    with pytest.raises(KeyError):
        refusals.attempt({}.__getitem__, "x")
