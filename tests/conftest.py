"""Shared by all tests: a compilation cache and strict shapes."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

# Compiled programs are kept between runs, so only the first run is slow.
jax.config.update(
  'jax_compilation_cache_dir',
  str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# [B] meeting [B, H, W, C] by accident is an error, not a broadcast.
jax.config.update('jax_numpy_rank_promotion', 'raise')
