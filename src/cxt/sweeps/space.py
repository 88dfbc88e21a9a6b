"""The sweep file: what is searched, by which method, and for the best value of which metric.

The format is that of Weights & Biases: `method`, `metric`, `parameters` and `early_terminate`.
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cxt.config.bounds import MAX_COUNT, NUMBER
from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest, suggest_nearest

if TYPE_CHECKING:  # an optional package
    from optuna.distributions import BaseDistribution

METHODS = ("bayes", "random", "grid")
Goal = Literal["minimize", "maximize"]
GOALS = get_args(Goal)

NOT_USED = ("program", "project", "entity", "name", "description")
"""Keys of Weights & Biases that mean nothing here."""

INSTEAD = {
    "q_log_uniform": "log_uniform_values", "q_log_uniform_values": "log_uniform_values",
    "inv_log_uniform": "log_uniform_values", "inv_log_uniform_values": "log_uniform_values",
    "q_normal": "normal", "q_log_normal": "log_normal", "beta": "uniform", "q_beta": "q_uniform",
    "categorical_w_probabilities": "categorical",
}  # fmt: skip
"""Distributions of Weights & Biases that cannot be expressed here, and the nearest one that can."""

KEYS = {
    "constant": ("value",), "categorical": ("values",),
    "uniform": ("min", "max"), "int_uniform": ("min", "max"), "q_uniform": ("min", "max", "q"),
    "log_uniform": ("min", "max"), "log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"), "log_normal": ("mu", "sigma"),
}  # fmt: skip
"""Distributions, and the keys that each of them has beside `distribution`."""

PARAMETER_KEYS = ("parameters", "distribution", *dict.fromkeys(key for keys in KEYS.values() for key in keys))
"""Keys that the entry of a parameter may have."""

TAIL = 1e-6
"""Normal distributions are cut at these probabilities on both sides."""

MAX_GRID = 100_000
"""Largest number of values that one parameter may have in a grid."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A setting that is searched.

    Parameters
    ----------
    name : name of the setting; of one inside another, with dots: `optimizer.momentum`
    values : the values to choose from; None for a range
    low, high : the ends of a range, both included. Of a normal distribution they are probabilities.
    step : distance of the values in a range; None if it is continuous
    is_integer : whether the values of a range are integers
    is_log : whether the logarithm of a value is uniform
    normal : (mean, standard deviation, whether of the logarithm) of a normal distribution; None for others
    """

    name: str
    values: tuple | None = None
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    is_integer: bool = False
    is_log: bool = False
    normal: tuple[float, float, bool] | None = None

    def distribution(self) -> "BaseDistribution":
        """The distribution for Optuna, over values that `decode` translates."""
        from optuna import distributions

        if self.values is not None:
            return distributions.CategoricalDistribution([encode(value) for value in self.values])
        if self.is_integer:
            return distributions.IntDistribution(int(self.low), int(self.high), step=int(self.step or 1))
        return distributions.FloatDistribution(self.low, self.high, log=self.is_log, step=self.step)

    def decode(self, raw: Any) -> Any:
        """The value of the setting for a value of `distribution`."""
        if self.values is not None:
            return next(value for value in self.values if _same(encode(value), raw))
        if self.normal is None:
            return raw
        mean, deviation, of_logarithm = self.normal
        value = statistics.NormalDist(mean, deviation).inv_cdf(raw)
        return math.exp(value) if of_logarithm else value

    def list_values(self) -> list:
        """All values in a grid; BadRequest for a continuous range."""
        if self.values is not None:
            return list(self.values)
        if self.step is None:
            raise BadRequest(
                f"parameters.{self.name}: a grid needs `values`, or a `q_uniform` or `int_uniform` distribution, because a "
                "continuous range has no end of values; list some, or choose method: random"
            )
        number = round((self.high - self.low) / self.step) + 1
        if number > MAX_GRID:
            raise BadRequest(f"parameters.{self.name} has {number} values in a grid, more than {MAX_GRID}; list some")
        points = [self.low + index * self.step for index in range(number)]
        return [int(point) for point in points] if self.is_integer else points


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def encode(value: Any) -> Any:
    """A value of `values` as Optuna can store it: lists and mappings as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


@dataclasses.dataclass(frozen=True)
class EarlyTermination:
    """Median pruning: a trial ends when its best value so far is worse than the median of earlier trials.

    Parameters
    ----------
    min_iter : first validation, counted from 1, after which a trial may end
    min_trials : trials that must be complete before any ends early
    """

    min_iter: int = 1
    min_trials: int = 5


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file, checked.

    Parameters
    ----------
    method : bayes, random or grid
    metric, goal : a column of training_log.csv, and whether to minimize or maximize it
    parameters : what is searched
    constants : settings that the file fixes, by name
    early : when trials end early; None = never
    run_cap : number of trials, if the file says it
    about : the file's content that decides what is searched, by key
    """

    method: str
    metric: str
    goal: Goal
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, Any]
    early: EarlyTermination | None
    run_cap: int | None
    about: Mapping[str, Any]

    def decode(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the settings for those of Optuna's trial."""
        return {parameter.name: parameter.decode(raw[parameter.name]) for parameter in self.parameters}

    def grid(self) -> Iterator[dict[str, Any]]:
        """All combinations, by the names of the parameters, as Optuna stores them; the last parameter changes fastest."""
        lists = [parameter.list_values() for parameter in self.parameters]
        for values in itertools.product(*lists):
            yield {parameter.name: encode(value) for parameter, value in zip(self.parameters, values, strict=True)}

    @property
    def grid_size(self) -> int:
        """Number of combinations of the grid."""
        return math.prod(len(parameter.list_values()) for parameter in self.parameters)


