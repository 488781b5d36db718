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
from curvlinops import hutchinson_trace, lanczos_approximate_spectrum
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
# of each block, put together.

bands = {f"levels {k} to {k + 249}": list(range(k + 25, k + 250, 50)) for k in (0, 250, 500, 750)}
eigenvalues, traces = {}, {}
for name, levels in bands.items():
    regression = NoisedRegression(objective, images[:64], timesteps=levels, batch_size=128)
    EK = DiffusionEKFACLinearOperator(regression)
    traces[name] = EK.trace().item()
    eigenvalues[name] = EK.eigenvalues()
    print(f"{name}: trace {traces[name]:.3g}, largest {eigenvalues[name][0]:.3g}")

# %%
# The exact GGN of the first and the last band, of fewer images and levels: its largest eigenvalues
# by SciPy, its trace from products with random signs, and its spectral density by Lanczos' method
# with ``curvlinops``. (Its smallest eigenvalue is zero.) EK-FAC of the same draws beside it, with
# many random loss vectors: its trace is that of the exact GGN.

largest, exact_traces, densities, same_draws = {}, {}, {}, {}
for name in (next(iter(bands)), list(bands)[-1]):
    few = NoisedRegression(objective, images[:16], timesteps=bands[name][::3], batch_size=64)
    exact = DiffusionGGNLinearOperator(few)
    same_draws[name] = DiffusionEKFACLinearOperator(few, mc_samples=32)
    found = eigsh(exact.to_scipy(), k=5, tol=1e-2, return_eigenvectors=False)
    largest[name] = torch.from_numpy(found).sort(descending=True).values
    exact_traces[name] = hutchinson_trace(exact, 24, distribution="rademacher").item()
    densities[name] = lanczos_approximate_spectrum(
        exact, 12, num_points=256, num_repeats=4, boundaries=(0.0, largest[name][0].item())
    )
shares = {name: (values[0] / exact_traces[name]).item() for name, values in largest.items()}
for name, values in largest.items():
    print(f"{name}: exact trace {exact_traces[name]:.3g}, largest {values[0]:.3g}", end=" ")
    print(f"({shares[name]:.0%} of the trace)", end="; EK-FAC of the same draws: ")
    EK = same_draws[name]
    print(f"trace {EK.trace().item():.3g}, largest {EK.eigenvalues()[0]:.3g}")

# %%
# At little noise there is more curvature, in EK-FAC's trace and in the exact one, and its largest
# eigenvalue is a smaller part of it: every pixel's noise is a problem of its own. At much noise
# more of it lies in few directions: the network must know the mean of the data, which few
# directions of the weights decide.
#
# EK-FAC finds that, too, but not the largest eigenvalues themselves. Those of the exact GGN are
# several times larger than EK-FAC's of the same draws: what moves all layers together lies between
# the blocks, and is left out.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
for k, (name, values) in enumerate(eigenvalues.items()):
    numbers = torch.arange(1, len(values) + 1)
    left.loglog(numbers, values.clamp(min=1e-12), color=f"C{k}", label=name)
    if name in largest:
        left.loglog(numbers[:5], largest[name], "o", color=f"C{k}", label="exact, fewer draws")
        few = same_draws[name].eigenvalues()[:5]
        left.loglog(numbers[:5], few, "x", color=f"C{k}", label="EK-FAC of these")
left.set(xlabel="number", ylabel="eigenvalue of EK-FAC", ylim=(1e-7, None))
left.legend(fontsize=8)
for (name, (grid, density)), color in zip(densities.items(), ("C0", "C3"), strict=True):
    right.semilogy(grid, density, color=color, label=name)
right.set(xlabel="eigenvalue of the exact GGN", ylabel="spectral density", ylim=(1e-7, None))
right.legend(fontsize=8)
figure.tight_layout()

effective = [(values.sum() ** 2 / values.square().sum()).item() for values in eigenvalues.values()]
print("effective number of EK-FAC's directions:", [round(number) for number in effective])
trace, exact_trace, share = (list(z.values()) for z in (traces, exact_traces, shares))
for name, EK in same_draws.items():
    assert abs(EK.trace().item() / exact_traces[name] - 1) < 0.2, "the same trace"
    assert largest[name][0] > 2 * EK.eigenvalues()[0], "whose largest eigenvalue is missed"
assert trace[0] > 2 * trace[-1], "there should be more curvature at little noise"
assert exact_trace[0] > 2 * exact_trace[-1], "of the exact GGN, too"
assert share[0] < 0.7 * share[-1], "and one direction should have less of it"
assert effective[0] > 2 * effective[-1], "as EK-FAC finds as well"
