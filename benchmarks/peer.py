"""The peer: diffusers' UNet2DModel of the same architecture, and with the same weights.

It runs unchanged on a CPU, with the memory that ``backend.keep_memory`` keeps for both sides and
that its own users lack; on a GPU channels-last, compiled by ``torch.compile``. bfloat16 is
autocast; float32 products may use TF32, as XLA's do.
"""

import contextlib
import re
import sys
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from measuring import Program
from setting import Setting

_LAYERS = {
    "time1": "time_embedding.linear_1",
    "time2": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "embedding": "time_emb_proj",
    "shortcut": "conv_shortcut",
}
_ARRAYS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_SCHEDULERS = {"ancestral": "DDPMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
_VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large"}


class Peer:
    """The peer's programs for a setting.

    Attributes:
      network: its UNet2DModel.

    Raises:
      SystemExit: in one line, where PyTorch or diffusers is not installed.
    """

    def __init__(self, setting: Setting):
        try:
            import diffusers  # noqa: F401
            import torch
        except ImportError as error:
            sys.exit(f"error: --peer: {error}; pip install torch diffusers")
        self._torch, self._setting, self._config = torch, setting, setting.config
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            sys.exit("error: --peer: this PyTorch sees no GPU; install a CUDA build of it")
        torch.set_float32_matmul_precision("high")
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._layout = torch.channels_last if on_gpu else torch.contiguous_format
        self.network = make_network(setting)
        self.network.load_state_dict(
            {name: torch.from_numpy(array) for name, array in state_dict(setting).items()}
        )
        self.network.to(self._device, memory_format=self._layout)
        self._apply = torch.compile(self.network) if on_gpu else self.network

    def forward(self) -> Program:
        """The network without dropout, on the same inputs as ours."""
        x, time = map(self._tensor, self._setting.inputs())
        self.network.eval()

        def launch() -> Any:
            with self._torch.no_grad():
                return self._predict(x, time)

        return self._program(launch)

    def training(self, steps: int) -> Program:
        """As many steps as one dispatch of ours, each doing all that ours does.

        It gathers a batch from the device, flips and scales it, and takes the ε-error, Adam with
        clipped gradients, and the moving average.
        """
        torch, every, batch_size = self._torch, self._config.training, self._setting.batch_size
        spec = self._setting.source.spec
        params = list(self.network.train().parameters())
        averages = [param.detach().clone() for param in params]
        optimiser = torch.optim.Adam(
            params,
            every.learning_rate,
            (every.adam_b1, every.adam_b2),
            every.adam_eps,
            fused=True,
        )
        images = self._tensor(self._setting.source.arrays("train")["image"])
        alpha_bar = self._tensor(self._setting.model.chain.alpha_bar.astype(np.float32))

        def step() -> Any:
            index = torch.randint(len(images), (batch_size,), device=self._device)
            x0 = images[index].float() / ((spec.num_levels - 1) / 2) - 1
            if self._config.data.flip:
                flipped = torch.rand(batch_size, 1, 1, 1, device=self._device) < 0.5
                x0 = torch.where(flipped, x0.flip(3), x0)
            time = torch.randint(len(alpha_bar), (batch_size,), device=self._device)
            signal = alpha_bar[time][:, None, None, None]
            eps = torch.randn_like(x0)
            xt = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
            loss = torch.nn.functional.mse_loss(self._predict(xt, time), eps)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, every.grad_clip)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - every.ema_decay)
            return loss.detach()

        def launch() -> Any:
            for _ in range(steps):
                loss = step()
            return loss

        return self._program(launch)

    def sampling(self) -> Program:
        """diffusers' scheduler for the method and the number of steps of ``config.sampling``."""
        import diffusers

        torch, sampling = self._torch, self._config.sampling
        batch_size = self._setting.batch_size
        betas = self._setting.model.chain.betas
        options: dict[str, Any] = {
            "trained_betas": betas.astype(np.float32),
            "num_train_timesteps": len(betas),
        }
        if sampling.sampler == "ancestral":
            variance = _VARIANCES[self._config.parameterisation.variance]
            options |= {"variance_type": variance, "clip_sample": sampling.clip}
        scheduler = getattr(diffusers, _SCHEDULERS[sampling.sampler])(**options)
        height, width, channels = self._setting.source.spec.image_shape
        self.network.eval()

        def launch() -> Any:
            scheduler.set_timesteps(sampling.num_steps or len(betas), device=self._device)
            x = torch.randn(batch_size, channels, height, width, device=self._device)
            x = x.to(memory_format=self._layout)
            with torch.no_grad():
                for time in scheduler.timesteps:
                    output = self._predict(x, time.expand(batch_size))
                    x = scheduler.step(output, time, x).prev_sample
            return x.cpu()

        return self._program(launch)

    def _predict(self, x: Any, time: Any) -> Any:
        """The network's output in float32."""
        bfloat16 = self._config.model.dtype == "bfloat16"
        autocast = self._torch.autocast(self._device.type, self._torch.bfloat16)
        with autocast if bfloat16 else contextlib.nullcontext():
            (output,) = self._apply(x, time, return_dict=False)
        return output.float()

    def _tensor(self, array: Any) -> Any:
        """An array on the device; images with their channels where PyTorch has them."""
        tensor = self._torch.from_numpy(np.array(array))
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=self._layout)
        return tensor.to(self._device)

    def _program(self, launch: Any) -> Program:
        if self._device.type == "cpu":
            return Program(launch, lambda result: None)
        return Program(launch, lambda result: self._torch.cuda.synchronize())


