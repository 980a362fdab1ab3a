# SPDX-License-Identifier: Apache-2.0
"""Times jaxspeed's generation on the model that `peer_generate.py` keeps in `--folder`. One JSON line.

taskset -c 0 python benchmarks/generate_cpu.py --folder runs/bench/gpt2 [--batch 1] [--bf16]
"""

import numpy as np
from generate_workload import arguments, prompts, report

from jaxspeed import launch


def main() -> None:
    """Runs the benchmark."""
    args = arguments(__doc__)
    launch.quiet()
    launch.keep_freed_memory()
    from jaxspeed.generate import Writer
    from jaxspeed.pretrained import open_model
    from jaxspeed.sampling import SamplingConfig

    compute = "bfloat16" if args.bf16 else "float32"
    writer = Writer(*open_model(args.folder, compute=compute))
    sampling = SamplingConfig(
        max_new_tokens=args.new, min_new_tokens=args.new, temperature=0.0
    )
    ids = prompts(args)
    report(
        "jaxspeed",
        args,
        lambda: np.stack([text.ids for text in writer.write(list(ids), sampling)]),
    )


if __name__ == "__main__":
    main()
