"""``reproduce``: the methods of a paper as one page."""

from __future__ import annotations

import argparse
from importlib import import_module

__all__ = ["PAPERS", "epilog", "reproduce"]

PAPERS = {
    "jelassi2022": "Jelassi, Sander, Li: Vision Transformers provably learn spatial structure",
    "lepori2024": "Lepori, Tartaglini, Vong, Serre, Lake, Pavlick: Beyond the Doors of Perception",
    "salman2024": "Salman, Shams, Liu: Intriguing equivalence structures of the embedding space of ViTs",
}
"""Name to title. ``vit_mechinterp.report.NAME`` holds the paper's ``REPRODUCTION``."""


def epilog() -> str:
    """List the papers, for ``--help``."""
    width = max(map(len, PAPERS))
    listed = "\n".join(f"  {name:{width}}  {title}" for name, title in PAPERS.items())
    return f"papers:\n{listed}"


def reproduce(arguments: argparse.Namespace) -> int:
    """Run a paper's methods and write the page."""
    from vit_mechinterp.errors import SpecError, suggest

    if arguments.paper not in PAPERS:
        raise SpecError(
            f"There is no paper {arguments.paper!r}. Papers: {', '.join(PAPERS)}."
            f"{suggest(arguments.paper, PAPERS)}"
        )
    from vit_mechinterp.report.reproduction import reproduce

    done = reproduce(
        import_module(f"vit_mechinterp.report.{arguments.paper}").REPRODUCTION,
        arguments.out,
        scale=arguments.scale,
        only=arguments.only,
        model=arguments.model,
        data=arguments.data,
        progress=not arguments.quiet,
    )
    print(done)
    return 0