def read_sweep(path: str | Path) -> tuple[Sweep, list[str]]:
    """Read a sweep file in the format of Weights & Biases.

    Parameters
    ----------
    path : path-like
        A YAML file with `method`, `metric`, `parameters` and, optionally, `early_terminate` and `run_cap`.

    Returns
    -------
    Sweep
    list of str
        Notes on keys that are not used, for the user.

    Raises
    ------
    BadRequest
        If the file cannot be read, or something in it is unknown, missing or contradictory.
    """
    content = read_yaml(path)
    try:
        return _build_sweep(content)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None


def _build_sweep(content: dict) -> tuple[Sweep, list[str]]:
    known = ("method", "metric", "parameters", "early_terminate", "run_cap")
    notes = []
    for key in content:
        if key == "command":
            raise BadRequest("`command` cannot be used, because the trials are started by cxt; give fixed settings as flags")
        if key in NOT_USED:
            notes.append(f"{key} is not used")
        elif key not in known:
            raise BadRequest(f"unknown key '{key}'{suggest_nearest(key, known)}")
    method = content.get("method")
    if method not in METHODS:
        found = "is missing" if method is None else f"'{method}' is unknown"
        raise BadRequest(f"`method` {found}{suggest_nearest(str(method), METHODS)}")
    metric, goal = _read_metric(content.get("metric"))
    given = content.get("parameters")
    if not isinstance(given, dict) or not given:
        raise BadRequest("`parameters` must be a mapping from names of settings to their values or distributions")
    flat = dict(_flatten(given))
    constants, parameters = {}, []
    for name, about in flat.items():
        try:
            parameter = _read_parameter(name, about)
        except BadRequest as error:
            raise BadRequest(f"parameters.{name}: {error}") from None
        if parameter is None:
            constants[name] = about["value"]
        else:
            parameters.append(parameter)
    if not parameters:
        raise BadRequest("`parameters` has only constants, so that all trials would be equal; give one of them `values`")
    if method == "grid":
        for parameter in parameters:
            parameter.list_values()
    run_cap = content.get("run_cap")
    if run_cap is not None and (type(run_cap) is not int or not 1 <= run_cap <= MAX_COUNT):
        raise BadRequest(f"run_cap must be a positive integer, got {run_cap!r}")
    early = _read_early(content.get("early_terminate"), method, notes)
    about = {"method": method, "metric": f"{goal} {metric}"} | {f"parameters.{name}": value for name, value in flat.items()}
    about |= {} if early is None else {"early_terminate": dataclasses.asdict(early)}
    return Sweep(method, metric, goal, tuple(parameters), constants, early, run_cap, about), notes


def _read_metric(metric: Any) -> tuple[str, Goal]:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise BadRequest("`metric` must be a mapping with the name of a column of training_log.csv, such as {name: val_loss}")
    for key in metric:
        if key not in ("name", "goal"):
            raise BadRequest(f"metric.{key}: unknown key{suggest_nearest(key, ('name', 'goal'))}")
    goal = metric.get("goal", "minimize")
    if goal not in GOALS:
        raise BadRequest(f"metric.goal: '{goal}' is unknown{suggest_nearest(str(goal), GOALS)}")
    return metric["name"], goal


def _read_early(early: Any, method: str, notes: list[str]) -> EarlyTermination | None:
    if early is None:
        return None
    if not isinstance(early, dict) or early.get("type") not in ("median", "hyperband"):
        raise BadRequest("`early_terminate` must be a mapping with `type: median` (or hyperband, which becomes median)")
    for key in early:
        if key not in ("type", "min_iter", "min_trials"):
            raise BadRequest(
                f"early_terminate.{key} has no meaning for median pruning; write {{type: median, min_iter: N}}, where N is the "
                "first validation after which a trial may end"
            )
    if early["type"] == "hyperband":
        notes.append("early_terminate: hyperband becomes median pruning from validation min_iter on")
    for key in ("min_iter", "min_trials"):
        if key in early and (type(early[key]) is not int or not 1 <= early[key] <= MAX_COUNT):
            raise BadRequest(f"early_terminate.{key} must be a positive integer, got {early[key]!r}")
    return EarlyTermination(**{key: value for key, value in early.items() if key != "type"})


