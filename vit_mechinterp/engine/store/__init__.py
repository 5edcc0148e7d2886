"""Activations that are kept: on GPUs, in memory and on disk, by what they are of."""

from __future__ import annotations

from vit_mechinterp.engine.store.activation_store import ActivationStore
from vit_mechinterp.engine.store.view import StoredActivations, StoredSite

__all__ = ["ActivationStore", "StoredActivations", "StoredSite"]
