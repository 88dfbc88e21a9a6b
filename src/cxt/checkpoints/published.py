"""Reading the published checkpoints: Lightning files of the original package, plain and with an adapter.

No pickled code in such a file is executed. Torch reads it under `weights_only=True`, which builds tensors, numbers, strings and
containers; of the original's classes, it may build those in `CLASSES`, and gets an empty substitute for each.

Differences of the published networks are recorded in the configuration: sources see the start token (`start_token_in_prefix`),
and the adapter overwrites frequency bin 0 (`overwrite_bin0`) with its `mask_token`. The original's inference did not overwrite:
it passed the adapter a bin 0 of zeros, or of missingness if a mask was given. Published weights have a `mask_token` of 0, so
that without a mask the two are the same; with a mask, this package does what the networks were trained with.

All of this was tested on files that the original code wrote for a small network (`tests/golden`). The six published files are
larger and may be older; anything that differs in one of them is refused by name, never guessed.
"""

import re
from pathlib import Path

import torch

from cxt.checkpoints.record import MAX_VALUES, check_sizes, check_tensors
from cxt.config.network import PRESETS, AdapterConfig, ModelConfig
from cxt.errors import BadRequest
from cxt.io import file_sha256
from cxt.model.adapter import build_model
from cxt.model.layers import CHANNEL_WEIGHTS

SCALES = (2, 8, 32, 64)
"""Window widths that every published network was trained with."""


class PublishedSettings:
    """Substitute for a dataclass of the original package: a dict of its fields, and no code."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise TypeError(f"the state of a configuration must be a dict, got a {type(state).__name__}")
        self.fields = state


MODULE = "cxt.config"
CLASSES = ("ModelConfig", "TrainingConfig", "AdapterConfig")
"""The original's classes, in its MODULE, that a file may contain. Only the first one was observed; the others are a guess."""


def allow_published_classes():
    """Context in which torch reads `CLASSES`, although this package does not contain their code."""
    # Torch identifies classes by their own names; older versions accept no other mapping.
    return torch.serialization.safe_globals([type(name, (PublishedSettings,), {"__module__": MODULE}) for name in CLASSES])


def is_published(content) -> bool:
    """Whether the content of a torch file is a Lightning file of the original package, and not one of this package."""
    keys = content.keys() if isinstance(content, dict) else set()
    return "cxt" not in keys and {"pytorch-lightning_version", "hyper_parameters"} <= keys


# {name in this package: name in the files}.
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
    """The name in a published file of this package's tensor *key*; *adapter* tells whether the file has an adapter."""
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
"""Fields of a published configuration that determine the network, with their types."""

WITHOUT_EFFECT = ("use_kv_cache", "device", "batch_size")
FIXED = {"bias": False, "sample_scale_embd": len(CHANNEL_WEIGHTS)}


def _get_fields(value) -> dict | None:
    """The fields of a configuration (a dataclass of the original, or a mapping); None for anything else."""
    value = getattr(value, "fields", None) if isinstance(value, PublishedSettings) else value
    return value if isinstance(value, dict) else None


