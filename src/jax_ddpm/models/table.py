"""Every network by its name: Linen modules, whose annotated attributes are their options."""

from jax_ddpm.models.classifier import ResNet
from jax_ddpm.models.unet import UNet
from jax_ddpm.options import Table

# (x, time, conditioning, dropout_keys) → output. A network gets out_channels, self_condition and
# dtype from the model, as far as it has attributes of these names, and those of the conditions that
# it is told: num_classes with a label.
NETWORKS = Table(unet=UNet)

# (x, dropout_keys, time) → (features, logits); time is None where images are clean.
CLASSIFIERS = Table(resnet=ResNet)
