"""Pretrain an image encoder: `python pretrain.py --config configs/demo.yaml`. The story is in
ssl_emp/commands/pretrain.py.
"""

import sys

from ssl_emp.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
