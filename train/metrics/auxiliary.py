"""The auxiliary losses that megatron-core's routers add up. Its versions keep them differently."""

from torch import Tensor

try:
    from megatron.core.transformer.moe.moe_logging import MetricEntry, get_moe_metrics_tracker
except ImportError:  # megatron-core 0.16.1, on Python 3.11
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    def sums() -> dict[str, Tensor]:
        """By name, float32 [layers]: no copies, so that routers keep adding to them."""
        return {name: entry["values"] for name, entry in _kept().items()}

    def keep(name: str, values: Tensor) -> None:
        """Keep adding to `values`."""
        _kept()[name] = {"values": values}

    _kept = get_moe_layer_wise_logging_tracker

else:

    def sums() -> dict[str, Tensor]:
        """By name, float32 [layers]: no copies, so that routers keep adding to them."""
        return {name: entry.values for name, entry in _kept().items()}

    def keep(name: str, values: Tensor) -> None:
        """Keep adding to `values`."""
        _kept()[name] = MetricEntry(values)

    def _kept() -> dict[str, MetricEntry]:
        return get_moe_metrics_tracker().metrics


def clear() -> None:
    """Start again at zero, with as many layers as the next model has."""
    _kept().clear()


def rewind(before: dict[str, Tensor]) -> None:
    """Continue from copies of what `sums` returned; anything newer is reset to zero."""
    for name, values in sums().items():
        if name in before:
            values.copy_(before[name])
        else:
            values.zero_()
