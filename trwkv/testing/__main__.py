"""Command line: `python -m trwkv.testing fuzz --help`."""

import argparse
import importlib.util
import os
import sys

from trwkv.testing.interpreter import interpret_without_gpu

FUZZ = """\
Draws an op, an implementation, a contract and a case, again and again, until time is up. Prints how many cases were
drawn for each; of a failure, the smallest case that shows it, as a test to paste (exit status 1; 0 without failure).
Without a GPU, Triton's kernels run in its interpreter, or as they are compiled (--emulate). Shrinking a failure may
take some minutes more."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trwkv.testing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fuzz = commands.add_parser(
        "fuzz", help="draw contract cases until time is up", description=FUZZ,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    fuzz.add_argument("--minutes", type=float, default=1.0, help="how long to draw (default: 1)")
    fuzz.add_argument("--backend", choices=("reference", "torch", "triton", "all"), default="all")
    fuzz.add_argument(
        "--op", default="all", help='an op\'s name, such as "wkv" or "wkv_states" (default: all)'
    )
    fuzz.add_argument("--seed", type=int, default=0, help="the same seed draws the same cases (default: 0)")
    fuzz.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE",
        help="a module that registers further ops or implementations; may be repeated",
    )  # fmt: skip
    fuzz.add_argument(
        "--emulate", type=int, metavar="CAPABILITY",
        help="Triton's kernels as they are compiled for GPUs of this compute capability (80, 90, ...), on the CPU",
    )  # fmt: skip
    options = parser.parse_args()
    if importlib.util.find_spec("hypothesis") is None:
        parser.error("fuzz: expected the package hypothesis; got none: pip install 'trwkv[test]'")
    if options.emulate is None:
        interpret_without_gpu()
    else:
        os.environ["TRITON_INTERPRET"] = "0"
    from trwkv.testing.fuzz import fuzz as run

    return run(
        options.minutes, options.backend, options.op, options.seed, options.modules, emulate=options.emulate
    )


if __name__ == "__main__":
    sys.exit(main())
