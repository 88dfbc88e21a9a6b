"""The order of training examples, and the loaders that Lightning asks for.

The order is a pure function of (seed, epoch); each rank takes its share of it. Where to go on inside an epoch comes from
Lightning's own counters, so that a resumed run sees exactly the batches that are left.
"""

import collections
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cxt.data.pair_dataset import Batch
from cxt.errors import BadRequest, Failed, first_line
from cxt.random_seeds import torch_seed
from cxt.signals import block_signals, end_with_parent, ignore


class EpochBatchSampler(Sampler):
    """Batches (lists of examples) of one rank in one epoch; examples that do not fill a batch are dropped."""

    def __init__(self, *, examples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.examples, self.batch_size, self.seed, self.rank, self.world = examples, batch_size, seed, rank, world
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over next; called by Lightning."""
        self.epoch = epoch

    def _order(self, epoch: int):
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "order", number=epoch))
        return torch.randperm(self.examples, generator=generator)

    def _select_rank_examples(self, epoch: int):
        return self._order(epoch)[: self.examples // self.world * self.world][self.rank :: self.world]

    def _part(self, examples, batch: int) -> list[int]:
        return [int(example) for example in examples[batch * self.batch_size : (batch + 1) * self.batch_size]]

    def __iter__(self):
        rank_examples = self._select_rank_examples(self.epoch)
        skip, self.skip = self.skip, 0
        for batch in range(skip, len(self)):
            yield self._part(rank_examples, batch)

    def batch(self, epoch: int, number: int) -> list[int]:
        """The examples of one batch, whatever has been drawn so far."""
        return self._part(self._select_rank_examples(epoch), number)

    def __len__(self) -> int:
        return self.examples // self.world // self.batch_size


class SequentialBatchSampler(EpochBatchSampler):
    """Batches of one rank in the order of their examples, for examples of which each is new anyway."""

    def _order(self, epoch: int) -> range:
        return range(self.examples)


class _TimedLoader:
    """A loader that measures how long its batches were waited for, in seconds (*waited*).

    Its state is in `DataModule`; having the methods below tells Lightning that it can be resumed.
    """

    waited = 0.0

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class PrefetchLoader(_TimedLoader):
    """The batches of *dataset* in the order of *sampler*, each made by one of *threads* threads before it is asked for.

    With no threads they are made when they are asked for. Batches are made in a few buffers, one after another: the last
    two that were given out stay as they are (Lightning asks for one before it is done with the other), older ones are
    overwritten. *pin* pins the buffers for copies to a GPU; `copied` tells of such a copy, which is waited for.
    """

    def __init__(self, dataset, sampler, *, batch_size: int, threads: int, pin: bool):
        self.dataset, self.sampler = dataset, sampler
        self.batch_sampler = None  # Lightning looks for it
        self.batch_size, self.threads, self.pin = batch_size, threads, pin
        self._buffers: list[Batch] = []
        self._copies: dict[int, torch.cuda.Event] = {}

    def __len__(self) -> int:
        return len(self.sampler)

    def copied(self, batch: Batch) -> None:
        """A copy of *batch* to a GPU is under way; called before the next batch is asked for."""
        event = torch.cuda.Event()
        event.record()
        self._copies[batch.counts.data_ptr()] = event

    def _make(self, examples: list[int], buffer: Batch) -> Batch:
        event = self._copies.pop(buffer.counts.data_ptr(), None)
        if event is not None:
            event.synchronize()
        return self.dataset.batch(examples, out=buffer)

    def __iter__(self) -> Iterator[Batch]:
        return self._timed(self._batches())

    def _batches(self) -> Iterator[Batch]:
        if not self._buffers:  # once: getting new memory from the system for every epoch takes its time
            buffers_needed = max(1, self.threads) + 2
            self._buffers = [self.dataset.empty_batch(self.batch_size, pin=self.pin) for _ in range(buffers_needed)]
        buffers = itertools.cycle(self._buffers)
        batches = iter(self.sampler)
        if not self.threads:
            for examples in batches:
                yield self._make(examples, next(buffers))
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batches") as threads:
            pending = collections.deque(
                threads.submit(self._make, examples, next(buffers)) for examples in itertools.islice(batches, self.threads)
            )
            try:
                while pending:
                    batch = pending.popleft().result()
                    # Only now: the buffer of the batch before the last one given out is free by now.
                    pending.extend(
                        threads.submit(self._make, examples, next(buffers)) for examples in itertools.islice(batches, 1)
                    )
                    yield batch
            finally:
                for batch in pending:
                    batch.cancel()


class _BatchDataset(Dataset):
    """Indexed by lists of examples, as samplers give them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, examples) -> Batch | BadRequest:
        try:
            return self.dataset.batch(examples)
        except BadRequest as error:
            return error  # raised in a process, it would come with that process's traceback


