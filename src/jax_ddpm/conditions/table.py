"""Every condition by its name: ``(config, spec) → Condition``, or None without it."""

from jax_ddpm.conditions.label import label
from jax_ddpm.options import Table

CONDITIONS = Table(label=label)
