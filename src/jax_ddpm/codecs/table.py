"""Every codec by its name: ``(spec, read, **options) → Codec``.

``read(field)`` is the frozen network of the run whose workdir that field of the config holds.
"""

from jax_ddpm.codecs.pixels import pixels
from jax_ddpm.options import Table

CODECS = Table(pixels=pixels)
