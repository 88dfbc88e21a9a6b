"""How fast this machine trains and decodes.

cxt bench train                               a broad model of the published size
cxt bench train --compare dense               compared with the published formulation, in turns
cxt bench decode --compare uncached           compared with decoding without a cache
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from cxt.config.bounds import Positive, PositiveInteger, Threads, Workers
from cxt.config.flags import check_flags, note_more_than_cores
from cxt.config.network import PRESETS, AdapterConfig, ModelConfig
from cxt.config.training import Attention, Compile, LossPath, TrainingConfig
from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest, Failed, first_line, suggest_nearest
from cxt.io import atomic_write, check_writable, json_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `cxt bench train` and `cxt bench decode` share."""
    training = TrainingConfig()
    parser.add_argument("--model", default="broad", help=f"preset: {', '.join(PRESETS)} (default broad)")
    for name in ("layers", "heads", "width", "windows", "samples"):
        parser.add_argument(f"--{name}", type=int, help="override the preset's size")
    parser.add_argument("--dropout", type=float, help="override the preset's dropout")
    parser.add_argument("--batch-size", type=int, help=f"default {training.batch_size}, smaller on a CPU")
    parser.add_argument("--precision", default=training.precision, help=f"on a GPU (default {training.precision})")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, default=training.threads, help=f"CPU threads (default {training.threads})")
    parser.add_argument("--seconds", type=float, default=20.0, help="approximate measuring time in seconds (default 20)")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file")


def read_network(args) -> ModelConfig:
    """The network that the flags describe."""
    if args.model not in PRESETS:
        raise BadRequest(f"unknown model '{args.model}'{suggest_nearest(args.model, PRESETS)}")
    given = {name: getattr(args, name) for name in ("layers", "heads", "width", "windows", "samples", "dropout")}
    return PRESETS[args.model].replace(**{name: value for name, value in given.items() if value is not None})


def run_benchmark(args, network: ModelConfig, device: str) -> dict:
    """Run the benchmark that the command and its flags select."""
    from cxt.benchmark.speed import bench_decoding, bench_training, limit_batch
    from cxt.model.flops import decoding_flops, training_flops

    if args.command == "train":
        adapter = AdapterConfig() if args.adapter else None
        batch = args.batch_size or limit_batch(TrainingConfig().batch_size, training_flops(network, adapter), device)
        settings = TrainingConfig(
            batch_size=batch, precision=args.precision, compile=args.compile, attention=args.attention, workers=args.workers,
            loss_path=args.loss_path, gradient_checkpointing=args.gradient_checkpointing,
        )  # fmt: skip
        if args.attention == "flex" and device == "cpu":
            raise BadRequest("--attention flex trains on GPUs only; use --attention split")
        return bench_training(network, adapter, settings, device=device, seconds=args.seconds, compare=args.compare)
    precision = TrainingConfig(precision=args.precision).precision
    batch = args.batch_size or limit_batch(64, decoding_flops(network, replicates=args.replicates), device)
    return bench_decoding(
        network, device=device, precision=precision, batch=min(batch, args.pairs or batch), pairs=args.pairs,
        replicates=args.replicates, seconds=args.seconds, compare=args.compare,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run `cxt bench`: measure how fast this machine trains or decodes.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt bench", description="How fast this machine trains and decodes.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="optimizer steps, including loading of data")
    add_flags(training)
    training.add_argument("--adapter", action="store_true", help="an adapter of 10 samples on a mostly frozen backbone")
    training.add_argument("--compile", default="auto", help=f"{', '.join(get_args(Compile))} (default auto)")
    training.add_argument("--attention", default="split", help=f"{', '.join(get_args(Attention))} (default split)")
    training.add_argument("--loss-path", default="target", help=f"{', '.join(get_args(LossPath))} (default target)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    training.add_argument("--workers", type=int, default=2, help="threads that prepare batches (default 2)")
    training.add_argument("--compare", choices=["dense"], help="also measure the published formulation, in turns")
    decoding = commands.add_parser("decode", help="decoding with a key-value cache")
    add_flags(decoding)
    decoding.add_argument("--replicates", type=int, default=15, help="decoded sequences per pair (default 15)")
    decoding.add_argument("--pairs", type=int, help="decode this many pairs once instead of measuring for --seconds")
    decoding.add_argument("--compare", choices=["uncached"], help="also measure decoding without a cache")
    args = parser.parse_args(argv)
    check_flags(
        args,
        seconds=Positive,
        threads=Threads,
        workers=Workers,
        batch_size=PositiveInteger,
        replicates=PositiveInteger,
        pairs=PositiveInteger,
    )
    run(args)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark, print its result, and write it to ``--out``."""
    import torch

    from cxt.benchmark.report import format_result
    from cxt.benchmark.speed import describe_device, detect_device

    note_more_than_cores(threads=args.threads, workers=getattr(args, "workers", 0))
    if args.out is not None:
        check_writable(args.out)
    device = args.device or detect_device()
    if device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("--device cuda, but torch sees no GPU")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium" if device == "cuda" else "highest")
    network = read_network(args)
    try:
        result = run_benchmark(args, network, device)
    except torch.OutOfMemoryError as error:
        without = ", or omit --compare" if args.compare else ""
        raise Failed(f"out of memory ({first_line(error)}); choose a smaller --batch-size{without}") from error
    what = "training" if args.command == "train" else "decoding"
    name = f"{args.model} with an adapter" if result["adapter"] else args.model
    print(format_result(name, what, result, device))
    if args.out is not None:
        about = {
            "device": describe_device(device),
            "command": " ".join(["cxt bench", *sys.argv[1:]]),
            "what": what,
        }
        atomic_write(args.out, json_text(about | {"network": network.model_dump()} | result).encode())


if __name__ == "__main__":
    exit_on_bad_request(main)
