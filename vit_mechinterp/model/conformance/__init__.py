"""What a model must show before anyone trusts what is read from it and written to it.

Third parties run the same checks on their own models and families: ``check(vit)``, ``load(..., check=True)``,
or ``vit-mechinterp check MODEL``.
"""

from vit_mechinterp.model.conformance.report import Report, Row
from vit_mechinterp.model.conformance.suite import CHECKS, check

__all__ = ["CHECKS", "Report", "Row", "check"]
