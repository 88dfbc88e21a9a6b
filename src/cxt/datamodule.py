"""The order of training items, and the loaders that Lightning asks for.

The order is a pure function of (seed, epoch); each rank takes its share of it. Where to go on inside an epoch comes from
Lightning's own counters, so that a resumed run sees exactly the batches that are left.
"""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cxt.dataset import Batch, PairDataset


class EpochBatches(Sampler):
    """Batches (lists of items) of one rank in one epoch; items that do not fill a batch are dropped."""

    def __init__(self, *, items: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.items, self.batch_size, self.seed, self.rank, self.world = items, batch_size, seed, rank, world
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls this
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.items, generator=generator)
        mine = order[: self.items // self.world * self.world][self.rank :: self.world]
        skip, self.skip = self.skip, 0
        for batch in range(skip, len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        return self.items // self.world // self.batch_size


class Batches(Dataset):
    """Indexed by lists of items, as `EpochBatches` gives them."""

    def __init__(self, dataset: PairDataset):
        self.dataset = dataset

    def __getitem__(self, items) -> Batch:
        return self.dataset.batch(items)


class ResumableLoader(DataLoader):
    """Its state is in `DataModule`; having these methods tells Lightning so."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class DataModule(pl.LightningDataModule):
    """Train and validation loaders of one dataset.

    *validation_items* test items, spread evenly over the split, are used for validation; 0 = all.
    """

    def __init__(self, train: PairDataset, test: PairDataset, *, batch_size, seed, workers, validation_items):
        super().__init__()
        self.train_set, self.test_set = train, test
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.validation_items = validation_items
        self.start = (0, 0)  # epoch, batches of it that are done

    def train_dataloader(self) -> DataLoader:
        sampler = EpochBatches(
            items=len(self.train_set),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        # Workers prefetch before Lightning calls set_epoch, so the epoch is set here too.
        sampler.epoch, sampler.skip = self.start
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader:
        count = len(self.test_set)
        chosen = min(self.validation_items or count, count)
        items = torch.linspace(0, count - 1, chosen, dtype=torch.float64).long() if chosen else torch.empty(0).long()
        # As many for each rank: they wait for each other when the losses are averaged, with equal weights.
        rank, world = self.trainer.global_rank, self.trainer.world_size
        mine = items[: chosen // world * world][rank::world] if chosen >= world else items
        return self._loader(self.test_set, [batch.tolist() for batch in mine.split(self.batch_size) if len(batch)])

    def _loader(self, dataset: PairDataset, sampler) -> DataLoader:
        # Its own generator, so that drawing worker seeds does not touch the global one.
        return ResumableLoader(
            Batches(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(1),
        )

    def state_dict(self) -> dict:
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        per_epoch = self.trainer.num_training_batches
        return {"start": divmod(self.trainer.current_epoch * per_epoch + done, per_epoch)}

    def load_state_dict(self, state: dict) -> None:
        self.start = tuple(state["start"])
