"""What importing the package imports: nothing that it does not need, or does not need yet."""

import subprocess
import sys

import curvlinops_diffusion

# all of these are installed where the tests run; none is needed to compute anything
NOT_NEEDED = {
    "PIL",
    "bitsandbytes",  # diffusers imports it wherever it is installed, and it warns
    "diffusers",  # its classes are told by their names
    "jsonargparse",
    "matplotlib",
    "peft",
    "sklearn",
    "torchvision",
    "transformers",
}


def modules_after(statements):
    """The top-level modules that a fresh process has imported after some statements."""
    statements += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    finished = subprocess.run(
        [sys.executable, "-c", statements], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.splitlines()[-1].split())


def test_the_bare_package():
    imported = modules_after("import curvlinops_diffusion")
    assert not imported & {*NOT_NEEDED, "curvlinops", "numpy", "scipy", "torch"}


def test_every_public_name():
    """Needs ``curvlinops``, PyTorch and what these import, and no more."""
    imported = modules_after("from curvlinops_diffusion import *")
    assert {"curvlinops", "torch"} <= imported
    assert not imported & NOT_NEEDED


def test_public_names():
    """Each is there, and has one place."""
    names = list(curvlinops_diffusion.__all__)
    assert all(hasattr(curvlinops_diffusion, name) for name in names)
    for name in ("baselines", "measurements", "timesteps", "validation", "weightings"):
        module = getattr(curvlinops_diffusion, name)
        assert all(hasattr(module, public) for public in module.__all__)
        names += module.__all__
    assert len(set(names)) == len(names) > 50
