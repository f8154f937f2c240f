"""Trains, samples, edits and measures from the command line.

python -m jax_ddpm.main --config=digits
python -m jax_ddpm.main --mode=check --config=cifar10
python -m jax_ddpm.main --mode=sample --workdir=runs/digits --num_samples=100 --out=more.png
python -m jax_ddpm.main --mode=edit --workdir=runs/digits --images=mine --mask=mask.png
python -m jax_ddpm.main --mode=eval --workdir=runs/digits --metrics=bpd
python -m jax_ddpm.main --mode=variance --workdir=runs/digits
python -m jax_ddpm.main --mode=fid_stats --config=cifar10 --out=cifar10.npz
python -m jax_ddpm.main --mode=compare a.json b.json
python -m jax_ddpm.main --help

Exit codes: 0 done; 1 a mistake, or another process of the job is lost, explained in one line; 75
stopped by SIGTERM or Ctrl-C with everything saved: the same command goes on.
"""

import sys


def main() -> None:
    """Does what the command line asks for."""
    try:
        from jax_ddpm.cli.parsing import resolve
        from jax_ddpm.cli.running import one_line, run
    except KeyboardInterrupt:  # before ``one_line`` can say so
        sys.exit("interrupted")
    with one_line():
        command = resolve(sys.argv[1:])
    run(command)


if __name__ == "__main__":
    main()
