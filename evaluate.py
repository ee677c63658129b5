"""Judge encoders: `python evaluate.py runs/demo knn linear`. The story is in ssl_emp/commands/evaluate.py."""

import sys

from ssl_emp.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
