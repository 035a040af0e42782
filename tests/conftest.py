"""Shared by all tests: a compilation cache, strict shapes, checked types."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Machine code is made in half of the time; the programs stay the same.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# The older way to make code of fused operations takes a third less time.
os.environ['XLA_FLAGS'] = ' '.join(
  (os.environ.get('XLA_FLAGS', ''), '--xla_cpu_use_fusion_emitters=false')
)

import jax
import jaxtyping
import pytest

from tests import typecheck

# Compiled programs are kept between runs, so only the first run is slow.
jax.config.update(
  'jax_compilation_cache_dir',
  str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# [B] meeting [B, H, W, C] by accident is an error, not a broadcast.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Annotations are checked in tests only, so that they cost nothing elsewhere.
TYPED = (
  'controllable_generation',
  'evaluation',
  'experiment',
  'likelihood',
  'losses',
  'optimization',
  'run_lib',
  'sampling',
  'sde_lib',
  'solvers',
)
jaxtyping.install_import_hook(TYPED, f'{typecheck.__name__}.check')


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Drop the programs of a file of tests after it.

  Otherwise a process of tests holds several GiB of them at the end.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope='module')
def quick_network():
  """Let `tests.tiny.get_config` have a network that compiles in a second."""
  from tests import tiny  # After the hook for annotations.

  with tiny.quick_network():
    yield


@pytest.fixture(scope='module')
def shared_programs():
  """Let trainings of one config, in a file of tests, share their programs."""
  from tests import tiny

  with tiny.shared_programs():
    yield
