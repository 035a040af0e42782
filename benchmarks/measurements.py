r"""Compare every method for measurements with the exact posterior.

  python -m benchmarks.measurements

The priors are a Gaussian and a mixture of two, with correlated values, whose
scores are known exactly: the results show the errors of the methods alone. For
linear operators the posterior is known in closed form, for nonlinear ones it is
computed by importance sampling in four dimensions. The results are written to
the end of docs/measurements.md.
"""

import dataclasses
import functools
import itertools
import pathlib
import textwrap
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

import controllable_generation as control
import sampling
import sde_lib
from runtime.files import write_text
from runtime.progress import say
from solvers import grids, predictors

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'measurements.md'
# The tables replace what follows this line of the page.
MARK = '<!-- measured -->\n'
SEED, NOISE = 0, 0.2
MEASUREMENTS, SAMPLES = 40, 100  # Samples of the posterior of each measurement.
INTERVAL = 0.9
KINDS = ('Gaussian', 'Mixture')
DRAWS = 300_000  # Of the prior, for nonlinear operators.


class Law(typing.NamedTuple):
  """Mixture sum_k weights_k N(means_k, cov) of vectors.

  Attributes:
    weights: [K].
    means: [K, D].
    cov: [D, D].
  """

  weights: np.ndarray
  means: np.ndarray
  cov: np.ndarray

  def score_fn(self, sde):
    """Return the exact score, of x of any shape [B, ...]."""
    means, (values, axes) = jnp.asarray(self.means), jnp.linalg.eigh(self.cov)

    def score(x, t):
      alpha, sigma = (v[:, None, None] for v in sde.marginal(t))
      variance = alpha**2 * values[None, None] + sigma**2
      delta = (x.reshape(len(x), 1, -1) - alpha * means[None]) @ axes
      logs = (
        -0.5 * jnp.sum(delta**2 / variance, -1) + jnp.log(self.weights)[None]
      )
      share = jax.nn.softmax(logs)[..., None]
      return (jnp.sum(-share * delta / variance, 1) @ axes.T).reshape(x.shape)

    return score

  def sample(self, rng, n):
    """Return n draws [n, D] by a numpy generator."""
    k = rng.choice(len(self.weights), n, p=self.weights)
    root = np.linalg.cholesky(self.cov + 1e-9 * np.eye(len(self.cov)))
    return self.means[k] + rng.standard_normal((n, len(root))) @ root.T

  def moments(self):
    """Return (mean [D], covariance [D, D])."""
    mean = self.weights @ self.means
    apart = self.means - mean
    return mean, self.cov + (self.weights[:, None] * apart).T @ apart

  def given(self, matrix, y, noise_std):
    """Return the posterior of x, a `Law`, for y = matrix x + noise_std n."""
    seen = matrix @ self.cov @ matrix.T + noise_std**2 * np.eye(len(matrix))
    gain = np.linalg.solve(seen, matrix @ self.cov).T
    delta = y - self.means @ matrix.T
    logs = np.log(self.weights) - 0.5 * np.sum(
      delta * np.linalg.solve(seen, delta.T).T, axis=1
    )
    weights = np.exp(logs - logsumexp(logs))
    cov = self.cov - gain @ matrix @ self.cov
    return Law(weights / weights.sum(), self.means + delta @ gain.T, cov)


def prior(kind, shape):
  """Return the `Law` of x of a shape: neighbours are correlated."""
  where = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
  where = where.reshape(-1, len(shape)).astype(float)
  gap = np.linalg.norm(where[:, None] - where[None], axis=-1)
  ramp = np.linspace(1, 0.2, len(where))
  if kind == 'Gaussian':
    means, std = np.stack([0.1 * ramp] * 2), 0.5
  else:
    means, std = np.stack([0.6 * ramp, -0.6 * ramp]), 0.3
  return Law(np.array([0.6, 0.4]), means, std**2 * np.exp(-gap / 2))


def sums(x):
  """Return the sums of neighbours, an operator of one's own."""
  return x[:, 1:] + x[:, :-1]


