"""What cannot work: one line that names the key or the file, nothing written.

Every case is a command line, run through `main` in this process. None of them
gets as far as compiling a network.
"""

import json
import os
import pathlib
import pickle
import shutil
import struct
import time

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import experiment
import main
import run_lib
from checkpoints import formats
from checkpoints.workdir import Checkpoints
from commands import trained
from tests import golden, tiny

TINY = str(pathlib.Path(__file__).with_name('tiny.py'))
RINGS = str(pathlib.Path(__file__).parents[1] / 'configs/toy/rings_vp.py')
TRAIN = f'--config={TINY} --mode=train --workdir=new'
POINTS = f'--config={RINGS} --mode=train --workdir=new'
NPZ = f'{TRAIN} --config.data.dataset=npz --config.data.path='
ARRAYS = (
  f'{TRAIN} --config.data.dataset=arrays --config.data.centered '
  '--config.data.random_flip=False --config.data.path='
)
FOLDER = f'{TRAIN} --config.data.dataset=folder --config.data.path='
IMPORT = f'--config={TINY} --mode=import --workdir=new --checkpoint='
RUN = '--workdir=run --mode='
CONTROL = f'{RUN}sample --config.control.name='
TOLD = '--workdir=told_run --mode=sample --config.control.'
STATS = f'--config={TINY} --mode=stats --workdir=new --config.'

