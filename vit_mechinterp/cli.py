"""The command line: ``vit-mechinterp demo | reproduce | models | check | parity | sites | circuit |
page | stimuli | plan | run | train | schema``.

Commands import what they need when they run, so that ``--help`` is immediate. An error of this package is one
message on stderr and exit code 2; ``--debug`` shows where it came from.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_mechinterp import __version__
from vit_mechinterp.commands import analyses, bridges, circuit, models, reproduce, stimuli, training
from vit_mechinterp.errors import VitMechInterpError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    arguments.argv = argv  # for the record that a training keeps
    level = logging.INFO if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except VitMechInterpError as error:
        if arguments.debug:
            raise
        print(f"vit-mechinterp: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has seen enough (models | head). Python's own flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("vit-mechinterp: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit-mechinterp", description="Causal analyses of vision transformers."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--verbose", action="store_true", help="log what is done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=command)
        return sub

    text = "run the main analysis on the shipped model, and write a page of pictures"
    demo = add("demo", analyses.demo, text)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write into (%(default)s)")

    text = "run the methods of a paper at small scale, and write a page"
    papers = add("reproduce", reproduce.reproduce, text)
    papers.epilog, papers.formatter_class = reproduce.epilog(), argparse.RawDescriptionHelpFormatter
    papers.add_argument("paper", metavar="PAPER", help="a name from the list below")
    papers.add_argument("--out", type=Path, required=True, help="folder to write into")
    text = "tiny (minutes), small, or for lepori2024 paper (%(default)s)"
    papers.add_argument("--scale", default="tiny", help=text)
    only = papers.add_argument("--only", action="append", default=[], metavar="FIGURE")
    only.help = "one figure alone; can be repeated"
    text = "a model string (lepori2024: a folder of trainings) in place of the shipped models"
    papers.add_argument("--model", help=text)
    sets = "digits, or from the hub cifar10, cifar100, svhn, imagenet"
    papers.add_argument("--data", help=f"images for jelassi2022: {sets}")

    listed = add("models", models.models, "list the supported models, and which sites they lack and why")
    listed.add_argument("--library", metavar="NAME", help="timm, hf, torchvision or open_clip")
    listed.add_argument("--search", default="", metavar="TEXT", help="in names, classes and families")
    listed.add_argument("--json", action="store_true", help="print JSON")

    check = add("check", models.check, "check that a model can be trusted, and print the table")
    check.add_argument("--fast", action="store_true", help="run the fast checks only")
    text = "pixels of the images, where the model takes several sizes"
    check.add_argument("--image-size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help=text)
    check.add_argument("--json", action="store_true", help="print every finding as JSON")
    sites = add("sites", models.sites, "list the sites of a model with their shapes for one example")
    parity = add("parity", bridges.parity, "compare the engine with other packages on a model")
    text = "hooks, nnsight, pyvene or transformer_lens; can be repeated (all by default)"
    parity.add_argument("--backend", action="append", default=[], metavar="NAME", help=text)
    parity.add_argument("--json", action="store_true", help="print every finding as JSON")
    for sub in (check, sites, parity):
        named = "timm/NAME, hf/ORG/NAME, vmi/NAME, ..., a folder as ./FOLDER, or module:factory"
        sub.add_argument("model", metavar="MODEL", help=named)
        sub.add_argument("--random", dest="pretrained", action="store_false", help="random weights")
        sub.add_argument("--allow-pickle", action="store_true", help="read pickles, which can run code")

    one = add("circuit", circuit.circuit, "run a standard analysis of a model, and save what it finds")
    one.add_argument("name", nargs="?", metavar="NAME", help="the analysis; --list lists them")
    one.add_argument("--list", action="store_true", help="list the analyses and what they take, and stop")
    one.add_argument("--options", action="store_true", help="print what NAME takes and returns, and stop")
    one.add_argument("--model", metavar="MODEL", help="as for check")
    one.add_argument("--random", dest="pretrained", action="store_false", help="random weights")
    one.add_argument("--allow-pickle", action="store_true", help="read pickles, which can run code")
    text = "image files, a folder, 'photographs', stimuli/NAME, or the name of a dataset"
    one.add_argument("--data", nargs="+", metavar="D", help=text)
    one.add_argument("-n", type=int, metavar="N", help="take the first N examples")
    text = "one option (a value is YAML); data.KEY for the dataset or the stimuli"
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    one.add_argument("--out", type=Path, help="folder for the results")
    one.add_argument("--quiet", action="store_true", help="no progress bars")

    made = add("stimuli", stimuli.stimuli, "make images whose structure is known, and save them as a dataset")
    made.add_argument("name", nargs="?", metavar="NAME", help="the stimuli; --list lists them")
    made.add_argument("--list", action="store_true", help="list the stimuli, and stop")
    made.add_argument("--options", action="store_true", help="print what NAME takes, and stop")
    made.add_argument("-n", "--n", type=int, metavar="N", help="how many examples")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one option")
    text = "a folder for datasets.load_from_disk, or FILE.parquet"
    made.add_argument("--out", type=Path, help=text)
    made.add_argument("--quiet", action="store_true", help="no progress bars")

    paged = add("page", circuit.page, "put saved results of analyses on one page")
    paged.add_argument("out", type=Path, metavar="OUT", help="the page, as FILE.html or a folder")
    text = "a folder that circuit --out wrote, or a folder of such folders; can be repeated"
    paged.add_argument("results", type=Path, nargs="+", metavar="RESULT", help=text)
    paged.add_argument("--title", default="", help="heading of the page")

    plan = add("plan", analyses.plan, "print what an experiment would compute, without computing it")
    plan.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    plan.add_argument("--per-example", action="store_true", help="plan for one example, without the data")

    run = add("run", analyses.run, "run an experiment, and save its results")
    run.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    run.add_argument("--out", type=Path, required=True, help="folder for the results")
    store = "folder where clean activations are kept: another experiment on the same data reads them"
    memory = "most memory beside the model, such as 4GiB (by default 2GiB; on a GPU 40 %% of what is free)"
    for sub in (plan, run):
        sub.add_argument("--store", type=Path, metavar="FOLDER", help=store)
        sub.add_argument("--memory", metavar="SIZE", help=memory)

    train = add("train", training.train, "train a ViT on the discrimination task or on RMTS")
    train.add_argument("--out", type=Path, help="folder for the checkpoint and the log")
    names = "clip-b16, clip-b32, imagenet21k-b16, dino-b16, mae-b16, dinov2-b14, scratch-b16, scratch-b32"
    train.add_argument("--preset", metavar="NAME", help=f"a model and its settings to begin with: {names}")
    train.add_argument("--config", type=Path, metavar="FILE.yaml", help="options as a document")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one option")
    train.add_argument("--resume", action="store_true", help="go on with the training in the folder")
    train.add_argument("--options", action="store_true", help="list all options, and stop")

    for sub in (demo, parity, papers, run, train):
        sub.add_argument("--quiet", action="store_true", help="no progress bars")

    add("schema", analyses.schema, "print the JSON schema of an experiment document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
