#!/bin/bash
# Train on all hosts of a TPU slice: one ssh to all workers.
#
#   launch/tpu.sh NAME ZONE CONFIG WORKDIR [--config.KEY=VALUE ...]
#
# The project and its environment are in ~/score_sde of every worker. The run
# goes on when the connection ends; its output is in ~/score_sde/train.log.
set -euo pipefail
name=${1:?NAME is missing} zone=${2:?ZONE is missing}
config=${3:?CONFIG is missing} workdir=${4:?WORKDIR is missing}
shift 4
printf -v command '%q ' python main.py --mode train --coordinator auto \
  --config "$config" --workdir "$workdir" "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "cd score_sde && PATH=\$PWD/.venv/bin:\$PATH && nohup $command \
  < /dev/null > train.log 2>&1 &"