# Each case is 'arguments => texts that the error contains, between |'. Paths
# are in the folder that the fixture `world` makes.
COMMAND_LINE = f"""
--workdir=new => --mode is missing
--mode=train => --workdir is missing
--mode=train --workdir= => --workdir is missing
--mode=trian --workdir=new => --mode=trian
--mode= --workdir=new => --mode
--modee=train => modee
{TRAIN} extra => extra
--mode=train --workdir=new => --config
--mode=import --workdir=new => --config
--config=none.py --mode=train --workdir=new => none.py
--config=photos --mode=train --workdir=new => photos
--config=text.txt --mode=train --workdir=new => text.txt
--config=exits.py --mode=train --workdir=new => exits.py|line 1
--config=syntax.py --mode=train --workdir=new => syntax.py
--config=empty.py --mode=train --workdir=new => empty.py|get_config
--config=raises.py --mode=train --workdir=new => raises.py|line 2
--config=dict.py --mode=train --workdir=new => dict.py
--config=key.py --mode=train --workdir=new => config.training.batch_sise
--config=text.json --mode=train --workdir=new => text.json
--config=list.json --mode=train --workdir=new => list.json
--config=bytes.json --mode=train --workdir=new => bytes.json
--config=deep.json --mode=train --workdir=new => deep.json
--config=unknown.json --mode=train --workdir=new => config.training.batch_sise
--config=section.json --mode=train --workdir=new => config.model
--config=empty.json --mode=train --workdir=new => config.sde.name
--config=null.json --mode=train --workdir=new => config.optim.lr=None
{TRAIN} --config.training.batch_sise=12 => did you mean config.training.batch
{TRAIN} --config.lr=1 => config.optim.lr
{TRAIN} --config.training.batch_size=many => batch_size=many
{TRAIN} --config.training.batch_size=1.5 => batch_size=1.5
{TRAIN} --config.training.batch_size= => config.training.batch_size
{TRAIN} --config.data.centered=maybe => config.data.centered
{TRAIN} --config.model.ch_mult=abc => config.model.ch_mult
{TRAIN} --config.model.ch_mult=1.5 => config.model.ch_mult
{TRAIN} --config.model.ch_mult=() => ch_mult=()
{TRAIN} --config.training => config.training is a section
{TRAIN} --config.sde=vp => config.sde is a section
{TRAIN} --num_processes=2 => --num_processes=2|--coordinator
{TRAIN} --num_processes=0 => --num_processes
{TRAIN} --cpu_devices=-1 => --cpu_devices
{TRAIN} --process_id=1 => --process_id=1
{TRAIN} --process_id=-1 => --process_id
{TRAIN} --coordinator=auto --num_processes=2 => --num_processes=2|leave it out
{TRAIN} --coordinator=host => --coordinator=host|HOST:PORT
{TRAIN} --coordinator=host:99999 => --coordinator=host:99999|HOST:PORT
{TRAIN} --coordinator=no.invalid:1234 => --coordinator=no.invalid:1234
{TRAIN} --coordinator=auto => --coordinator=auto|--process_id
{TRAIN} --output=a.safetensors => --output|--mode export
{RUN}sample --samples=photos => --samples|--mode eval
{RUN}eval --checkpoint=8 => --checkpoint|config.eval.checkpoint
{RUN}encode --eval_folder=eval2 => --eval_folder|--mode eval
"""
# Object stores are refused wherever a path is taken.
ADDRESSES = f"""
--config=gs://b/c.py --mode=train --workdir=new => gs://b/c.py
--config={TINY} --mode=train --workdir=gs://b/run => --workdir=gs://b/run
--workdir=gs://b/run --mode=sample => --workdir=gs://b/run
{RUN}eval --samples=s3://b/a.npz => --samples=s3://b/a.npz
{RUN}eval --eval_folder=gs://b/eval => --eval_folder=gs://b/eval
{RUN}export --output=gs://b/out => --output=gs://b/out
{IMPORT}https://h/checkpoint_1 => --checkpoint=https://h/checkpoint_1
{NPZ}gs://b/a.npz => config.data.path='gs://b/a.npz'
{RUN}eval --config.eval.ood=noised,s3://b/a.npz => config.eval.ood
{STATS}eval.stats_path=gs://b/s => config.eval.stats_path='gs://b/s'
{STATS}eval.inception_path=gs://b/w => config.eval.inception_path='gs://b/w'
{CONTROL}inpaint --config.control.images=gs://b/x => control.images='gs://b/x'
{RUN}sample --config.control.condition=gs://b/c => control.condition='gs://b/c'
{CONTROL}inpaint --config.control.mask=gs://b/m => control.mask='gs://b/m'
{CONTROL}classifier --config.control.classifier_workdir=gs://b/r => gs://b/r
"""
VALUES = f"""
{TRAIN} --config.seed=-1 => config.seed=-1
{TRAIN} --config.seed=4294967296 => config.seed=4294967296
{TRAIN} --config.data.dataset=cifar => config.data.dataset='cifar'
{TRAIN} --config.data.image_size=0 => config.data.image_size=0
{TRAIN} --config.data.image_size=1000000000 => config.data.image_size=1000000000
{TRAIN} --config.data.num_channels=2 => config.data.num_channels=2
{TRAIN} --config.data.shape=-1 => config.data.shape=(-1,)
{TRAIN} --config.data.shape=2 => data.shape=(2,)
{TRAIN} --config.data.std=2 => data.std
{POINTS} --config.data.shape=3 => data.shape=(2,)
{POINTS} --config.data.std=2 => data.std
{ARRAYS} => data.path
{ARRAYS}none.npz => none.npz
{ARRAYS}text.txt => text.txt
{ARRAYS}names.npz => names.npz
{ARRAYS}one_axis.npz => one_axis.npz
{ARRAYS}nan.npz => nan.npz|not finite in float32, first in example
{ARRAYS}labels.npz --config.data.mean=0 --config.data.std=1 => labels.npz
{ARRAYS}wide.npz --config.data.std=0 => config.data.std=(0
{ARRAYS}whole.npz => channel 0|does not vary
{ARRAYS}half.npz --config.data.std=1 => half.npz|x_test
{ARRAYS}flat.npz --config.data.std=1 => config.data.shape|mlp
{ARRAYS}wide.npz --config.model.ch_mult=1,1 => config.data.shape|multiples
{ARRAYS}wide.npz --config.data.centered=0 => data.centered=True
{ARRAYS}wide.npz --config.data.random_flip => data.random_flip=False
{ARRAYS}wide.npz --config.data.shape=5,3 => wide.npz
{ARRAYS}wide.npz --config.data.mean=1,2 => data.mean
{POINTS} --config.data.centered => data.centered
{TRAIN} --config.sde.name=vpe => config.sde.name='vpe'
{TRAIN} --config.sde.sigma_min=0 => config.sde.sigma_min=0.0
{TRAIN} --config.sde.sigma_min=-1 => config.sde.sigma_min=-1.0
{TRAIN} --config.sde.sigma_min=10 => sigma_min=10.0
{TRAIN} --config.sde.sigma_max=inf => config.sde.sigma_max=inf
{TRAIN} --config.sde.sigma_max=nan => config.sde.sigma_max=nan
{TRAIN} --config.sde.sigma_max=1e30 => config.sde.sigma_max=1e+30
{TRAIN} --config.sde.sigma_min=1e-40 => config.sde.sigma_min=1e-40
{TRAIN} --config.sde.beta_min=1 => config.sde.beta_min
{POINTS} --config.sde.beta_min=30 => beta_min=30.0
{POINTS} --config.sde.beta_max=2000 => config.sde.beta_max=2000.0
{TRAIN} --config.model.name=unet => config.model.name='unet'
{TRAIN} --config.model.nf=0 => config.model.nf=0
{TRAIN} --config.model.nf=1000000000 => config.model.nf=1000000000
{TRAIN} --config.model.nf=7 => config.model.name='ncsnpp'|choose nf
{TRAIN} --config.model.ch_mult=1,0 => config.model.ch_mult=(1, 0)
{TRAIN} --config.model.ch_mult=1,1,1,1,1 => config.data.image_size
{TRAIN} --config.model.num_res_blocks=0 => config.model.num_res_blocks=0
{TRAIN} --config.model.num_res_blocks=100000 => config.model.num_res_blocks
{TRAIN} --config.model.dropout=1 => config.model.dropout=1.0
{TRAIN} --config.model.dropout=-0.1 => config.model.dropout=-0.1
{TRAIN} --config.model.fir_kernel=1,-3 => config.model.fir_kernel=(1, -3)
{TRAIN} --config.model.fir_kernel=() => fir_kernel=()
{TRAIN} --config.model.num_layers=2 => config.model.num_layers
{TRAIN} --config.model.conditioning=smld_label => training.num_scales
{TRAIN} --config.model.num_labels=3 => config.model.num_labels=3
{TRAIN} --config.training.batch_size=0 => config.training.batch_size=0
{TRAIN} --config.training.batch_size=-8 => config.training.batch_size=-8
{TRAIN} --config.training.batch_size=9999999999 => config.training.batch_size
{TRAIN} --config.training.grad_accumulation=3 => config.training.grad_accum
{TRAIN} --config.training.n_iters=-1 => config.training.n_iters=-1
{TRAIN} --config.training.num_scales=-1 => config.training.num_scales=-1
{TRAIN} --config.training.ema_rate=1 => config.training.ema_rate=1.0
{TRAIN} --config.training.ema_rate=1.5 => config.training.ema_rate=1.5
{TRAIN} --config.training.ema_rate=0.999999999 => config.training.ema_rate
{TRAIN} --config.model.init_scale=1e300 => config.model.init_scale=1e+300
{TRAIN} --config.training.ema_rate=-0.1 => config.training.ema_rate=-0.1
{TRAIN} --config.training.n_jitted_steps=0 => config.training.n_jitted_steps=0
{TRAIN} --config.training.n_jitted_steps=3 => config.training.n_jitted_steps=3
{TRAIN} --config.training.eval_freq=-1 => config.training.eval_freq=-1
{TRAIN} --config.training.eps=1 => config.training.eps=1.0
{TRAIN} --config.training.eps=-0.1 => config.training.eps=-0.1
{TRAIN} --config.training.eps=2 => config.training.eps=2.0
{POINTS} --config.training.eps=0 => config.training.eps=0.0
{POINTS} --config.training.eps=1e-46 => config.training.eps=1e-46
{TRAIN} --config.training.times=grid => training.num_scales
{TRAIN} --config.training.times=lognormal => sde.name='edm'
{TRAIN} --config.training.objective=explicit => data.dataset
{TRAIN} --config.training.weighting=none => config.training.weighting='none'
{TRAIN} --config.training.condition_dropout=1.1 => training.condition_dropout
{TRAIN} --config.optim.lr=-1e-3 => config.optim.lr=-0.001
{TRAIN} --config.optim.optimizer=sgd => config.optim.optimizer='sgd'
{TRAIN} --config.optim.schedule=step => config.optim.schedule='step'
{TRAIN} --config.optim.unit=epochs => config.optim.unit='epochs'
{TRAIN} --config.optim.muon_beta=1 => config.optim.muon_beta=1.0
{TRAIN} --config.training.ema_lengths=0.05,0.3 => config.training.ema_lengths
{TRAIN} --config.training.noise=sorted => config.training.noise='sorted'
{TRAIN} --config.optim.lr=inf => config.optim.lr=inf
{TRAIN} --config.optim.lr=1e39 => config.optim.lr=1e+39
{TRAIN} --config.optim.grad_clip=1e-320 => config.optim.grad_clip=1e-320
{TRAIN} --config.optim.beta2=0.99999999 => config.optim.beta2=0.99999999
{TRAIN} --config.optim.lr=nan => config.optim.lr=nan
{TRAIN} --config.optim.beta1=1 => config.optim.beta1=1.0
{TRAIN} --config.optim.beta2=-0.5 => config.optim.beta2=-0.5
{TRAIN} --config.optim.eps=0 => config.optim.eps=0.0
{TRAIN} --config.optim.warmup=-1 => config.optim.warmup=-1
{TRAIN} --config.optim.grad_clip=-1 => config.optim.grad_clip=-1.0
{TRAIN} --config.optim.weight_decay=-1 => config.optim.weight_decay=-1.0
{TRAIN} --config.sampling.method=euler => config.sampling.method='euler'
{TRAIN} --config.sampling.eps=0 => config.sampling.eps=0.0
{TRAIN} --config.sampling.eps=1 => config.sampling.eps=1.0
{TRAIN} --config.sampling.eps=2 => config.sampling.eps=2.0
{TRAIN} --config.sampling.eps=-0.1 => config.sampling.eps=-0.1
{POINTS} --config.sampling.eps=1e-46 => config.sampling.eps=1e-46
{TRAIN} --config.sampling.num_steps=0 => config.sampling.num_steps=0
{TRAIN} --config.sampling.num_steps=999999999 => config.sampling.num_steps
{TRAIN} --config.sampling.eps=0.99999999 => sampling.eps=0.99999999
{POINTS} --config.sampling.num_steps=5 => sampling.num_steps
{TRAIN} --config.sampling.snr=-0.1 => config.sampling.snr=-0.1
{TRAIN} --config.sampling.corrector_steps=0 => config.sampling.corrector_steps
{TRAIN} --config.sampling.rtol=0 => config.sampling.rtol=0.0
{TRAIN} --config.sampling.atol=-1 => config.sampling.atol=-1.0
{TRAIN} --config.sampling.rho=0 => config.sampling.rho=0.0
{TRAIN} --config.sampling.order=4 => config.sampling.order=4
{TRAIN} --config.sampling.num_samples=0 => config.sampling.num_samples=0
{TRAIN} --config.sampling.num_samples=-3 => config.sampling.num_samples=-3
{TRAIN} --config.sampling.frames=1 => sampling.frames=1
{TRAIN} --config.sampling.frames=9 => sampling.frames=9
{TRAIN} --config.sampling.method=heun --config.sampling.s_min=60 => sampling.s_m
{TRAIN} --config.control.factor=0 => config.control.factor=0
{TRAIN} --config.control.repeats=0 => config.control.repeats=0
{TRAIN} --config.control.width=inf => config.control.width=inf
{TRAIN} --config.control.known=1 => config.control.known=1.0
{TRAIN} --config.eval.batch_size=0 => config.eval.batch_size=0
{TRAIN} --config.eval.bpd_eps=0 => config.eval.bpd_eps=0.0
{TRAIN} --config.eval.bpd_eps=1 => config.eval.bpd_eps=1.0
{TRAIN} --config.eval.bpd_eps=0.9999999999 => config.eval.bpd_eps=0.9999999999
{TRAIN} --config.sampling.snr=1e40 => config.sampling.snr=1e+40
{TRAIN} --config.sampling.rtol=1e300 => config.sampling.rtol=1e+300
{TRAIN} --config.eval.bpd_trace=exct => config.eval.bpd_trace='exct'
{TRAIN} --config.eval.num_samples=0 => config.eval.num_samples=0
"""
DATA = f"""
{NPZ} => data.path
{NPZ}none.npz => none.npz
{NPZ}text.txt => text.txt
{NPZ}empty_file.npz => empty_file.npz
{NPZ}cut.npz => cut.npz
{NPZ}pickled.npz => pickled.npz
{NPZ}pickled.npz => Python objects
{NPZ}names.npz => names.npz
{NPZ}flat.npz => flat.npz
{NPZ}range.npz => range.npz
{NPZ}nan.npz => nan.npz
{NPZ}channels.npz => channels.npz
{NPZ}labels.npz => labels.npz
{NPZ}one.npz => data.path
{NPZ}none_in_it.npz => none_in_it.npz
{NPZ}photos => photos
{NPZ}pipe.npz => pipe.npz
{NPZ}many_labels.npz => many_labels.npz
{NPZ}huge_labels.npz => huge_labels.npz
{NPZ}one_hot.npz => one_hot.npz
{NPZ}half.npz => half.npz|x_test
{FOLDER}pipes => 1.png
{FOLDER}link => 1.png
{FOLDER}gifs => gifs|3 .gif
{FOLDER}text_png => 1.png|PNG, JPEG
{FOLDER}like_splits => te, tr|cat, dog
{FOLDER}dev_prod => dev, prod|rename
{FOLDER} => data.path
{FOLDER}none => none
{FOLDER}text.txt => text.txt
{FOLDER}empty => empty
{FOLDER}one => one
{FOLDER}damaged => 1.png
{FOLDER}deep => 16-bit .png
{TRAIN} --config.data.dataset=cifar10 --config.data.path=photos => photos
--config={RINGS} --mode=stats --workdir=new => config.data.dataset='toy/rings'
--config={RINGS} --mode=eval --workdir=new --samples=photos => photos|.npy
{STATS}eval.extractor=none => config.eval.extractor='none'
{STATS}eval.extractor=os:none => config.eval.extractor='os:none'
{STATS}eval.extractor=json:none => config.eval.extractor='json:none'
{STATS}eval.extractor=broken_extractor:f => config.eval.extractor|no GPU
{STATS}eval.extractor=exits:f => config.eval.extractor='exits:f'
{RUN}eval --samples=half.npz => half.npz|name the images images
{STATS}eval.stats_path=photos --config.eval.extractor=json:dumps => photos
{STATS}eval.inception_path=none.pth => none.pth
{STATS}eval.inception_path=text.txt => text.txt
{STATS}eval.inception_path=pickled.npz => pickled.npz
{RUN}eval --config.eval.ood=rotatd => config.eval.ood|did you mean 'rotated'?
{RUN}eval --config.eval.ood=toy/rings => config.eval.ood|'toy/rings'
{RUN}eval --config.eval.ood=none.npz => config.eval.ood|'none.npz'
{RUN}eval --config.eval.ood=text.txt => text.txt
{RUN}eval --config.eval.ood=empty => config.eval.ood|empty
{RUN}eval --config.eval.ood=whole.npz => 'whole' has 4|at least 50
{RUN}eval --config.eval.ood=channels.npz => channels.npz|num_channels
{RUN}eval --config.eval.ood=large => 0.png|data.image_size
{RUN}eval --config.eval.ood=noised,noised => config.eval.ood|'noised'
{RUN}eval --config.eval.ood_images=9 => config.eval.ood_images=9
{RUN}eval --samples=none => none
{RUN}eval --samples=empty => empty
{RUN}eval --samples=text.txt => text.txt
{RUN}eval --samples=large => 0.png|data.image_size
{RUN}eval --samples=photos/0.png => --samples|photos/0.png|folder
"""
CHECKPOINTS = f"""
{IMPORT} => --checkpoint
{IMPORT}none => none
{IMPORT}photos => photos
{IMPORT}text.txt => text.txt
{IMPORT}empty_file.npz => empty_file.npz
{IMPORT}other => other
{IMPORT}cut => cut
{IMPORT}hostile.pth => hostile.pth
{IMPORT}other.pth => other.pth
{IMPORT}cut.pth => cut.pth
{IMPORT}cut.safetensors => cut.safetensors
{IMPORT}other.safetensors => other.safetensors
{IMPORT}nan.safetensors => nan.safetensors|is not finite
{IMPORT}late.safetensors => late.safetensors|its step is out of range
--config={TINY} --mode=import --workdir=run --checkpoint=other => run
--config={TINY} --mode=import --workdir=text.txt --checkpoint=other => text.txt
--config={TINY} --mode=import --workdir=text.txt/a --checkpoint=other => text.t
{RUN}export => --output
{RUN}export --output=/proc/a.safetensors => /proc/a.safetensors
{RUN}export --output=text.txt/a.safetensors => text.txt/a|text.txt is no folder
{RUN}export --output=out => diffusers
"""
WORKDIRS = f"""
--workdir=new --mode=sample => new/config.json
--workdir=new --mode=eval => new/config.json
--workdir=photos --mode=sample => photos/config.json
--workdir=damaged_config --mode=sample => damaged_config/config.json
--workdir=nothing_config --mode=sample => nothing_config/config.json
--workdir=file_run --mode=sample => checkpoint 'last'|file_run/checkpoints
--workdir=list_config --mode=sample => list_config/config.json
--workdir=bytes_config --mode=sample => bytes_config/config.json
--workdir=damaged_config --config={TINY} --mode=train => damaged_config/config
--workdir=text.txt --config={TINY} --mode=train => text.txt
--workdir=text.txt/run --config={TINY} --mode=train => text.txt
--workdir=unknown_config --mode=sample => unknown_config/config.json|batch_sise
--workdir=text.txt --mode=sample => text.txt
--workdir=untrained --mode=sample => untrained/checkpoints
{RUN}eval --config.eval.ema_length=0.4 => config.eval.ema_length=(0.4,)
{RUN}eval --config.eval.ema_length=0.08 => training.ema_lengths
{RUN}sample --config.eval.ema_length=0.08 => training.ema_lengths
{RUN}sample --config.eval.ema_length=0.06,0.08 => --mode eval
{RUN}export --output=n.safetensors --config.eval.ema_length=0.1 => ema_lengths
--workdir=untrained --mode=eval => untrained/checkpoints
--workdir=untrained --mode=encode => untrained/checkpoints
--workdir=damaged_run --mode=sample => damaged_run/checkpoints/4
--workdir=run --config={TINY} --mode=train --config.model.nf=16 => config.model
{RUN}sample --config.model.nf=16 => config.model.nf=8
{RUN}sample --config.sde.sigma_max=20 => config.sde.sigma_max=10.0
{RUN}sample --config.eval.checkpoint=5 => 5
{RUN}sample --config.eval.checkpoint=lst => config.eval.checkpoint='lst'
{RUN}sample --config.eval.checkpoint=5:9 => 5:9
{RUN}eval --config.eval.checkpoint=-1 => -1
{CONTROL}labels => config.control.name='labels'
{CONTROL}classifier => classifier_workdir
{CONTROL}colorize => config.data.num_channels
{CONTROL}super_resolution --config.control.factor=3 => config.control.factor=3
{CONTROL}inpaint --config.control.mask=none.png => none.png
{CONTROL}inpaint --config.control.images=none => none
{CONTROL}deblur => config.control.method
{CONTROL}inpaint --config.control.method=dps => config.control.noise_std
{CONTROL}inpaint --config.control.noise_std=-1 => config.control.noise_std=-1.0
{CONTROL}overexposed --config.control.method=ddrm => ddrm|is not linear
{CONTROL}inpaint --config.control.method=ddrm => sampling.predictor='ddim'
{CONTROL}own => config.control.operator
{CONTROL}own --config.control.operator=own:none => config.control.operator='own
{CONTROL}own --config.control.operator=own:batch => own:batch|is the batch
{CONTROL}own --config.control.operator=own:rounded => own:rounded|derivative 0
{CONTROL}own --config.control.operator=own:narrow => own:narrow|own.py, line 3
{CONTROL}inpaint --config.control.measurements=none.npy => none.npy
{CONTROL}inpaint --config.control.measurements=text.txt => text.txt
{CONTROL}inpaint --config.control.measurements=whole.npz => whole.npz|images
{CONTROL}inpaint --config.control.measurements=y_flat.npz => y_flat.npz|(2, 5)
{CONTROL}inpaint --config.control.measurements=y_nan.npz => y_nan.npz|finite
{RUN}encode --config.sampling.num_samples=0 => config.sampling.num_samples=0
{RUN}sample --config.control.label=3 => config.control.label='3'
{CONTROL}inpaint --config.control.label=3 => config.control.label='3'
{CONTROL}autoguidance --config.control.label=3 => config.control.label='3'
{CONTROL}inpaint --config.control.images=photos/0.png => control.images|folder
{TRAIN} --config.training.begin_with=none => training.begin_with='none'
{TRAIN} --config.training.begin_with=run --config.model.nf=16 => begin_with
{TRAIN} --config.training.begin_with=damaged_config => damaged_config
"""


