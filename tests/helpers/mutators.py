"""Random damage to bytes, text, trees of values, arrays and zip archives, decided by a `random.Random` alone."""

import copy
import io
import json
import random
import zipfile

import numpy as np


def nested(depth: int) -> list:
    """Lists in lists, *depth* of them."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


ODD = (
    None, True, False, -1, 0, 1, 2, 255, 65536, 10**7, 4 * 10**18, 10**30, -(10**12), 0.5, -0.0, 1e-320, 1e300,
    float("nan"), float("inf"), float("-inf"), "", " ", "1", "1e-8", "nan", "null", "text", "x" * 5000, "../../elsewhere",
    "a\nb", "\x00", "ß", [], {}, [None], [[]], [-1], ["text"], {"": 0}, {"a": {"b": []}}, nested(40),
)  # fmt: skip
"""Values that are seldom what is expected."""

WORDS = (
    "", " ", "-1", "0", "1e-8", "1e400", "99999999999999999999", "NaN", "null", "yes", "no:", "2024:", "&a", "*a", "<<: *a",
    "- ", "? ", ": ", "{", "}", "[", "]", '"', "'", "#", "!!python/object:os.system", "!!binary", "\t", "\r", "\x00", "\ufeff",
    "é", "%YAML 9", "---", "...", "track", "chr1", "2001-13-45",
)  # fmt: skip


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """*data* with bits flipped, or bytes replaced, lost, repeated, added, or cut off."""
    result = bytearray(data)
    at = rng.randrange(max(1, len(data)))
    length = min(rng.choice((1, 2, 8, 100, 1000)), len(data) - at)
    way = rng.choice(("flip", "flip", "flips", "replace", "zero", "lose", "repeat", "insert", "cut", "head", "append", "empty"))
    if way == "flip" and data:
        result[at] ^= 1 << rng.randrange(8)
    elif way == "flips" and data:
        for _ in range(rng.randint(2, 30)):
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    elif way == "replace":
        result[at : at + length] = rng.randbytes(length)
    elif way == "zero":
        result[at : at + length] = bytes(length)
    elif way == "lose":
        del result[at : at + length]
    elif way == "repeat":
        result[at:at] = result[at : at + length]
    elif way == "insert":
        result[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
    elif way == "cut":
        del result[at:]
    elif way == "head":
        del result[:at]
    elif way == "append":
        result += rng.choice((rng.randbytes(100), bytes(1000), data[: at + 1]))
    else:
        result = bytearray(rng.choice((b"", b"\n", b"PK", rng.randbytes(300))))
    return bytes(result)


def changed_text(text: str, rng: random.Random) -> str:
    """*text* with a line lost, repeated, moved, indented or joined to the next, or a word replaced by another or an odd one."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        other = rng.randrange(len(lines))
        way = rng.choice(("lose", "repeat", "move", "indent", "join", "word", "word", "word", "insert"))
        if way == "lose" and len(lines) > 1:
            del lines[at]
        elif way == "repeat":
            lines.insert(other, lines[at])
        elif way == "move":
            lines[at], lines[other] = lines[other], lines[at]
        elif way == "indent":
            lines[at] = rng.choice((" ", "    ", "\t")) + lines[at] if rng.random() < 0.5 else lines[at].lstrip()
        elif way == "join" and at + 1 < len(lines):
            lines[at : at + 2] = [lines[at] + rng.choice((" ", "", ",")) + lines[at + 1].lstrip()]
        elif way == "insert":
            column = rng.randint(0, len(lines[at]))
            lines[at] = lines[at][:column] + rng.choice(WORDS) + lines[at][column:]
        else:
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice((*WORDS, rng.choice(lines[other].split(" "))))
            lines[at] = " ".join(words)
    return rng.choice(("\n", "\n", "\n", "\r\n")).join(lines)


def _places(value, places: list) -> list:
    """(container, key) of everything in a tree of mappings and lists."""
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        places.append((value, key))
        if isinstance(child, dict | list):
            _places(child, places)
    return places


