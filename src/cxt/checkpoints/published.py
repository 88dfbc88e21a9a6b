"""Reading the published checkpoints: Lightning files of the original package, plain and with an adapter.

Nothing pickled in such a file is run. Torch reads it under `weights_only=True`, which builds tensors, numbers, strings and
containers; of the original's classes it may make those in `CLASSES`, and gets an empty stand-in for each.

What the published networks do differently travels in the configuration: sources see the start token
(`start_token_in_prefix`), and the adapter overwrites frequency bin 0 (`overwrite_bin0`) by its `mask_token`. The original's
inference did not overwrite: it handed the adapter a bin 0 of zeros, or of missingness where a mask was given. Published
weights hold a `mask_token` of 0, so without a mask the two are the same; with one, only what they were trained on is done here.

All of this was tried on files that the original code wrote for a small network (`tests/golden`). The six published files are
larger and may be older; what does not look the same in one of them is refused by name, never guessed.
"""

import re
from pathlib import Path

import torch

from cxt.checkpoints.record import MAX_VALUES, check_sizes, check_tensors
from cxt.config.network import PRESETS, AdapterConfig, ModelConfig
from cxt.errors import BadRequest
from cxt.io import file_sha256
from cxt.model.adapter import build_model
from cxt.model.transformer import CHANNEL_WEIGHTS

SCALES = (2, 8, 32, 64)
"""Window widths that every published network was trained with."""


class PublishedSettings:
    """Stands for a dataclass of the original package: its fields, in a dict, and no code."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise TypeError(f"the state of a configuration is a {type(state).__name__}, expected a dict")
        self.fields = state


MODULE = "cxt.config"
CLASSES = ("ModelConfig", "TrainingConfig", "AdapterConfig")
"""The original's classes, in its MODULE, that a file may hold. Only the first was seen; the others are a guess."""


def allow_published_classes():
    """Context in which torch reads `CLASSES`, although none of their code is here (module and names are like ours)."""
    # Torch goes by what a class says its name is; older ones cannot be told another.
    return torch.serialization.safe_globals([type(name, (PublishedSettings,), {"__module__": MODULE}) for name in CLASSES])


def is_published(content) -> bool:
    """Whether what torch read is a Lightning file of the original package, and not one of this package's."""
    keys = content.keys() if isinstance(content, dict) else set()
    return "cxt" not in keys and {"pytorch-lightning_version", "hyper_parameters"} <= keys


# Names in this package to those in the files.
TRUNK = {
    "source_embedding.inner.": "transformer.bt2ls.proj01.", "source_embedding.outer.": "transformer.bt2ls.proj02.",
    "token_embedding.": "transformer.ote.", "norm.": "transformer.ln_f.", "head.": "lm_head.",
}  # fmt: skip
BLOCK = {
    "norm_attention.": "ln_1.", "attention.qkv.": "attn.c_attn.", "attention.out.": "attn.c_proj.",
    "norm_mlp.": "ln_2.", "mlp.up.": "mlp.c_fc.", "mlp.down.": "mlp.c_proj.",
}  # fmt: skip
ADAPTER = {"excite.": "se.", "residual.": "proj.", "norm.": "ln.", "gated.": "fc_in.", "out.": "fc_out."}


def _replace_prefix(key: str, names: dict[str, str]) -> str:
    for prefix, published_prefix in names.items():
        if key.startswith(prefix):
            return published_prefix + key.removeprefix(prefix)
    return key


def published_name(key: str, *, adapter: bool) -> str:
    """The name in a published file of this package's tensor *key*; *adapter* says whether the file is an adapter's."""
    part, rest = key.split(".", 1)
    if part == "adapter":
        return f"model.{rest}" if rest == "mask_token" else f"model.adapter.{_replace_prefix(rest, ADAPTER)}"
    if rest.startswith("blocks."):
        _, i, rest = rest.split(".", 2)
        rest = f"transformer.h.{i}.{_replace_prefix(rest, BLOCK)}"
    else:
        rest = _replace_prefix(rest, TRUNK)
    return f"model.backbone.{rest}" if adapter else f"model.{rest}"


FIELDS = {
    "n_layer": int, "n_embd": int, "n_head": int, "output_dim": int, "num_samples": int, "combined_dim": int,
    "window_size": int, "mask_singletons": bool, "dropout": float, "bias": bool, "sample_scale_embd": int,
}  # fmt: skip
"""What decides the network in a published configuration."""

WITHOUT_EFFECT = ("use_kv_cache", "device", "batch_size")
FIXED = {"bias": False, "sample_scale_embd": len(CHANNEL_WEIGHTS)}