def cases(table):
  """Return pytest's parameters of a table."""
  lines = filter(None, table.splitlines())
  pairs = (line.split(' => ') for line in lines)
  return [
    pytest.param(given, texts, id=given.replace(TINY, '').removeprefix('--'))
    for given, texts in pairs
  ]


# Places that nothing can be written to, which is said before any work.
OUTPUTS = f"""
--config={TINY} --mode=train --workdir=/proc/run => /proc/run cannot be written
--workdir=no_room --mode=sample => no_room/samples is no folder
--workdir=no_room --mode=encode => no_room/latent is no folder
--workdir=no_room --mode=eval => no_room/eval is no folder
--workdir=no_room --mode=eval --samples=photos => no_room/eval is no folder
{RUN}eval --eval_folder=/proc/eval => /proc/eval cannot be written
--workdir=no_room --mode=sample --config.control.name=inpaint => no_room/samples
--workdir=run --mode=export --output=/proc/a/b.safetensors => /proc/a/b
--config={TINY} --mode=import --workdir=/proc/a/b --checkpoint=other => /proc/a
{STATS}eval.stats_path=text.txt/s --config.eval.extractor=json:dumps => text.txt
--mode=stats --workdir=no_room --config.eval.extractor=json:dumps => no_room/st
"""

VECTOR = f'{TRAIN} --config.model.condition=vector --config.data.'
FROM = f'{VECTOR}dataset=npz --config.data.path='
CONDITIONS = f"""
{VECTOR}dataset=digits => 'digits' has none|condition_train
{FROM}whole.npz => condition_train
{FROM}told_half.npz => condition_test
{FROM}told_few.npz => told_few.npz:condition_train has 3|for 4 examples
{FROM}told_nan.npz => told_nan.npz:condition_test|not finite
{FROM}told_other.npz => (2,)|config.data.condition_shape=(3,)
{FROM}told_same.npz => channel 0|does not vary
{FROM}told.npz --config.data.condition_std=-1 => config.data.condition_std
{FROM}told.npz --config.data.condition_std=1,2 => 2 numbers for 3 channels
{FROM}told.npz --config.model.condition=array => 'array'|(3,)|(8, 8, 1)
{FROM}told.npz --config.model.condition=vectors => did you mean 'vector'?
{FROM}told.npz --config.model.name=ncsnv2 => config.model.
--workdir=told_run --mode=eval --config.eval.ood=noised => config.eval.ood
{TOLD}condition=none.npy => none.npy
{TOLD}condition=text.txt => text.txt
{TOLD}condition=wide.npy => wide.npy|(4, 5)|[N, 3]
{TOLD}condition=no_number.npy => no_number.npy|not finite
{TOLD}condition=names.npz => names.npz
{RUN}sample --config.control.condition=wide.npy => config.model.condition
"""

