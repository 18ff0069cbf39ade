"""``python -m taylorkern``: the same as the ``taylorkern`` command."""

import sys

from taylorkern.cli import main

sys.exit(main())
