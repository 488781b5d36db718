"""The problem: noise, timesteps, draws, data, objective, regression."""