def _get_fields(value) -> dict | None:
    """The fields of a configuration that is a dataclass of the original, or a mapping; None for anything else."""
    value = getattr(value, "fields", None) if isinstance(value, PublishedSettings) else value
    return value if isinstance(value, dict) else None


def read_network(hyper: dict) -> ModelConfig:
    """The network that a published file's hyper-parameters describe; BadRequest if it is none that can be built."""
    given = _get_fields(hyper.get("gpt_config"))
    if given is None:
        raise BadRequest("its hyper-parameters hold no `gpt_config`, which says what the network is")
    problems = [f"{name} is missing" for name in FIELDS if name not in given]
    problems += [
        f"{name} is {given[name]!r}, expected {kind.__name__}"
        for name, kind in FIELDS.items()
        if name in given and type(given[name]) is not kind and not (kind is float and type(given[name]) is int)
    ]
    problems += [
        f"{name} is {given[name]!r}, only {value!r} is known"
        for name, value in FIXED.items()
        if given.get(name, value) != value
    ]
    problems += [
        f"{name} is {value!r}, a setting whose meaning is not known"
        for name, value in given.items()
        if name not in FIELDS and name not in WITHOUT_EFFECT
    ]
    if not problems and given["combined_dim"] % 2 == 0:
        problems = [f"combined_dim is {given['combined_dim']}, expected an odd number: twice the windows and one"]
    if problems:
        raise BadRequest(f"its `gpt_config` does not fit: {'; '.join(problems)}")
    return ModelConfig(
        layers=given["n_layer"],
        heads=given["n_head"],
        width=given["n_embd"],
        dropout=given["dropout"],
        windows=given["combined_dim"] // 2,
        samples=given["num_samples"],
        scales=len(SCALES),
        window_size=given["window_size"],
        mask_singletons=given["mask_singletons"],
        start_token_in_prefix=True,
        bins=given["output_dim"] - 2,
    )


def read_adapter(hyper: dict, backbone: ModelConfig) -> AdapterConfig | None:
    """The adapter that a published file's hyper-parameters describe, None for a plain model; BadRequest as `read_network`."""
    if "ie_new" not in hyper:
        return None
    samples, bottleneck = hyper["ie_new"], hyper.get("adapter_bottleneck")
    dropout, index = hyper.get("adapter_dropout", 0.0), hyper.get("new_mask_index", 0)
    if type(samples) is not int or not 1 < samples < backbone.samples:
        raise BadRequest(f"its `ie_new` is {samples!r}, expected fewer samples than the backbone's {backbone.samples}")
    if type(bottleneck) is not int or bottleneck < 1:
        raise BadRequest(f"its `adapter_bottleneck` is {bottleneck!r}, expected at least 1")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadRequest(f"its `adapter_dropout` is {dropout!r}, expected at least 0 and below 1")
    if index != 0:
        raise BadRequest(f"its `new_mask_index` is {index!r}, only 0 is known: frequency bin 0 is the one overwritten")
    return AdapterConfig(samples=samples, bottleneck=bottleneck, dropout=dropout, overwrite_bin0=True)


def convert_weights(tensors: dict, network: ModelConfig, adapter: AdapterConfig | None) -> dict[str, torch.Tensor]:
    """The state dict of a published file under this package's names.

    Raises
    ------
    BadRequest
        Naming every tensor that is missing, of another shape, or not known, and channel weights that are not the fixed ones.
    """
    prefix = "model." if adapter is None else "model.backbone."
    channel_weights_name = f"{prefix}transformer.bt2ls.weights"
    if any(str(key).startswith("model.adapter.") for key in tensors) != (adapter is not None):
        raise BadRequest("adapter weights and the hyper-parameter `ie_new`, an adapter's samples, do not go together")
    # Before a network of any depth is built.
    blocks = {match[1] for key in tensors if (match := re.match(re.escape(prefix) + r"transformer\.h\.(\d+)\.", str(key)))}
    if len(blocks) != network.layers:
        raise BadRequest(f"its n_layer is {network.layers}, but it has weights of {len(blocks)} blocks")
    for configuration in (network, adapter):
        if configuration is not None:
            check_sizes(configuration)
    with torch.device("meta"):
        expected_state = build_model(network, adapter).state_dict()
    names = {key: published_name(key, adapter=adapter is not None) for key in expected_state}
    known_names = {*names.values(), channel_weights_name}
    # Empty memory for decoding, which is made anew.
    caches = {key for key in tensors if any(word.startswith("kv_cache") for word in str(key).split("."))}
    problems = [f"{name} is missing" for name in [*names.values(), channel_weights_name] if name not in tensors]
    problems += [f"{key} is not known" for key in tensors if key not in known_names and key not in caches]
    problems += [
        f"{name} is not a tensor" for name in known_names & tensors.keys() if not isinstance(tensors[name], torch.Tensor)
    ]
    if not problems:
        problems = [
            f"{name} has shape {tuple(tensors[name].shape)}, its hyper-parameters ask for {tuple(expected_state[key].shape)}"
            for key, name in names.items()
            if tensors[name].shape != expected_state[key].shape
        ]
    if problems:
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadRequest("its weights do not fit:\n  " + "\n  ".join(problems[:8]) + more)
    channel_weights = tensors[channel_weights_name].flatten()
    expected_weights = torch.tensor(CHANNEL_WEIGHTS)
    if channel_weights.shape != expected_weights.shape or not torch.allclose(
        channel_weights.float(), expected_weights, rtol=0, atol=1e-6
    ):
        raise BadRequest(
            f"{channel_weights_name} is {channel_weights.tolist()[:8]}, but the weights of the two channels are fixed to "
            f"{CHANNEL_WEIGHTS}"
        )
    return {key: tensors[name] for key, name in names.items()}


