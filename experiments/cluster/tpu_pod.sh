#!/bin/bash
# Runs a command on all hosts of a TPU slice, with the repository in ~/jax_ddpm of each:
#   TPU=my-slice ZONE=us-central2-b experiments/cluster/tpu_pod.sh \
#       --config=configs/cifar10.py --workdir=/mnt/shared/cifar10
# The workdir must lie on a file system that all hosts have mounted. After a preemption, once the
# slice is back, the same command goes on. Installs what is missing; stops by Ctrl-C.

set -eu
: "${TPU:?is to name the slice}" "${ZONE:?is to name its zone}"

install="pip install --quiet --editable '.[tpu]'"
run="python3 -m jax_ddpm.main$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd ~/jax_ddpm && $install && exec $run"
