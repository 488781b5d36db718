"""The demo's main steps in seconds, with the package as the wheel has it.

python -P .ci/try_wheel.py FOLDER, with the wheel in FOLDER and the checkout on no path.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDPMScheduler, UNet2DModel

import curvlinops_diffusion
from curvlinops_diffusion import Attributor, DenoisingObjective

folder = Path(sys.argv[1]).resolve()
assert folder in Path(curvlinops_diffusion.__file__).resolve().parents, (
    curvlinops_diffusion.__file__
)
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8,),
    norm_num_groups=4,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    attention_head_dim=4,
)
objective = DenoisingObjective(unet.eval(), DDPMScheduler())
images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
with TemporaryDirectory() as output:
    file, page = Path(output) / "ekfac.safetensors", Path(output) / "report.html"
    Attributor(objective, images).fit(num_draws=2).save(file)
    attributor = Attributor.load(file, objective, images)
    result = attributor.score(images[:2] / 2, num_draws=2, damping=1e-3)
    assert result.scores.shape == (2, 6)
    assert result.scores.isfinite().all()
    result.report(page)
    assert "<html" in page.read_text()
subprocess.run([sys.executable, "-P", "-m", "curvlinops_diffusion", "--version"], check=True)
