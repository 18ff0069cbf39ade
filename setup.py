"""Ships csrc/ inside the wheel as taylorkern/csrc. Compiles nothing; the metadata are in pyproject.toml."""

from setuptools import find_packages, setup

SOURCES = ["**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh", "**/*.sh"]

setup(
    packages=[*find_packages(include=["taylorkern", "taylorkern.*"]), "taylorkern.csrc"],
    package_dir={"taylorkern.csrc": "csrc"},
    package_data={"taylorkern": ["py.typed", "backends/measured.json", "job/page.html"], "taylorkern.csrc": SOURCES},
)
