"""Where scripts written for version 0.1 import from; the code is in ssl_emp/data/images.py."""

from ssl_emp.data.images import load_images as load_images
from ssl_emp.data.images import load_source as load_source
from ssl_emp.data.images import load_test_images as load_test_images
