"""`python -m openvision3`, and so `torchrun ... -m openvision3`: the command `ov3`."""

import sys

from openvision3.cli import main

sys.exit(main())
