"""docs/features.md: every name in code marks that it says is here exists, as a setting, flag, command, function or file."""

import contextlib
import importlib
import inspect
import io
import json
import re
from functools import cache

import pytest
import yaml
from helpers.repository import REPOSITORY

import cxt
from cxt.cli import COMMANDS

PAGE = REPOSITORY / "docs" / "features.md"
OTHER_PROGRAMS = ("snakemake ", "tensorboard ", "python -m cxt.", "import cxt")


@cache
def schema_names() -> tuple[frozenset[str], frozenset[str]]:
    """(keys, words that are choices of a key) of the configuration."""
    keys, words = set(), set()

    def collect(value) -> None:
        if isinstance(value, dict):
            keys.update(value.get("properties", {}))
            words.update(map(str, [*value.get("enum", []), *([value["const"]] if "const" in value else [])]))
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            collect(child)

    collect(json.loads((REPOSITORY / "config" / "config.schema.json").read_text(encoding="utf-8")))
    return frozenset(keys), frozenset(words)


@cache
def source() -> str:
    """All code of the package."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "src" / "cxt").rglob("*.py")))


@cache
def help_text(*words: str) -> str:
    """What `cxt WORDS --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as exited:
        importlib.import_module(COMMANDS[words[0]][0]).main([*words[1:], "--help"])
    assert exited.value.code in (0, None), words
    return out.getvalue()


@cache
def trainer_flags() -> frozenset[str]:
    """The flags of `cxt train`."""
    return frozenset(re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_text("train"), flags=re.M))


def is_quoted(word: str) -> bool:
    """Whether the code has *word* as a text of its own, as it has the words that a setting accepts."""
    return f'"{word}"' in source()


def missing_in_yaml(span: str) -> list[str]:
    """Keys of a snippet of YAML that are no settings, and words that no setting accepts."""
    keys, words = schema_names()
    missing = []

    def check(value) -> None:
        for key, child in value.items() if isinstance(value, dict) else []:
            if key not in keys and not is_quoted(key):
                missing.append(key)
            check(child)
        if isinstance(value, str) and re.fullmatch(r"[a-z_]+", value) and value not in words:
            missing.append(value)

    check(yaml.safe_load(span))
    return missing


def missing_in_python(span: str) -> list[str]:
    """The dotted name of a call if it cannot be imported, and its keywords that the function does not have."""
    name, _, arguments = span.partition("(")
    *module, last = name.split(".")
    try:
        function = getattr(cxt if module == ["cxt"] else importlib.import_module(".".join(module)), last)
    except (AttributeError, ImportError):
        return [name]
    accepted = inspect.signature(function).parameters
    return [word for word in re.findall(r"(\w+)=", arguments) if word not in accepted]


def flags_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def missing_in_command(span: str) -> list[str]:
    """The command, subcommand or flags that `cxt …` does not have."""
    _, command, *rest = span.split()
    if command not in COMMANDS:
        return [command]
    sub = rest[:1] if rest and re.fullmatch(r"[a-z]+", rest[0]) else []
    text = help_text(command, *sub)
    return [flag for flag in flags_of(rest) if flag not in text]


def missing_names(cell: str) -> list[str]:
    """What a cell of the column *here* names that does not exist."""
    spans = re.findall(r"`([^`]+)`", cell)
    commands = [span for span in spans if span.startswith("cxt ")]
    keys, words = schema_names()
    flags = trainer_flags()
    missing = []
    for span in spans:
        if span in commands:
            missing += missing_in_command(span)
        elif span.startswith("--"):
            of_commands = "".join(help_text(*re.findall(r" ([a-z_]+)\b", command)[:2]) for command in commands)
            missing += [flag for flag in flags_of(span.split()) if flag not in flags and flag not in of_commands]
        elif span.startswith(("cxt.", "torch.")):
            missing += missing_in_python(span)
        elif ": " in span:
            missing += missing_in_yaml(span)
        elif not span.startswith(OTHER_PROGRAMS) and "<" not in span:
            name = span.removesuffix(":")
            known = name in keys or name in words or is_quoted(name) or (REPOSITORY / name).exists()
            if not known and ("/" in name or "." in name):  # a file that a run leaves, or a repeat of a model
                known = name in source()
            missing += [] if known else [name]
    return missing


def read_rows() -> list[str]:
    """The cells *here* of all tables before the last section."""
    text = PAGE.read_text(encoding="utf-8").partition("## Not here")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row[1] for row in rows if len(row) == 3 and row[0] != "| capability" and not row[0].startswith("| ---")]


def test_what_the_page_names_exists():
    rows = read_rows()
    assert len(rows) > 100
    wrong = {row: names for row in rows if (names := missing_names(row))}
    assert not wrong, "\n".join(f"{names} in: {row}" for row, names in wrong.items())


@pytest.mark.parametrize(
    ("cell", "missing"),
    [
        ("`grad_acum`", ["grad_acum"]),
        ("`schedule`: `cosin`", ["cosin"]),
        ("`noise: {thining: 0.1}`", ["thining"]),
        ("`objective: maskd`", ["maskd"]),
        ("`--grad-acum`", ["--grad-acum"]),
        ("`cxt runz`", ["runz"]),
        ("`cxt runs table` with `--per-rum`", ["--per-rum"]),
        ("`cxt checkpoint diff A B --rtoll 1`", ["--rtoll"]),
        ("`cxt.load_model(\"broad\", beste=True)`", ["beste"]),
        ("`cxt.load_modell`", ["cxt.load_modell"]),
        ("`traning_log.csv`", ["traning_log.csv"]),
        ("`workflow/profiles/slurmm`", ["workflow/profiles/slurmm"]),
    ],
)  # fmt: skip
def test_names_that_do_not_exist_are_found(cell, missing):
    assert missing_names(cell) == missing
