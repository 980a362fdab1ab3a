# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxspeed` is the `jaxspeed` command."""

import sys

from jaxspeed.cli import main


if __name__ == "__main__":
    sys.exit(main())
