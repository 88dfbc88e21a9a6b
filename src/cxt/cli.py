"""The console script: `cxt STAGE …` is `python -m cxt.STAGE …`."""

import os
import sys

from cxt.errors import BadRequest, exit_on_bad_request, nearest

COMMANDS = {
    "plan": "what a configuration will cost: simulations, steps, bytes, hours",
    "simulate": "one batch of tree sequences",
    "trees": "take one tree sequence out of a batch",
    "preprocess": "shards and manifest of a dataset, synthetic masks",
    "dataset": "look at a dataset, check it, export dense arrays",
    "train": "one checkpoint",
    "find_lr": "a learning rate to train with",
    "runs": "the run directories of the workflow, and removing old ones",
    "checkpoint": "what a checkpoint is, whether it is current, where two differ; import and export",
    "evaluate": "a checkpoint on held-out simulations, and the accuracy table",
    "bench": "how fast this machine trains and decodes",
    "catalogue": "fetch a genetic map of stdpopsim's catalogue",
    "configfile": "one model's training settings as YAML, as the workflow writes them",
    "schema": "config/README.md, from the schema of the configuration",
    "lineage": "digests of the code of each stage, for those who change it",
}


def main() -> None:
    """Run the command named by the first argument with the others; usage without one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"

    def run() -> None:
        if name in ("-h", "--help"):
            print("usage: cxt COMMAND [options]\n")
            for command, text in COMMANDS.items():
                print(f"  {command:12s}{text}")
            print("\n`cxt COMMAND --help` lists its options; `python -m cxt.COMMAND` is the same.")
            return
        if name not in COMMANDS:
            raise BadRequest(f"unknown command '{name}'{nearest(name, COMMANDS)}")
        # As the module itself, so that processes it starts (one for each device) find their way back to it.
        os.execv(sys.executable, [sys.executable, "-m", f"cxt.{name}", *sys.argv[2:]])

    exit_on_bad_request(run)
