"""Lightning callbacks that users name in the setting `callbacks`."""

import importlib
import io
from collections.abc import Sequence

import torch
from pytorch_lightning.callbacks import Callback

from cxt.config.learning import UserCallback
from cxt.errors import BadRequest, Failed, first_line, suggest_nearest


def find_callback_class(setting: UserCallback) -> type[Callback]:
    """Import the class of a callback.

    Raises
    ------
    BadRequest
        If its module or the class cannot be found, or it is no callback.
    """
    path = setting.class_path
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise BadRequest(f"callbacks: class_path must be a module and a class, such as my_module.MyCallback, got '{path}'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's does
        raise BadRequest(
            f"callbacks: {path}: the module cannot be imported ({first_line(error)}); put its directory on PYTHONPATH, or "
            "install its package"
        ) from None
    kind = getattr(module, name, None)
    if kind is None:
        raise BadRequest(f"callbacks: module {module_name} has no '{name}'{suggest_nearest(name, vars(module))}")
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise BadRequest(f"callbacks: {path} is not a subclass of pytorch_lightning.Callback")
    return kind


def build_callbacks(settings: Sequence[UserCallback]) -> list[Callback]:
    """Make an object of each callback; BadRequest if a class cannot be found, or cannot be used."""
    made = []
    for setting in settings:
        kind = find_callback_class(setting)
        try:
            callback = kind(**setting.init_args)
        except Exception as error:
            raise BadRequest(
                f"callbacks: {setting.class_path} does not take init_args {setting.init_args}: {first_line(error)}"
            ) from None
        if (problem := describe_state_problem(callback)) is not None:
            raise BadRequest(f"callbacks: {problem}")
        made.append(callback)
    return made


def stop_if_not_storable(callbacks: Sequence[Callback]) -> None:
    """Failed if the state that a callback has now could be saved, but not read again."""
    for callback in callbacks:
        if (problem := describe_state_problem(callback)) is not None:
            raise Failed(f"callbacks: {problem}; no training state with it was saved")


def describe_state_problem(callback: Callback) -> str | None:
    """Why the state of a callback cannot be read again from a training state, with what to do; None if it can."""
    buffer = io.BytesIO()
    try:
        torch.save(callback.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # whatever a state_dict of the user's does
        kind = type(callback)
        return (
            f"the state_dict of {kind.__module__}.{kind.__qualname__} must consist of numbers, text, lists, mappings and "
            f"tensors, so that a run can be continued ({first_line(error)}); convert other values, such as numpy's with float()"
        )
    return None
