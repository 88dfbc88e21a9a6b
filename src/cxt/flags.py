"""The flags of the trainer, which are also the keys of its configuration files."""

import dataclasses

import jsonargparse

from cxt.config import PRESETS, AdapterConfig, TrainingConfig
from cxt.configfile import read_yaml
from cxt.errors import BadRequest, nearest


def build_parser(**options) -> jsonargparse.ArgumentParser:
    """All flags; a key of `--config FILE.yaml` is the name of a flag, with underscores."""
    training = TrainingConfig()
    parser = jsonargparse.ArgumentParser(prog="python -m cxt.train", description="Train one checkpoint.", **options)
    add = parser.add_argument
    add("--config", action="config", help="YAML file whose keys are the names of these flags; the command line wins")
    add("--model", default="broad", help=f"preset: {', '.join(PRESETS)}")
    add("--name", type=str | None, help="name of the checkpoint in logs and file names (default: the preset)")
    add("--dataset-path", type=str | None, help="dataset directory, with train/ and test/")
    add("--simulate", type=str, nargs="+", help="train on these scenarios, simulated on the fly, instead of a dataset")
    add("--configfile", type=str, nargs="+", default=[], help="overlays over the default configuration, for --simulate")
    add("--window-size", type=int | None, help="base pairs of a window, for --simulate (default: the preset's)")
    add("--samples", type=int | None, help="haplotypes, for --simulate (default: all that are simulated)")
    add("--eval-samples", type=int | None, help="items held out for validation, for --simulate: the first ones")
    add("--eval-max-batches", type=int | None, help="the same in batches of --batch-size")
    add("--max-steps", type=int | None, help="optimizer steps to train for; with a dataset, at most its epochs")
    add("--gpus", type=int, nargs="+", help="indices of the GPUs to train on; several use DDP")
    add("--devices", type=int | None, help="number of devices instead: GPUs, or 0 for the CPU")
    add("--nodes", type=int, default=1, help="nodes with so many devices each; start the same command once on each")
    add("--accelerator", default="auto", choices=["auto", "cpu", "gpu"], help="cpu with --devices N: N DDP processes on CPU")
    add("--checkpoint", type=str | None, help="start from the weights of this checkpoint")
    add("--resume-adapter", type=str | None, help="start from the backbone and adapter weights of this adapter checkpoint")
    add(
        "--resume",
        type=bool | str,
        default=False,
        nargs="?",
        const=True,
        help="continue the newest run below --log-dir, or --run-dir, or a run or one of its saves, given as a path",
    )
    add(
        "--restart",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="start the run directory afresh; what it held is kept as …-superseded-N",
    )
    add(
        "--adapter",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="train a sample-size adapter on the backbone of --checkpoint",
    )
    add("--adapter-samples", type=int | None, help="haplotypes of the adapter's input (default: the dataset's)")
    adapter = AdapterConfig()
    add("--adapter-bottleneck", type=int, default=adapter.bottleneck, help="width of the adapter's gated branch")
    add("--adapter-dropout", type=float, default=adapter.dropout, help="dropout in the adapter's gated branch")
    add("--unfreeze-strategy", default=adapter.unfreeze_strategy, choices=["none", "ln", "lastN", "ln_lastN"],
        help="backbone parameters that train beside the adapter")  # fmt: skip
    add("--last-n", type=int, default=adapter.last_n, help="last blocks that lastN and ln_lastN unfreeze")
    add("--overwrite-bin0", type=bool | None, help="adapter overwrites bin 0 always (published; default: as its parent)")
    add("--log-dir", type=str, default=".", help="runs go to <log-dir>/lightning_logs/version_N")
    add("--run-dir", type=str | None, help="run directory to use instead; an unfinished run in it is continued")
    add("--max-minutes", type=float | None, help="after so many minutes save and exit with status 75; run again to go on")
    add("--out", type=str | None, help="publish the finished checkpoint here")
    add("--print-config", type=bool, default=False, nargs="?", const=True, help="print all settings as YAML and end")
    add("--lineage", type=str | None, help="digest of everything the checkpoint depends on, stored in it")
    add("--settings-lineage", type=str | None, help="lineage that the settings of --config are for; must be --lineage's")
    add("--dataset-lineage", type=str | None, help="lineage that the dataset must have")
    add("--parent-lineage", type=str | None, help="lineage that --checkpoint or --resume-adapter must have")
    add("--wait-for-lock", type=float, default=0.0, help="minutes to wait where another trainer has the run directory")
    for name, text in {
        "layers": "transformer blocks", "heads": "attention heads", "width": "width of the residual stream",
    }.items():  # fmt: skip
        add(f"--{name}", type=int | None, help=f"{text} (default: the preset's)")
    add("--dropout", type=float | None, help="dropout of the network (default: the preset's)")
    add("--mask-singletons", type=bool | None, help="zero frequency bin 0 in the model (default: the preset's)")
    add("--start-token-in-prefix", type=bool | None, help="sources see the start token (published; default: as its parent)")
    for field in dataclasses.fields(TrainingConfig):
        add(
            f"--{field.name.replace('_', '-')}",
            type=str | bool | int if field.name == "precision" else field.type,  # YAML reads `no` and `16` as these
            default=getattr(training, field.name),
            help="see config/README.md",
            **({"nargs": "?", "const": True} if field.type is bool else {}),
        )
    return parser


def check_config_keys(argv: list[str], parser: jsonargparse.ArgumentParser) -> None:
    """BadRequest with the nearest name for an unknown key in a --config file, or an unknown flag."""
    known = {action.dest for action in parser._actions} - {"help", "config"}
    flags = {option for action in parser._actions for option in action.option_strings}
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag not in flags:
            raise BadRequest(f"unknown flag {flag}{nearest(flag, flags)}")
        if flag == "--config":
            for key in read_yaml(value or argv[min(i + 1, len(argv) - 1)]):
                if key not in known:
                    raise BadRequest(f"{value or argv[i + 1]}: unknown key '{key}'{nearest(key, known)}")
