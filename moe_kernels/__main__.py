import sys

from moe_kernels.cli.main import main

sys.exit(main())