def changed_value(value, rng: random.Random, *, odd=ODD):
    """A copy of a tree of mappings and lists in which entries are lost, added, renamed, wrapped, moved or odd."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value, [])
        if not places:
            return rng.choice(odd)
        container, key = rng.choice(places)
        way = rng.choice(("odd", "odd", "odd", "odd", "lose", "add", "rename", "wrap", "move", "number"))
        old = container[key]
        if way == "lose":
            del container[key]
        elif way == "add" and isinstance(container, dict):
            container[rng.choice(("unknown", "", "a b", str(key) + "\n", str(key) + "s"))] = copy.deepcopy(old)
        elif way == "add":
            container.insert(rng.randint(0, len(container)), copy.deepcopy(old))
        elif way == "rename" and isinstance(container, dict):
            container[rng.choice((str(key)[:-1], str(key).upper(), str(key) + "x"))] = container.pop(key)
        elif way == "wrap":
            container[key] = rng.choice(([old], {"a": old}, str(old), [old] * 3))
        elif way == "move":
            from_there, its_key = rng.choice(places)
            try:
                container[key] = copy.deepcopy(from_there[its_key])
            except (KeyError, IndexError):
                container[key] = rng.choice(odd)
        elif way == "number" and isinstance(old, int | float) and not isinstance(old, bool):
            container[key] = rng.choice((-old, old + 1, old * 2, old * 10**6, old / 3, float(old)))
        else:
            container[key] = copy.deepcopy(rng.choice(odd))
    return value


DTYPES = ("int8", "uint8", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64", "bool", "complex64")
ODD_NUMBERS = (float("nan"), float("inf"), -1, 0, 1, 2, 128, 255, 65535, 1e-320, 1e18, -1e18)


def changed_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """*array* with other values, of another type, shape, order or length."""
    way = rng.choice(
        ("value", "value", "values", "row", "all", "dtype", "sort", "shuffle", "cut", "longer", "flat", "axis", "turn", "empty")
    )
    result = np.array(array)
    with np.errstate(all="ignore"):
        if way in ("value", "values", "row", "all") and result.size:
            number = rng.choice(ODD_NUMBERS)
            if result.dtype.kind in "iub":
                span = np.iinfo(result.dtype) if result.dtype.kind != "b" else None
                number = int(np.nan_to_num(number, nan=3, posinf=1e18))
                number = number % 2 if span is None else max(span.min, min(span.max, number))
            if way == "all":
                result[...] = number
            elif way == "row" and result.ndim > 1:
                result[rng.randrange(len(result))] = number
            else:
                for _ in range(1 if way == "value" else rng.randint(2, 20)):
                    result.reshape(-1)[rng.randrange(result.size)] = number
        elif way == "dtype":
            result = result.astype(rng.choice(DTYPES))
        elif way == "sort" and result.size:
            result = result[::-1].copy()
        elif way == "shuffle" and result.size:
            result = result[np.array(rng.sample(range(len(result)), len(result)))]
        elif way == "cut":
            result = result[: rng.randrange(len(result))] if result.ndim and len(result) else result
        elif way == "longer" and result.ndim:
            result = np.concatenate([result, result[: rng.randint(1, 3)]])
        elif way == "flat":
            result = result.reshape(-1)
        elif way == "axis":
            result = result[..., None]
        elif way == "turn":
            result = np.ascontiguousarray(result.T)
        elif way == "empty":
            result = result[:0]
    return result


def entries_of(data: bytes) -> dict[str, bytes]:
    """What is in a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(entries, *, compressed=()) -> bytes:
    """A zip archive of (name, bytes) with right checksums; entries named in *compressed* are deflated."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, data, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)
    return out.getvalue()


def changed_archive(data: bytes, rng: random.Random) -> bytes:
    """A zip archive in which an entry is damaged, lost, renamed, repeated, compressed, or huge; all checksums are right."""
    entries = entries_of(data)
    name = rng.choice(sorted(entries))
    way = rng.choice(("bytes", "bytes", "bytes", "json", "lose", "rename", "repeat", "compress", "bomb", "swap"))
    items = dict(entries)
    if way == "json":
        name = rng.choice([key for key in sorted(entries) if key.endswith(".json")] or [name])
    if way == "json" and name.endswith(".json"):
        items[name] = json.dumps(changed_value(json.loads(entries[name]), rng)).encode()
    elif way == "lose":
        del items[name]
    elif way == "rename":
        items[rng.choice((name + "x", "../" + name, "/" + name, name.upper(), ""))] = items.pop(name)
    elif way == "repeat":
        return archive_of([*items.items(), (name, changed_bytes(items[name], rng))])
    elif way == "compress":
        return archive_of(items.items(), compressed=rng.choice(([name], list(items))))
    elif way == "bomb":
        items[name] = bytes(300_000_000)
        return archive_of(items.items(), compressed=[name])
    elif way == "swap":
        items[name] = entries[rng.choice(sorted(entries))]
    else:
        items[name] = changed_bytes(entries[name], rng)
    return archive_of(items.items())
