"""The order of training examples, and the data loaders for Lightning.

The order is a pure function of (seed, epoch), and each rank takes its share of it. Within an epoch, a resumed run continues
from Lightning's own counters, so that it sees exactly the remaining batches.
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

from cxt.config.regions import RegionPlan
from cxt.data.examples import Batch, Example, ExampleDataset
from cxt.data.noise import BatchNoise, NoiseSchedule
from cxt.data.pair_dataset import PairDataset
from cxt.data.regions import Cut, RegionSchedule, cut_for_validation
from cxt.errors import BadRequest, Failed, first_line
from cxt.random_seeds import torch_seed
from cxt.signals import block_signals, end_with_parent, ignore


class EpochBatchSampler(Sampler):
    """Batches (lists of examples) of one rank in one epoch; examples that do not fill a batch are dropped.

    With *noise*, iterating gives each batch with its noise, for a `NoisyDataset`. With *regions*, it gives (examples, noise or
    None, cut), for a `RegionDataset`; a batch then has *batch_size* rows, and several batches in a row may read the same
    examples.
    """

    def __init__(
        self,
        *,
        examples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        noise: NoiseSchedule | None = None,
        regions: RegionSchedule | None = None,
    ):
        self.examples, self.seed, self.rank, self.world = examples, seed, rank, world
        self.noise, self.regions = noise, regions
        self.batch_size = batch_size if regions is None else batch_size * regions.plan.per_row  # examples
        self.chunks = 1 if regions is None else regions.plan.chunks
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
        group = batch // self.chunks
        return [int(example) for example in examples[group * self.batch_size : (group + 1) * self.batch_size]]

    def __iter__(self):
        epoch, rank_examples = self.epoch, self._select_rank_examples(self.epoch)
        skip, self.skip = self.skip, 0
        for batch in range(skip, len(self)):
            examples = self._part(rank_examples, batch)
            noise = None if self.noise is None else self.noise.at(epoch, batch)
            if self.regions is not None:
                yield examples, noise, self.regions.cut(epoch, batch, examples)
            else:
                yield examples if noise is None else (examples, noise)

    def batch(self, epoch: int, number: int) -> list[int]:
        """The examples of one batch, independent of the state of iteration."""
        return self._part(self._select_rank_examples(epoch), number)

    def __len__(self) -> int:
        return self.examples // self.world // self.batch_size * self.chunks


class SequentialBatchSampler(EpochBatchSampler):
    """Batches of one rank in the order of their examples, for examples that are used only once."""

    def _order(self, epoch: int) -> range:
        return range(self.examples)


class NoisyDataset:
    """The examples of *dataset* with noise: its batches are asked for by (examples, noise)."""

    def __init__(self, dataset: ExampleDataset):
        self.dataset = dataset

    def empty_batch(self, examples: int, *, pin: bool = False) -> Batch:
        """A batch that `batch` can fill repeatedly, see `ExampleDataset.empty_batch`."""
        return self.dataset.empty_batch(examples, pin=pin, noisy=True)

    def batch(self, wanted: tuple[list[int], BatchNoise], *, out: Batch | None = None) -> Batch:
        """Compute several examples at once; into the first places of *out* if given."""
        examples, noise = wanted
        return self.dataset.batch(examples, noise=noise, out=out)


class RegionDataset:
    """Regions of the examples of *dataset*, as long as in *plan*: batches are asked for by (examples, noise or None, cut)."""

    def __init__(self, dataset: PairDataset, plan: RegionPlan, *, noisy: bool):
        self.dataset, self.plan, self.noisy = dataset, plan, noisy

    def empty_batch(self, examples: int, *, pin: bool = False) -> Batch:
        """A batch of *examples* rows that `batch` can fill repeatedly, see `ExampleDataset.empty_batch`."""
        packed = self.plan.regions.pack
        return self.dataset.empty_batch(examples, pin=pin, noisy=self.noisy, windows=self.plan.row_windows, packed=packed)

    def batch(self, wanted: tuple[list[int], BatchNoise | None, Cut], *, out: Batch | None = None) -> Batch:
        """Compute a batch; into the first places of *out* if given."""
        examples, noise, cut = wanted
        return self.dataset.batch(examples, noise=noise, cut=cut, out=out)


class ValidationRegions:
    """The examples of *dataset*, of each of which one region is read: see `cxt.data.regions.cut_for_validation`."""

    def __init__(self, dataset: PairDataset, plan: RegionPlan):
        self.dataset, self.plan = dataset, plan

    def __len__(self) -> int:
        return len(self.dataset)

    def empty_batch(self, examples: int, *, pin: bool = False) -> Batch:
        """A batch that `batch` can fill repeatedly, see `ExampleDataset.empty_batch`."""
        return self.dataset.empty_batch(examples, pin=pin, windows=self.plan.windows)

    def batch(self, examples: list[int], *, out: Batch | None = None) -> Batch:
        """Compute several examples at once; into the first places of *out* if given."""
        return self.dataset.batch(examples, cut=cut_for_validation(examples, self.plan), out=out)

    def describe(self, i: int) -> Example:
        """Scenario, simulation index and pair of example *i*."""
        return self.dataset.describe(i)


class _TimedLoader:
    """A loader that measures the time spent waiting for its batches, in seconds (*waited*).

    Its state is in `DataModule`; the methods below only tell Lightning that it can be resumed.
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
    """The batches of *dataset* in the order of *sampler*, prepared in advance by *threads* threads.

    Without threads, they are prepared when they are needed. Batches are stored in a few buffers in turn: the last two that were
    returned stay valid (Lightning requests one before it has finished with the other), older ones are overwritten. *pin* pins
    the buffers for copies to a GPU; after a call of `copied`, a buffer is not overwritten before its copy has finished.
    """

    def __init__(self, dataset, sampler, *, batch_size: int, threads: int, pin: bool):
        self.dataset, self.sampler = dataset, sampler
        self.batch_sampler = None  # Lightning requires this attribute
        self.batch_size, self.threads, self.pin = batch_size, threads, pin
        self._buffers: list[Batch] = []
        self._copies: dict[int, torch.cuda.Event] = {}

    def __len__(self) -> int:
        return len(self.sampler)

    def copied(self, batch: Batch) -> None:
        """Record that *batch* is being copied to a GPU; called before the next batch is requested."""
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
        if not self._buffers:  # only once, because allocating memory for every epoch takes time
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
                    # Only now is the buffer of the batch before the last one free.
                    pending.extend(
                        threads.submit(self._make, examples, next(buffers)) for examples in itertools.islice(batches, 1)
                    )
                    yield batch
            finally:
                for batch in pending:
                    batch.cancel()