def find_nearest_preset(network: ModelConfig) -> str:
    """The preset that *network* is, or else the one most like it: in missingness, then window size, then depth."""
    return min(
        PRESETS,
        key=lambda name: (
            PRESETS[name].mask_singletons != network.mask_singletons,
            PRESETS[name].window_size != network.window_size,
            abs(PRESETS[name].layers - network.layers),
        ),
    )


def to_plain(value, *, depth: int = 0, budget: list[int] | None = None):
    """*value* as dicts, lists, numbers and strings; BadRequest if it has no end, or not one within `MAX_VALUES` values."""
    budget = [MAX_VALUES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > 50 or (isinstance(value, int) and value.bit_length() > 4096):
        raise BadRequest("its hyper-parameters hold more than any that the original package writes")
    value = value.__dict__.get("fields", {}) if isinstance(value, PublishedSettings) else value
    nested = {"depth": depth + 1, "budget": budget}
    if isinstance(value, dict):
        return {str(key): to_plain(child, **nested) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(child, **nested) for child in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_published(content: dict, path) -> tuple[dict, ModelConfig, AdapterConfig | None, dict]:
    """Weights, network, adapter and what else a checkpoint records, of the published file that torch read as *content*.

    Raises
    ------
    BadRequest
        If it is not what the original package writes: the message names what does not fit. And for its legacy model
        `residual`, known by its file name, which predicts another quantity on another grid.
    """
    try:
        if Path(path).stem.startswith("residual"):
            raise BadRequest("the legacy `residual` model predicts another quantity than ln TMRCA; choose another one")
        hyper, tensors = content["hyper_parameters"], content.get("state_dict")
        if not isinstance(hyper, dict) or not isinstance(tensors, dict):
            raise BadRequest("it has no hyper-parameters or no weights")
        hyper, version = to_plain(hyper), to_plain(content["pytorch-lightning_version"])
        for key in ("global_step", "epoch"):
            if type(content.get(key)) is not int:
                raise BadRequest(f"its {key} is {content.get(key)!r}, expected a number")
        network = read_network(hyper)
        adapter = read_adapter(hyper, network)
        weights = convert_weights(tensors, network, adapter)
        check_tensors(weights)
    except BadRequest as error:
        raise BadRequest(f"{path} is not a checkpoint of the original package as this cxt knows them: {error}") from None
    preset = find_nearest_preset(network)
    more = {
        # Registry names are NAME_epoch=E-step=S; Lightning's own are epoch=E-step=S.
        "name": re.sub(r"(^|_)epoch=.*", "", Path(path).stem) or preset,
        "preset": preset,
        "training": None,
        "lineage": None,
        "dataset": {
            "window_size": network.window_size,
            "sequence_length": network.windows * network.window_size,
            "samples": network.samples if adapter is None else adapter.samples,
            "missing": not network.mask_singletons,
            "scales": list(SCALES),
            "sha256": None,
            "simulated": None,
            "ranges": None,
        },
        "parent": None,
        "published": {"file": Path(path).name, "sha256": file_sha256(path), "hyper_parameters": hyper},
        "versions": {"pytorch-lightning": str(version)},
        "step": content["global_step"],
        "epoch": content["epoch"],
    }
    return weights, network, adapter, more
