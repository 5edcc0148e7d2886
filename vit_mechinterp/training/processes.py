"""How a training is spread over processes and devices, by accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from vit_mechinterp.errors import SpecError
from vit_mechinterp.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerator_for", "on_main"]

Value = TypeVar("Value")


def accelerator_for(config: TrainingConfig) -> Accelerator:
    """Return accelerate's view of this process: its device, its precision and its fellows.

    Raises:
        SpecError: the precision does not exist here, or the images of a step cannot be shared out equally.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # accelerate holds one precision per Python process, and an earlier training may have had another.
    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()
    # What no loss reads at a step (a mask token, a pooler, a stage that is off) has no gradient there.
    sharing = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision=config.precision, kwargs_handlers=[sharing]
        )
    except ValueError as error:
        raise SpecError(
            f"precision={config.precision!r} cannot be had here: {error}. Use 'no', or 'bf16'."
        ) from error
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise SpecError(
            f"batch_size={config.batch_size} cannot be shared out equally over {accelerator.num_processes} "
            f"processes in {config.accumulate} parts each: use a multiple of {parts}."
        )
    return accelerator


def on_main(accelerator: Accelerator, compute: Callable[[], Value]) -> Value:
    """Compute a value in the main process, and return it in all."""
    from accelerate.utils import broadcast_object_list

    value = compute() if accelerator.is_main_process else None
    if accelerator.num_processes == 1:
        return value  # type: ignore[return-value]
    received: Value = broadcast_object_list([value])[0]
    return received
