"""Samplers: predictors, grids, fast solvers, ODE and SDE solvers, Langevin."""
