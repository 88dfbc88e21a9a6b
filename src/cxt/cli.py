"""The console script: `cxt COMMAND …` runs a stage or one of the other commands."""

import importlib
import sys

from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest, suggest_nearest

COMMANDS = {
    "plan": ("cxt.plan", "what a configuration will cost: simulations, steps, bytes, hours"),
    "simulate": ("cxt.simulate", "run one simulation batch: consecutive simulations of one variant"),
    "trees": ("cxt.commands.trees", "extract one tree sequence from a simulation batch"),
    "preprocess": ("cxt.preprocess", "make shards, manifest and mask of a dataset; or a dataset of your tree sequences"),
    "dataset": ("cxt.commands.dataset", "show, verify and export a dataset"),
    "teach": ("cxt.teach", "read the examples of a dataset with a teacher's checkpoint, for distillation"),
    "train": ("cxt.train", "train one checkpoint"),
    "find_lr": ("cxt.commands.find_lr", "suggest a learning rate"),
    "sweep": ("cxt.commands.sweep", "search settings of a training: many trials, chosen by their results"),
    "report": ("cxt.commands.report", "write the tables of the workflow's report"),
    "runs": ("cxt.commands.runs", "list, compare and tabulate run directories, and remove old ones"),
    "checkpoint": ("cxt.commands.checkpoint", "show, verify, compare, import, export, merge and quantise checkpoints"),
    "evaluate": ("cxt.evaluate", "evaluate a checkpoint on held-out simulations; print the accuracy table"),
    "translate": ("cxt.commands.translate", "estimate TMRCA tracks from a VCF, VCF Zarr, tree sequence or arrays"),
    "plot": ("cxt.commands.plot", "draw the tracks of a translation"),
    "bench": ("cxt.commands.bench", "measure how fast this machine trains and decodes"),
    "catalogue": ("cxt.commands.catalogue", "fetch a genetic map of stdpopsim's catalogue"),
    "schema": ("cxt.commands.schema", "print config/README.md, the reference of all configuration keys"),
}
"""{name: (module with the command's `main(argv)`, its description)}."""


def format_usage() -> str:
    """The text of `cxt --help`."""
    lines = [f"  {name:12s}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: cxt COMMAND [options]", "", *lines, "", "`cxt COMMAND --help` lists the options of a command."])


def main() -> None:
    """Run the command named by the first argument with the others; print the usage without one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"

    def run() -> None:
        if name in ("-h", "--help"):
            print(format_usage())
            return
        if name not in COMMANDS:
            raise BadRequest(f"unknown command '{name}'{suggest_nearest(name, COMMANDS)}")
        if name == "train":  # a signal during its imports, which take a second, must not end in a traceback
            from cxt.signals import install_exit_handler

            install_exit_handler()
        importlib.import_module(COMMANDS[name][0]).main(sys.argv[2:])

    exit_on_bad_request(run)
