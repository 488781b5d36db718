"""``python -m curvlinops_diffusion``, the same as the program ``curvlinops-diffusion``."""

import sys
import warnings


def main() -> int:
    """Run the command line; needs the extra ``cli``."""
    # of libraries that the user cannot do anything about
    warnings.simplefilter("ignore", FutureWarning)
    try:
        from curvlinops_diffusion.cli.program import run
    except ImportError as error:
        print(
            f"error: the command line needs {error.name}: pip install 'curvlinops-diffusion[cli]'",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
