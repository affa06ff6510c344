"""Run ``python -m qlora_sft VERB`` as ``qlora-sft VERB``."""

import sys

from qlora_sft.cli import main

sys.exit(main())
