"""The study of a sweep: all its trials in an SQLite database, which several processes and machines may use at a time.

Each process holds the lock `study.lock` while it reads and changes the study, and `trials/<number>.claim` while it trains a
trial. Both end with the process. A trial that is running in the database but claimed by no process was interrupted, and is
continued.
"""

import contextlib
import dataclasses
import fcntl
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxt.errors import BadRequest, Failed, first_line
from cxt.io import Lock, acquire_lock, canonical_json, check_writable, is_locked
from cxt.random_seeds import hash_key
from cxt.sweeps.settings import describe_differences
from cxt.sweeps.space import Sweep

if TYPE_CHECKING:  # an optional package
    import optuna

IDENTITY = "identity"
FINISHED = ("COMPLETE", "PRUNED", "FAIL")


def _quiet_optuna():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this process trains.

    Parameters
    ----------
    number : number of the trial in its study, from 0
    values : values of the parameters
    continues : whether an interrupted process had begun it
    """

    number: int
    values: Mapping[str, Any]
    continues: bool
    lock: Lock
    trial: "optuna.Trial"


def draw(sweep: Sweep, seed: int, earlier: Sequence["optuna.trial.FrozenTrial"]) -> dict[str, Any] | None:
    """Draw the values of the next trial.

    They are a function of the sweep, the seed and the earlier trials, so that an interrupted sweep goes on as if nothing had
    happened.

    Parameters
    ----------
    sweep : Sweep
    seed : int
    earlier : all trials of the study, by number

    Returns
    -------
    dict or None
        Optuna's values by the names of the parameters; None if a grid is exhausted.
    """
    number = len(earlier)
    key = hash_key("sweep", seed)
    if sweep.method == "grid":
        size = sweep.grid_size
        if number >= size:
            return None
        place = int(np.random.default_rng(key).permutation(size)[number])
        return next(point for index, point in enumerate(sweep.grid()) if index == place)
    optuna = _quiet_optuna()
    own = hash_key("sweep", seed, number) % 2**32
    samplers = optuna.samplers
    sampler = samplers.RandomSampler(seed=own) if sweep.method == "random" else samplers.TPESampler(seed=own)
    memory = optuna.create_study(direction=sweep.goal, sampler=sampler)  # so that the trial is added in one step, with values
    memory.add_trials(earlier)
    return memory.ask({parameter.name: parameter.distribution() for parameter in sweep.parameters}).params


class Study:
    """The study in `study.db` of a directory.

    Parameters
    ----------
    directory : directory of the sweep, which is created if need be
    sweep : Sweep
    seed : seed of the values
    identity : what every process of the study must have in common, from `cxt.sweeps.settings.identify`

    Raises
    ------
    BadRequest
        If the directory holds the study of another sweep, or none can be kept in it.
    """

    def __init__(self, directory: Path, sweep: Sweep, *, seed: int, identity: Mapping[str, Any]):
        optuna = _quiet_optuna()
        from sqlalchemy.exc import SQLAlchemyError

        self.directory, self.sweep, self.seed = directory, sweep, seed
        self.trials_directory = directory / "trials"
        check_writable(self.trials_directory / "0.claim")
        early = sweep.early
        pruner: Any = optuna.pruners.NopPruner()
        if early is not None:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=early.min_trials, n_warmup_steps=early.min_iter)
        identity = dict(identity) | {"--sampler-seed": seed}
        with self.locked():
            try:
                url = f"sqlite:///{(directory / 'study.db').absolute()}"
                storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
                self._study = optuna.create_study(
                    storage=storage, study_name="sweep", direction=sweep.goal, pruner=pruner, load_if_exists=True
                )
                before = self._study.user_attrs.get(IDENTITY)
                if before is None:
                    self._study.set_user_attr(IDENTITY, identity)
            except (SQLAlchemyError, RuntimeError) as error:
                raise BadRequest(
                    f"{directory / 'study.db'} is no study of a sweep, or damaged: {first_line(error)}; choose another --out"
                ) from None
        # As they are read back: lists for tuples.
        if before is not None and canonical_json(before) != canonical_json(identity):
            raise BadRequest(
                f"{directory} holds another sweep, of {describe_differences(before, identity)}; choose another --out, or "
                "repeat the command that it was started with"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the study for this process in a `with` block, after other processes have released it."""
        with open(self.directory / "study.lock", "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise BadRequest(
                    f"{self.directory}: its file system cannot lock files ({error.strerror}); use one that supports locks"
                ) from None
            yield

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        """All trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def run_directory(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.trials_directory / str(number)

    def _claim_path(self, number: int) -> Path:
        return self.trials_directory / f"{number}.claim"

    def running_elsewhere(self) -> int:
        """Number of unfinished trials that a process is training."""
        trials = [trial for trial in self.trials() if not trial.state.is_finished()]
        return sum(is_locked(self._claim_path(trial.number)) for trial in trials)

    def take(self, count: int) -> Claim | None:
        """Claim an interrupted trial, or begin the next one.

        Parameters
        ----------
        count : int
            Number of trials that the study is to have.

        Returns
        -------
        Claim or None
            None if all are finished, or other processes are training those that are not.
        """
        optuna = _quiet_optuna()
        with self.locked():
            trials = self.trials()
            unfinished = [trial for trial in trials if not trial.state.is_finished()]
            if len(trials) - len(unfinished) >= count:
                return None
            for trial in unfinished:
                if not is_locked(self._claim_path(trial.number)):
                    return self._claim(trial, continues=True)
            if len(trials) >= count:
                return None
            raw = draw(self.sweep, self.seed, trials)
            if raw is None:
                return None
            distributions = {parameter.name: parameter.distribution() for parameter in self.sweep.parameters}
            new = optuna.create_trial(state=optuna.trial.TrialState.RUNNING, params=raw, distributions=distributions)
            # Under its own lock no other process begins a trial meanwhile, so that this one is the last.
            self._study.add_trial(new)
            return self._claim(self.trials()[-1], continues=False)

    def _claim(self, trial: "optuna.trial.FrozenTrial", *, continues: bool) -> Claim:
        lock = acquire_lock(self._claim_path(trial.number), f"trial {trial.number}")
        optuna = _quiet_optuna()
        live = optuna.trial.Trial(self._study, trial._trial_id)
        return Claim(trial.number, self.sweep.decode(trial.params), continues, lock, live)

    def report(self, claim: Claim, validation: int, value: float) -> bool:
        """Record a trial's metric at a validation, counted from 1, unless it is recorded already.

        Returns
        -------
        bool
            Whether it is the last one that is recorded: a trial that is continued reports earlier ones again.
        """
        with self.locked():
            before = self.trials()[claim.number].intermediate_values
            if validation not in before:
                claim.trial.report(value, validation)
        return validation >= max(before, default=0)

    def should_prune(self, claim: Claim) -> bool:
        """Whether the trial is worse than the median of the others at its last reported validation."""
        if self.sweep.early is None:
            return False
        with self.locked():
            return claim.trial.should_prune()

    def finish(self, claim: Claim, state: str, *, value: float | None, about: Mapping[str, Any]) -> None:
        """Record the end of a trial and release it.

        Parameters
        ----------
        claim : Claim
        state : str
            COMPLETE, PRUNED or FAIL.
        value : float or None
            The metric of a complete trial.
        about : mapping
            `steps`, `seconds` and `reason` of the end.
        """
        optuna = _quiet_optuna()
        with self.locked():
            if state not in FINISHED:
                raise Failed(f"trial {claim.number} cannot end as {state}")
            for key, content in about.items():
                claim.trial.set_user_attr(key, content)
            self._study.tell(claim.trial, value, state=optuna.trial.TrialState[state])
        claim.lock.close(remove=True)

    def importances(self) -> dict[str, float]:
        """Share of each parameter in the variance of the metric over complete trials (PED-ANOVA)."""
        optuna = _quiet_optuna()
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(self._study, evaluator=evaluator)
