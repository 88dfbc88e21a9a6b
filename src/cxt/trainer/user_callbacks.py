"""Lightning callbacks that users name in the setting `callbacks`."""

import importlib
import io
from collections.abc import Sequence

import torch
from pytorch_lightning.callbacks import Callback

from cxt.config.learning import UserCallback
from cxt.errors import BadRequest, first_line, suggest_nearest


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
        _check_state(callback, setting.class_path)
        made.append(callback)
    return made


def _check_state(callback: Callback, path: str) -> None:
    """BadRequest if the state of a callback could be saved, but not read again."""
    buffer = io.BytesIO()
    try:
        torch.save(callback.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise BadRequest(
            f"callbacks: the state_dict of {path} must consist of numbers, text, lists, mappings and tensors, so that a run "
            f"can be continued ({first_line(error)})"
        ) from None
