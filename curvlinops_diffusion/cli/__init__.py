"""The program ``curvlinops-diffusion``: fit, score, report, inspect."""
