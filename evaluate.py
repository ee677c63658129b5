"""Judge encoders: `python evaluate.py runs/demo knn linear`. The story is in ssl_emp/commands/evaluate.py."""

import sys

from ssl_emp.commands.evaluate import main
from ssl_emp.commands.rows import write_rows as write_rows  # for scripts that add rows of their own

if __name__ == "__main__":
    sys.exit(main())
