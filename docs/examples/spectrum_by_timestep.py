"""Spectrum of a diffusion model's GGN by timestep
==================================================

A diffusion model is one network for a thousand denoising problems. How curved is each of them?
``NoisedRegression(..., timesteps=[...])`` confines the expectation over timesteps to a band of
noise levels, and every operator of this library, or of ``curvlinops``, is then that band's.
"""

# %%
# A UNet with attention, trained for a few seconds on scikit-learn's digits.

import warnings

import matplotlib.pyplot as plt
import torch
from curvlinops import lanczos_approximate_spectrum
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet, train
from scipy.sparse.linalg import eigsh

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    NoisedRegression,
)

warnings.simplefilter("ignore")
torch.manual_seed(0)
images, _ = digits()
unet, scheduler = make_unet(), DDPMScheduler()
train(unet, scheduler, images, steps=250)
objective = DenoisingObjective(unet.eval(), scheduler)

# %%
# Four bands of noise levels, from little to much noise. EK-FAC's eigenvalues in each of them: those
# of each block, put together. Its trace is the trace of the exact GGN.

bands = {f"levels {k} to {k + 249}": list(range(k + 25, k + 250, 50)) for k in (0, 250, 500, 750)}
eigenvalues, traces = {}, {}
for name, levels in bands.items():
    regression = NoisedRegression(objective, images[:64], timesteps=levels, batch_size=128)
    EK = DiffusionEKFACLinearOperator(regression)
    traces[name] = EK.trace().item()
    eigenvalues[name] = EK.eigenvalues()
    print(f"{name}: trace {traces[name]:.3g}, largest {eigenvalues[name][0]:.3g}")

# %%
# The exact GGN of two bands, its spectral density by Lanczos' method with ``curvlinops``. Its
# smallest eigenvalue is zero; SciPy finds the largest one.

densities = {}
for name in (next(iter(bands)), list(bands)[-1]):
    exact = DiffusionGGNLinearOperator(
        NoisedRegression(objective, images[:16], timesteps=bands[name][::3], batch_size=64)
    )
    largest = eigsh(exact.to_scipy(), k=1, tol=0.1, return_eigenvectors=False).item()
    densities[name] = lanczos_approximate_spectrum(
        exact, 12, num_points=256, num_repeats=4, boundaries=(0.0, largest)
    )
    print(f"{name}: largest eigenvalue {largest:.3g}, EK-FAC {eigenvalues[name][0]:.3g}")

# %%
# At little noise there is more curvature, and it is spread over many directions: every pixel's
# noise is a problem of its own. At much noise it lies in few: the network must know the mean of
# the data, which few directions of the weights decide. The largest eigenvalue even grows.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
for name, values in eigenvalues.items():
    left.loglog(torch.arange(1, len(values) + 1), values.clamp(min=1e-12), label=name)
left.set(xlabel="number", ylabel="eigenvalue of EK-FAC", ylim=(1e-7, None))
left.legend(fontsize=8)
for name, (grid, density) in densities.items():
    right.semilogy(grid, density, label=name)
right.set(xlabel="eigenvalue of the exact GGN", ylabel="spectral density", ylim=(1e-7, None))
right.legend(fontsize=8)
figure.tight_layout()

effective = [(values.sum() ** 2 / values.square().sum()).item() for values in eigenvalues.values()]
print("effective number of directions:", [round(number) for number in effective])
trace = list(traces.values())
assert trace[0] > 2 * trace[-1], "there should be more curvature at little noise"
assert effective[0] > 2 * effective[-1], "and it should be spread over more directions"
