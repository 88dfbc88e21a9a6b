"""Lightning callbacks that users name in the setting `callbacks`."""

import importlib
from collections.abc import Sequence

from pytorch_lightning.callbacks import Callback

from cxt.config.learning import UserCallback
from cxt.errors import BadRequest, suggest_nearest


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
    except ImportError as error:
        raise BadRequest(
            f"callbacks: {path}: the module cannot be imported ({error}); put its directory on PYTHONPATH, or install its "
            "package"
        ) from None
    kind = getattr(module, name, None)
    if kind is None:
        raise BadRequest(f"callbacks: module {module_name} has no '{name}'{suggest_nearest(name, vars(module))}")
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise BadRequest(f"callbacks: {path} is not a subclass of pytorch_lightning.Callback")
    return kind


def build_callbacks(settings: Sequence[UserCallback]) -> list[Callback]:
    """Make an object of each callback; BadRequest if a class cannot be found or does not take its arguments."""
    made = []
    for setting in settings:
        try:
            made.append(find_callback_class(setting)(**setting.init_args))
        except (TypeError, ValueError) as error:
            raise BadRequest(f"callbacks: {setting.class_path} does not take init_args {setting.init_args}: {error}") from None
    return made
