"""Commands on all checkpoints of a folder: one line for each file, and the others go on if one fails."""

import re
from collections.abc import Callable
from pathlib import Path

from cxt.errors import BadRequest, Failed


def list_checkpoint_files(directory, *, recursive: bool) -> list[Path]:
    """The `.ckpt` files in a folder, and in those below it if *recursive*, by name; links to folders are not followed.

    Raises
    ------
    BadRequest
        If there is no such folder, or no such file in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadRequest(f"--dir {directory}: there is no such folder")
    found = directory.rglob("*.ckpt") if recursive else directory.glob("*.ckpt")
    files = sorted(path for path in found if path.is_file())
    if not files:
        deeper = "" if recursive else ", or add -r for the folders in it"
        raise BadRequest(f"--dir {directory}: there is no .ckpt file in it; name another folder{deeper}")
    return files


def apply_to_files(files: list[Path], function: Callable[[Path], str], *, report: Callable[[str], None]) -> None:
    """Report the line that *function* returns for each file, or why it failed.

    Raises
    ------
    Failed
        At the end, if one failed.
    """
    failed = 0
    for path in files:
        try:
            line = function(path)
        except (BadRequest, Failed) as error:
            failed += 1
            reason = str(error)
            line = f"{'' if str(path) in reason else f'{path}: '}{reason}"
            line = f"FAILED  {line}"
        report(line)
    if failed:
        raise Failed(f"{failed} of {len(files)} files failed")


def import_folder(directory, out, *, recursive: bool, report: Callable[[str], None]) -> None:
    """Import the files of the original package in a folder, each as `<name>.ckpt` at the same place below *out*.

    The name is that of the file up to `_epoch=`. Checkpoints of cxt are passed over.

    Parameters
    ----------
    directory, out : path-like
        Folder to read, and folder to write to.
    recursive : bool
        Whether to read the folders below it, too.
    report : callable
        Called with a line about each file.

    Raises
    ------
    BadRequest
        Before anything is written: if there is nothing to import, the two folders are the same, or two files have one name.
    Failed
        At the end, if a file could not be imported; nothing is written for it.
    """
    from cxt.checkpoints.file import import_published, is_published_file, read_checkpoint

    directory, out = Path(directory), Path(out)
    files = list_checkpoint_files(directory, recursive=recursive)
    if out.exists() and not out.is_dir():
        raise BadRequest(f"--out {out} is a file; with --dir, it is the folder for the checkpoints")
    if out.resolve() == directory.resolve():
        raise BadRequest(f"--out {out} is the folder to import; choose another one for the checkpoints")
    targets: dict[Path, Path] = {}
    for path in files:
        stem = re.sub(r"_epoch=.*", "", path.stem)
        target = (out / path.relative_to(directory)).with_name(f"{stem}.ckpt")
        if (other := targets.setdefault(target, path)) != path:
            raise BadRequest(
                f"{other} and {path} would both be imported as {target}; import them one by one, with names of their own"
            )
    of = {path: target for target, path in targets.items()}

    def import_one(path: Path) -> str:
        if not is_published_file(path):
            read_checkpoint(path)  # refuses what is neither
            return f"{path}: passed over, it is a checkpoint of cxt already"
        import_published(path, of[path])
        return f"{path}: imported as {of[path]}"

    apply_to_files(files, import_one, report=report)
