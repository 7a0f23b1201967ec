"""`python -m privet` is `privet`; `accelerate launch -m privet ...` runs it on several GPUs."""

import sys

from privet.cli import main

if __name__ == "__main__":
    sys.exit(main())
