"""``python -m qlora_sft VERB`` is ``qlora-sft VERB``."""

import sys

from qlora_sft.cli import main

sys.exit(main())
