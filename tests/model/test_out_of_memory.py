"""Memory that runs out is told from everything else that goes wrong."""

from __future__ import annotations

import pytest
import torch

from vit_mechinterp.model.out_of_memory import memory_may_run_out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_ends_the_block(error: BaseException) -> None:
    ended = False
    with memory_may_run_out():
        raise error
    ended = True  # type: ignore[unreachable]
    assert ended


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, memory_may_run_out():
        raise error
    assert raised.value is error


def test_the_host_says_so_in_words_that_are_known() -> None:
    with memory_may_run_out():
        torch.empty(2**60, dtype=torch.uint8)
        pytest.fail("there was memory enough")
