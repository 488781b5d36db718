"""The program ``curvlinops-diffusion``: callers of the library, and what is read of a shell."""


def lacking(error: ImportError) -> str:
    """Say what to install, where the extra ``cli`` was left out."""
    return f"the command line needs {error.name}: pip install 'curvlinops-diffusion[cli]'."
