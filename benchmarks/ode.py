r"""Compare the ODE solver on the device with scipy's solver on the host.

  python -m benchmarks.ode [--case vp_ddpmpp_continuous] [--tolerance 1e-3]

Both have the same network (reduced, with the parameters of tests/arrays), the
same start and the same tolerances. Scipy's RK45 runs on the host, as in the
paper's release: each evaluation of the compiled drift copies the state to the
device and back. Prints NFE and seconds: the best of --repeats interleaved runs,
after one run that compiles.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

import likelihood
from solvers import ode
from tests import golden
from tests.test_golden import PROCESSES, score_of


def scipy_solver(drift, t0, t1, tolerance):
  """Return solve(y0) -> (y, nfe) by scipy, for drift(t, y) of a pytree."""
  drift = jax.jit(drift)

  def solve(y0):
    leaves, tree = jax.tree.flatten(y0)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def unflatten(flat):
      parts = np.split(np.float32(flat), ends)
      parts = [p.reshape(v.shape) for p, v in zip(parts, leaves, strict=True)]
      return jax.tree.unflatten(tree, parts)

    def flatten(y):
      return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(y)])

    solution = scipy.integrate.solve_ivp(
      lambda t, flat: flatten(drift(np.float32(t), unflatten(flat))),
      (t0, t1),
      flatten(y0),
      rtol=tolerance,
      atol=tolerance,
    )
    return unflatten(solution.y[:, -1]), solution.nfev

  return solve


def tasks(case, tolerance):
  """Return {task: {solver: () -> (result, nfe)}}."""
  g, _ = golden.load(case)
  sde, _ = PROCESSES[case]
  score_fn, eps = score_of(case), float(g['ode_eps'])
  z, data, probes = (
    jnp.asarray(g[k]) for k in ('ode_z', 'data', 'hutchinson_eps')
  )
  probes = probes[None]
  sampler = ode.ODE(
    eps=eps, rtol=tolerance, atol=tolerance, final_denoise=False
  )

  def drift(t, x):
    t = jnp.full(x.shape[:1], t)
    return sde.ode_drift(x, t, score_fn(x, t))

  def with_divergence(t, state):
    t = jnp.full(data.shape[:1], t)
    slope, divergence = likelihood.drift_and_divergence(
      score_fn, sde, state[0], t, probes
    )
    return slope, divergence[0]

  @jax.jit
  def sample(z):
    return sampler(None, score_fn, sde, z)

  @jax.jit
  def logp(x):
    return likelihood.log_likelihood(
      score_fn, sde, x, probes, rtol=tolerance, atol=tolerance
    )

  def device_sample():
    samples = jax.block_until_ready(sample(z))
    return np.asarray(samples.x), int(samples.nfe)

  def device_logp():
    result = jax.block_until_ready(logp(data))
    return np.asarray(result.logp), int(result.nfe)

  solve_x = scipy_solver(drift, 1.0, eps, tolerance)
  solve_logp = scipy_solver(with_divergence, 1e-5, 1.0, tolerance)

  def host_logp():
    (x, integral), nfe = solve_logp((data, jnp.zeros(len(data))))
    return np.asarray(sde.prior_logp(x) + integral), nfe

  return {
    'sampling': {'device': device_sample, 'scipy': lambda: solve_x(z)},
    'likelihood': {'device': device_logp, 'scipy': host_logp},
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--case', default='vp_ddpmpp_continuous')
  parser.add_argument('--tolerance', type=float, default=1e-3)
  parser.add_argument('--repeats', type=int, default=3)
  flags = parser.parse_args()
  print(f'{flags.case}, rtol = atol = {flags.tolerance:g}, {jax.devices()[0]}')
  for task, solvers in tasks(flags.case, flags.tolerance).items():
    results = {name: solve() for name, solve in solvers.items()}
    seconds = {name: [] for name in solvers}
    for _ in range(flags.repeats):
      for name, solve in solvers.items():
        start = time.perf_counter()
        solve()
        seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    (x, nfe), (y, nfe_scipy) = results['device'], results['scipy']
    gap = np.abs(x - y).max() / np.abs(y).max()
    print(
      f'{task}: on the device {best["device"]:.2f} s, {nfe} NFE; scipy '
      f'{best["scipy"]:.2f} s, {nfe_scipy} NFE; scipy takes '
      f'{best["scipy"] / best["device"]:.2f} times as long; results differ by '
      f'{gap:.1e}',
      flush=True,
    )


if __name__ == '__main__':
  main()
