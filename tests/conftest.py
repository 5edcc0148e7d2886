"""Shared by all tests: few threads, fixed seeds, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from vit_mechinterp.spec import OPS

settings.register_profile("tests", derandomize=True, deadline=None)  # how busy the machine is proves nothing
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _only_the_ops_there_were() -> Iterator[None]:
    """Take back the ops that a test registers, so that no other test meets them."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)
