"""Where scripts written for version 0.1 import from; the code is in ssl_emp/data/decode.py."""

from ssl_emp.data.decode import decode as decode