def read_network(hyper: dict) -> ModelConfig:
    """The network described by a published file's hyper-parameters; BadRequest if it cannot be built."""
    given = _get_fields(hyper.get("gpt_config"))
    if given is None:
        raise BadRequest("its hyper-parameters have no `gpt_config`, which describes the network")
    problems = [f"{name} is missing" for name in FIELDS if name not in given]
    problems += [
        f"{name} must be {kind.__name__}, got {given[name]!r}"
        for name, kind in FIELDS.items()
        if name in given and type(given[name]) is not kind and not (kind is float and type(given[name]) is int)
    ]
    problems += [
        f"{name} must be {value!r}, got {given[name]!r}" for name, value in FIXED.items() if given.get(name, value) != value
    ]
    problems += [
        f"{name} {value!r} is an unknown setting"
        for name, value in given.items()
        if name not in FIELDS and name not in WITHOUT_EFFECT
    ]
    if not problems and given["combined_dim"] % 2 == 0:
        problems = [f"combined_dim must be odd (twice the windows plus one), got {given['combined_dim']}"]
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
    """The adapter described by a published file's hyper-parameters, None for a plain model; BadRequest as in `read_network`."""
    if "ie_new" not in hyper:
        return None
    samples, bottleneck = hyper["ie_new"], hyper.get("adapter_bottleneck")
    dropout, index = hyper.get("adapter_dropout", 0.0), hyper.get("new_mask_index", 0)
    if type(samples) is not int or not 1 < samples < backbone.samples:
        raise BadRequest(f"its `ie_new` must be fewer samples than the backbone's {backbone.samples}, got {samples!r}")
    if type(bottleneck) is not int or bottleneck < 1:
        raise BadRequest(f"its `adapter_bottleneck` must be a positive whole number, got {bottleneck!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadRequest(f"its `adapter_dropout` must be a number in [0, 1), got {dropout!r}")
    if index != 0:
        raise BadRequest(f"its `new_mask_index` must be 0, the frequency bin that the adapter overwrites, got {index!r}")
    return AdapterConfig(samples=samples, bottleneck=bottleneck, dropout=dropout, overwrite_bin0=True)


def convert_weights(tensors: dict, network: ModelConfig, adapter: AdapterConfig | None) -> dict[str, torch.Tensor]:
    """The state dict of a published file under this package's names.

    Raises
    ------
    BadRequest
        Naming every tensor that is missing, unknown or of the wrong shape, and channel weights that are not the fixed ones.
    """
    prefix = "model." if adapter is None else "model.backbone."
    channel_weights_name = f"{prefix}transformer.bt2ls.weights"
    if any(str(key).startswith("model.adapter.") for key in tensors) != (adapter is not None):
        raise BadRequest(
            "adapter weights need the hyper-parameter `ie_new`, an adapter's samples, and it needs adapter weights"
        )
    # Checked before a network of any depth is built.
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
    # Buffers for decoding, which are allocated anew.
    caches = {key for key in tensors if any(word.startswith("kv_cache") for word in str(key).split("."))}
    problems = [f"{name} is missing" for name in [*names.values(), channel_weights_name] if name not in tensors]
    problems += [f"{key} is not known" for key in tensors if key not in known_names and key not in caches]
    problems += [
        f"{name} is not a tensor" for name in known_names & tensors.keys() if not isinstance(tensors[name], torch.Tensor)
    ]
    if not problems:
        problems = [
            f"{name} must have shape {tuple(expected_state[key].shape)} by its hyper-parameters, got "
            f"{tuple(tensors[name].shape)}"
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
            f"{channel_weights_name} must be the fixed weights of the two channels, {CHANNEL_WEIGHTS}, got "
            f"{channel_weights.tolist()[:8]}"
        )
    return {key: tensors[name] for key, name in names.items()}


def find_nearest_preset(network: ModelConfig) -> str:
    """The preset of *network*, or the most similar one: by missingness, then window size, then depth."""
    return min(
        PRESETS,
        key=lambda name: (
            PRESETS[name].mask_singletons != network.mask_singletons,
            PRESETS[name].window_size != network.window_size,
            abs(PRESETS[name].layers - network.layers),
        ),
    )


def to_plain(value, *, depth: int = 0, budget: list[int] | None = None):
    """Convert *value* to dicts, lists, numbers and strings; BadRequest if there are more than `MAX_VALUES` of them."""
    budget = [MAX_VALUES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > 50 or (isinstance(value, int) and value.bit_length() > 4096):
        raise BadRequest("its hyper-parameters are larger than any that the original package writes")
    value = value.__dict__.get("fields", {}) if isinstance(value, PublishedSettings) else value
    nested = {"depth": depth + 1, "budget": budget}
    if isinstance(value, dict):
        return {str(key): to_plain(child, **nested) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(child, **nested) for child in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_published(content: dict, path) -> tuple[dict, ModelConfig, AdapterConfig | None, dict]:
    """Weights, network, adapter and other record entries of a published file, whose content torch has read.

    Raises
    ------
    BadRequest
        If it was not written by the original package; the message names what does not fit. Also for its legacy model
        `residual`, recognised by the file name, which predicts another quantity on another grid.
    """
    try:
        if Path(path).stem.startswith("residual"):
            raise BadRequest("the legacy `residual` model does not predict ln TMRCA; choose another model")
        hyper, tensors = content["hyper_parameters"], content.get("state_dict")
        if not isinstance(hyper, dict) or not isinstance(tensors, dict):
            raise BadRequest("it has no hyper-parameters or no weights")
        hyper, version = to_plain(hyper), to_plain(content["pytorch-lightning_version"])
        for key in ("global_step", "epoch"):
            if type(content.get(key)) is not int:
                raise BadRequest(f"its {key} must be a whole number, got {content.get(key)!r}")
        network = read_network(hyper)
        adapter = read_adapter(hyper, network)
        weights = convert_weights(tensors, network, adapter)
        check_tensors(weights)
    except BadRequest as error:
        raise BadRequest(f"{path} is not a checkpoint of the original package that this cxt can read: {error}") from None
    preset = find_nearest_preset(network)
    more = {
        # Names in the registry are NAME_epoch=E-step=S, Lightning's own are epoch=E-step=S.
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