def _prepare_loader_process(number: int) -> None:
    """Leave signals, which may be sent to all processes of a job, to the trainer, and exit when the trainer does."""
    ignore()
    end_with_parent(os.getppid())
    if not multiprocessing.parent_process().is_alive():  # it ended before that
        os._exit(1)


def _kill_loader(kill: Callable[[], None]) -> None:
    """End a loader on purpose: torch's handler for children that have ended would raise an error, even at the very end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kill()


class ProcessLoader(_TimedLoader, DataLoader):
    """The batches of *dataset* in the order of *sampler*, made by processes: for examples that cost more than their copying."""

    def __init__(self, dataset, sampler, *, processes: int, pin: bool):
        super().__init__(
            _BatchDataset(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=pin,
            worker_init_fn=_prepare_loader_process,
            generator=torch.Generator().manual_seed(1),  # its own: drawing seeds for processes leaves the global one alone
        )

    def _get_iterator(self):
        with block_signals():
            iterator = super()._get_iterator()
        for process in getattr(iterator, "_workers", ()):
            # torch's way to end one that is busy is a signal that they ignore
            process._popen.terminate = functools.partial(_kill_loader, process._popen.kill)
        return iterator

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._timed(super().__iter__()):
                if isinstance(batch, BadRequest):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, OSError | EOFError) or "DataLoader worker" in str(error):
                raise Failed(
                    f"a process that simulates has ended ({first_line(error)}); the machine may have run out of memory: "
                    "the same command with fewer --workers goes on from the last training state"
                ) from error
            raise


class DataModule(pl.LightningDataModule):
    """Train and validation loaders of two datasets; *order* makes the training sampler.

    *workers* threads make batches, or processes with *in_processes*, for examples that take long and hold Python's lock.
    *validation_items* test examples, spread evenly over the split, are used for validation; 0 = all.
    """

    def __init__(
        self, train, test, *, batch_size, seed, workers, validation_items, order=EpochBatchSampler, in_processes=False
    ):
        super().__init__()
        self.train_set, self.test_set = train, test
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.order, self.in_processes = order, in_processes
        self.validation_items = validation_items
        self.start = (0, 0)  # epoch, batches of it that are done
        self._loaders: dict[bool, PrefetchLoader] = {}

    def train_dataloader(self) -> PrefetchLoader | ProcessLoader:
        """Return the loader of this rank's training batches, from where a resumed run continues; called by Lightning."""
        sampler = self.order(
            examples=len(self.train_set),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        # The epoch is set here too: batches may be asked for before Lightning calls set_epoch.
        sampler.epoch, sampler.skip = self.start
        return self._loader(True, self.train_set, sampler)

    def val_dataloader(self) -> PrefetchLoader | ProcessLoader:
        """Return the loader of this rank's validation batches, of as many examples as every other rank has.

        If there are fewer examples than ranks, each rank gets all of them.
        """
        count = len(self.test_set)
        chosen = min(self.validation_items or count, count)
        examples = torch.linspace(0, count - 1, chosen, dtype=torch.float64).long() if chosen else torch.empty(0).long()
        # As many for each rank: they wait for each other when the losses are averaged, with equal weights.
        rank, world = self.trainer.global_rank, self.trainer.world_size
        rank_examples = examples[: chosen // world * world][rank::world] if chosen >= world else examples
        return self._loader(
            False, self.test_set, [batch.tolist() for batch in rank_examples.split(self.batch_size) if len(batch)]
        )

    def _loader(self, training: bool, dataset, sampler) -> PrefetchLoader | ProcessLoader:
        pin = self.trainer.strategy.root_device.type == "cuda"
        if self.in_processes:
            return ProcessLoader(dataset, sampler, processes=self.workers, pin=pin)
        self._loaders[training] = PrefetchLoader(dataset, sampler, batch_size=self.batch_size, threads=self.workers, pin=pin)
        return self._loaders[training]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return *batch* on *device*, and tell a `PrefetchLoader` of a copy to a GPU, which may still be under way."""
        if device.type != "cuda" or self.in_processes:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        moved = Batch(*(None if part is None else part.to(device, non_blocking=True) for part in batch))
        self._loaders[self.trainer.training].copied(batch)
        return moved

    def state_dict(self) -> dict:
        """Return the epoch and how many of its batches are done, for a training state."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        per_epoch = self.trainer.num_training_batches
        return {"start": divmod(self.trainer.current_epoch * per_epoch + done, per_epoch)}

    def load_state_dict(self, state: dict) -> None:
        """Make the next training loader start where *state* says."""
        self.start = tuple(state["start"])
