"""Numba's compiler as all loops use it: without Python's lock, and kept on disk where that is possible."""

import functools
import warnings

import numba


def compiled(function):
    """Compile *function* when it is first called; kept beside the package, in the user's cache or in `NUMBA_CACHE_DIR`.

    Where none of these can be written (a read-only container) it is compiled anew in each process, and a warning says so once.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
    _warn()
    return numba.njit(nogil=True)(function)


@functools.cache
def _warn() -> None:
    warnings.warn(
        "compiled code cannot be kept, since neither the folder of the package nor that of the user can be written: each "
        "process compiles again; set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
