"""The input pipeline beside the train step that eats from it.

    python benchmarks/input_pipeline.py --shape=cifar10 --batch_size 16

``resident`` is a set on the devices, where a batch is only its indices; ``streamed`` comes from the
host's memory; ``decoded`` from JPEG files of 256×256, held in memory as a system's file cache
would. Each is timed on its own until a batch lies on the devices: ``times_the_step`` is the number
of batches ready in the time of one step.
"""

import io
from typing import Any

import jax
import numpy as np
from measuring import Program, alternate, ratio, report
from PIL import Image
from setting import Setting, Training, make_parser

from jax_ddpm.data.lazy import Encoded, LazySource
from jax_ddpm.data.source import Source
from jax_ddpm.training.feed import Feed

_BATCHES = 32  # in a timing, so that the few prepared before it do not count
_JPEGS = 500


def main() -> None:
    """Prints JSON and a table."""
    arguments = make_parser(__doc__).parse_args()
    results = []
    for batch_size in arguments.batch_size:
        results += measure(Setting(arguments, batch_size), arguments.rounds)
    report(__doc__, results)


def measure(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """A row for each place of the data."""
    training = Training(setting)
    streaming = setting.config.copy_and_resolve_references()
    streaming.data.resident_gigabytes = 0.0
    feeds = {
        "resident": training.feed,
        "streamed": Feed(streaming, setting.source, setting.mesh, start=0),
    }
    if setting.config.data.source == "folder":
        feeds["decoded"] = Feed(streaming, jpegs(setting.source), setting.mesh, start=0)
    programs = {"step": training.program}
    programs |= {name: batches(training, feed) for name, feed in feeds.items()}
    seconds = alternate(programs, rounds)
    for feed in feeds.values():
        feed.__exit__()
    per_step = [second / training.steps for second in seconds["step"]]
    rows = []
    for name in feeds:
        per_batch = [second / _BATCHES for second in seconds[name]]
        times, times_range = ratio(per_step, per_batch)
        rows.append(
            {
                "feed": name,
                **setting.fields,
                "images_per_second": setting.batch_size / float(np.median(per_batch)),
                "step_images_per_second": setting.batch_size / float(np.median(per_step)),
                "times_the_step": times,
                "times_range": times_range,
            }
        )
    return rows


def batches(training: Training, feed: Feed) -> Program:
    """Batches of the feed, brought onto the devices."""

    def launch() -> Any:
        for _ in range(_BATCHES):
            batch = jax.block_until_ready(training.step.arrange(feed.take(1)))
        return batch

    return Program(launch)


def jpegs(source: Source) -> LazySource:
    """``_JPEGS`` files, smooth like photographs: noise would decode more slowly."""
    height, width, _ = source.spec.image_shape
    coarse = source.batch("train", np.arange(_JPEGS))["image"][:, :: height // 8, :: width // 8]

    def encode(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        smooth = Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
        smooth.save(file, "JPEG", quality=95)
        return file.getvalue()

    files = [encode(image) for image in coarse]
    spec = source.spec._replace(split_sizes={"train": len(files), "heldout": len(files)})
    beside = {"label": 0} if spec.num_classes else {}
    return LazySource(lambda split, index: Encoded("jpeg", files[index], beside), spec, width)


if __name__ == "__main__":
    main()
