"""What pyproject.toml has no word for: configs/, a folder of the clone, is ssl_emp/configs/ in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["ssl_emp*", "linear_eval*"]),
        "ssl_emp.configs",
        "ssl_emp.configs.suites",
    ],
    package_dir={"ssl_emp.configs": "configs", "ssl_emp.configs.suites": "configs/suites"},
    # "": of every package
    package_data={
        "": ["py.typed", "*.html", "*.css", "*.js"],
        "ssl_emp.configs": ["*.yaml"],
        "ssl_emp.configs.suites": ["*.yaml"],
    },
)
