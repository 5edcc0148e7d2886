"""Circuits: the standard analyses, one file each, one shape: ``circuit(vit, data, ...) -> CircuitResult``."""

from __future__ import annotations

from vit_mechinterp.circuits.ablation import ablation_sweep
from vit_mechinterp.circuits.activation_patching import activation_patching
from vit_mechinterp.circuits.association_phases import association_phases
from vit_mechinterp.circuits.attention import attention
from vit_mechinterp.circuits.attention_stages import attention_stages
from vit_mechinterp.circuits.attention_walkthrough import attention_walkthrough
from vit_mechinterp.circuits.attribution_patching import attribution_patching
from vit_mechinterp.circuits.behaviour import behaviour
from vit_mechinterp.circuits.cumulative_ablation import cumulative_ablation
from vit_mechinterp.circuits.das import das, das_by_attribute
from vit_mechinterp.circuits.dictionary_files import load_dictionary
from vit_mechinterp.circuits.directions import mean_directions
from vit_mechinterp.circuits.disentanglement_generalization import disentanglement_generalization
from vit_mechinterp.circuits.edge_attribution import edge_attribution
from vit_mechinterp.circuits.embedding_matching import embedding_matching
from vit_mechinterp.circuits.equivalence_walks import equivalence_walks
from vit_mechinterp.circuits.faithfulness import faithfulness
from vit_mechinterp.circuits.generalization import accuracy_by_split, generalization
from vit_mechinterp.circuits.images import image_pairs, sample_photographs
from vit_mechinterp.circuits.interchange_sweep import interchange_sweep
from vit_mechinterp.circuits.local_lipschitz import local_lipschitz
from vit_mechinterp.circuits.logit_attribution import logit_attribution
from vit_mechinterp.circuits.logit_lens import logit_lens
from vit_mechinterp.circuits.metrics import (
    Accuracy,
    KLDivergence,
    LogitDifference,
    Probability,
    Rank,
    Similarity,
)
from vit_mechinterp.circuits.novel_representations import novel_representations
from vit_mechinterp.circuits.patch_association import patch_association
from vit_mechinterp.circuits.path_patching import edge_patching, path_patching
from vit_mechinterp.circuits.positional_comparison import positional_comparison
from vit_mechinterp.circuits.probe_intervention import probe_intervention
from vit_mechinterp.circuits.probing import probing
from vit_mechinterp.circuits.representation_similarity import representation_similarity
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.circuits.sparse_autoencoder import sparse_autoencoder
from vit_mechinterp.circuits.steering import steering
from vit_mechinterp.circuits.structure_transfer import structure_transfer

__all__ = [
    "Accuracy",
    "CircuitResult",
    "KLDivergence",
    "LogitDifference",
    "Probability",
    "Rank",
    "Similarity",
    "ablation_sweep",
    "accuracy_by_split",
    "activation_patching",
    "association_phases",
    "attention",
    "attention_stages",
    "attention_walkthrough",
    "attribution_patching",
    "behaviour",
    "cumulative_ablation",
    "das",
    "das_by_attribute",
    "disentanglement_generalization",
    "edge_attribution",
    "edge_patching",
    "embedding_matching",
    "equivalence_walks",
    "faithfulness",
    "generalization",
    "image_pairs",
    "interchange_sweep",
    "load_dictionary",
    "local_lipschitz",
    "logit_attribution",
    "logit_lens",
    "mean_directions",
    "novel_representations",
    "patch_association",
    "path_patching",
    "positional_comparison",
    "probe_intervention",
    "probing",
    "representation_similarity",
    "sample_photographs",
    "sparse_autoencoder",
    "steering",
    "structure_transfer",
]
