"""Every setting with its default."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default() -> ConfigDict:
    """All fields; a config in ``configs/`` changes those that make its experiment."""
    config = ConfigDict()
    config.task = "diffusion"  # | classification | noisy_classification (of x_t, for guidance)
    config.seed = 0
    config.parallel = "jit"  # over a mesh of all devices; or pmap
    config.fsdp = 1  # neighbouring devices that share parameters, averages and optimiser state
    config.deterministic = False  # bit for bit the same on a GPU too
    config.init_from = ""  # workdir whose averaged parameters to start from

    config.data = ConfigDict()
    config.data.source = "digits"  # digits | npz | idx | cifar10 | folder | tfds
    config.data.path = ""  # of the file or folder; for tfds its data_dir
    config.data.name = ""  # of the tfds set, e.g. "cifar10" or "imagenet_resized/64x64:0.1.0"
    config.data.image_size = 0  # resize and crop to a square (folder, tfds); 0: as they are
    config.data.flip = False  # random horizontal flips
    config.data.resident_gigabytes = 1.0  # a set up to this size lies on every device as uint8
    config.data.shift = 0  # random shifts by up to so many pixels (classification)

    config.model = ConfigDict()
    config.model.base_channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)  # heights of feature maps
    config.model.num_groups = 32  # of GroupNorm
    config.model.dropout = 0.1
    config.model.class_conditional = False
    config.model.self_condition = False  # on the network's own earlier estimate of x_0
    config.model.dtype = "float32"  # of computation: float32 | bfloat16
    config.model.remat = ""  # to save memory recompute: elementwise | blocks

    config.process = ConfigDict()
    # A chain's schedule (diffusion/schedules.py), or in continuous time vp_linear | vp_cosine |
    # vp_sigmoid | ve | edm | rectified_flow (diffusion/continuous.py).
    config.process.name = "linear"
    config.process.num_timesteps = 1000  # of a chain
    config.process.beta_start = 1e-4  # meant for T = 1000, scaled by 1000/T
    config.process.beta_end = 0.02
    config.process.sigma_min = 0.002  # ve, edm
    config.process.sigma_max = 80.0
    config.process.shift = 1.0  # factor on σ/α, for resolutions above that of the schedule
    config.process.zero_terminal_snr = False  # of a chain: rescaled to end without signal

    config.parameterisation = ConfigDict()
    config.parameterisation.target = "eps"  # x0 | v | score | velocity | edm | posterior_mean
    config.parameterisation.variance = "fixedlarge"  # fixedsmall | learned | learned_range
    config.parameterisation.condition_on = "time"  # or log_snr
    config.parameterisation.normalise_input = False  # x_t by its standard deviation
    config.parameterisation.data_std = 0.5  # for that, and for edm

    config.loss = ConfigDict()
    config.loss.kind = "error"  # error | bound (variational) | hybrid (iDDPM)
    config.loss.weighting = "simple"  # on the ε-error: see diffusion/losses.py
    config.loss.bound_weight = 1e-3  # of the bound in the hybrid loss
    # uniform | stratified; of a chain loss_second_moment; of edm log_normal, of a flow logit_normal
    config.loss.time_sampler = "uniform"
    config.loss.time_mean = -1.2  # of log t or of log(t/(1-t))
    config.loss.time_std = 1.2

    config.training = ConfigDict()
    config.training.num_steps = 800_000
    config.training.batch_size = 128
    config.training.accumulate = 1  # micro-batches per step
    config.training.steps_per_dispatch = 1  # steps in a row without the host
    config.training.learning_rate = 2e-4
    config.training.warmup_steps = 5000
    config.training.decay = "constant"  # constant | cosine (to 0 at num_steps)
    config.training.adam_b1 = 0.9
    config.training.adam_b2 = 0.999
    config.training.adam_eps = 1e-8
    config.training.grad_clip = 1.0  # of the global norm
    config.training.ema_decay = 0.9999
    config.training.label_drop = 0.1  # share of labels replaced by the null label
    config.training.log_every = 100
    config.training.heldout_every = 5000
    config.training.heldout_examples = 1024  # at most
    config.training.sample_every = 20_000
    config.training.checkpoint_every = 5000
    config.training.keep_last = 2  # checkpoints
    config.training.keep_every = 100_000  # and each at a multiple of this step for good

    config.sampling = ConfigDict()
    config.sampling.num_samples = 64
    config.sampling.batch_size = 64
    config.sampling.clip = True  # the predicted x_0 to [-1, 1] in every step
    config.sampling.dynamic_threshold = 0.0  # or by this quantile of |x_0| (Imagen's: 0.995)
    config.sampling.sampler = "ancestral"  # see diffusion/samplers/methods.py
    config.sampling.num_steps = 0  # 0: all of a chain
    config.sampling.grid = ""  # uniform | quadratic | karras | log_snr; "": the sampler's usual
    config.sampling.times = ()  # or these, falling
    config.sampling.process = ""  # to sample under, by name; "": the one of training
    # Options of single samplers; None: the sampler's own default.
    config.sampling.variance = placeholder(str)  # fixedsmall | fixedlarge | optimal
    config.sampling.eta = placeholder(float)
    config.sampling.churn = placeholder(float)
    config.sampling.churn_range = ()  # of σ/α; (): everywhere
    config.sampling.churn_noise = placeholder(float)
    config.sampling.order = placeholder(int)
    config.sampling.snr = placeholder(float)
    config.sampling.corrector_steps = placeholder(int)
    config.sampling.guidance = "classifier_free"  # | classifier | autoguidance
    config.sampling.guidance_scale = 1.0  # 0: without the guide; classifier-free 0: unconditional
    config.sampling.guidance_interval = ()  # of σ/α; (): everywhere
    config.sampling.guidance_rescale = 0.0  # φ of Lin et al. 2024
    config.sampling.guide = ""  # workdir of the classifier, or of the worse model
    config.sampling.guide_step = 0  # of its checkpoint; 0: the newest
    config.sampling.negative_class = placeholder(int)  # to be guided away from
    return config.lock()  # a mistyped field in a config file is an error, not a new field
