"""The command line: ``vit-mechinterp demo | check | sites | plan | run | train | schema``.

Commands import what they need when they run, so that ``--help`` is immediate. An error of this package is one
message on stderr and exit code 2; ``--debug`` shows where it came from.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp import __version__
from vit_mechinterp.errors import SpecError, VitMechInterpError

if TYPE_CHECKING:
    from vit_mechinterp.engine import Results

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
        return code
    except VitMechInterpError as error:
        if arguments.debug:
            raise
        print(f"vit-mechinterp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vit-mechinterp: interrupted", file=sys.stderr)
        return 130


def _demo(arguments: argparse.Namespace) -> int:
    from vit_mechinterp.report.demo import analyse

    print(analyse(arguments.out, progress=not arguments.quiet))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from vit_mechinterp.model import load
    from vit_mechinterp.model.conformance import check

    report = check(load(arguments.model, pretrained=arguments.pretrained))
    print(report)
    return 0 if report.passed else 1


def _sites(arguments: argparse.Namespace) -> int:
    from vit_mechinterp.model import load
    from vit_mechinterp.spec import GLOBAL_SITES

    vit = load(arguments.model, pretrained=arguments.pretrained)
    table = [("site", "shape", "axes", "note")]
    for name, info in vit.sites().items():
        table.append((name, "x".join(map(str, info.shape)), " ".join(info.axes), info.note))
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for *cells, note in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join([*padded, note]).rstrip())
    for name, reason in vit.layout.absent.items():
        if name in GLOBAL_SITES:
            print(f"No {name}: {reason}.")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from vit_mechinterp.engine import plan
    from vit_mechinterp.experiment import load_data, load_model, read_experiment

    experiment = read_experiment(arguments.experiment)
    data = None if arguments.per_example else load_data(experiment)
    print(plan(load_model(experiment), experiment, data, batch_size=experiment.batch_size))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from vit_mechinterp.experiment import run_experiment

    results = run_experiment(arguments.experiment, arguments.out, progress=not arguments.quiet)
    print(_summary(results))
    print(f"{results!r} in {arguments.out}")
    return 0


def _summary(results: Results) -> str:
    """How often each run predicts what the data's label columns say, or, without any, its mean outputs."""
    table = results.to_pandas()
    n = results.logits.shape[1]
    if "prediction" not in table:
        return f"Outputs of shape {tuple(results.logits.shape[2:])} for {n} examples a run."
    labels = [name for name in ("label", "counterfactual_label") if name in table]
    if labels:
        title = f"Share of the {n} examples whose prediction equals the column:"
        right = table[labels].eq(table["prediction"], axis=0)
        shown = right.groupby(table["run"], sort=False).mean()
    else:
        title = f"Mean output over the {n} examples:"
        shown = table.filter(like="logit_").groupby(table["run"], sort=False).mean()
    return f"{title}\n{shown.rename_axis(None).to_string(float_format='{:.3f}'.format, max_cols=8)}"


def _train(arguments: argparse.Namespace) -> int:
    from vit_mechinterp.spec.documents import load_yaml, read_text, validate
    from vit_mechinterp.training import TrainingConfig, train

    if arguments.options:
        print(json.dumps(TrainingConfig.model_json_schema(), indent=2))
        return 0
    if arguments.out is None:
        raise SpecError("train needs --out FOLDER (or --options, to list what can be set).")
    given: dict[str, Any] = {}
    if arguments.config is not None:
        given = load_yaml(read_text(arguments.config), str(arguments.config))
    for setting in arguments.set:
        _put(given, setting, load_yaml)
    config = validate(TrainingConfig, given, "training options")
    command = shlex.join(["vit-mechinterp", *arguments.argv])
    progress = not arguments.quiet
    result = train(config, arguments.out, resume=arguments.resume, command=command, progress=progress)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    print(f"Best checkpoint (step {result.best_step}) in {result.folder}: {metrics}")
    return 0


def _put(options: dict[str, Any], setting: str, parse: Any) -> None:
    key, separator, value = setting.partition("=")
    if not separator:
        raise SpecError(f"--set takes KEY=VALUE, got {setting!r}.")
    *groups, name = key.split(".")
    for group in groups:
        options = options.setdefault(group, {})
    options[name] = parse(value, f"--set {key}")


def _schema(_: argparse.Namespace) -> int:
    from vit_mechinterp.spec import Experiment

    print(json.dumps(Experiment.json_schema(), indent=2))
    return 0


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

    demo = add("demo", _demo, "run the main analysis on the shipped model, and write a page of pictures")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write into (%(default)s)")

    for name, command, text in (
        ("check", _check, "check that a model can be trusted, and print the table"),
        ("sites", _sites, "list the sites of a model with their shapes for one example"),
    ):
        sub = add(name, command, text)
        sub.add_argument("model", metavar="MODEL", help="timm/NAME, hf/ORG/NAME, vmi/NAME, hf/./FOLDER")
        sub.add_argument("--random", dest="pretrained", action="store_false", help="random weights")

    plan = add("plan", _plan, "print what an experiment would compute, without computing it")
    plan.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    plan.add_argument("--per-example", action="store_true", help="plan for one example, without the data")

    run = add("run", _run, "run an experiment, and save its results")
    run.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    run.add_argument("--out", type=Path, required=True, help="folder for the results")

    train = add("train", _train, "train a small ViT from scratch on the discrimination task")
    train.add_argument("--out", type=Path, help="folder for the checkpoint and the log")
    train.add_argument("--config", type=Path, metavar="FILE.yaml", help="options as a document")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one option")
    train.add_argument("--resume", action="store_true", help="go on with the training in the folder")
    train.add_argument("--options", action="store_true", help="list all options, and stop")

    for sub in (demo, run, train):
        sub.add_argument("--quiet", action="store_true", help="no progress bars")

    add("schema", _schema, "print the JSON schema of an experiment document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
