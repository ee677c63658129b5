"""Where scripts written for version 0.1 import from; the code is in ssl_emp/run/checkpoint.py."""

from ssl_emp.run.checkpoint import load_checkpoint as load_checkpoint
from ssl_emp.run.checkpoint import save_checkpoint as save_checkpoint
