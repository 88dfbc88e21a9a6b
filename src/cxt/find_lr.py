"""A learning rate for a run, found by raising it step by step and watching the loss.

    python -m cxt.find_lr --model broad --dataset-path results/datasets/processed --num-steps 100 --plot lr.png

Takes the flags of `cxt.train`, trains for a while without saving anything, and suggests where the loss falls most steeply.
"""

import math
import sys
import tempfile

import jsonargparse

from cxt.errors import BadRequest, Failed, exit_on_bad_request
from cxt.files import check_writable
from cxt.flags import build_parser, parse_flags
from cxt.ranges import MOST
from cxt.train import plan_of


def find_lr(plan, *, lowest: float, highest: float, num_steps: int):
    """Lightning's record of the search: ``results`` with "lr" and "loss", and ``suggestion()``.

    Parameters
    ----------
    plan : of the run, `cxt.fit.Plan`; one device of it is used
    lowest, highest : learning rates of the first and the last step, which grow by a constant factor
    num_steps : optimizer steps, each of batch_size · grad_accum items
    """
    import pytorch_lightning as pl
    from pytorch_lightning.tuner import Tuner

    from cxt.fit import data_of, quieten, set_threads, starting_model
    from cxt.training import Reseed, TrainingModule

    quieten()
    set_threads(plan)
    module = TrainingModule(starting_model(plan), plan.training, record={}, total_steps=plan.total_steps)
    module.lr = plan.training.lr  # Lightning looks for it
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            accelerator=plan.accelerator,
            devices=plan.devices[:1] if isinstance(plan.devices, list) else 1,
            accumulate_grad_batches=plan.training.grad_accum,
            precision=plan.precision,
            max_epochs=-1,  # with one epoch, a small dataset would end it before there is anything to see
            gradient_clip_val=plan.training.grad_clip or None,
            use_distributed_sampler=False,
            logger=False,
            callbacks=[Reseed(plan.training.seed)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        )
        return Tuner(trainer).lr_find(
            module, data_of(plan), min_lr=lowest, max_lr=highest, num_training=num_steps, update_attr=False
        )


def add_flags(parser: jsonargparse.ArgumentParser) -> None:
    parser.prog, parser.description = "python -m cxt.find_lr", "Find a learning rate for a run."
    parser.add_argument("--lowest", type=float, default=1e-6, help="first learning rate (default 1e-6)")
    parser.add_argument("--highest", type=float, default=1e-2, help="last learning rate (default 1e-2)")
    parser.add_argument("--num-steps", type=int, default=100, help="optimizer steps to train for (default 100)")
    parser.add_argument("--plot", type=str | None, help="draw loss against learning rate into this file, .png")


def main() -> None:
    parser = build_parser()
    add_flags(parser)
    args = parse_flags(sys.argv[1:], parser)
    if not 0 < args.lowest < args.highest < math.inf:
        raise BadRequest(f"--lowest {args.lowest:g} --highest {args.highest:g}: expected 0 < lowest < highest, and finite")
    if args.num_steps > MOST:
        raise BadRequest(f"--num-steps {args.num_steps}: expected at most {MOST}")
    if args.num_steps < 20:
        raise BadRequest(f"--num-steps {args.num_steps}: expected at least 20, fewer show no slope")
    if args.plot is not None:
        check_writable(args.plot)
    plan, _ = plan_of(args)
    found = find_lr(plan, lowest=args.lowest, highest=args.highest, num_steps=args.num_steps)
    suggestion = found.suggestion()
    if suggestion is None:
        raise Failed("fewer than three points of the curve can be used: raise --num-steps, or lower --highest")
    if args.plot is not None:
        from cxt.figures import draw_learning_rates

        title = f"{plan.name}: suggested learning rate {suggestion:.2g}"
        draw_learning_rates(found.results["lr"], found.results["loss"], suggestion, args.plot, title=title)
        print(f"drawn: {args.plot}")
    print(f"suggested learning rate: {suggestion:.3g} (lr: {suggestion:.1e}; the schedule's min_lr must not be above it)")


if __name__ == "__main__":
    exit_on_bad_request(main)
