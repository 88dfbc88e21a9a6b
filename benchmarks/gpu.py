"""Everything that needs a GPU, in under 25 minutes: the tests in tests/gpu, then the tables of docs/throughput-gpu.md.

    python benchmarks/gpu.py

Run it in a clone with the `dev` extra installed, on a machine with one GPU. It ends with exit status 1 if a test failed. The
page is written in any case, and says what failed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "throughput-gpu.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument("--out", type=Path, default=PAGE, help="Markdown file to write (default docs/throughput-gpu.md)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cxt: this needs a GPU, and torch sees none")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    began = time.monotonic()
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rA", "tests/gpu"]
    tests = subprocess.run(words, cwd=REPOSITORY, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    print(tests.stdout, flush=True)
    minutes = (time.monotonic() - began) / 60
    words = [sys.executable, REPOSITORY / "benchmarks" / "training.py", "--seconds", str(args.seconds), "--out", args.out]
    measured = subprocess.run([str(word) for word in words], cwd=REPOSITORY, env=environment, check=False)
    if measured.returncode == 0:
        outcome = [line for line in tests.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED"))]
        text = args.out.read_text()
        text += f"\n## Tests\n\n`pytest tests/gpu`, {minutes:.1f} minutes:\n\n```text\n" + "\n".join(outcome) + "\n```\n"
        args.out.write_text(text)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    sys.exit(1 if tests.returncode or measured.returncode else 0)


if __name__ == "__main__":
    main()