TABLES = {
  'conditions': CONDITIONS,
  'outputs': OUTPUTS,
  'command_line': COMMAND_LINE,
  'addresses': ADDRESSES,
  'values': VALUES,
  'data': DATA,
  'checkpoints': CHECKPOINTS,
  'workdirs': WORKDIRS,
}


def _write_configs(folder):
  tiny_json = experiment.json_of(tiny.get_config())
  write = lambda name, text: (folder / name).write_text(text)
  write('text.txt', 'no config, no data, no weights')
  write('syntax.py', 'def get_config(:\n')
  write('empty.py', '')
  write('exits.py', 'raise SystemExit(3)')
  write('raises.py', 'def get_config():\n  return 1 / 0\n')
  write('dict.py', 'def get_config():\n  return {"seed": 1}\n')
  write(
    'key.py',
    'from configs.base import compose\n'
    'def get_config():\n  return compose({"training.batch_sise": 1})\n',
  )
  write('text.json', '{"seed": 1')
  write('list.json', '[1, 2]')
  write('deep.json', '[' * 5000)
  (folder / 'bytes.json').write_bytes(b'\xff\xfe{"seed": 1}')
  write('unknown.json', json.dumps({'training': {'batch_sise': 1}}))
  write('section.json', json.dumps(tiny_json | {'model': 3}))
  write('empty.json', '{}')
  write('null.json', json.dumps(tiny_json | {'optim': {'lr': None}}))


