"""Command line: `python -m jepa_kernels {info,explain,verify,profile,train,plan}`."""

import argparse
import importlib
import json
import sys

import torch

import jepa_kernels
from jepa_kernels import about
from jepa_kernels._core import check
from jepa_kernels._core.select import short
from jepa_kernels.names import check_known
from jepa_kernels.ops import OPS
from jepa_kernels.testing import DTYPES, cast, op_module

COMMANDS = {"verify": "verify.command", "profile": "profiling.command", "train": "train", "plan": "plan"}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (2: the call's words are off)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"jepa_kernels.{COMMANDS[argv[0]]}").main(argv[1:])
    options = _parser().parse_args(argv)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels", description=jepa_kernels.__doc__)
    verbs = parser.add_subparsers(required=True, metavar="{info,explain,verify,profile,train,plan}")
    verb = verbs.add_parser("info", help="what this machine and build can run: paste it into a bug report")
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(run=_info)
    verb = verbs.add_parser("explain", help="which backend an op takes for a typical call, and why not the others")
    verb.add_argument("op", help=f"of {', '.join(OPS)}")
    verb.add_argument("--dtype", metavar="D", default="float32", help=f"of {', '.join(map(short, DTYPES))}")
    verb.add_argument("--device", default="cpu")
    verb.set_defaults(run=_explain)
    verbs.add_parser("verify", help="hold every kernel to its error budget on this machine; see `verify --help`")
    verbs.add_parser("profile", help="where a training step's time goes: `profile ijepa`; see `profile --help`")
    verbs.add_parser("train", help="train a model: `train ijepa`, `train vl_jepa`, or a YAML file; see `train --help`")
    verbs.add_parser("plan", help="plan with a world model and act, on PushT; see `plan --help`")
    return parser


def _info(options: argparse.Namespace) -> int:
    report = jepa_kernels.info()
    print(json.dumps(report, indent=2) if options.json else about.text(report))
    return 0


def _explain(options: argparse.Namespace) -> int:
    try:
        check_known("explain", "op", options.op, OPS, "choose one of them")
        check_known("explain", "--dtype", options.dtype, [short(d) for d in DTYPES], "leave it out for float32")
        device = check.usable_device("explain", "--device", options.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    case = op_module(options.op, "cases").CASES[0]
    drawn = case.make(torch.Generator().manual_seed(0))
    print(jepa_kernels.explain(options.op, **cast(drawn, getattr(torch, options.dtype), device, case.keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
