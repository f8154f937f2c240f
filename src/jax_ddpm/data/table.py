"""Every data source by name: a function whose annotated parameters are its options."""

from jax_ddpm.data.cifar10 import cifar10
from jax_ddpm.data.digits import digits
from jax_ddpm.data.folder import folder
from jax_ddpm.data.idx import idx
from jax_ddpm.data.npz import npz
from jax_ddpm.data.tfds import tfds
from jax_ddpm.options import Table

SOURCES = Table(digits=digits, npz=npz, idx=idx, cifar10=cifar10, folder=folder, tfds=tfds)