# Operators, each with the shape of what it measures.
neighbours = control.Own(operator='benchmarks.measurements:sums')
OPERATORS = {
  'inpaint': (control.Inpaint(mask='half'), (4, 4, 1)),
  'colorize': (control.Colorize(), (2, 2, 3)),
  'super_resolution': (control.SuperResolution(factor=2), (4, 4, 1)),
  'deblur': (control.Deblur(width=0.6), (4, 4, 1)),
  'fourier': (control.Fourier(known=0.5), (4, 4, 1)),
  'own, of points': (neighbours, (6,)),
  'overexposed': (control.Overexposed(gain=1.0, centered=True), (2, 2, 1)),
  'phase_retrieval': (control.PhaseRetrieval(), (2, 2, 1)),
}


solver = functools.partial(
  sampling.SAMPLERS['dpmpp_2m'], grid=grids.LogSNR(), eps=1e-3
)


def chain(eta, num_steps):
  """Return the sampler of methods with new noise."""
  step = predictors.DDIM(eta=eta)
  grid = grids.LogSNR()
  return sampling.PC(predictor=step, num_steps=num_steps, grid=grid, eps=1e-3)


def methods():
  """Return {name: (method, sampler)}."""
  noise, steps = {'noise_std': NOISE}, solver(num_steps=50)
  plain = noise | {'ramp': 0.0}
  diffpir, ddrm = control.DiffPIR(**noise), control.DDRM(**noise)
  return {
    'projection': (control.Projection(**noise), steps),
    'dps': (control.DPS(**plain), steps),
    'pigdm': (control.PiGDM(data_std=0.5, **plain), steps),
    'mmps': (control.MMPS(cg_steps=16, **plain), steps),
    'mmps, ramp=1': (control.MMPS(cg_steps=16, **noise), steps),
    'diffpir': (diffpir, steps),
    'diffpir, eta=0.55, 20 steps': (diffpir, chain(0.3**0.5, 20)),
    'ddrm, eta=0, 50 steps': (ddrm, chain(0.0, 50)),
    'ddrm, eta=0.85, 20 steps': (ddrm, chain(0.85, 20)),
  }


def flat(y):
  """Return measurements as real vectors [B, M]."""
  y = np.asarray(y).reshape(len(y), -1)
  y = np.hstack([y.real, y.imag]) if np.iscomplexobj(y) else y
  return np.float64(y)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """Measurements of draws of a prior, and their posteriors.

  Attributes:
    law, operator, shape: of the data.
    truth: what was measured, [N, D].
    y: measurements [N, ...].
    means, covs: of the posteriors, [N, D] and [N, D, D].
    exact: samples of the posteriors, [N, SAMPLES, D].
  """

  law: Law
  operator: control.Operator
  shape: tuple
  truth: np.ndarray
  y: np.ndarray
  means: np.ndarray
  covs: np.ndarray
  exact: np.ndarray


def _weighed(x, made, y, rng, count):
  """Return mean, covariance and samples of a posterior by prior draws.

  Args:
    x, made: draws of the prior, [DRAWS, D], and their measurements as vectors.
    y: the measurement, as a vector.
    rng, count: generator, and number of samples.
  """
  logs = -0.5 * np.sum((made - y) ** 2, axis=1) / NOISE**2
  weights = np.exp(logs - logs.max())
  weights /= weights.sum()
  if 1 / np.sum(weights**2) < 50:
    raise RuntimeError('Too few draws of the prior: raise DRAWS.')
  mean = weights @ x
  cov = (weights[:, None] * (x - mean)).T @ (x - mean)
  return mean, cov, x[rng.choice(len(x), count, p=weights)]


