"""Forwards of the model: clean ones, and waves in which interventions are carried out."""
