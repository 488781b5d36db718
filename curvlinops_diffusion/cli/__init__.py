"""The program ``curvlinops-diffusion``: fit, score, report, inspect."""

import logging

# diffusers imports it wherever it is installed, and it warns of kernels that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