def make_case(kind, name, number=MEASUREMENTS, count=SAMPLES):
  """Return the `Case` of a prior and an operator, by their names."""
  operator, shape = OPERATORS[name]
  operator.check_shape((1, *shape))
  law, rng = prior(kind, shape), np.random.default_rng(SEED)
  truth = law.sample(rng, number)
  y = operator(jnp.float32(truth).reshape(-1, *shape))
  y = np.asarray(y + NOISE * control.noise_like(jax.random.key(SEED), y))
  if operator.linear:
    matrix = flat(operator(jnp.eye(truth.shape[1]).reshape(-1, *shape))).T
    posteriors = [law.given(matrix, one, NOISE) for one in flat(y)]
    found = [(*p.moments(), p.sample(rng, count)) for p in posteriors]
  else:
    x = law.sample(rng, DRAWS)
    made = flat(operator(jnp.float32(x).reshape(-1, *shape)))
    found = [_weighed(x, made, one, rng, count) for one in flat(y)]
  parts = zip(*found, strict=True)
  return Case(law, operator, shape, truth, y, *map(np.stack, parts))


@functools.cache
def compiled(method, sampler, sde, operator):
  """Return program(rng, law, y, z) -> samples, for all priors."""

  def program(rng, law, y, z):
    score_fn = Law(*law).score_fn(sde)
    return sampler(rng, method(score_fn, sde, operator=operator, y=y), sde, z).x

  return jax.jit(
    program, compiler_options={'xla_backend_optimization_level': 1}
  )


def draw(case, method, sampler, sde):
  """Return samples [N, count, D] of the posteriors by a method."""
  count = case.exact.shape[1]
  y = jnp.asarray(np.repeat(case.y, count, axis=0))
  z = sde.prior_sample(jax.random.key(SEED + 1), (len(y), *case.shape))
  law = [jnp.float32(v) for v in case.law]
  program = compiled(method, sampler, sde, case.operator)
  x = program(jax.random.key(SEED + 2), law, y, z)
  return np.float64(x).reshape(len(case.y), count, -1)


class Errors(typing.NamedTuple):
  """Errors of samples of posteriors.

  Attributes:
    mean: root mean square of the error of the mean, relative to that of the
      distance of a draw from the mean.
    cov: the same of the covariance, relative to its Frobenius norm.
    coverage: share of true values in the central interval of `INTERVAL`.
  """

  mean: float
  cov: float
  coverage: float

  def __str__(self):
    mean, cov = (f'{v:.2f}' if v < 10 else '>10' for v in self[:2])
    return f'{mean} · {cov} · {100 * self.coverage:.0f}%'


def compare(case, x):
  """Return the `Errors` of samples x [N, count, D]; None if not finite."""
  if not np.isfinite(x).all():
    return None
  means = x.mean(axis=1)
  apart = x - means[:, None]
  covs = np.einsum('nki,nkj->nij', apart, apart) / (x.shape[1] - 1)
  total = np.trace(case.covs, axis1=1, axis2=2).sum()
  low, high = np.quantile(x, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=1)
  return Errors(
    float(np.sqrt(np.sum((means - case.means) ** 2) / total)),
    float(np.sqrt(np.sum((covs - case.covs) ** 2) / np.sum(case.covs**2))),
    float(np.mean((low <= case.truth) & (case.truth <= high))),
  )


def suits(method, operator):
  """Return whether a method can use an operator."""
  return (operator.orthonormal or not method.orthonormal_only) and (
    operator.linear or not method.linear_only
  )


def measure(sde):
  """Return {prior: {operator: {method: Errors or None}}}."""
  tables = {kind: {} for kind in KINDS}
  for name, kind in itertools.product(OPERATORS, KINDS):
    case = make_case(kind, name)
    found = {'exact samples': compare(case, case.exact)}
    for label, (method, sampler) in methods().items():
      found[label] = None
      if suits(method, case.operator):
        found[label] = compare(case, draw(case, method, sampler, sde))
      say(f'{kind} {name} {label}: {found[label]}')
    tables[kind][name] = found
  return tables


# ------------------------------------------------------------- convergence

STEPS, CG_STEPS = (5, 10, 20, 40, 80), (1, 2, 4, 8, 16)