def _flatten(parameters: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    """The parameters with nested ones by their dotted names."""
    for name, about in parameters.items():
        if not isinstance(name, str):
            raise BadRequest(f"parameters: the name {name!r} must be text")
        path = prefix + name
        if not isinstance(about, dict):
            raise BadRequest(f"parameters.{path} must be a mapping with `value`, `values`, or `min` and `max`, got {about!r}")
        if "parameters" in about:
            if len(about) > 1 or not isinstance(about["parameters"], dict):
                raise BadRequest(f"parameters.{path}: `parameters` must be a mapping, and stand alone")
            yield from _flatten(about["parameters"], f"{path}.")
        else:
            yield path, _parse_numbers(about)


def _parse_numbers(value: Any) -> Any:
    """Convert texts that spell numbers, at any depth: YAML reads `1e-4` as text."""
    if isinstance(value, dict):
        return {key: _parse_numbers(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_parse_numbers(child) for child in value]
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    return value


def _read_parameter(name: str, about: dict) -> Parameter | None:
    """A parameter from its entry; None for a constant."""
    if "probabilities" in about:
        raise BadRequest("`probabilities` cannot be expressed here; leave them out, so that all values are equally probable")
    kind = about.get("distribution") or _guess_distribution(about)
    if kind in INSTEAD:
        raise BadRequest(
            f"the distribution {kind} cannot be expressed here; use {INSTEAD[kind]}, which is the nearest of {', '.join(KEYS)}"
        )
    if kind not in KEYS:
        raise BadRequest(f"unknown distribution '{kind}'{suggest_nearest(str(kind), KEYS)}")
    for key in about:
        if key != "distribution" and key not in KEYS[kind]:
            raise BadRequest(f"`{key}` is no key of the distribution {kind}{suggest_nearest(key, KEYS[kind])}")
    optional = {"q": 1, "mu": 0, "sigma": 1}
    if missing := [key for key in KEYS[kind] if key not in about and key not in optional]:
        raise BadRequest(f"the distribution {kind} needs {' and '.join(f'`{key}`' for key in missing)}")
    if kind == "constant":
        return None
    if kind == "categorical":
        return Parameter(name, values=_read_values(about["values"]))
    numbers = {key: about.get(key, optional.get(key)) for key in KEYS[kind]}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRequest(f"`{key}` must be a finite number, got {value!r}")
    if kind in ("normal", "log_normal"):
        if numbers["sigma"] <= 0:
            raise BadRequest(f"`sigma` must be positive, got {numbers['sigma']}")
        normal = (float(numbers["mu"]), float(numbers["sigma"]), kind == "log_normal")
        return Parameter(name, low=TAIL, high=1 - TAIL, normal=normal)
    return _read_range(name, kind, numbers)


def _guess_distribution(about: dict) -> str:
    """The distribution of an entry that names none, as Weights & Biases does."""
    for key in about:
        if key not in PARAMETER_KEYS:
            raise BadRequest(f"unknown key '{key}'{suggest_nearest(str(key), PARAMETER_KEYS)}")
    if "value" in about or "values" in about:
        return "constant" if "value" in about else "categorical"
    if "mu" in about or "sigma" in about:
        return "normal"
    if "min" not in about or "max" not in about:
        raise BadRequest("`value`, `values`, or both `min` and `max` are needed")
    if "q" in about:
        return "q_uniform"
    return "int_uniform" if type(about["min"]) is int and type(about["max"]) is int else "uniform"


def _read_values(values: Any) -> tuple:
    if not isinstance(values, list) or not values:
        raise BadRequest(f"`values` must be a list with at least one value, got {values!r}")
    encoded = [encode(value) for value in values]
    for place, value in enumerate(encoded):
        if value is not None and not isinstance(value, bool | int | float | str):
            raise BadRequest(f"{value!r} in `values` is no number, text, list or mapping; put it in quotes")
        if value in encoded[:place]:
            raise BadRequest(f"{values[place]!r} is twice in `values`; remove one of them")
    return tuple(values)


def _read_range(name: str, kind: str, numbers: dict) -> Parameter:
    low, high = numbers["min"], numbers["max"]
    if low >= high:
        raise BadRequest(f"`min` must be below `max`, got min {low} and max {high}")
    if kind == "int_uniform":
        if not all(float(value).is_integer() for value in (low, high)):
            raise BadRequest(f"`min` and `max` of int_uniform must be integers, got {low} and {high}; use uniform")
        return Parameter(name, low=int(low), high=int(high), step=1, is_integer=True)
    if kind == "log_uniform":  # the ends are exponents
        return Parameter(name, low=math.exp(low), high=math.exp(high), is_log=True)
    if kind == "log_uniform_values":
        if low <= 0:
            raise BadRequest(f"`min` of log_uniform_values must be positive, got {low}")
        return Parameter(name, low=float(low), high=float(high), is_log=True)
    if kind == "q_uniform":
        step = numbers["q"]
        if not 0 < step <= high - low:
            raise BadRequest(f"`q` must be positive and at most max - min, got {step}")
        steps = math.floor((high - low) / step + 1e-9)
        is_integer = all(type(value) is int for value in (low, high, step))
        top = low + steps * step
        return Parameter(
            name, low=low if is_integer else float(low), high=top if is_integer else float(top),
            step=step if is_integer else float(step), is_integer=is_integer,
        )  # fmt: skip
    return Parameter(name, low=float(low), high=float(high))