class _BatchDataset(Dataset):
    """A dataset that is indexed by lists of examples from a sampler."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, examples) -> Batch | BadRequest:
        try:
            return self.dataset.batch(examples)
        except BadRequest as error:
            return error  # an exception would arrive with the traceback of this process


def _prepare_loader_process(number: int) -> None:
    """Leave signals, which may be sent to all processes of a job, to the trainer, and exit when the trainer does."""
    ignore()
    end_with_parent(os.getppid())
    if not multiprocessing.parent_process().is_alive():  # the parent ended before the call
        os._exit(1)


def _kill_loader(kill: Callable[[], None]) -> None:
    """Kill a loader process; torch's handler for terminated children is removed first, because it would raise an error."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kill()


class ProcessLoader(_TimedLoader, DataLoader):
    """The batches of *dataset* in the order of *sampler*, made by processes, for examples that are slow to compute."""

    def __init__(self, dataset, sampler, *, processes: int, pin: bool):
        super().__init__(
            _BatchDataset(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=pin,
            worker_init_fn=_prepare_loader_process,
            generator=torch.Generator().manual_seed(1),  # so that seeding the processes does not advance the global generator
        )

    def _get_iterator(self):
        with block_signals():
            iterator = super()._get_iterator()
        for process in getattr(iterator, "_workers", ()):
            # torch would terminate a busy process with a signal that it ignores
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
                    f"a simulation process died ({first_line(error)}); the machine may have run out of memory: "
                    "the same command with fewer --workers continues from the last training state"
                ) from error
            raise


class DataModule(pl.LightningDataModule):
    """Training and validation loaders of two datasets; *order* is the class of the training sampler.

    *workers* threads prepare batches; with *in_processes*, processes do, for slow examples that hold Python's global lock.
    *validation_items* test examples, evenly spaced in the split, are used for validation; 0 = all. They come in batches of
    *batch_size_eval*; 0 = *batch_size*. *noise* is that of training batches, and *regions* are theirs, if they are not whole
    examples.
    """

    def __init__(
        self, train, test, *, batch_size, seed, workers, validation_items, batch_size_eval=0, noise=None,
        order=EpochBatchSampler, in_processes=False, regions=None,
    ):  # fmt: skip
        super().__init__()
        self.train_set, self.test_set = train, test
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.noise, self.order, self.in_processes, self.regions = noise, order, in_processes, regions
        self.validation_items, self.batch_size_eval = validation_items, batch_size_eval or batch_size
        self.start = (0, 0)  # epoch, and number of its batches that are done
        self._loaders: dict[bool, PrefetchLoader] = {}

    def train_dataloader(self) -> PrefetchLoader | ProcessLoader:
        """Return the loader of this rank's training batches, from where a resumed run continues; called by Lightning."""
        sampler = self.order(
            examples=len(self.train_set),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            noise=self.noise,
            regions=self.regions,
        )
        # The epoch is set here too, because batches may be requested before Lightning calls set_epoch.
        sampler.epoch, sampler.skip = self.start
        dataset = self.train_set if self.noise is None else NoisyDataset(self.train_set)
        if self.regions is not None:
            dataset = RegionDataset(self.train_set, self.regions.plan, noisy=self.noise is not None)
        return self._loader(True, dataset, sampler)

    def val_dataloader(self) -> PrefetchLoader | ProcessLoader:
        """Return the loader of this rank's validation batches, with the same number of examples on all ranks.

        If there are fewer examples than ranks, each rank gets all of them.
        """
        count = len(self.test_set)
        chosen = min(self.validation_items or count, count)
        examples = torch.linspace(0, count - 1, chosen, dtype=torch.float64).long() if chosen else torch.empty(0).long()
        # The same number for each rank, because ranks wait for each other to average the losses, with equal weights.
        rank, world = self.trainer.global_rank, self.trainer.world_size
        rank_examples = examples[: chosen // world * world][rank::world] if chosen >= world else examples
        return self._loader(
            False, self.test_set, [batch.tolist() for batch in rank_examples.split(self.batch_size_eval) if len(batch)]
        )

    def _loader(self, training: bool, dataset, sampler) -> PrefetchLoader | ProcessLoader:
        pin = self.trainer.strategy.root_device.type == "cuda"
        if self.in_processes:
            return ProcessLoader(dataset, sampler, processes=self.workers, pin=pin)
        batch_size = self.batch_size if training else self.batch_size_eval
        self._loaders[training] = PrefetchLoader(dataset, sampler, batch_size=batch_size, threads=self.workers, pin=pin)
        return self._loaders[training]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return *batch* on *device*, and notify a `PrefetchLoader` of a copy to a GPU, which may still be in progress."""
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
        """Make the next training loader start at *state*."""
        self.start = tuple(state["start"])
