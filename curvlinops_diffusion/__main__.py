"""``python -m curvlinops_diffusion``, the same as the program ``curvlinops-diffusion``."""

import sys

from curvlinops_diffusion.cli import lacking


def main() -> int:
    """Run the command line; needs the extra ``cli``."""
    try:
        from curvlinops_diffusion.cli.program import run
    except ModuleNotFoundError as error:
        print(f"error: {lacking(error)}", file=sys.stderr)
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
