# SPDX-License-Identifier: Apache-2.0
"""Trains a recipe.

python train.py configs/tiny.py [--steps N --zero.stage 2 ...] [--deepspeed ds_config.json]
"""

import sys

from jaxspeed.cli import train


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