def converge(sde):
  """Return ({cg_steps: Errors}, {num_steps: Errors}) of mmps on a Gaussian."""
  case = make_case('Gaussian', 'deblur', number=4, count=1000)
  options = {'noise_std': NOISE, 'ramp': 0.0}

  def errors(cg_steps, num_steps):
    method = control.MMPS(cg_steps=cg_steps, **options)
    sampler = solver(num_steps=num_steps)
    return compare(case, draw(case, method, sampler, sde))

  return (
    {n: errors(n, 80) for n in CG_STEPS},
    {n: errors(16, n) for n in STEPS},
    compare(case, case.exact),
  )


PROCESS_METHODS = 'pigdm', 'mmps', 'diffpir', 'ddrm, eta=0.85, 20 steps'
PROCESSES = ('ve', 'vp', 'subvp', 'edm', 'rectified_flow')


def by_process():
  """Return {process: {method: Errors}} of super-resolution of a Gaussian."""
  case, results = make_case('Gaussian', 'super_resolution'), {}
  for name in PROCESSES:
    sde = sde_lib.SDES[name]()
    results[name] = {
      label: compare(case, draw(case, *pair, sde))
      for label, pair in methods().items()
      if label in PROCESS_METHODS
    }
    say(f'{name}: {[*map(str, results[name].values())]}')
  return results


# -------------------------------------------------------------------- page


def rows(results):
  """Return a Markdown table of {column: {row: Errors or None}}."""
  columns = list(results)
  lines = ['| | ' + ' | '.join(f'`{c}`' for c in columns) + ' |']
  lines.append('|---' * (1 + len(columns)) + '|')
  for label in next(iter(results.values())):
    cells = (results[c][label] for c in columns)
    shown = ' | '.join('–' if cell is None else str(cell) for cell in cells)
    lines.append(f'| {label} | {shown} |')
  return lines


def page(tables, processes, converged):
  """Return the results as Markdown."""
  text = (
    '`python -m benchmarks.measurements` made these tables: with seed '
    f'{SEED}, {MEASUREMENTS} measurements of draws of the prior with noise_std='
    f'{NOISE}, and {SAMPLES} samples of the posterior of each, by the exact '
    'score of the VP process. A cell is `error of the mean · error of the '
    f'covariance · share of true values in {INTERVAL:.0%} intervals`. Errors '
    'are root mean squares, relative to the standard deviation and to the '
    'Frobenius norm of the covariance of the exact posterior. The first row '
    'has samples of the exact posterior: no method can have smaller errors '
    'with so many. Score methods use `dpmpp_2m` with 50 steps and, unless the '
    'row says otherwise, `ramp=0`, with up to 16 steps of conjugate gradients '
    'in mmps; rows with `eta` use `pc` with the predictor `ddim`.'
  )
  by_cg, by_steps, floor = converged
  lines = ['## Errors of all methods', '', *textwrap.wrap(text, 80)]
  for kind, results in tables.items():
    lines += ['', f'### {kind} prior', '', *rows(results)]
  lines += ['', '### All processes', '']
  text = 'Super-resolution of the Gaussian prior, by the process.'
  lines += [text, '', *rows(processes)]
  lines += ['', '### Convergence of mmps', '']
  text = (
    'Deblurring of the Gaussian prior: error of the mean · error of the '
    'covariance, for 4 measurements with 1,000 samples each; exact samples '
    f'have {floor.mean:.3f} · {floor.cov:.3f}.'
  )
  lines += [*textwrap.wrap(text, 80), '', '| | | | | | |', '|---' * 6 + '|']
  both = lambda e: f'{e.mean:.3f} · {e.cov:.3f}'
  for label, found in (('`cg_steps`', by_cg), ('steps', by_steps)):
    cells = ' | '.join(f'{n}: {both(e)}' for n, e in found.items())
    lines.append(f'| {label} | {cells} |')
  return '\n'.join(lines) + '\n'


def main():
  sde = sde_lib.VPSDE()
  text = page(measure(sde), by_process(), converge(sde))
  written = PAGE.read_text().partition(MARK)[0]
  write_text(PAGE, written + MARK + text)
  say(f'{PAGE} has been written.')


if __name__ == '__main__':
  main()