def make_network(setting: Setting) -> Any:
    """The UNet2DModel that computes what the setting's network does."""
    from diffusers import UNet2DModel

    model = setting.config.model
    size, _, channels = setting.source.spec.image_shape
    levels = range(len(model.channel_multipliers))
    attention = [size >> level in model.attention_resolutions for level in levels]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(model.base_channels * m for m in model.channel_multipliers),
        layers_per_block=model.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        norm_num_groups=model.num_groups,
        norm_eps=1e-6,
        dropout=model.dropout,
        attention_head_dim=None,  # one head
        downsample_padding=0,  # below and to the right only
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def state_dict(setting: Setting) -> dict[str, np.ndarray]:
    """Our parameters under the peer's names and in its layouts (PyTorch's OIHW and out×in)."""
    last = len(setting.config.model.channel_multipliers) - 1
    return {
        _peer_name(path, last): _peer_layout(path, np.array(array))
        for path, array in flatten_dict(setting.params).items()
    }


def _peer_name(path: tuple[str, ...], last: int) -> str:
    *modules, array = path
    return ".".join([*(_peer_module(name, last) for name in modules), _ARRAYS[array]])


def _peer_module(name: str, last: int) -> str:
    """The peer's name of one of our modules; its blocks on the way up count from the bottom."""
    if found := re.fullmatch(r"(down|up)(\d+)_(\d+)_(res|attention)", name):
        way, level, index, kind = found.groups()
        number = int(level) if way == "down" else last - int(level)
        return f"{way}_blocks.{number}.{kind.replace('res', 'resnet')}s.{index}"
    if found := re.fullmatch(r"(down|up)sample(\d+)", name):
        way, level = found.groups()
        number = int(level) if way == "down" else last - int(level)
        return f"{way}_blocks.{number}.{way}samplers.0.conv"
    if found := re.fullmatch(r"middle_(res|attention)(\d*)", name):
        kind, index = found.groups()
        return f"mid_block.{kind.replace('res', 'resnet')}s.{index or 0}"
    return _LAYERS.get(name, name)


def _peer_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    if path[-2] == "shortcut":  # a 1×1 convolution there, a dense layer here
        array = array[None, None]
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
