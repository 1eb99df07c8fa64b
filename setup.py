"""Map the checkout's folders to packages; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"graphlocal": "graphlocal", "graphlocal.passes": "passes", "graphlocal.targets": "targets"}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in [package, *(f"{package}.{found}" for found in find_packages(folder))]
    ],
)
