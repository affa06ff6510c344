"""Run ``python -m qlora_sft.demo``; see `qlora_sft.demo_run`."""

import sys

from qlora_sft.demo_run import main

sys.exit(main())
