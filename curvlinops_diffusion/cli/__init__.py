"""The program ``curvlinops-diffusion``: fit, score, report, inspect."""


def lacking(error: ImportError) -> str:
    """Say what to install, where the extra ``cli`` was left out."""
    return f"the command line needs {error.name}: pip install 'curvlinops-diffusion[cli]'"