def _save_image(path, size=8, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
  Image.fromarray(pixels).save(path)


CLASSES = 'cat', 'dog'


def _write_data(folder):
  images = np.zeros((4, 8, 8, 1), np.uint8)
  save = lambda name, **arrays: np.savez(folder / f'{name}.npz', **arrays)
  (folder / 'empty_file.npz').write_bytes(b'')
  save('whole', images=images)
  whole = (folder / 'whole.npz').read_bytes()
  (folder / 'cut.npz').write_bytes(whole[: len(whole) // 2])
  save('pickled', images=np.array([{}], object))
  save('names', pictures=images)
  save('flat', images=images.reshape(4, -1))
  save('one_axis', images=images.ravel())
  save('wide', images=np.random.default_rng(0).normal(size=(4, 5, 4)))
  save('range', images=images + 300.0)
  save('nan', images=images + np.nan)
  save('channels', images=np.zeros((4, 8, 8, 3), np.uint8))
  save('labels', images=images, labels=np.zeros(3, int))
  save('many_labels', images=images, labels=np.full(4, 10**9))
  save('huge_labels', images=images, labels=np.full(4, 2**63, np.uint64))
  save('one_hot', images=images, labels=np.eye(4, dtype=int))
  save('half', x_train=images)
  both = {'x_train': images, 'x_test': images}
  told = np.arange(12.0).reshape(4, 3)
  save('told', **both, condition_train=told, condition_test=told)
  save('told_half', **both, condition_train=told)
  save('told_few', **both, condition_train=told[:3], condition_test=told)
  save('told_nan', **both, condition_train=told, condition_test=told * np.nan)
  save('told_other', **both, condition_train=told, condition_test=told[:, :2])
  save('told_same', **both, condition_train=told * 0, condition_test=told)
  np.save(folder / 'wide.npy', np.zeros((4, 5)))
  np.save(folder / 'no_number.npy', np.full((4, 3), np.nan))
  os.mkfifo(folder / 'pipe.npz')
  save('one', images=images[:1])
  save('none_in_it', images=images[:0])
  (folder / 'empty').mkdir()
  _save_image(folder / 'one' / '0.png')
  names = 'photos', 'damaged', 'deep', 'pipes', 'link', 'text_png'
  names += 'dev_prod/dev', 'dev_prod/prod'
  names += tuple(f'like_splits/{s}/{c}' for s in ('tr', 'te') for c in CLASSES)
  for name in names:
    for i in range(3):
      _save_image(folder / name / f'{i}.png', seed=i)
  for i in range(3):
    _save_image(folder / 'gifs' / f'{i}.gif')
  for name in ('pipes', 'link'):
    (folder / name / '1.png').unlink()
  os.mkfifo(folder / 'pipes' / '1.png')
  (folder / 'link' / '1.png').symlink_to(folder / 'none')
  (folder / 'text_png' / '1.png').write_text('no image')
  (folder / 'broken_extractor.py').write_text('raise RuntimeError("no GPU")')
  (folder / 'own.py').write_text(
    'batch = lambda x: x[:1]\n'
    'rounded = lambda x: x.round()\n'
    'narrow = lambda x: x.reshape(-1, 7)\n'
  )
  save('y_flat', measurements=np.zeros((2, 5)))
  save('y_nan', measurements=np.full((2, 32, 1), np.nan))
  path = folder / 'damaged' / '1.png'
  path.write_bytes(path.read_bytes()[:60])
  deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
  for i in range(2):
    deep.save(folder / 'deep' / f'{i}.png')
  for i in range(3):
    _save_image(folder / 'large' / f'{i}.png', size=9)


def _write_checkpoints(folder):
  class Hostile:
    def __reduce__(self):
      return os.mkdir, (str(folder / 'trace'),)

  shutil.copy(golden.DATA / 'released_jax.checkpoint', folder / 'other')
  shutil.copy(golden.DATA / 'released_torch.pth', folder / 'other.pth')
  formats.export(folder / 'other.safetensors', '{}', {'a': np.zeros(3)})
  for name in ('cut', 'cut.pth', 'cut.safetensors'):
    data = (folder / name.replace('cut', 'other')).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
  (folder / 'hostile.pth').write_bytes(pickle.dumps({'a': Hostile()}, 2))


def _write_workdirs(folder):
  model = experiment.build(tiny.get_config())
  init, _ = run_lib.make_init(model, trained.make_layout())
  zeros = jax.tree.map(
    lambda v: jax.numpy.zeros(v.shape, v.dtype),
    jax.eval_shape(init, model.abstract_params()),
  )
  experiment.claim(model.config, folder / 'run')
  with Checkpoints(folder / 'run', keep_every=0) as saved:
    saved.save(4, run_lib.without_ema(zeros), zeros.ema, loss=1.0)
    saved.wait()
  shutil.copytree(folder / 'run', folder / 'damaged_run')
  shutil.copytree(folder / 'run', folder / 'no_room')
  for name in ('samples', 'latent', 'eval', 'stats'):
    (folder / 'no_room' / name).write_text('a file')
  for path in (folder / 'damaged_run').rglob('*'):
    if path.is_file() and path.parts[-2] == 'd':
      path.write_bytes(b'damaged')
  experiment.claim(model.config, folder / 'file_run')
  (folder / 'file_run' / 'checkpoints').write_text('a file')
  params = jax.tree.map(np.asarray, zeros.ema)
  formats.export(folder / 'late.safetensors', '{}', params, step=10**30)
  params = jax.tree.map(lambda v: v + np.nan, params)
  formats.export(folder / 'nan.safetensors', '{}', params)
  told = tiny.get_config(
    data__dataset='npz', data__path='told.npz', model__condition='vector',
    data__condition_shape=(3,), data__condition_mean=(0.0,),
    data__condition_std=(1.0,),
  )  # fmt: skip
  experiment.claim(told, folder / 'told_run')
  experiment.claim(model.config, folder / 'untrained')
  text = (folder / 'untrained' / 'config.json').read_bytes()
  for name, content in (
    ('damaged', text[:100]),
    ('list', b'[1, 2]'),
    ('nothing', b'{}'),
    ('unknown', b'{"training": {"batch_sise": 1}}'),
    ('bytes', struct.pack('8d', *range(8))),
  ):
    (folder / f'{name}_config').mkdir()
    (folder / f'{name}_config' / 'config.json').write_bytes(content)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Return a folder of files that are in some way bad, and a run."""
  folder = tmp_path_factory.mktemp('world')
  _write_configs(folder)
  _write_data(folder)
  _write_checkpoints(folder)
  _write_workdirs(folder)
  return folder


def contents(folder):
  """Return {path: size and time of change} of all files and folders."""
  return {
    path: None
    if path.is_dir()
    else (path.lstat().st_size, path.lstat().st_mtime)
    for path in folder.rglob('*')
  }


@pytest.fixture
def error_of(world, monkeypatch, tmp_path):
  """Return run(arguments) -> the text with which the process ends."""
  monkeypatch.chdir(world)
  monkeypatch.syspath_prepend(world)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', tiny.CACHE)
  monkeypatch.setenv('SCORE_SDE_CACHE', str(tmp_path / 'cache'))

  def too_late(*args, **kwargs):
    pytest.fail('The error comes after a network is compiled.')

  monkeypatch.setattr(experiment.Experiment, 'init_params', too_late)
  monkeypatch.setattr(run_lib, 'make_train_steps', too_late)
  monkeypatch.setattr(trained.jax, 'jit', too_late)

  def run(arguments):
    flags.FLAGS.unparse_flags()
    with pytest.raises(SystemExit) as stopped:
      main.parse(['main.py', *arguments])
      main.main(['main.py'])
    return stopped.value.code

  yield run
  flags.FLAGS.unparse_flags()


def check(world, error_of, given, texts):
  before, begun = contents(world), time.monotonic()
  error = error_of(given.split(' '))
  assert isinstance(error, str) and error.startswith('error: '), error
  assert error.count('error: ') == 1 and len(error.splitlines()) == 1
  assert len(error) < 600
  for text in texts.split('|'):
    assert text in error, error
  assert contents(world) == before
  assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
  ('given', 'texts'),
  [
    case
    for name, table in TABLES.items()
    if name != 'addresses'
    for case in cases(table)
  ],
)
def test_one_line(world, error_of, given, texts):
  check(world, error_of, given, texts)


@pytest.mark.parametrize(('given', 'texts'), cases(ADDRESSES))
def test_addresses(world, error_of, given, texts):
  check(world, error_of, given, f'{texts}|is an address|mount the bucket|NFS')


def test_there_are_many():
  assert sum(len(cases(table)) for table in TABLES.values()) >= 200
