"""Formatting the result of a benchmark."""

from cxt.benchmark.speed import describe_device


def _flops(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def _memory(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def format_result(name: str, what: str, result: dict, device: str) -> str:
    """Format the result of a benchmark of *what* (training or decoding) as text."""
    unit = "items" if what == "training" else "pairs"
    share = result["flops_per_second"] / result["peak_flops_per_second"]
    setting = f"batch {result['batch']}, {result['precision']}"
    setting += f", compiled: {result['compile']}" if what == "training" else f", {result['replicates']} replicates"
    rows = {
        f"{'examples' if what == 'training' else 'pairs'}/s": f"{result[f'{unit}_per_second']:.4g}",
        "windows/s": f"{result['windows_per_second']:,.0f}",
        "model FLOP/s": f"{_flops(result['flops_per_second'])}, {share:.0%} of the {_flops(result['peak_flops_per_second'])} "
        "of a matrix product here",
        "memory": _memory(result["memory_bytes"]),
    }
    if what == "training":
        rows["attention"] = result["attention_kernels"]
        rows["waiting for data"] = f"{result['waiting']:.1%} of the time"
    else:
        rows["total"] = f"{result['pairs']} pairs in {result['seconds']:.1f} s"
    if "dense_items_per_second" in result:
        low, high = min(result["ratios"]), max(result["ratios"])
        rows["published formulation"] = (
            f"{result['dense_items_per_second']:.4g} examples/s, memory {_memory(result['dense_memory_bytes'])}; cxt is "
            f"{result['ratio']:.2f} times as fast ({len(result['ratios'])} turns, {low:.2f} to {high:.2f})"
        )
        rows["difference"] = (
            f"{result['loss_difference']:.1g} in the loss, {result['gradient_difference']:.1g} of the largest gradient"
        )
    if "uncached_pairs_per_second" in result:
        rows["without a cache"] = (
            f"{result['uncached_pairs_per_second']:.3g} pairs/s; with it, decoding is {result['ratio']:.1f} times as fast"
        )
    head = f"{name}: {what}, {setting}, {describe_device(device)}"
    return "\n".join([head, *(f"  {key:24s}{value}" for key, value in rows.items())])
